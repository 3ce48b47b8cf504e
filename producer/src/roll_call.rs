//! Asking the workers of a fleet what they hold and have.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use common::broker::{InHand, Notice, RollCall, SharedBroker};
use common::fault::Fault;
use common::ids::{JobKey, RunId};
use common::job::Job;
use common::text::format_duration;
use futures::StreamExt;

/// How long workers may take to answer.
const ANSWERS: Duration = Duration::from_secs(5);

/// Most answers that are kept where nobody knows how many to expect.
const MAX_ANSWERS: u64 = 1000;

/// Asks, and returns the answers once `workers` have answered, or time is up.
///
/// # Errors
/// If the broker does not pass the question on.
pub async fn roll_call(broker: &SharedBroker, workers: u64) -> Result<Vec<InHand>, Fault> {
    let asking = async {
        let answers = broker.announcements().await?;
        let roll_call = format!("{:016x}", fastrand::u64(..));
        let call = RollCall {
            roll_call: roll_call.clone(),
        };
        broker.announce(&Notice::RollCall(call)).await?;
        Ok((answers, roll_call))
    };
    let (mut answers, roll_call) = bounded(ANSWERS, "broker", asking).await?;
    let mut answered = HashMap::new();
    let collecting = async {
        // Workers that drain are not counted as connected, but may answer.
        let enough = if workers == 0 { MAX_ANSWERS } else { workers };
        while (answered.len() as u64) < enough {
            match answers.next().await {
                Some(Notice::InHand(answer)) if answer.answers == roll_call => {
                    answered.insert(answer.worker.clone(), answer);
                }
                Some(_) => {}
                None => return,
            }
        }
    };
    // The caller sees whether they were too few.
    _ = tokio::time::timeout(ANSWERS, collecting).await;
    Ok(answered.into_values().collect())
}

/// Returns the jobs in workers' hands.
pub fn in_hand(answers: &[InHand]) -> HashSet<(RunId, JobKey)> {
    let ids = answers.iter().flat_map(|answer| &answer.jobs);
    ids.filter_map(|id| Job::parse_id(id)).collect()
}

/// Returns the answer of `what`, or a fault after `limit`.
///
/// # Errors
/// If it fails, or takes too long.
pub async fn bounded<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    let answer = tokio::time::timeout(limit, call).await;
    answer.unwrap_or_else(|_| {
        let limit = format_duration(limit);
        Err(Fault::infra(format!(
            "the {what} did not answer within {limit}"
        )))
    })
}
