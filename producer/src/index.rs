//! What the producer remembers of the store's digests, so that it need not ask about each of them.
//!
//! The index is an object beside the runs: for each digest what a listing shows of it (ETag, time,
//! size) and what its metadata said (pushedAt, format). It is believed about a digest only where a
//! listing made now shows the very same; everything else is looked at. So a lost, old or torn index
//! costs looks, never an answer.
//!
//! ETag and size tell one text from another, but a digest may be stored again with the same text
//! and another pushedAt. Then only the time differs, which some servers tell in whole seconds. So a
//! digest is remembered only when it has been there for [`SETTLED`]: as git distrusts files that
//! are as young as its own index ("racy git").

use std::collections::HashMap;
use std::time::Duration;

use common::fault::Fault;
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::store::freshness::Facts;
use common::store::{DigestStore, DocumentKey, Listed};
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// How long a digest must have been in the store before it is remembered.
///
/// More than the quarter of an hour by which S3 allows clocks to differ, and whatever second the
/// store's clock may round to.
pub const SETTLED: Duration = Duration::from_secs(20 * 60);

/// Version of the document. Another one is as good as none.
const VERSION: u32 = 2;
/// Repositories that one lane of a listing should have at most: two pages, which have 1,000 each.
/// Shorter ones would be many more, and each costs at least one request.
const LANE_REPOSITORIES: usize = 1600;
/// Into about how many lanes a listing is cut in any case: a few repositories may be spread over
/// all of a large bucket, and a lane lists what lies between them as well.
const LANES: usize = 16;
/// How many lanes are listed at the same time.
const LANES_WIDTH: usize = 64;

/// What is remembered of the digests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    entries: HashMap<RepoRef, Entry>,
}

/// What is remembered of one digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What a listing shows of it.
    pub etag: String,
    /// What a listing shows of it.
    pub modified_millis: i64,
    /// What a listing shows of it.
    pub bytes: u64,
    /// What its metadata said.
    pub pushed_at: PushedAt,
    /// What its metadata said.
    pub url: String,
    /// What its metadata said.
    pub format: String,
}

impl Entry {
    /// What the digest says about itself.
    pub fn facts(&self) -> Facts<'_> {
        Facts {
            push: &self.pushed_at,
            url: &self.url,
            format: &self.format,
            bytes: self.bytes,
        }
    }

    /// Whether a listing shows the very object that this is about.
    fn is_of(&self, listed: &Listed) -> bool {
        self.etag == listed.etag
            && self.modified_millis == listed.modified_millis
            && self.bytes == listed.bytes
    }
}

/// The document: its entries are signed, as it were, by their own sum, so that a torn one shows.
#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    sha256: String,
    entries: Box<RawValue>,
}

/// An [`Entry`] with its repository, as an array: there are tens of thousands.
type Row = (RepoRef, String, i64, u64, PushedAt, String, String);

impl Index {
    /// How many digests it knows of.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it knows of none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Remembers a digest.
    pub fn insert(&mut self, repo: RepoRef, entry: Entry) {
        self.entries.insert(repo, entry);
    }

    /// What it knows of the object that a listing shows; nothing where that has been replaced.
    pub fn of(&self, listed: &Listed) -> Option<&Entry> {
        self.entries
            .get(&listed.repo)
            .filter(|entry| entry.is_of(listed))
    }

    /// Forgets what `listing` refutes.
    pub fn retain(&mut self, listing: &Listing) {
        self.entries.retain(|repo, entry| match listing.of(repo) {
            Sight::Listed(listed) => entry.is_of(listed),
            Sight::Absent => false,
            Sight::Unknown => true,
        });
    }

    /// The document.
    pub fn encode(&self) -> Vec<u8> {
        let mut rows: Vec<Row> = self
            .entries
            .iter()
            .map(|(repo, e)| {
                (
                    repo.clone(),
                    e.etag.clone(),
                    e.modified_millis,
                    e.bytes,
                    e.pushed_at.clone(),
                    e.url.clone(),
                    e.format.clone(),
                )
            })
            .collect();
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        let entries = serde_json::value::to_raw_value(&rows).expect("only strings and numbers");
        let document = Document {
            version: VERSION,
            sha256: sha256(entries.get()),
            entries,
        };
        serde_json::to_vec(&document).expect("only strings and numbers")
    }

