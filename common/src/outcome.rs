//! From what happened to what is done about it: pure functions of values.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use strum::AsRefStr;

use crate::fault::{Fault, FaultKind};
use crate::ids::{JobKey, PushedAt, RepoRef, RunId};

/// Attempts after the first that a transient fault gets, after 1, 2 and 4 seconds.
pub const RETRIES: u32 = 3;
/// How often a job is sent to wait for a host that asks for patience before it fails as
/// `throttled`. With a minute each this is a quarter of an hour.
pub const WAITS: u32 = 15;
/// The same where the host does not ask, but turns the job away with a bare 403: most likely that
/// is about this repository alone, and for good. GitHub answers so for what its staff disabled.
pub const BARE_WAITS: u32 = 2;
/// However short a host says that its patience lasts, the pause before the n-th wait is no shorter
/// than 2ⁿ seconds, up to this.
const LONGEST_FLOOR: Duration = Duration::from_secs(32);
/// How long a throttling host that names no time is left alone.
pub const THROTTLE_PAUSE: Duration = Duration::from_secs(60);

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

/// What to do with a job after an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Record the outcome, then settle as done.
    Finish(Outcome),
    /// Record `failed: poison`, then leave it to the dead letters.
    Bury,
    /// Try again after this long; the attempt counts.
    Retry(Duration),
    /// Its host wants to be left alone this long; the attempt does not count.
    Wait(Duration),
    /// Nothing is wrong with the job: stop taking jobs until machine and store are well, then
    /// work on it again; the attempt does not count.
    Pause,
}

/// The table of failure classes.
///
/// `attempt` counts earlier attempts that a fault of the repository or its host cost; `waits`
/// counts how often the job was sent to wait for a throttling host.
pub fn decide(result: Result<Outcome, &Fault>, attempt: u32, waits: u32) -> Decision {
    let fault = match result {
        Ok(outcome) => return Decision::Finish(outcome),
        Err(fault) => fault,
    };
    let failed = Decision::Finish(Outcome::Failed(fault.kind));
    match fault.kind {
        FaultKind::Transient if attempt < RETRIES => Decision::Retry(retry_delay(attempt)),
        FaultKind::Killed if attempt == 0 => Decision::Retry(retry_delay(attempt)),
        FaultKind::Throttled if waits < fault.retry_after.map_or(BARE_WAITS, |_| WAITS) => {
            let floor = Duration::from_secs(1 << waits.min(16)).min(LONGEST_FLOOR);
            Decision::Wait(fault.retry_after.unwrap_or(THROTTLE_PAUSE).max(floor))
        }
        FaultKind::Infra => Decision::Pause,
        FaultKind::Poison => Decision::Bury,
        FaultKind::Transient
        | FaultKind::Killed
        | FaultKind::Throttled
        | FaultKind::Gone
        | FaultKind::Refused
        | FaultKind::TooLarge
        | FaultKind::InvalidEntry => failed,
    }
}

/// 1, 2, 4 seconds.
fn retry_delay(attempt: u32) -> Duration {
    Duration::from_secs(1 << attempt.min(RETRIES - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decision_table() {
        use Decision::{Bury, Finish, Pause, Retry, Wait};
        use FaultKind::{
            Gone, Infra, InvalidEntry, Killed, Poison, Refused, Throttled, TooLarge, Transient,
        };
        let seconds = Duration::from_secs;
        let failed = |kind| Finish(Outcome::Failed(kind));
        for (kind, retry_after, attempt, waits, expected) in [
            (Transient, None, 0, 0, Retry(seconds(1))),
            (Transient, None, 1, 0, Retry(seconds(2))),
            (Transient, None, 2, 9, Retry(seconds(4))),
            (Transient, None, 3, 0, failed(Transient)),
            (Throttled, None, 3, 0, Wait(seconds(60))),
            (Throttled, None, 0, 1, Wait(seconds(60))),
            (Throttled, None, 0, 2, failed(Throttled)),
            (Throttled, Some(7), 0, 0, Wait(seconds(7))),
            (Throttled, Some(0), 0, 0, Wait(seconds(1))),
            (Throttled, Some(0), 0, 3, Wait(seconds(8))),
            (Throttled, Some(7), 0, 14, Wait(seconds(32))),
            (Throttled, Some(7), 0, 15, failed(Throttled)),
            (Gone, None, 0, 0, failed(Gone)),
            (Refused, None, 0, 0, failed(Refused)),
            (TooLarge, None, 0, 0, failed(TooLarge)),
            (Killed, None, 0, 0, Retry(seconds(1))),
            (Killed, None, 1, 0, failed(Killed)),
            (Poison, None, 0, 0, Bury),
            (Infra, None, 3, 15, Pause),
            (InvalidEntry, None, 0, 0, failed(InvalidEntry)),
        ] {
            let mut fault = Fault::new(kind, "why");
            fault.retry_after = retry_after.map(seconds);
            assert_eq!(
                decide(Err(&fault), attempt, waits),
                expected,
                "{kind} {attempt} {waits}"
            );
        }
        for outcome in [Outcome::Processed, Outcome::Unchanged, Outcome::Superseded] {
            assert_eq!(decide(Ok(outcome), 3, 15), Finish(outcome));
        }
    }

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
