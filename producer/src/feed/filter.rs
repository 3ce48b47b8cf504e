//! Which of the feed's repositories a run is about.

use std::collections::HashSet;
use std::str::FromStr;

use common::ids::RepoRef;
use common::text::thousands;
use globset::{GlobBuilder, GlobMatcher};
use tracing::warn;

use super::entry::{FeedRepo, InvalidEntry};

/// Selects the repositories of a run.
///
/// Globs and `--skip-archived` apply first, then `--limit` to the rest, in the feed's order. What
/// they leave out is not counted, unusable entries included.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Filters")]
pub struct FilterConfig {
    /// Take at most this many repositories
    #[arg(long, env = "LIMIT", value_name = "N")]
    pub limit: Option<usize>,

    /// Take only repositories whose owner/name matches; repeatable. `*` does not cross the slash,
    /// letter case does not matter. Several may be separated by commas or spaces
    #[arg(long, env = "ONLY", value_name = "GLOB")]
    pub only: Vec<GlobList>,

    /// Leave out repositories whose owner/name matches; repeatable, wins over --only
    #[arg(long, env = "EXCLUDE", value_name = "GLOB")]
    pub exclude: Vec<GlobList>,

    /// Leave out repositories that the feed marks as archived
    #[arg(long, env = "SKIP_ARCHIVED")]
    pub skip_archived: bool,

    /// Take only these.
    #[arg(skip)]
    pub names: Option<HashSet<RepoRef>>,
}

/// A pattern for `owner/name`: `alphagov/*`, `*/*-frontend`, `{hmrc,dwp}/*`.
///
/// `*` does not cross the slash, and letter case does not matter, as on GitHub.
#[derive(Clone, Debug)]
pub struct RepoGlob(GlobMatcher);

/// Patterns as one value: separated by commas, which need no quotes in a shell, in an env file of
/// Docker or in one of systemd; or by spaces. What is in braces or brackets is the pattern's own.
#[derive(Clone, Debug)]
pub struct GlobList(Vec<RepoGlob>);

impl FilterConfig {
    /// Returns whether a run that selected `selected` counts this unusable entry.
    pub fn takes_unusable(&self, entry: &InvalidEntry, selected: &[FeedRepo]) -> bool {
        if self.limit == Some(selected.len())
            && selected.last().is_none_or(|l| l.index < entry.index)
        {
            return false;
        }
        // An entry without a name cannot be one that --only names.
        entry
            .repo
            .as_ref()
            .map_or(self.only.is_empty() && self.names.is_none(), |repo| {
                self.matches(repo)
            })
    }

    /// Returns the repositories of a run, in the feed's order.
    pub fn select(&self, repositories: Vec<FeedRepo>) -> Vec<FeedRepo> {
        let all = repositories.len();
        let selected: Vec<_> = repositories
            .into_iter()
            .filter(|entry| self.takes(entry))
            .take(self.limit.unwrap_or(usize::MAX))
            .collect();
        if selected.is_empty() && all > 0 {
            warn!(operation = "feed", repositories = all, "{}", none_of(all));
        }
        selected
    }

    /// Whether a run is about the whole feed, but for what the feed marks as archived.
    pub fn takes_all(&self) -> bool {
        self.limit.is_none()
            && self.only.is_empty()
            && self.exclude.is_empty()
            && self.names.is_none()
    }

    fn takes(&self, entry: &FeedRepo) -> bool {
        !(self.skip_archived && entry.details.archived == Some(true)) && self.matches(&entry.repo)
    }

    fn matches(&self, repo: &RepoRef) -> bool {
        if self
            .names
            .as_ref()
            .is_some_and(|names| !names.contains(repo))
        {
            return false;
        }
        if self.only.is_empty() && self.exclude.is_empty() {
            return true;
        }
        let name = repo.to_string();
        let any = |lists: &[GlobList]| {
            let mut globs = lists.iter().flat_map(|list| &list.0);
            globs.any(|glob| glob.0.is_match(&name))
        };
        (self.only.is_empty() || any(&self.only)) && !any(&self.exclude)
    }
}

/// Says that nothing is selected of so many repositories, and why that may be.
pub(crate) fn none_of(repositories: usize) -> String {
    format!(
        "none of the feed's {} repositories is selected; see --only, --exclude, --skip-archived and --limit",
        thousands(repositories as u64)
    )
}

