//! What the store holds of some repositories, as listings show it, whatever their letter case.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use common::fault::Fault;
use common::ids::RepoRef;
use common::store::{DigestStore, Listed};
use futures::stream::{self, StreamExt, TryStreamExt};

/// Repositories below one prefix: two pages of 1,000. Smaller prefixes would be many more, and each
/// costs at least one request.
const PREFIX_REPOSITORIES: usize = 1600;
/// An owner with more repositories is listed by the first characters of their names.
const OWNER_REPOSITORIES: usize = 4000;
/// The least number of prefixes: a few repositories may be spread over all of a large bucket, and
/// a prefix lists what is between them as well.
const PREFIXES: usize = 16;
/// Prefixes that are listed at the same time.
const WIDTH: usize = 64;

/// What the store holds of some repositories.
#[derive(Debug, Default)]
pub struct Listing {
    /// The repositories that it is about, in the spelling of the feed.
    wanted: HashMap<RepoRef, String>,
    listed: HashMap<RepoRef, Listed>,
    /// Prefixes that could not be listed, in lower case.
    unlisted: Vec<String>,
    faults: Vec<Fault>,
}

/// What a [`Listing`] shows of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight<'a> {
    /// The store holds something, in the spelling of [`Listed::repo`].
    Listed(&'a Listed),
    /// The store holds nothing in any spelling.
    Absent,
    /// It was not listed.
    Unknown,
}

impl Listing {
    /// Lists what the store holds of `repositories`: first the owners, whose spelling nothing else
    /// tells, then what is below them, many prefixes at the same time.
    pub async fn of(store: &dyn DigestStore, repositories: impl Iterator<Item = &RepoRef>) -> Self {
        let wanted = repositories.map(|repo| (repo.clone(), repo.to_string()));
        let mut listing = Self {
            wanted: wanted.collect(),
            ..Self::default()
        };
        if listing.wanted.is_empty() {
            return listing;
        }
        match store.owners().await {
            Ok(owners) => {
                let prefixes = prefixes(owners, listing.wanted.keys());
                listing.add(store, prefixes).await;
            }
            Err(fault) => listing.fail("", fault),
        }
        listing
    }

    async fn add(&mut self, store: &dyn DigestStore, prefixes: Vec<String>) {
        let lists = prefixes.into_iter().map(|prefix| list(store, prefix));
        let lists: Vec<_> = lists.collect();
        let mut lists = stream::iter(lists).buffer_unordered(WIDTH);
        while let Some((prefix, listed)) = lists.next().await {
            match listed {
                Ok(listed) => listed.into_iter().for_each(|listed| self.insert(listed)),
                Err(fault) => self.fail(&prefix, fault),
            }
        }
    }

    fn fail(&mut self, prefix: &str, fault: Fault) {
        self.unlisted.push(prefix.to_ascii_lowercase());
        self.faults.push(fault);
    }

    /// Of two spellings of one repository, the feed's own counts, else the one stored last.
    fn insert(&mut self, new: Listed) {
        match self.listed.entry(new.repo.clone()) {
            Entry::Vacant(vacant) => _ = vacant.insert(new),
            Entry::Occupied(mut occupied) => {
                let wanted = self.wanted.get(&new.repo);
                let rank = |listed: &Listed| {
                    let exact = wanted.is_some_and(|wanted| *wanted == listed.repo.to_string());
                    (exact, listed.modified_millis)
                };
                if rank(&new) > rank(occupied.get()) {
                    occupied.insert(new);
                }
            }
        }
    }

    /// Returns what it shows of `repo`.
    pub fn sight(&self, repo: &RepoRef) -> Sight<'_> {
        if let Some(listed) = self.listed.get(repo) {
            return Sight::Listed(listed);
        }
        let name = format!("{repo}/").to_ascii_lowercase();
        let unlisted = self.unlisted.iter().any(|prefix| name.starts_with(prefix));
        match self.wanted.contains_key(repo) && !unlisted {
            true => Sight::Absent,
            false => Sight::Unknown,
        }
    }

    /// Why something was not listed.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

/// Lists all that the store holds, copies in other letter case as well.
///
/// # Errors
/// If something cannot be listed.
pub async fn everything(store: &dyn DigestStore) -> Result<Vec<Listed>, Fault> {
    let owners = store.owners().await?;
    let places = owners.into_iter().map(|owner| format!("{owner}/"));
    let prefixes = grouped(places.collect());
    let lists = prefixes.into_iter().map(|prefix| list(store, prefix));
    let lists: Vec<_> = lists.collect();
    let lists = stream::iter(lists).buffer_unordered(WIDTH);
    lists.map(|(_, listed)| listed).try_concat().await
}

async fn list(store: &dyn DigestStore, prefix: String) -> (String, Result<Vec<Listed>, Fault>) {
    let listed = store.list(&prefix).try_collect().await;
    (prefix, listed)
}

/// Returns prefixes of `owner/name/` that together cover all spellings of `repositories` below
/// `owners`, none of them the beginning of another, each of a page or two.
///
/// S3 lists a page at a time, and only a page tells where the next one begins. Many short lists take
/// the time of one page.
fn prefixes<'a>(
    mut owners: Vec<String>,
    repositories: impl Iterator<Item = &'a RepoRef>,
) -> Vec<String> {
    let mut initials: HashMap<String, Vec<char>> = HashMap::new();
    for repo in repositories {
        let of_owner = initials
            .entry(repo.owner().to_ascii_lowercase())
            .or_default();
        of_owner.extend(repo.name().chars().next());
    }
    owners.sort();
    owners.dedup();
    let mut places = Vec::new();
    for owner in owners {
        let Some(initials) = initials.get(&owner.to_ascii_lowercase()) else {
            continue;
        };
        // With the slash, no owner is the beginning of another.
        if initials.len() <= OWNER_REPOSITORIES {
            places.extend(initials.iter().map(|_| format!("{owner}/")));
            continue;
        }
        for initial in initials {
            let both = [initial.to_ascii_lowercase(), initial.to_ascii_uppercase()];
            let both = &both[usize::from(both[0] == both[1])..];
            places.extend(both.iter().map(|initial| format!("{owner}/{initial}")));
        }
    }
    grouped(places)
}

