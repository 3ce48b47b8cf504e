//! A repository's name, checked once and safe everywhere after.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where the digest of a repository is in any store.
pub const DIGEST_PATTERN: &str = "gitingest/{owner}/{name}/summary.txt";

/// Longest owner that GitHub allows.
const OWNER_MAX: usize = 39;
/// Longest repository name that GitHub allows.
const NAME_MAX: usize = 100;

/// `owner/name`: the identity of a repository in the feed, on the queue and in the store.
///
/// Made only by [`RepoRef::new`] and [`str::parse`], which follow GitHub's rules, so a value is
/// safe as two path components and inside an object key: ASCII letters, digits, `-`, `_` and `.`,
/// and never `.` or `..`. A name may begin with a dash, as some of GitHub's do, but an owner never
/// does, so that `owner/name` cannot be taken for a program's option.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RepoRef {
    owner: String,
    name: String,
}

/// Why a text is not a repository's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRepo {
    /// The text is not of the form `owner/name`.
    #[error("expected owner/name, got {0:?}")]
    Shape(String),
    /// The owner breaks GitHub's rules.
    #[error(
        "owner {0:?} is not a GitHub owner (1 to 39 letters, digits, - or _; a letter or digit first)"
    )]
    Owner(String),
    /// The name breaks GitHub's rules.
    #[error(
        "name {0:?} is not a GitHub repository name (1 to 100 letters, digits, -, _ or .; not . or .., no .git at the end)"
    )]
    Name(String),
}

impl RepoRef {
    /// Checks both parts.
    ///
    /// Owners may hold `_` (enterprise-managed users) and may end with a dash (accounts made
    /// before GitHub forbade that), since such owners exist.
    pub fn new(owner: &str, name: &str) -> Result<Self, InvalidRepo> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let owner_ok = (1..=OWNER_MAX).contains(&owner.len())
            && owner.bytes().all(word)
            && owner.as_bytes()[0].is_ascii_alphanumeric();
        if !owner_ok {
            return Err(InvalidRepo::Owner(shortened(owner)));
        }
        let name_ok = (1..=NAME_MAX).contains(&name.len())
            && name.bytes().all(|b| word(b) || b == b'.')
            && name != "."
            && name != ".."
            && !name.to_ascii_lowercase().ends_with(".git");
        if !name_ok {
            return Err(InvalidRepo::Name(shortened(name)));
        }
        Ok(Self {
            owner: owner.to_owned(),
            name: name.to_owned(),
        })
    }

    /// The account or organisation.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The repository's name below its owner.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key of its digest in the store, the same for every implementation:
    /// [`DIGEST_PATTERN`], filled in.
    pub fn digest_key(&self) -> String {
        format!("gitingest/{}/{}/summary.txt", self.owner, self.name)
    }
}

impl fmt::Display for RepoRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

impl FromStr for RepoRef {
    type Err = InvalidRepo;

    fn from_str(text: &str) -> Result<Self, InvalidRepo> {
        match text.split_once('/') {
            Some((owner, name)) => Self::new(owner, name),
            None => Err(InvalidRepo::Shape(shortened(text))),
        }
    }
}

impl TryFrom<String> for RepoRef {
    type Error = InvalidRepo;

    fn try_from(text: String) -> Result<Self, InvalidRepo> {
        text.parse()
    }
}

impl From<RepoRef> for String {
    fn from(repo: RepoRef) -> Self {
        repo.to_string()
    }
}

/// Keeps an error about a hostile name readable.
fn shortened(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_github_gives_them_are_taken() {
        for (owner, name) in [
            ("alphagov", "whitehall"),
            ("a", "b"),
            ("UK-Home_Office", ".github"),
            ("legacy-", "..."),
            ("a", "-dash"),
            ("0", "_"),
            (&"o".repeat(39), &"n".repeat(100)),
        ] {
            let repo = RepoRef::new(owner, name).unwrap();
            assert_eq!(repo.to_string().parse::<RepoRef>().unwrap(), repo);
            assert_eq!(
                repo.digest_key(),
                format!("gitingest/{owner}/{name}/summary.txt")
            );
        }
    }

    #[test]
    fn names_that_could_leave_their_place_are_refused() {
        let long = "x".repeat(300);
        for (owner, name) in [
            ("", "b"),
            ("a", ""),
            ("..", "b"),
            ("a", ".."),
            ("a", "."),
            ("-a", "b"),
            ("a.b", "c"),
            ("a/b", "c"),
            ("a", "b/c"),
            ("a", "b\\c"),
            ("a", "b\0"),
            ("a", "b\n"),
            ("a", "b c"),
            ("a", "ä"),
            ("a", "b.git"),
            ("a", "b.GIT"),
            (long.as_str(), "b"),
            ("a", long.as_str()),
        ] {
            assert!(RepoRef::new(owner, name).is_err(), "{owner:?}/{name:?}");
        }
        assert!("no-slash".parse::<RepoRef>().is_err());
        assert!("a/b/c".parse::<RepoRef>().is_err());
        assert!(serde_json::from_str::<RepoRef>("\"a/../b\"").is_err());
    }

    #[test]
    fn errors_do_not_repeat_a_hostile_name_in_full() {
        let error = RepoRef::new("a", &"x".repeat(100_000))
            .unwrap_err()
            .to_string();
        assert!(error.len() < 300, "{error}");
    }
}
