//! The store boundary: at most one digest for each repository, and the documents of runs.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fault::{Fault, FaultKind};
use crate::ids::{PushedAt, RepoRef, RunId};
use crate::text::{sha256, thousands};

pub mod config;
pub mod freshness;
pub mod fs;
pub mod s3;

/// A store as the programs hold it.
pub type SharedStore = Arc<dyn DigestStore>;

/// Below which digests are …
const DIGESTS: &str = "gitingest";
/// … and those that were withdrawn.
const WITHDRAWN: &str = "withdrawn";

/// Length of what a probe writes: that of the longest digest, with its notice.
const PROBE_BYTES: usize = 600_000;

/// Longest text that is read back, in bytes. Workers write no more than 512 KiB.
const MAX_TEXT_BYTES: u64 = 16 << 20;

/// At most one digest for each repository, always with its own metadata.
///
/// Every implementation promises, and `testing::store_contract` checks:
/// - a reader sees a digest with the metadata it was stored with, or the one before with its own,
///   whatever is written, or dies, at the same time;
/// - [`DigestStore::put`] stores nothing if the store no longer holds what `expected` says.
///
/// A store tells spellings of a name apart; the cache check finds out which one is in use.
#[async_trait]
pub trait DigestStore: fmt::Debug + Send + Sync {
    /// Reads what the store holds for `repo`, without the text.
    async fn head(&self, repo: &RepoRef) -> Result<Found, Fault>;

    /// Reads a digest and its metadata; `None` if there is none that can be read.
    async fn get(&self, repo: &RepoRef) -> Result<Option<Digest>, Fault>;

    /// Stores a digest if the store still holds what `expected` says.
    async fn put(&self, repo: &RepoRef, digest: &Digest, expected: &Expected)
    -> Result<Put, Fault>;

    /// Replaces the record of the digest that is `version`, and leaves its text as it is.
    ///
    /// `meta` is the new record; `bytes` stays that of the text.
    async fn renew(
        &self,
        repo: &RepoRef,
        meta: &DigestMeta,
        version: &Version,
    ) -> Result<Renewal, Fault>;

    /// Lists the keys beside digests that are no digest's key, nor anything else of this store.
    async fn strays(&self) -> Result<Vec<String>, Fault>;

    /// Removes the digest that is `version`. Returns whether it was there.
    async fn remove(&self, repo: &RepoRef, version: &Version) -> Result<bool, Fault>;

    /// Returns the digests that were withdrawn: the same store, with digests below `withdrawn/`.
    fn withdrawn(&self) -> SharedStore;

    /// Lists the repositories of which the store holds something and whose `owner/name/` begins
    /// with `prefix`, in no particular order.
    fn list(&self, prefix: &str) -> BoxStream<'_, Result<Listed, Fault>>;

    /// Lists the owners of which the store may hold something, in the spelling of its keys.
    async fn owners(&self) -> Result<Vec<String>, Fault> {
        let listed = self
            .list("")
            .map_ok(|listed| listed.repo.owner().to_owned());
        let mut owners: Vec<_> = listed.try_collect().await?;
        owners.sort();
        owners.dedup();
        Ok(owners)
    }

    /// Stores a document, if the store still holds what `expected` says; `None` expects nothing.
    async fn write_document(
        &self,
        key: &DocumentKey,
        content: &[u8],
        expected: Option<&Expected>,
    ) -> Result<Put, Fault>;

    /// Reads a document and which copy it is; `None` if there is none.
    ///
    /// # Errors
    /// [`FaultKind::TooLarge`] if it is longer than
    /// [`DocumentKey::max_bytes`]: whatever lies in a store, it is not read beyond that.
    async fn read_document(&self, key: &DocumentKey) -> Result<Option<(Vec<u8>, Version)>, Fault>;

    /// Stores a document, replacing what was there.
    async fn put_document(&self, key: &DocumentKey, content: &[u8]) -> Result<(), Fault> {
        self.write_document(key, content, None).await.map(drop)
    }

    /// Reads a document; `None` if there is none.
    ///
    /// # Errors
    /// As [`read_document`](Self::read_document).
    async fn document(&self, key: &DocumentKey) -> Result<Option<Vec<u8>>, Fault> {
        let read = self.read_document(key).await?;
        Ok(read.map(|(content, _)| content))
    }

    /// Checks with one read that the store answers.
    async fn reachable(&self) -> Result<(), Fault>;

