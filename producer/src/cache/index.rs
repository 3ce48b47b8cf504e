//! What the producer remembers of the store's digests, to save asking about each of them.
//!
//! The index is an object beside the runs. For each digest it holds what a listing shows (ETag, size,
//! time) and its record. A listing made now decides whether an
//! entry still holds; everything else is looked at. So a lost, old or torn index costs requests,
//! never an answer.
//!
//! ETag and size identify the text, and of which push, URL and format a text is the digest does not
//! change, unless the record is renewed for a later push. So an entry that makes a digest current is
//! believed if ETag and size agree, also for an object that is seconds old: [`Learned`] takes them
//! from the outcomes of a run.
//!
//! The same text may be stored again for another push, which changes the metadata alone. So an entry
//! that makes a digest anything but current is believed only about the very object whose metadata
//! were read, which the time tells. Some servers tell it in whole seconds, so the time of a younger
//! object than [`SETTLED`] is not remembered: git distrusts files as young as its index in the same
//! way ("racy git").

use std::collections::HashMap;
use std::time::Duration;

use common::fault::Fault;
use common::ids::RepoRef;
use common::outcome::OutcomeRecord;
use common::store::freshness::{Freshness, Wanted};
use common::store::{DigestMeta, DigestStore, DocumentKey, Found, Listed};
use common::text::{sha256, unix_millis};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;

use super::listing::{Listing, Sight};

/// How old an object must be before its time identifies it: more than the quarter of an hour by
/// which S3 allows clocks to differ, and the second to which a store may round.
pub const SETTLED: Duration = Duration::from_secs(20 * 60);

/// Version of the document; any other is ignored.
const VERSION: u32 = 3;

/// What is remembered of the digests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    entries: HashMap<RepoRef, Entry>,
}

/// What is remembered of one digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What a listing shows.
    pub etag: String,
    /// What a listing shows, if that identifies the object.
    pub modified_millis: Option<i64>,
    /// Its record.
    pub meta: DigestMeta,
}

impl Entry {
    fn is_text_of(&self, listed: &Listed) -> bool {
        self.etag == listed.etag && self.meta.bytes == listed.bytes
    }
}

/// The document: a checksum of the entries exposes a torn one.
#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    sha256: String,
    entries: Box<RawValue>,
}

/// An [`Entry`] with its repository, as an array: there are tens of thousands.
type Row = (RepoRef, String, Option<i64>, DigestMeta);

impl Index {
    /// How many digests it knows of.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it knows of none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Remembers a digest, in this spelling.
    pub fn insert(&mut self, repo: RepoRef, entry: Entry) {
        // Or else the key would keep its old spelling.
        self.entries.remove(&repo);
        self.entries.insert(repo, entry);
    }

    /// Returns what it knows of a listed digest, if that can be believed.
    pub fn believed(&self, listed: &Listed, wanted: &Wanted<'_>) -> Option<&DigestMeta> {
        let (repo, entry) = self.entries.get_key_value(&listed.repo)?;
        let same_key = (repo.owner(), repo.name()) == (listed.repo.owner(), listed.repo.name());
        let believed = same_key
            && entry.is_text_of(listed)
            && (entry.modified_millis == Some(listed.modified_millis)
                || entry.meta.freshness(wanted) == Freshness::Current);
        believed.then_some(&entry.meta)
    }

    /// Returns what it knows of the text of a listed digest.
    pub fn of_text(&self, listed: &Listed) -> Option<&DigestMeta> {
        let entry = self.entries.get(&listed.repo)?;
        entry.is_text_of(listed).then_some(&entry.meta)
    }

    /// Remembers a digest whose metadata were read at `now`, unless it was replaced since the listing.
    pub fn learn(&mut self, listed: &Listed, found: &Found, now: OffsetDateTime) {
        let Found::Stored { meta, version } = found else {
            return;
        };
        if version.etag() != listed.etag || meta.bytes != listed.bytes {
            return;
        }
        let is_settled = listed.modified_millis < unix_millis(now - SETTLED);
        let entry = Entry {
            etag: listed.etag.clone(),
            modified_millis: is_settled.then_some(listed.modified_millis),
            meta: meta.clone(),
        };
        self.insert(listed.repo.clone(), entry);
    }

    /// Forgets what `listing` refutes.
    pub fn retain(&mut self, listing: &Listing) {
        self.entries
            .retain(|repo, entry| match listing.sight(repo) {
                Sight::Listed(listed) => entry.is_text_of(listed),
                Sight::Absent => false,
                Sight::Unknown => true,
            });
    }

    /// Writes the document.
    pub fn encode(&self) -> Vec<u8> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(repo, _)| *repo);
        // As a [`Row`].
        let mut rows = Vec::with_capacity(entries.len());
        for (repo, e) in entries {
            rows.push((repo, &e.etag, e.modified_millis, &e.meta));
        }
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
            return Err("its checksum does not match its entries".to_owned());
        }
        let rows: Vec<Row> =
            serde_json::from_str(document.entries.get()).map_err(|error| error.to_string())?;
        let entry = |(repo, etag, modified_millis, meta)| {
            let entry = Entry {
                etag,
                modified_millis,
                meta,
            };
            (repo, entry)
        };
        Ok(Self {
            entries: rows.into_iter().map(entry).collect(),
        })
    }

    /// Reads the store's index; an empty one if there is none.
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
    /// If the store does not take it.
    pub async fn save(&self, store: &dyn DigestStore) -> Result<(), Fault> {
        store
            .put_document(&DocumentKey::Index, &self.encode())
            .await
    }
}