/// Returns prefixes that together cover `places`, none of them the beginning of another.
fn grouped(mut places: Vec<String>) -> Vec<String> {
    places.sort();
    let most = (places.len() / PREFIXES).clamp(1, PREFIX_REPOSITORIES);
    let mut prefixes = Vec::new();
    split(&places, 0, most, &mut prefixes);
    prefixes
}

/// Splits `places`, which are sorted and agree in their first `depth` bytes, into groups of at most
/// `most` with a common prefix. No place is the beginning of a different one.
fn split(places: &[String], depth: usize, most: usize, prefixes: &mut Vec<String>) {
    let (Some(first), Some(last)) = (places.first(), places.last()) else {
        return;
    };
    if places.len() <= most || first == last {
        // Sorted: what these two agree in, all do.
        let common = first.bytes().zip(last.bytes());
        let common = common.take_while(|(a, b)| a == b).count();
        prefixes.push(first[..common].to_owned());
        return;
    }
    for group in places.chunk_by(|a, b| a.as_bytes()[depth] == b.as_bytes()[depth]) {
        split(group, depth + 1, most, prefixes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(name: &str) -> RepoRef {
        name.parse().unwrap()
    }

    fn listed(name: &str, modified_millis: i64) -> Listed {
        Listed {
            repo: repo(name),
            etag: "e".to_owned(),
            modified_millis,
            bytes: 7,
        }
    }

    fn listing(wanted: &[&str]) -> Listing {
        let wanted = wanted.iter().map(|name| (repo(name), (*name).to_owned()));
        Listing {
            wanted: wanted.collect(),
            ..Listing::default()
        }
    }

    #[test]
    fn sights() {
        let mut listing = listing(&["a/x", "b/b", "B/c", "c-d/e"]);
        listing.insert(listed("b/b", 1));
        assert!(matches!(listing.sight(&repo("b/b")), Sight::Listed(_)));
        assert!(matches!(listing.sight(&repo("B/B")), Sight::Listed(_)));
        for wanted in ["a/x", "b/c", "c-d/e", "A/X"] {
            assert_eq!(listing.sight(&repo(wanted)), Sight::Absent, "{wanted}");
        }
        assert_eq!(listing.sight(&repo("d/e")), Sight::Unknown);
        listing.fail("B/", Fault::infra("away"));
        assert_eq!(listing.sight(&repo("b/c")), Sight::Unknown);
        assert_eq!(listing.sight(&repo("a/x")), Sight::Absent);
        listing.fail("", Fault::infra("away"));
        assert_eq!(listing.sight(&repo("a/x")), Sight::Unknown);
    }

    #[test]
    fn of_two_spellings_the_feeds_own_counts() {
        for wanted in ["AlphaGov/Site", "ALPHAGOV/site"] {
            let mut listing = listing(&[wanted]);
            for (name, modified) in [("alphagov/site", 1), ("AlphaGov/Site", 2), ("a/b", 9)] {
                listing.insert(listed(name, modified));
            }
            listing.insert(listed("Alphagov/Site", 1));
            let Sight::Listed(listed) = listing.sight(&repo(wanted)) else {
                panic!("it is listed");
            };
            assert_eq!(listed.repo.to_string(), "AlphaGov/Site");
        }
        let mut listing = listing(&["alphagov/site"]);
        listing.insert(listed("alphagov/site", 1));
        listing.insert(listed("AlphaGov/Site", 2));
        let Sight::Listed(listed) = listing.sight(&repo("alphagov/site")) else {
            panic!("it is listed");
        };
        assert_eq!(listed.modified_millis, 1);
    }

    #[test]
    fn prefixes_cover_every_spelling_once() {
        let owners = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(prefixes(Vec::new(), [].into_iter()), [""; 0]);
        let few = ["b/a", "a/b", "A/bc"].map(repo);
        let all = owners(&["a", "A", "B", "x"]);
        assert_eq!(prefixes(all, few.iter()), ["A/", "B/", "a/"]);

        let one_owner = |i: usize| format!("AlphaGov/{}-{i}", ["s", "Web", "0"][i % 3]);
        let many_owners = |i: usize| format!("org-{}/service-{i}", i % 300);
        let spread = |i: usize| format!("{}{}/x-{i}", ["d", "h", "Z", "0"][i % 4], i % 97);
        for names in [
            (0..24_500).map(one_owner).collect::<Vec<_>>(),
            (0..24_500).map(many_owners).collect(),
            (0..24_500).map(spread).collect(),
        ] {
            let wanted: Vec<_> = names.iter().map(|name| repo(name)).collect();
            let stored: Vec<_> = names
                .iter()
                .enumerate()
                .map(|(i, name)| {
                    if i % 2 == 0 {
                        name.to_uppercase()
                    } else {
                        name.clone()
                    }
                })
                .collect();
            let owners = stored.iter().map(|name| repo(name).owner().to_owned());
            let prefixes = prefixes(owners.collect(), wanted.iter());
            assert!(prefixes.len() <= 200, "{} prefixes", prefixes.len());
            for name in &stored {
                let name = format!("{name}/");
                let of = prefixes.iter().filter(|prefix| name.starts_with(&**prefix));
                assert_eq!(of.count(), 1, "{name}");
            }
        }
    }
}
