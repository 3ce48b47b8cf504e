//! What became of a job.

use std::fmt;

use serde::{Deserialize, Serialize};
use strum::AsRefStr;

use crate::fault::FaultKind;
use crate::ids::{JobKey, PushedAt, RepoRef, RunId};
use crate::store::DigestMeta;

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, AsRefStr)]
#[serde(from = "WrittenOutcome", into = "WrittenOutcome")]
#[strum(serialize_all = "snake_case")]
pub enum Outcome {
    /// A digest was made and stored.
    Processed,
    /// HEAD is still the commit of the stored digest, whose record was renewed.
    Unmoved,
    /// The store already had this `pushedAt`.
    Unchanged,
    /// The store has a newer `pushedAt`.
    Superseded,
    /// No digest, because of a fault of this class.
    Failed(FaultKind),
}

impl Outcome {
    /// Of a job that was taken off the queue together with its run.
    pub const CANCELLED: Self = Self::Failed(FaultKind::Cancelled);

    /// Whether the job led to a digest of its push in the store: made, or renewed.
    pub fn is_processed(self) -> bool {
        matches!(self, Self::Processed | Self::Unmoved)
    }
}

/// An outcome as the ledger has it. Programs from before [`Outcome::Unmoved`] and
/// [`Outcome::CANCELLED`] skip a record with a word that they do not know, and would wait for the job
/// for ever, or publish it again; so they read `processed` and `failed: infra`.
#[derive(Serialize, Deserialize)]
struct WrittenOutcome {
    #[serde(flatten)]
    word: OutcomeWord,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unmoved: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    cancelled: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "outcome", content = "class", rename_all = "snake_case")]
enum OutcomeWord {
    Processed,
    Unchanged,
    Superseded,
    Failed(FaultKind),
}

impl From<Outcome> for WrittenOutcome {
    fn from(outcome: Outcome) -> Self {
        let word = match outcome {
            Outcome::Processed | Outcome::Unmoved => OutcomeWord::Processed,
            Outcome::Unchanged => OutcomeWord::Unchanged,
            Outcome::Superseded => OutcomeWord::Superseded,
            Outcome::CANCELLED => OutcomeWord::Failed(FaultKind::Infra),
            Outcome::Failed(kind) => OutcomeWord::Failed(kind),
        };
        Self {
            word,
            unmoved: outcome == Outcome::Unmoved,
            cancelled: outcome == Outcome::CANCELLED,
        }
    }
}

impl From<WrittenOutcome> for Outcome {
    fn from(written: WrittenOutcome) -> Self {
        match written.word {
            OutcomeWord::Processed if written.unmoved => Self::Unmoved,
            OutcomeWord::Processed => Self::Processed,
            OutcomeWord::Unchanged => Self::Unchanged,
            OutcomeWord::Superseded => Self::Superseded,
            OutcomeWord::Failed(_) if written.cancelled => Self::CANCELLED,
            OutcomeWord::Failed(kind) => Self::Failed(kind),
        }
    }
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
    /// Size of the stored digest; 0 if none was stored, or only its record.
    pub stored_bytes: u64,
    /// What was stored or renewed; `None` if nothing was.
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
    /// Its size.
    #[serde(default)]
    pub bytes: u64,
    /// Its record; `None` from a worker from before this was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<Box<DigestMeta>>,
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
        for (outcome, written) in [
            (Outcome::Processed, r#"{"outcome":"processed"}"#),
            (
                Outcome::Unmoved,
                r#"{"outcome":"processed","unmoved":true}"#,
            ),
            (Outcome::Unchanged, r#"{"outcome":"unchanged"}"#),
            (Outcome::Superseded, r#"{"outcome":"superseded"}"#),
            (
                Outcome::CANCELLED,
                r#"{"outcome":"failed","class":"infra","cancelled":true}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&outcome).unwrap(), written);
            let read: Outcome = serde_json::from_str(written).unwrap();
            assert_eq!(read, outcome);
        }
    }

    #[test]
    fn an_unmoved_head_is_processed_to_earlier_programs() {
        let written = r#"{"run":"20261123T130000Z-0a1b2c","repo":"a/b","pushedAt":"2026-11-22T10:00:00Z","outcome":"processed","unmoved":true,"attempt":0,"millis":20,"fetchedBytes":3,"storedBytes":0,"digest":{"etag":"e","format":"f","bytes":7}}"#;
        let record: OutcomeRecord = serde_json::from_str(written).unwrap();
        assert_eq!(record.outcome, Outcome::Unmoved);
        assert_eq!(serde_json::to_string(&record).unwrap(), written);
        let word: OutcomeWord = serde_json::from_str(written).unwrap();
        assert!(matches!(word, OutcomeWord::Processed));
    }
}
