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
use crate::job::PushedAt;
use crate::repo::RepoRef;
use crate::run::RunId;

pub mod fs;

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

    /// Every repository of which the store holds something, in no particular order.
    fn list(&self) -> BoxStream<'_, Result<RepoRef, Fault>>;

    /// Stores a document of a run, replacing what was there.
    async fn put_document(&self, key: &DocumentKey, content: &[u8]) -> Result<(), Fault>;

    /// A document of a run; `None` where there is none.
    async fn document(&self, key: &DocumentKey) -> Result<Option<Vec<u8>>, Fault>;

    /// Finds out whether the store can be read and written now.
    async fn probe(&self) -> Result<(), Fault>;

    /// Where a person would look for the keys of digests and documents: a folder or an address,
    /// without a slash at its end.
    fn location(&self) -> String;
}

/// The place of a document of a run: `runs/{run}/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DocumentKey {
    /// The run.
    pub run: RunId,
    /// Which of its documents.
    pub document: Document,
}

/// The documents of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Document {
    /// [`Manifest`](crate::run::Manifest), written before the first job.
    Manifest,
    /// [`RunSummary`](crate::run::RunSummary), written at the end.
    Summary,
}

impl fmt::Display for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.document {
            Document::Manifest => "manifest.json",
            Document::Summary => "summary.json",
        };
        write!(f, "runs/{}/{name}", self.run)
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

/// Which copy of an object this is: an ETag. Another copy has another version.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Version(pub String);

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
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Store")]
pub struct StoreConfig {
    /// Folder in which digests are kept: gitingest/{owner}/{name}/summary.txt, and runs/ beside it.
    #[arg(
        long,
        env = "STORE_URL",
        value_name = "DIR",
        default_value = "./digests"
    )]
    pub store: String,
}

impl StoreConfig {
    /// The folder, where the store is one.
    pub fn folder(&self) -> Option<&Path> {
        (!self.store.contains("://")).then(|| Path::new(&self.store))
    }

    /// Opens the store.
    ///
    /// # Errors
    /// [`exit::USAGE`] for a place that is not supported.
    pub fn open(&self) -> Result<SharedStore, ExitError> {
        if let Some((scheme, _)) = self.store.split_once("://") {
            // Not the whole address, which may hold credentials.
            return Err(ExitError::new(
                exit::USAGE,
                format!("--store {scheme}://… is not supported, give a folder"),
            ));
        }
        Ok(Arc::new(fs::FsStore::new(&self.store)))
    }
}