impl FromStr for RepoGlob {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let glob = GlobBuilder::new(text)
            .literal_separator(true)
            .case_insensitive(true)
            .build()
            .map_err(|error| error.to_string())?;
        if !text.contains('/') && !text.contains("**") {
            return Err(format!(
                "a glob matches owner/name and needs a slash: {text}/* or */{text}"
            ));
        }
        Ok(Self(glob.compile_matcher()))
    }
}

impl FromStr for GlobList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut depth = 0_usize;
        let between = |c: char| {
            match c {
                '{' | '[' => depth += 1,
                '}' | ']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0 && (c.is_whitespace() || c == ',')
        };
        let parts = text.split(between).filter(|part| !part.is_empty());
        let globs: Vec<RepoGlob> = parts.map(str::parse).collect::<Result<_, _>>()?;
        if globs.is_empty() {
            return Err(format!("expected a glob such as alphagov/*, got {text:?}"));
        }
        Ok(Self(globs))
    }
}

#[cfg(test)]
mod tests {
    use common::ids::PushedAt;

    use super::*;
    use crate::feed::details::Details;

    fn entry(name: &str, archived: bool) -> FeedRepo {
        FeedRepo {
            index: 0,
            repo: name.parse().unwrap(),
            url: format!("https://github.com/{name}"),
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
            details: Details {
                archived: Some(archived),
                ..Details::default()
            },
        }
    }

    fn names(entries: &[FeedRepo]) -> Vec<String> {
        entries.iter().map(|entry| entry.repo.to_string()).collect()
    }

    fn globs(texts: &[&str]) -> Vec<GlobList> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn filters_apply_before_the_limit() {
        let all = vec![
            entry("alphagov/whitehall", false),
            entry("alphagov/old", true),
            entry("hmrc/tax-frontend", false),
            entry("alphagov/pay-frontend", false),
            entry("dwp/x", false),
        ];
        for (filter, expected) in [
            (FilterConfig::default(), vec![0, 1, 2, 3, 4]),
            (
                FilterConfig {
                    only: globs(&["AlphaGov/*"]),
                    ..Default::default()
                },
                vec![0, 1, 3],
            ),
            (
                FilterConfig {
                    only: globs(&["*/*-frontend", "dwp/?"]),
                    exclude: globs(&["hmrc/*"]),
                    ..Default::default()
                },
                vec![3, 4],
            ),
            (
                FilterConfig {
                    only: globs(&["{alphagov,dwp}/*"]),
                    skip_archived: true,
                    limit: Some(2),
                    ..Default::default()
                },
                vec![0, 3],
            ),
            (
                FilterConfig {
                    exclude: globs(&["**"]),
                    ..Default::default()
                },
                vec![],
            ),
            (
                FilterConfig {
                    limit: Some(0),
                    ..Default::default()
                },
                vec![],
            ),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|i| all[i].clone()).collect();
            assert_eq!(
                names(&filter.select(all.clone())),
                names(&expected),
                "{filter:?}"
            );
        }
    }

    #[test]
    fn one_value_may_hold_several() {
        for (text, count) in [
            ("a/*", 1),
            ("a/* b/*", 2),
            ("a/*,b/*", 2),
            (" a/*, {b, c}/* ,d/{e,{f,g}}, a/[b,c]* ", 4),
        ] {
            let list: GlobList = text.parse().unwrap();
            assert_eq!(list.0.len(), count, "{text}");
        }
        for text in ["", ", ,", "a/*,b", "a/*,{b"] {
            assert!(text.parse::<GlobList>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_star_stays_within_its_part() {
        let takes = |glob: &str, name: &str| {
            let filter = FilterConfig {
                only: globs(&[glob]),
                ..Default::default()
            };
            filter.takes(&entry(name, false))
        };
        assert!(takes("a*/b", "ab/b"));
        assert!(!takes("a*/b", "b/b"));
        assert!(!takes("a/*/", "a/b"));
        assert!(takes("a/.*", "a/.github"), "a dot is a letter like others");
        for glob in ["alphagov", "*", "a[", "{a/b", ""] {
            let error = glob.parse::<RepoGlob>().unwrap_err();
            assert!(error.contains(glob), "{error}");
        }
    }
}
