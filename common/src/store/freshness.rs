//! The rule that decides whether a repository is digested again.
//!
//! The cache check and the worker both ask [`freshness`]; nothing else compares a stored digest with
//! what is wanted.

use url::Url;

use crate::ids::PushedAt;
use crate::job::{DIGEST_FORMAT, Job};
use crate::store::{DigestMeta, Found, Version};

/// Hosts that ignore the letter case of a repository's path.
const CASE_INSENSITIVE_HOSTS: [&str; 4] =
    ["github.com", "gitlab.com", "bitbucket.org", "codeberg.org"];

/// Ends a URL that a store cut, because it was too long for its metadata.
pub const ELLIPSIS: char = '…';

/// The digest that is wanted of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// The push that it covers.
    pub push: &'a PushedAt,
    /// Where it is made from, as [`canonical_url`] writes it.
    pub url: String,
    /// [`DIGEST_FORMAT`] of the program that makes it.
    pub format: &'a str,
}

impl<'a> Wanted<'a> {
    /// The digest that this program makes of `url` at `push`.
    pub fn new(push: &'a PushedAt, url: &str) -> Self {
        Self {
            push,
            url: canonical_url(url),
            format: DIGEST_FORMAT,
        }
    }
}

impl<'a> From<&'a Job> for Wanted<'a> {
    fn from(job: &'a Job) -> Self {
        Self::new(&job.pushed_at, &job.url)
    }
}

/// What a stored digest is to the one that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Nothing is stored.
    Absent,
    /// The stored object is not a digest, or is empty.
    Unreadable,
    /// It covers an earlier push.
    Older,
    /// It covers this push, but was made from another URL.
    OtherUrl,
    /// It covers this push, but was made in another format.
    OtherFormat,
    /// It is the one that is wanted.
    Current,
    /// It covers a later push. It stays, whatever its URL and format: a newer digest is never
    /// replaced by an older one, in whatever order the jobs of several runs are worked on.
    Newer,
}

/// Compares what a store holds with what is wanted.
pub fn freshness(found: &Found, wanted: &Wanted<'_>) -> Freshness {
    match found {
        Found::Absent => Freshness::Absent,
        Found::Unreadable { .. } => Freshness::Unreadable,
        Found::Stored { meta, .. } => meta.freshness(wanted),
    }
}

/// Returns a stored digest that covers an earlier push, but would be the wanted one if HEAD were
/// still its commit: `pushedAt` moves with any branch.
pub fn renewable<'a>(
    found: &'a Found,
    wanted: &Wanted<'_>,
) -> Option<(&'a DigestMeta, &'a Version)> {
    let Found::Stored { meta, version } = found else {
        return None;
    };
    let of_its_push = Wanted {
        push: &meta.pushed_at,
        ..wanted.clone()
    };
    let renewable = meta.commit.is_some()
        && meta.freshness(wanted) == Freshness::Older
        && meta.freshness(&of_its_push) == Freshness::Current;
    renewable.then_some((meta, version))
}

impl DigestMeta {
    /// Compares a stored digest with the one that is wanted: the push first, then URL and format.
    pub fn freshness(&self, wanted: &Wanted<'_>) -> Freshness {
        match () {
            // Even an empty repository's digest has text.
            () if self.bytes == 0 => Freshness::Unreadable,
            () if self.pushed_at < *wanted.push => Freshness::Older,
            () if self.pushed_at > *wanted.push => Freshness::Newer,
            () if !self.is_from(&wanted.url) => Freshness::OtherUrl,
            () if self.format != wanted.format => Freshness::OtherFormat,
            () => Freshness::Current,
        }
    }

    /// An unknown URL is taken for the wanted one: an object without one has no format either, so
    /// it is replaced for that.
    fn is_from(&self, canonical: &str) -> bool {
        match self.url.strip_suffix(ELLIPSIS) {
            Some(beginning) => canonical.starts_with(&canonical_url(beginning)),
            None => self.url.is_empty() || canonical_url(&self.url) == canonical,
        }
    }
}

