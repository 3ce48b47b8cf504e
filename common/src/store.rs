//! The store boundary: at most one digest for each repository, and the documents of runs.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use clap::Args;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use crate::exit::{self, ExitError};
use crate::fault::Fault;
use crate::ids::PushedAt;
use crate::ids::RepoRef;
use crate::ids::RunId;
use crate::store::s3::S3Store;
use crate::store::s3::config::{S3Config, unsubstituted};

pub mod freshness;
pub mod fs;
pub mod s3;

/// A store as the programs hold it.
pub type SharedStore = Arc<dyn DigestStore>;

/// At most one digest for each repository, always with its own metadata.
///
/// What every implementation promises, and `testing::store_contract` checks:
/// - a reader sees a digest with the metadata it was stored with, or the one before with its own,
///   whatever is written, or dies, at the same time;
/// - [`DigestStore::put`] stores nothing if the store no longer holds what `expected` says.
#[async_trait]
pub trait DigestStore: fmt::Debug + Send + Sync {
    /// What the store holds for `repo`, without the text.
    async fn head(&self, repo: &RepoRef) -> Result<Found, Fault>;

    /// The digest and its metadata; `None` where there is none that can be read.
    async fn get(&self, repo: &RepoRef) -> Result<Option<Digest>, Fault>;

    /// Stores a digest if the store still holds what `expected` says.
    async fn put(&self, repo: &RepoRef, digest: &Digest, expected: &Expected)
    -> Result<Put, Fault>;

    /// Every repository of which the store holds something and whose `owner/name/` begins with
    /// `prefix`, in no particular order.
    fn list(&self, prefix: &str) -> BoxStream<'_, Result<Listed, Fault>>;

    /// Stores a document, replacing what was there.
    async fn put_document(&self, key: &DocumentKey, content: &[u8]) -> Result<(), Fault>;

    /// A document; `None` where there is none.
    async fn document(&self, key: &DocumentKey) -> Result<Option<Vec<u8>>, Fault>;

    /// Whether the store answers: one look at one key. Nothing is written.
    async fn reachable(&self) -> Result<(), Fault>;

    /// Finds out whether the store can be read and written now, by writing something of no other
    /// use. A store in a bucket also finds out what its server can do.
    async fn probe(&self) -> Result<(), Fault>;

    /// Whether every call is a journey over a network, so that it pays to save some.
    fn is_remote(&self) -> bool;

    /// Where a person would look for the keys of digests and documents: a folder or an address,
    /// without a slash at its end.
    fn location(&self) -> String;
}

/// The place of a document: `runs/{run}/{name}`, or `runs/{name}` where it is of no one run.
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
    /// The push that it covers: the cache compares this.
    pub pushed_at: PushedAt,
    /// Where it was fetched from.
    pub url: String,
    /// When it was made, RFC 3339 in UTC.
    pub processed_at: String,
    /// HEAD's commit; `None` for a repository without one.
    pub commit: Option<String>,
    /// [`DIGEST_FORMAT`](crate::job::DIGEST_FORMAT) of the program that made it.
    pub format: String,
    /// Length of the text in bytes.
    pub bytes: u64,
    /// Whether the text was cut at its limit.
    pub truncated: bool,
    /// The run that it was made for.
    pub run: RunId,
}

/// Which copy of an object this is. Another copy has another version, even of the same text.
///
/// The text up to the first space is its [`Listed::etag`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Version(pub String);

impl Version {
    /// What a listing shows of it.
    pub fn etag(&self) -> &str {
        self.0.split_once(' ').map_or(&self.0, |(etag, _)| etag)
    }
}

/// What [`DigestStore::list`] shows of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The repository that it is of.
    pub repo: RepoRef,
    /// Changes with the content. In S3 it does not change where only the metadata do.
    pub etag: String,
    /// When it was stored, by the store's clock: Unix time, as exact as the store has it.
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
    /// What a [`DigestStore::put`] is to expect that was decided on this.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The digest is stored, safe against a crash.
    Stored,
    /// Something other than expected was there; nothing was changed.
    Conflict,
}

/// Where digests are kept.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Store")]
pub struct StoreConfig {
    /// Where digests are kept: a folder, or s3://BUCKET[/PREFIX] with endpoint and credentials in
    /// AWS_* or R2_* variables [default: ./digests, or R2_BUCKET where that is set].
    #[arg(long, env = "STORE_URL", value_name = "FOLDER|URL")]
    pub store: Option<String>,
}

/// The folder where nothing else is said.
const DEFAULT_FOLDER: &str = "./digests";

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

impl StoreConfig {
    /// What was said; a variable that is empty counts as not set.
    fn place(&self) -> Option<&str> {
        self.store
            .as_deref()
            .filter(|place| !place.trim().is_empty())
    }

    /// The folder, where the store is one.
    pub fn folder(&self) -> Option<&Path> {
        match self.place() {
            Some(place) => (!place.contains("://")).then(|| Path::new(place)),
            None if S3Config::is_predecessors(environment) => None,
            None => Some(Path::new(DEFAULT_FOLDER)),
        }
    }

    /// Opens the store. Nothing is read or written yet.
    ///
    /// # Errors
    /// [`exit::USAGE`] for a place that is not supported, or of which something is not said.
    pub fn open(&self) -> Result<SharedStore, ExitError> {
        if let Some(folder) = self.folder() {
            let place = folder.to_string_lossy();
            if let Some(why) = unsubstituted("--store", &place) {
                return Err(ExitError::new(exit::USAGE, why));
            }
            if let Some(bucket) = place.strip_prefix("s3:") {
                let bucket = bucket.trim_start_matches('/');
                let why = format!(
                    "--store {place}: a bucket is s3://{bucket}; a folder of that name is ./{place}"
                );
                return Err(ExitError::new(exit::USAGE, why));
            }
            return Ok(Arc::new(fs::FsStore::new(folder)));
        }
        let config = S3Config::from_env(self.place(), environment)
            .map_err(|why| ExitError::new(exit::USAGE, why))?;
        Ok(Arc::new(S3Store::new(&config)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `.env.example` has it, so that R2_BUCKET is not silently passed over.
    #[test]
    fn an_empty_store_url_counts_as_not_set() {
        for store in [None, Some(""), Some(" ")] {
            let config = StoreConfig {
                store: store.map(str::to_owned),
            };
            assert_eq!(config.folder(), Some(Path::new(DEFAULT_FOLDER)));
        }
    }
}