    /// Checks that the store can be read and written, by writing something that is removed again.
    /// A store in a bucket also finds out what its server can do.
    async fn probe(&self) -> Result<(), Fault>;

    /// Whether every call crosses a network, so that it pays to save some.
    fn is_remote(&self) -> bool;

    /// The folder or address below which a person finds the keys, without a slash at its end.
    fn location(&self) -> String;
}

/// Reads a document that its reader can do without: one that cannot be understood is none.
///
/// # Errors
/// As [`DigestStore::document`].
pub async fn readable<T: DeserializeOwned>(
    store: &dyn DigestStore,
    key: &DocumentKey,
) -> Result<Option<T>, Fault> {
    let document = store.document(key).await?;
    Ok(document.and_then(|document| serde_json::from_slice(&document).ok()))
}

/// The key of a document: `runs/{run}/{name}`, `runs/{name}` for one that belongs to no run, and
/// `{name}` for one that readers of the digests look for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DocumentKey {
    /// A document of a run.
    OfRun {
        /// The run.
        run: RunId,
        /// Which of its documents.
        document: Document,
    },
    /// What the producer remembers of the digests; it can do without.
    Index,
    /// [`KnownFailures`](crate::run::documents::KnownFailures), written at a run's end.
    Failures,
    /// [`LatestRun`](crate::run::documents::LatestRun), written with each manifest.
    Latest,
    /// [`LastClosed`](crate::run::documents::LastClosed), written when a run closes.
    LastClosed,
    /// [`RunHistory`](crate::run::documents::RunHistory), written when a run closes.
    History,
    /// The same as a page.
    HistoryPage,
    /// What the producer remembers of the feed of the run begun last.
    Feed,
    /// Repositories whose digests were withdrawn, or may be.
    Withdrawals,
    /// The digests and what is known of them, a line each.
    Catalog,
    /// The same as a page.
    CatalogPage,
    /// What changed in the catalogue.
    Changes,
}

impl DocumentKey {
    /// Returns how long it may be: more is not read, so that nobody who can write it can take a
    /// reader's memory. The shortest form of a job takes 70 bytes, of a digest in the index 400.
    pub fn max_bytes(&self) -> u64 {
        match self {
            Self::Latest | Self::LastClosed | Self::History | Self::Feed => 64 << 10,
            Self::OfRun {
                document: Document::Manifest | Document::Progress,
                ..
            } => 1 << 20,
            Self::OfRun {
                document: Document::Jobs | Document::Summary,
                ..
            } => 32 << 20,
            Self::Failures | Self::Withdrawals | Self::Changes => 64 << 20,
            Self::Catalog | Self::CatalogPage | Self::HistoryPage => 256 << 20,
            Self::Index => 128 << 20,
        }
    }

    /// Returns its media type.
    fn content_type(&self) -> &'static str {
        match self {
            // Not as an encoding: a reader gets the file that its name says.
            Self::Catalog => "application/gzip",
            Self::Changes => "text/csv; charset=utf-8",
            Self::CatalogPage | Self::HistoryPage => "text/html; charset=utf-8",
            _ => "application/json",
        }
    }

    /// Returns the fault of a document that is longer than that.
    fn too_large(&self, place: &str) -> Fault {
        Fault::new(
            FaultKind::TooLarge,
            format!(
                "store {place}: {self} has more than {} bytes, which no version of this program writes; delete it",
                thousands(self.max_bytes())
            ),
        )
    }
}

/// The documents of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Document {
    /// [`JobList`](crate::run::documents::JobList), written before the manifest.
    Jobs,
    /// [`Manifest`](crate::run::documents::Manifest), written before the first job.
    Manifest,
    /// [`RunProgress`](crate::run::view::RunProgress), written from time to time by a run in one
    /// process.
    Progress,
    /// [`RunSummary`](crate::run::documents::RunSummary), written at the end.
    Summary,
}

impl fmt::Display for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OfRun { run, document } => {
                let name = match document {
                    Document::Jobs => "jobs.json",
                    Document::Manifest => "manifest.json",
                    Document::Progress => "progress.json",
                    Document::Summary => "summary.json",
                };
                write!(f, "runs/{run}/{name}")
            }
            Self::Index => f.write_str("runs/index.json"),
            Self::Failures => f.write_str("runs/failures.json"),
            Self::Latest => f.write_str("runs/latest.json"),
            Self::LastClosed => f.write_str("runs/last-closed.json"),
            Self::History => f.write_str("runs/history.json"),
            Self::HistoryPage => f.write_str("runs/index.html"),
            Self::Feed => f.write_str("runs/feed.json"),
            Self::Withdrawals => f.write_str("runs/withdrawals.json"),
            Self::Catalog => f.write_str("catalog.jsonl.gz"),
            Self::CatalogPage => f.write_str("index.html"),
            Self::Changes => f.write_str("changes.csv"),
        }
    }
}