    /// Reads the document.
    ///
    /// # Errors
    /// With what is wrong with it.
    pub fn decode(document: &[u8]) -> Result<Self, String> {
        let document: Document =
            serde_json::from_slice(document).map_err(|error| error.to_string())?;
        if document.version != VERSION {
            return Err(format!("version {} is not known here", document.version));
        }
        if document.sha256 != sha256(document.entries.get()) {
            return Err("its sum does not fit its entries".to_owned());
        }
        let rows: Vec<Row> =
            serde_json::from_str(document.entries.get()).map_err(|error| error.to_string())?;
        let entry = |(repo, etag, modified_millis, bytes, pushed_at, url, format)| {
            let entry = Entry {
                etag,
                modified_millis,
                bytes,
                pushed_at,
                url,
                format,
            };
            (repo, entry)
        };
        Ok(Self {
            entries: rows.into_iter().map(entry).collect(),
        })
    }

    /// Reads the store's index; an empty one where there is none.
    ///
    /// # Errors
    /// With what is wrong with it, or with the store.
    pub async fn load(store: &dyn DigestStore) -> Result<Self, String> {
        match store.document(&DocumentKey::Index).await {
            Ok(Some(document)) => Self::decode(&document),
            Ok(None) => Ok(Self::default()),
            Err(fault) => Err(fault.to_string()),
        }
    }

    /// Writes the store's index.
    ///
    /// # Errors
    /// Where the store does not take it.
    pub async fn save(&self, store: &dyn DigestStore) -> Result<(), Fault> {
        store
            .put_document(&DocumentKey::Index, &self.encode())
            .await
    }
}

fn sha256(text: &str) -> String {
    Sha256::digest(text)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// What the store holds of some repositories, as listings show it.
#[derive(Debug, Default)]
pub struct Listing {
    listed: HashMap<RepoRef, Listed>,
    /// Beginnings of `owner/name/` that were listed to their ends, sorted.
    whole: Vec<String>,
    /// Why the others were not.
    faults: Vec<Fault>,
}

/// What a [`Listing`] shows of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight<'a> {
    /// The store holds something.
    Listed(&'a Listed),
    /// The store holds nothing.
    Absent,
    /// It was not listed.
    Unknown,
}

impl Listing {
    /// Lists `lanes`, many at the same time. What could not be listed is [`Sight::Unknown`].
    pub async fn of_lanes(store: &dyn DigestStore, lanes: Vec<String>) -> Self {
        let mut listing = Self::default();
        let lanes: Vec<_> = lanes.into_iter().map(|lane| list(store, lane)).collect();
        let mut lanes = stream::iter(lanes).buffer_unordered(LANES_WIDTH);
        while let Some((lane, listed)) = lanes.next().await {
            match listed {
                Ok(listed) => {
                    let by_repo = listed.into_iter().map(|l| (l.repo.clone(), l));
                    listing.listed.extend(by_repo);
                    listing.whole.push(lane);
                }
                Err(fault) => listing.faults.push(fault),
            }
        }
        listing.whole.sort();
        listing
    }

    /// What it shows of `repo`.
    pub fn of(&self, repo: &RepoRef) -> Sight<'_> {
        if let Some(listed) = self.listed.get(repo) {
            return Sight::Listed(listed);
        }
        // No lane is the beginning of another, so the last one that is not after the name is the
        // only one that can be its beginning.
        let name = format!("{repo}/");
        let after = self.whole.partition_point(|lane| *lane <= name);
        match self.whole[..after].last() {
            Some(lane) if name.starts_with(lane) => Sight::Absent,
            _ => Sight::Unknown,
        }
    }

    /// Why something was not listed.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

async fn list(store: &dyn DigestStore, lane: String) -> (String, Result<Vec<Listed>, Fault>) {
    let listed = store.list(&lane).try_collect().await;
    (lane, listed)
}

/// Beginnings of `owner/name/` that together cover `repositories`, none of them the beginning of
/// another, each of a page or two.
///
/// S3 gives a page at a time, and the next one's place only with it; so many short lists are read
/// in the time of one page.
pub fn lanes<'a>(repositories: impl Iterator<Item = &'a RepoRef>) -> Vec<String> {
    // With the slash, no name is the beginning of another.
    let mut names: Vec<_> = repositories.map(|repo| format!("{repo}/")).collect();
    names.sort();
    names.dedup();
    let most = (names.len() / LANES).clamp(1, LANE_REPOSITORIES);
    let mut lanes = Vec::new();
    split(&names, 0, most, &mut lanes);
    lanes
}

