//! What became of a job.

use std::fmt;

use serde::{Deserialize, Serialize};
use strum::AsRefStr;

use crate::fault::FaultKind;
use crate::ids::{JobKey, PushedAt, RepoRef, RunId};

/// The one final word on a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, AsRefStr)]
#[serde(tag = "outcome", content = "class", rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Outcome {
    /// A digest was made and stored.
    Processed,
    /// The store already held this `pushedAt`.
    Unchanged,
    /// The store holds a newer `pushedAt`.
    Superseded,
    /// No digest, for this class of reason.
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

/// An [`Outcome`] with what is worth knowing about it: a record of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutcomeRecord {
    /// The run that the job was published for.
    pub run: RunId,
    /// The repository.
    pub repo: RepoRef,
    /// The push that the job was for.
    pub pushed_at: PushedAt,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Why it failed, for a person. Empty where it did not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Attempts before the last one.
    pub attempt: u32,
    /// Wall-clock milliseconds of the last attempt, from delivery to stored digest.
    pub millis: u64,
    /// Bytes that came over the network.
    pub fetched_bytes: u64,
    /// Bytes of the stored digest; 0 where none was stored.
    pub stored_bytes: u64,
    /// Who worked on it: a name that no other worker has. Empty where nobody did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub worker: String,
}

impl OutcomeRecord {
    /// Of a job that nobody worked on.
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
            worker: String::new(),
        }
    }

    /// What a run's tally counts by: the repository at its `pushedAt`, whatever run published it.
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

    /// The ledger's records are a contract too: version 1 as first published.
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