/// Returns the one spelling of a repository's address.
///
/// Two URLs with the same canonical form name the same repository:
/// - letter case of scheme and host, a port that is the scheme's default, slashes and `.git` at the
///   end, credentials and fragment don't matter;
/// - letter case of the path doesn't matter on hosts that are known to ignore it;
/// - all else does: `http` and `https`, `www.`, the query.
///
/// What is no URL, such as a local path, keeps all but slashes at its end.
pub fn canonical_url(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else {
        return text.trim_end_matches('/').to_owned();
    };
    let path = url.path().trim_end_matches('/');
    let mut path = path.strip_suffix(".git").unwrap_or(path).to_owned();
    if url
        .host_str()
        .is_some_and(|host| CASE_INSENSITIVE_HOSTS.contains(&host))
    {
        path.make_ascii_lowercase();
    }
    url.set_path(&path);
    url.set_fragment(None);
    // Both fail on URLs without a host, which have no credentials.
    _ = url.set_username("");
    _ = url.set_password(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RunId;
    use crate::store::Version;

    const OLD: &str = "2026-01-01T00:00:00Z";
    const NEW: &str = "2026-01-02T00:00:00Z";
    const URL: &str = "https://github.com/a/b";

    fn stored(pushed_at: &str, url: &str, format: &str, bytes: u64) -> Found {
        Found::Stored {
            meta: DigestMeta {
                pushed_at: PushedAt::new(pushed_at).unwrap(),
                url: url.to_owned(),
                processed_at: OLD.to_owned(),
                commit: None,
                format: format.to_owned(),
                bytes,
                truncated: false,
                run: RunId::new(),
                sha256: None,
                tokens: None,
                files: None,
            },
            version: Version("1".to_owned()),
        }
    }

    #[test]
    fn the_table_of_freshness() {
        let wanted = |pushed_at: &str| PushedAt::new(pushed_at).unwrap();
        let unreadable = Found::Unreadable {
            torn: false,
            version: Version("1".to_owned()),
            why: "no metadata".to_owned(),
        };
        let now = DIGEST_FORMAT;
        let cut = format!("{}…", &URL[..URL.len() - 1]);
        for (found, push, expected) in [
            (Found::Absent, NEW, Freshness::Absent),
            (unreadable, NEW, Freshness::Unreadable),
            (stored(NEW, URL, now, 9), NEW, Freshness::Current),
            (stored(NEW, URL, now, 0), NEW, Freshness::Unreadable),
            (stored(NEW, URL, now, 0), OLD, Freshness::Unreadable),
            (stored(OLD, URL, now, 9), NEW, Freshness::Older),
            (stored(NEW, URL, now, 9), OLD, Freshness::Newer),
            // Equal times are equal, however they are spelled.
            (
                stored("2026-01-02T00:00:00.000Z", URL, now, 9),
                NEW,
                Freshness::Current,
            ),
            (
                stored("2026-01-02T01:00:00+01:00", URL, now, 9),
                NEW,
                Freshness::Current,
            ),
            (
                stored("2026-01-02T00:00:00+01:00", URL, now, 9),
                NEW,
                Freshness::Older,
            ),
            // A URL that was corrected at the same push.
            (
                stored(NEW, "https://github.com/a/c", now, 9),
                NEW,
                Freshness::OtherUrl,
            ),
            (
                stored(NEW, "https://GitHub.com/A/B.git/", now, 9),
                NEW,
                Freshness::Current,
            ),
            (stored(NEW, &cut, now, 9), NEW, Freshness::Current),
            (
                stored(NEW, "https://github.com/x…", now, 9),
                NEW,
                Freshness::OtherUrl,
            ),
            (stored(NEW, URL, "older", 9), NEW, Freshness::OtherFormat),
            // As the predecessor left some.
            (stored(NEW, "", "", 9), NEW, Freshness::OtherFormat),
            (stored(NEW, "", now, 9), NEW, Freshness::Current),
            // The push decides first, then the URL.
            (
                stored(OLD, "https://x.example/a", "older", 9),
                NEW,
                Freshness::Older,
            ),
            (
                stored(NEW, "https://x.example/a", "older", 9),
                OLD,
                Freshness::Newer,
            ),
            (
                stored(NEW, "https://x.example/a", "older", 9),
                NEW,
                Freshness::OtherUrl,
            ),
        ] {
            let push = wanted(push);
            assert_eq!(
                freshness(&found, &Wanted::new(&push, URL)),
                expected,
                "{found:?} {push}"
            );
        }
    }

    #[test]
    fn canonical_urls() {
        for same in [
            "https://github.com/alphagov/site",
            "HTTPS://GitHub.com/alphagov/site",
            "https://github.com:443/alphagov/site",
            "https://github.com/alphagov/site/",
            "https://github.com/alphagov/site.git",
            "https://github.com/alphagov/site.git/",
            "https://github.com/AlphaGov/Site",
            "https://token:secret@github.com/alphagov/site",
            "https://github.com/alphagov/site#readme",
        ] {
            assert_eq!(
                canonical_url(same),
                "https://github.com/alphagov/site",
                "{same}"
            );
        }
        for other in [
            "http://github.com/alphagov/site",
            "https://www.github.com/alphagov/site",
            "https://github.com:8443/alphagov/site",
            "https://github.com/alphagov/site?x",
            "https://github.com/alphagov/sites",
            "https://github.example/alphagov/site",
        ] {
            assert_ne!(
                canonical_url(other),
                "https://github.com/alphagov/site",
                "{other}"
            );
            assert_eq!(canonical_url(&canonical_url(other)), canonical_url(other));
        }
        // A host of which nothing is known may tell cases apart.
        assert_eq!(
            canonical_url("https://Git.Example/A/b.git"),
            "https://git.example/A/b"
        );
        for (path, expected) in [("/srv/a.git/", "/srv/a.git"), ("../A", "../A"), ("", "")] {
            assert_eq!(canonical_url(path), expected);
        }
    }
}