/// `names` are sorted, agree in their first `depth` bytes, which are ASCII, and none is the
/// beginning of another.
fn split(names: &[String], depth: usize, most: usize, lanes: &mut Vec<String>) {
    let (Some(first), Some(last)) = (names.first(), names.last()) else {
        return;
    };
    if names.len() <= most {
        // Sorted, so what these two agree in, all do.
        let alike = first.bytes().zip(last.bytes());
        let alike = alike.take_while(|(a, b)| a == b).count();
        lanes.push(first[..alike].to_owned());
        return;
    }
    for names in names.chunk_by(|a, b| a.as_bytes()[depth] == b.as_bytes()[depth]) {
        split(names, depth + 1, most, lanes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(name: &str) -> RepoRef {
        name.parse().unwrap()
    }

    fn entry(etag: &str) -> Entry {
        Entry {
            etag: etag.to_owned(),
            modified_millis: 1_700_000_000_123,
            bytes: 7,
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
            url: "https://github.com/a/b".to_owned(),
            format: "f/1".to_owned(),
        }
    }

    fn listed(name: &str, entry: &Entry) -> Listed {
        Listed {
            repo: repo(name),
            etag: entry.etag.clone(),
            modified_millis: entry.modified_millis,
            bytes: entry.bytes,
        }
    }

    fn index() -> Index {
        let mut index = Index::default();
        for name in ["a/b", "a/c", "b/a"] {
            index.insert(repo(name), entry(name));
        }
        index
    }

    /// The document is a contract between versions of the producer: version 2, which added the URL.
    #[test]
    fn the_document_is_as_published() {
        let mut index = Index::default();
        index.insert(repo("a/b"), entry("e"));
        let document = String::from_utf8(index.encode()).unwrap();
        let entries = r#"[["a/b","e",1700000000123,7,"2026-01-01T00:00:00Z","https://github.com/a/b","f/1"]]"#;
        assert_eq!(
            document,
            format!(
                r#"{{"version":2,"sha256":"{}","entries":{entries}}}"#,
                sha256(entries)
            )
        );
        assert_eq!(Index::decode(document.as_bytes()), Ok(index));
    }

    #[test]
    fn a_torn_document_is_refused_whole() {
        let whole = index().encode();
        assert_eq!(Index::decode(&whole), Ok(index()));
        for end in 0..whole.len() {
            assert!(Index::decode(&whole[..end]).is_err(), "{end}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            // A changed space between words would be no harm; there is none.
            assert!(Index::decode(&changed).is_err(), "{at}");
        }
    }

    #[test]
    fn an_entry_is_believed_about_the_very_object_only() {
        let index = index();
        let same = listed("a/b", &entry("a/b"));
        assert_eq!(index.of(&same), Some(&entry("a/b")));
        for other in [
            Listed {
                etag: "other".to_owned(),
                ..same.clone()
            },
            Listed {
                modified_millis: same.modified_millis + 1,
                ..same.clone()
            },
            Listed {
                bytes: 8,
                ..same.clone()
            },
            listed("b/a", &entry("a/b")),
            listed("x/y", &entry("a/b")),
        ] {
            assert_eq!(index.of(&other), None, "{other:?}");
        }
    }

    #[test]
    fn what_a_listing_refutes_is_forgotten() {
        let mut index = index();
        let same = listed("a/b", &entry("a/b"));
        index.retain(&Listing {
            listed: HashMap::from([(repo("a/b"), same)]),
            whole: vec!["a/".to_owned()],
            faults: Vec::new(),
        });
        let mut left: Vec<_> = index.entries.keys().map(ToString::to_string).collect();
        left.sort();
        // a/c is not there any more; of b/ nothing is known.
        assert_eq!(left, ["a/b", "b/a"]);
    }

    #[test]
    fn sights() {
        let listing = Listing {
            listed: HashMap::from([(repo("b/b"), listed("b/b", &entry("e")))]),
            whole: ["a/", "b/b", "b/d", "c-"].map(str::to_owned).to_vec(),
            faults: Vec::new(),
        };
        for (name, known) in [
            ("a/x", true),
            ("b/a", false),
            ("b/bx", true),
            ("b/c", false),
            ("b/dx", true),
            ("c-d/e", true),
            ("c/e", false),
            ("d/e", false),
            ("A/x", false),
        ] {
            let expected = if known { Sight::Absent } else { Sight::Unknown };
            assert_eq!(listing.of(&repo(name)), expected, "{name}");
        }
        assert!(matches!(listing.of(&repo("b/b")), Sight::Listed(_)));
        let everything = Listing {
            whole: vec![String::new()],
            ..Listing::default()
        };
        assert_eq!(everything.of(&repo("a/b")), Sight::Absent);
    }

    #[test]
    fn lanes_cover_all_and_none_begins_another() {
        assert_eq!(lanes([].into_iter()), [""; 0]);
        let few = ["b/a", "a/b", "a/bc", "a/b"].map(repo);
        assert_eq!(lanes(few.iter()), ["a/b/", "a/bc/", "b/a/"]);
        let owner: Vec<_> = (100..200).map(|i| repo(&format!("alphagov/{i}"))).collect();
        let tens: Vec<_> = (10..20).map(|ten| format!("alphagov/{ten}")).collect();
        assert_eq!(
            lanes(owner[..90].iter()).len(),
            90,
            "five or fewer each: one by one"
        );
        assert_eq!(lanes(owner.iter().chain(&few)).len(), 102);
        let many: Vec<_> = (0..16 * 10)
            .map(|i| repo(&format!("alphagov/{:03}", i + 100)))
            .collect();
        assert_eq!(lanes(many.iter())[..10], tens);
        let one_owner = |i| format!("alphagov/service-{i}");
        let many_owners = |i| format!("org-{}/service-{i}", i % 300);
        let long_name = |i: usize| format!("o/{}", "x".repeat(i % 90 + 1));
        let spread = |i: usize| format!("{}{}/x-{i}", ["d", "h", "Z", "0"][i % 4], i % 97);
        for names in [
            (0..24_500).map(one_owner).collect::<Vec<_>>(),
            (0..24_500).map(many_owners).collect(),
            (0..24_500).map(long_name).collect(),
            (0..24_500).map(spread).collect(),
        ] {
            let repositories: Vec<_> = names.iter().map(|name| repo(name)).collect();
            let lanes = lanes(repositories.iter());
            assert!(lanes.len() <= 200, "{} lanes", lanes.len());
            assert!(lanes.is_sorted());
            for pair in lanes.windows(2) {
                assert!(!pair[1].starts_with(&pair[0]), "{pair:?}");
            }
            for name in &names {
                let name = format!("{name}/");
                let of = lanes.iter().filter(|lane| name.starts_with(&**lane));
                assert_eq!(of.count(), 1, "{name}");
            }
            let mut distinct = names.clone();
            distinct.sort();
            distinct.dedup();
            for lane in &lanes {
                let held = distinct
                    .iter()
                    .filter(|name| format!("{name}/").starts_with(lane));
                assert!(held.count() <= LANE_REPOSITORIES, "{lane}");
            }
        }
    }
}
