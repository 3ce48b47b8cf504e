//! Identifiers: repositories, pushes, runs and jobs. Each is parsed once and safe everywhere after,
//! as a path component and inside an object key.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

/// Where the digest of a repository is in any store.
pub const DIGEST_PATTERN: &str = "gitingest/{owner}/{name}/summary.txt";

/// Longest owner that GitHub allows.
const OWNER_MAX: usize = 39;
/// Longest owner of nested groups: with its folder's name, a file system takes 255 bytes.
const GROUPS_MAX: usize = 200;
/// Longest repository name that GitHub allows.
const NAME_MAX: usize = 100;

/// `owner/name`: the identity of a repository in the feed, on the queue and in the store.
///
/// Made only by [`RepoRef::new`] and [`str::parse`], which follow GitHub's rules, so a value is
/// safe as two path components and inside an object key: ASCII letters, digits, `-`, `_` and `.`,
/// and never `.` or `..`. A name may begin with a dash, as some of GitHub's do, but an owner never
/// does, so that `owner/name` cannot be taken for a program's option.
///
/// Letter case does not distinguish repositories, as on GitHub: equality, order and hash ignore it.
/// The spelling is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
        "owner {0:?} is not a GitHub owner (1 to 39 letters, digits, - or _; a letter or digit first), nor several joined by dots"
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
    /// On hosts with nested groups, as GitLab, the owner is their names joined by dots: `a.b`. No
    /// account of GitHub, and no group that the feed takes, has a dot in its own name.
    ///
    /// Owners may hold `_` (enterprise-managed users) and may end with a dash (accounts made
    /// before GitHub forbade that), since such owners exist.
    pub fn new(owner: &str, name: &str) -> Result<Self, InvalidRepo> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let account = |part: &str| {
            (1..=OWNER_MAX).contains(&part.len())
                && part.bytes().all(word)
                && part.as_bytes()[0].is_ascii_alphanumeric()
        };
        let owner_ok = owner.len() <= GROUPS_MAX && owner.split('.').all(account);
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

    /// The bytes of `owner/name` in lower case: what identifies the repository. `/` is in neither
    /// part, so two repositories never share them.
    fn folded(&self) -> impl Iterator<Item = u8> {
        let parts = self.owner.bytes().chain([b'/']).chain(self.name.bytes());
        parts.map(|byte| byte.to_ascii_lowercase())
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

impl PartialEq for RepoRef {
    fn eq(&self, other: &Self) -> bool {
        self.owner.eq_ignore_ascii_case(&other.owner) && self.name.eq_ignore_ascii_case(&other.name)
    }
}

impl Eq for RepoRef {}

impl PartialOrd for RepoRef {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for RepoRef {
    fn cmp(&self, other: &Self) -> Ordering {
        self.folded().cmp(other.folded())
    }
}

impl Hash for RepoRef {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.folded().for_each(|byte| state.write_u8(byte));
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

/// The feed's time of the last push, with the text that the feed wrote.
///
/// Equality and order are those of the times: `Z`, `+00:00` and `.000Z` are spellings of one push.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PushedAt {
    text: String,
    time: OffsetDateTime,
}

/// Why a text is not a `pushedAt`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pushedAt {0:?} is not an RFC 3339 time such as 2026-01-02T03:04:05Z")]
pub struct InvalidPushedAt(String);

impl PushedAt {
    /// Longest text that is taken, so that it fits into an object's metadata and a header as it is.
    const MAX: usize = 64;

    /// Parses an RFC 3339 time.
    ///
    /// # Errors
    /// For anything else, and for times written in more than 64 bytes.
    pub fn new(text: &str) -> Result<Self, InvalidPushedAt> {
        let invalid = || InvalidPushedAt(shortened(text));
        if text.len() > Self::MAX {
            return Err(invalid());
        }
        let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| invalid())?;
        Ok(Self {
            text: text.to_owned(),
            time,
        })
    }

    /// The text as the feed wrote it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The time.
    pub fn time(&self) -> OffsetDateTime {
        self.time
    }
}

impl PartialEq for PushedAt {
    fn eq(&self, other: &Self) -> bool {
        self.time == other.time
    }
}

impl Eq for PushedAt {}

impl PartialOrd for PushedAt {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for PushedAt {
    fn cmp(&self, other: &Self) -> Ordering {
        self.time.cmp(&other.time)
    }
}

impl Hash for PushedAt {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.time.unix_timestamp_nanos().hash(state);
    }
}

impl fmt::Display for PushedAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for PushedAt {
    type Error = InvalidPushedAt;

    fn try_from(text: String) -> Result<Self, InvalidPushedAt> {
        Self::new(&text)
    }
}

impl From<PushedAt> for String {
    fn from(pushed_at: PushedAt) -> Self {
        pushed_at.text
    }
}

/// One producer run: `20261123T130000Z-0a1b2c`. Sorts by time; safe in keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(String);

/// Why a text is not a run's id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a run id is 1 to 40 letters, digits and dashes")]
pub struct InvalidRunId;

impl RunId {
    /// A new id from the clock and six random hexadecimal digits.
    pub fn new() -> Self {
        let format = format_description!("[year][month][day]T[hour][minute][second]Z");
        let time = OffsetDateTime::now_utc()
            .format(&format)
            .expect("the format has only numbers of a valid time");
        Self(format!("{time}-{:06x}", fastrand::u32(..0x100_0000)))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for RunId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for RunId {
    type Error = InvalidRunId;

    fn try_from(text: String) -> Result<Self, InvalidRunId> {
        let ok = (1..=40).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        ok.then_some(Self(text)).ok_or(InvalidRunId)
    }
}

impl From<RunId> for String {
    fn from(run: RunId) -> Self {
        run.0
    }
}

/// What tells the jobs of a run apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobKey {
    /// The repository.
    pub repo: RepoRef,
    /// The push to digest.
    pub pushed_at: PushedAt,
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
            ("group.sub-group.deep", "project"),
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
            ("a..b", "c"),
            (".a", "c"),
            ("a.", "c"),
            ("a.-b", "c"),
            (&"o.".repeat(110)[..219], "c"),
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

    fn pushed(text: &str) -> PushedAt {
        PushedAt::new(text).unwrap()
    }

    #[test]
    fn pushes_compare_as_times_and_keep_their_text() {
        let z = pushed("2026-01-02T03:04:05Z");
        for same in [
            "2026-01-02T03:04:05.000Z",
            "2026-01-02T03:04:05+00:00",
            "2026-01-02T04:04:05+01:00",
        ] {
            assert_eq!(z, pushed(same));
            assert_eq!(pushed(same).as_str(), same);
        }
        assert!(z < pushed("2026-01-02T03:04:06Z"));
        assert!(z > pushed("2026-01-02T03:04:05+00:01"));
    }

    #[test]
    fn letter_case_does_not_distinguish_repositories() {
        let names = ["AlphaGov/Site", "alphagov/site"].map(|name| name.parse::<RepoRef>().unwrap());
        assert_eq!(names[0], names[1]);
        assert_eq!(std::collections::HashSet::from(names.clone()).len(), 1);
        assert_eq!(names[0].to_string(), "AlphaGov/Site");
        assert!(names[0] < "alphagov/sites".parse().unwrap());
    }

    #[test]
    fn what_is_no_time_is_no_pushed_at() {
        for text in [
            "",
            " ",
            "yesterday",
            "1",
            "2026-01-02",
            "2026-01-02T03:04:05",
            "2026-13-02T03:04:05Z",
            &"x".repeat(65),
        ] {
            assert!(PushedAt::new(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn run_ids_are_checked() {
        assert!(RunId::try_from(RunId::new().to_string()).is_ok());
        for text in ["", "a/b", "..", "a b", &"x".repeat(41)] {
            assert!(RunId::try_from(text.to_owned()).is_err(), "{text:?}");
        }
    }
}