/// What a run learns of the digests that its workers store and renew.
#[derive(Debug, Default)]
pub struct Learned {
    index: Index,
}

impl Learned {
    /// Takes a record of the ledger.
    pub fn record(&mut self, record: &OutcomeRecord) {
        let Some(digest) = &record.digest else {
            return;
        };
        // Workers from before records had it: the next cache check reads the digest.
        let Some(meta) = &digest.meta else {
            return;
        };
        let entry = Entry {
            etag: digest.etag.clone(),
            modified_millis: None,
            meta: DigestMeta::clone(meta),
        };
        self.index.insert(record.repo.clone(), entry);
    }

    /// Returns the record of a digest that was stored or renewed.
    pub fn meta(&self, repo: &RepoRef) -> Option<&DigestMeta> {
        Some(&self.index.entries.get(repo)?.meta)
    }

    /// Adds what was learned to the store's index, which is unchanged if there is nothing to add.
    ///
    /// # Errors
    /// If the store does not take it.
    pub async fn save(&self, store: &dyn DigestStore) -> Result<(), Fault> {
        if self.index.is_empty() {
            return Ok(());
        }
        let mut index = Index::load(store).await.unwrap_or_default();
        for (repo, entry) in &self.index.entries {
            index.insert(repo.clone(), entry.clone());
        }
        index.save(store).await
    }
}

#[cfg(test)]
mod tests {
    use common::ids::{PushedAt, RunId};

    use super::*;

    fn repo(name: &str) -> RepoRef {
        name.parse().unwrap()
    }

    fn entry(etag: &str) -> Entry {
        Entry {
            etag: etag.to_owned(),
            modified_millis: Some(1_700_000_000_123),
            meta: DigestMeta {
                pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
                url: "https://github.com/a/b".to_owned(),
                processed_at: "2026-01-02T00:00:00Z".to_owned(),
                commit: None,
                format: "f/1".to_owned(),
                bytes: 7,
                truncated: false,
                run: RunId::try_from("run-1".to_owned()).unwrap(),
                sha256: Some("5a".to_owned()),
                tokens: Some(2),
                files: Some(1),
            },
        }
    }

    fn listed(name: &str, entry: &Entry) -> Listed {
        Listed {
            repo: repo(name),
            etag: entry.etag.clone(),
            modified_millis: entry.modified_millis.unwrap_or_default(),
            bytes: entry.meta.bytes,
        }
    }

    fn index() -> Index {
        let mut index = Index::default();
        for name in ["a/b", "a/c", "b/a"] {
            index.insert(repo(name), entry(name));
        }
        index
    }

    /// The document is a contract between versions of the producer: version 3, which has whole records.
    #[test]
    fn the_document_is_as_published() {
        let mut index = Index::default();
        index.insert(repo("a/b"), entry("e"));
        let document = String::from_utf8(index.encode()).unwrap();
        let meta = r#"{"pushedAt":"2026-01-01T00:00:00Z","url":"https://github.com/a/b","processedAt":"2026-01-02T00:00:00Z","commit":null,"format":"f/1","bytes":7,"truncated":false,"run":"run-1","sha256":"5a","tokens":2,"files":1}"#;
        let entries = &format!(r#"[["a/b","e",1700000000123,{meta}]]"#);
        assert_eq!(
            document,
            format!(
                r#"{{"version":3,"sha256":"{}","entries":{entries}}}"#,
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
    fn an_entry_is_believed_about_its_text_or_the_very_object() {
        let index = index();
        let same = listed("a/b", &entry("a/b"));
        let push = entry("").meta.pushed_at;
        let current = Wanted {
            format: "f/1",
            ..Wanted::new(&push, "https://github.com/a/b")
        };
        let other = Wanted::new(&push, "https://github.com/a/b");
        for (listed, if_current, if_not) in [
            (same.clone(), true, true),
            (
                Listed {
                    modified_millis: same.modified_millis + 1,
                    ..same.clone()
                },
                true,
                false,
            ),
            (
                Listed {
                    etag: "other".to_owned(),
                    ..same.clone()
                },
                false,
                false,
            ),
            (Listed { bytes: 8, ..same }, false, false),
            (listed("A/b", &entry("a/b")), false, false),
            (listed("b/a", &entry("a/b")), false, false),
            (listed("x/y", &entry("a/b")), false, false),
        ] {
            let believed = |wanted| index.believed(&listed, wanted).is_some();
            assert_eq!(believed(&current), if_current, "{listed:?}");
            assert_eq!(believed(&other), if_not, "{listed:?}");
        }
    }
}
