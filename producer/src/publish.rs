//! From what the cache said to jobs with the broker: those that still wait are adopted, the rest
//! is published.

use std::collections::HashMap;

use common::broker::{Enqueued, Event, Position, SharedBroker};
use common::fault::Fault;
use common::ids::{JobKey, RunId};
use common::job::{Job, WIRE_VERSION};
use common::telemetry::traces::Traces;
use futures::{StreamExt, stream};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::cache::Checked;

/// An older job is published again: a broker that was killed may have kept only the ledger's copy,
/// which no worker ever gets.
pub const BELIEVED: time::Duration = time::Duration::hours(2);

/// Jobs that still wait from earlier runs, each with the runs that published it.
pub type Adopted = HashMap<JobKey, Vec<RunId>>;

/// Returns the jobs that need not be published, since they still wait from an earlier run and do
/// what is asked for now: same push, same address, forced if this one is.
///
/// The ledger may hold a job that the queue does not, never the other way round. So a job counts
/// as waiting only if anything waits at all, and its record is not older than [`BELIEVED`]. When in
/// doubt it is published: a duplicate costs one look at the store.
///
/// # Errors
/// If queues or ledger cannot be read.
pub async fn adopt(broker: &SharedBroker, checked: &[Checked]) -> Result<Adopted, Fault> {
    let waiting = broker.waiting().await?;
    let mut adopted = Adopted::new();
    if waiting.ready + waiting.retry == 0 {
        return Ok(adopted);
    }
    let wanted = checked.iter().filter(|checked| checked.has_job());
    let wanted: HashMap<_, _> = wanted.map(|checked| (checked.key(), checked)).collect();
    let does_it = |job: &Job| {
        wanted
            .get(&job.key())
            .is_some_and(|checked| job.url == checked.entry.url && (job.force || !checked.force))
    };
    let since = OffsetDateTime::now_utc() - BELIEVED;
    let mut history = broker.history(Position::Since(since)).await?;
    while let Some(entry) = history.next().await {
        let entry = entry?;
        match entry.event {
            Event::Job(job) if entry.at >= since && does_it(&job) => {
                adopted.entry(job.key()).or_default().push(job.run);
            }
            Event::Job(_) | Event::Worker(_) => {}
            ended @ (Event::Outcome(_) | Event::Dead(_)) => {
                // One run's copy ended; another's may still wait.
                if let Some(record) = ended.into_outcome()
                    && let Some(runs) = adopted.get_mut(&record.key())
                {
                    runs.retain(|run| *run != record.run);
                }
            }
        }
    }
    adopted.retain(|_, runs| !runs.is_empty());
    Ok(adopted)
}

/// Hands the broker a job for each of `checked`, until `stop`; what was handed over by then is
/// still confirmed.
///
/// # Errors
/// If the broker does not take them all.
pub async fn publish(
    broker: &SharedBroker,
    run: &RunId,
    checked: impl Iterator<Item = &Checked> + Send,
    traces: &Traces,
    stop: &CancellationToken,
) -> Result<Enqueued, Fault> {
    let jobs = checked.map(|checked| {
        let mut job = job(run, checked);
        traces.enqueue(&mut job, broker.system());
        job
    });
    let jobs = stream::iter(jobs).take_until(stop.cancelled());
    broker.enqueue(jobs.boxed()).await
}

/// Returns the job of a repository that is not cached.
pub fn job(run: &RunId, checked: &Checked) -> Job {
    let entry = &checked.entry;
    Job {
        version: WIRE_VERSION,
        run: run.clone(),
        repo: entry.repo.clone(),
        url: entry.url.clone(),
        pushed_at: entry.pushed_at.clone(),
        force: checked.force,
        replay_of: None,
        traceparent: None,
    }
}
