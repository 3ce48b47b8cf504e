//! The store boundary: at most one digest for each repository, and the documents of runs.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::ids::{PushedAt, RepoRef, RunId};

pub mod config;
pub mod freshness;
pub mod fs;
pub mod s3;

/// A store as the programs hold it.
pub type SharedStore = Arc<dyn DigestStore>;

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

    /// Stores a document, replacing what was there.
    async fn put_document(&self, key: &DocumentKey, content: &[u8]) -> Result<(), Fault>;

    /// Reads a document; `None` if there is none.
    async fn document(&self, key: &DocumentKey) -> Result<Option<Vec<u8>>, Fault>;

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

/// The key of a document: `runs/{run}/{name}`, or `runs/{name}` for one that belongs to no run.
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
}

/// The documents of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Document {
    /// [`JobList`](crate::run::documents::JobList), written before the manifest.
    Jobs,
    /// [`Manifest`](crate::run::documents::Manifest), written before the first job.
    Manifest,
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
                    Document::Summary => "summary.json",
                };
                write!(f, "runs/{run}/{name}")
            }
            Self::Index => f.write_str("runs/index.json"),
            Self::Failures => f.write_str("runs/failures.json"),
            Self::Latest => f.write_str("runs/latest.json"),
            Self::LastClosed => f.write_str("runs/last-closed.json"),
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
pub enum Found {
    /// Nothing.
    Absent,
    /// Something that is not a digest with its metadata.
    Unreadable {
        /// For [`Expected::Version`].
        version: Version,
        /// What is wrong with it.
        why: String,
    },
    /// A digest.
    Stored {
        /// Its metadata.
        meta: DigestMeta,
        /// For [`Expected::Version`].
        version: Version,
    },
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
