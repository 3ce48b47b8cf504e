//! What became of a job.

use std::fmt;

use serde::{Deserialize, Serialize};
use strum::AsRefStr;

use crate::fault::FaultKind;
use crate::ids::{JobKey, PushedAt, RepoRef, RunId};

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, AsRefStr)]
#[serde(tag = "outcome", content = "class", rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Outcome {
    /// A digest was made and stored.
    Processed,
    /// The store already had this `pushedAt`.
    Unchanged,
    /// The store has a newer `pushedAt`.
    Superseded,
    /// No digest, because of a fault of this class.
    Failed(FaultKind),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(kind) => write!(f, "failed: {kind}"),
            other => f.write_str(other.as_ref()),
        }
    }
}

/// An [`Outcome`] with its circumstances: a record of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutcomeRecord {
    /// The run that the job was published for.
    pub run: RunId,
    /// The repository.
    pub repo: RepoRef,
    /// The push that was to be digested.
    pub pushed_at: PushedAt,
    /// How the job ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Why it failed, for a person; empty if it did not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Attempts before the last one.
    pub attempt: u32,
    /// Wall-clock milliseconds of the last attempt, from delivery to stored digest.
    pub millis: u64,
    /// Bytes fetched over the network.
    pub fetched_bytes: u64,
    /// Size of the stored digest; 0 if none was stored.
    pub stored_bytes: u64,
    /// What was stored; `None` if nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<StoredDigest>,
    /// Where the host says that the repository is now, if that is another path than was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renamed_to: Option<String>,
    /// The worker, by its unique name; empty if none worked on it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub worker: String,
}

/// What identifies a digest's text in a listing of the store, and how it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDigest {
    /// [`Listed::etag`](crate::store::Listed::etag).
    pub etag: String,
    /// [`DIGEST_FORMAT`](crate::job::DIGEST_FORMAT) of the worker.
    pub format: String,
}

impl OutcomeRecord {
    /// Returns a record of a job that no worker worked on.
    pub fn without_work(key: JobKey, run: RunId, outcome: Outcome, message: &str) -> Self {
        Self {
            run,
            repo: key.repo,
            pushed_at: key.pushed_at,
            outcome,
            message: message.to_owned(),
            attempt: 0,
            millis: 0,
            fetched_bytes: 0,
            stored_bytes: 0,
            digest: None,
            renamed_to: None,
            worker: String::new(),
        }
    }

    /// Returns the repository and push, which identify the job in any run.
    pub fn key(&self) -> JobKey {
        JobKey {
            repo: self.repo.clone(),
            pushed_at: self.pushed_at.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ledger records are a contract: version 1 as first published.
    #[test]
    fn record_reads_and_writes_as_published() {
        let golden = r#"{"run":"20261123T130000Z-0a1b2c","repo":"a/b","pushedAt":"2026-11-22T10:00:00Z","outcome":"failed","class":"too_large","message":"over 1 GiB","attempt":1,"millis":20,"fetchedBytes":3,"storedBytes":0}"#;
        let record: OutcomeRecord = serde_json::from_str(golden).unwrap();
        assert_eq!(record.outcome, Outcome::Failed(FaultKind::TooLarge));
        assert_eq!(serde_json::to_string(&record).unwrap(), golden);
        let processed = serde_json::to_value(Outcome::Processed).unwrap();
        assert_eq!(processed, serde_json::json!({"outcome": "processed"}));
    }
}