/// A digest as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The text for a language model.
    pub text: String,
    /// What is known about it.
    pub meta: DigestMeta,
}

/// What is known about a digest. Stored with it, in one step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DigestMeta {
    /// The push that it covers.
    pub pushed_at: PushedAt,
    /// Where it was fetched from.
    pub url: String,
    /// When it was made, or found to be of a HEAD that has not moved; RFC 3339 in UTC.
    pub processed_at: String,
    /// HEAD's commit; `None` for a repository without one.
    pub commit: Option<String>,
    /// [`DIGEST_FORMAT`](crate::job::DIGEST_FORMAT) of the program that made it.
    pub format: String,
    /// Length of the text in bytes.
    pub bytes: u64,
    /// Whether the text was cut at its limit.
    pub truncated: bool,
    /// The run that it was made or renewed for.
    pub run: RunId,
    /// SHA-256 of the text, hexadecimal; this and the next two are `None` in digests from before
    /// they were recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Tokens of the text, as its summary estimates them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Files and symbolic links that it is made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<u64>,
}

impl DigestMeta {
    /// Whether `text` is the one that this is about, as far as it says.
    pub fn describes(&self, text: &[u8]) -> bool {
        let same_hash = |recorded: &String| *recorded == sha256(text);
        self.bytes == text.len() as u64
            && self.sha256.as_ref().is_none_or(same_hash)
            && std::str::from_utf8(text).is_ok()
    }
}

/// Identifies one copy of an object. Another copy has another version, even with the same text.
///
/// The text up to the first space is its [`Listed::etag`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Version(pub String);

impl Version {
    /// Returns the part that a listing shows.
    pub fn etag(&self) -> &str {
        self.0.split_once(' ').map_or(&self.0, |(etag, _)| etag)
    }
}

/// What [`DigestStore::list`] shows of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The repository, in the spelling of the object's key.
    pub repo: RepoRef,
    /// Identifies the content. In S3 it does not change if only the metadata do.
    pub etag: String,
    /// When it was stored, by the store's clock, which may have whole seconds only. Unix time.
    pub modified_millis: i64,
    /// Its size.
    pub bytes: u64,
}

/// What [`DigestStore::head`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "most are of the large variant, and short-lived"
)]
pub enum Found {
    /// Nothing.
    Absent,
    /// Something that is not a digest with its metadata.
    Unreadable {
        /// For [`Expected::Version`].
        version: Version,
        /// What is wrong with it.
        why: String,
        /// Whether it has a digest's metadata, but another length than they say.
        torn: bool,
    },
    /// A digest.
    Stored {
        /// Its metadata.
        meta: DigestMeta,
        /// For [`Expected::Version`].
        version: Version,
    },
}

impl From<Version> for Expected {
    fn from(version: Version) -> Self {
        Self::Version(version)
    }
}

impl Found {
    /// Returns what a [`DigestStore::put`] that was decided on this has to expect.
    pub fn expected(&self) -> Expected {
        match self {
            Self::Absent => Expected::Absent,
            Self::Unreadable { version, .. } | Self::Stored { version, .. } => {
                Expected::Version(version.clone())
            }
        }
    }
}

/// What a [`DigestStore::put`] replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nothing.
    Absent,
    /// This copy.
    Version(Version),
}

/// What a [`DigestStore::put`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Put {
    /// The digest is stored, safe against a crash, as this copy.
    Stored(Version),
    /// Something other than expected was there; nothing was changed.
    Conflict,
}

impl Put {
    /// Whether the digest is stored.
    pub fn is_stored(&self) -> bool {
        matches!(self, Self::Stored(_))
    }
}

/// What a [`DigestStore::renew`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The record is renewed, safe against a crash, and the digest is this copy now.
    Renewed(Version),
    /// Something other than expected was there; nothing was changed.
    Conflict,
    /// The text is not the one that its record describes; nothing was changed.
    Torn,
}
