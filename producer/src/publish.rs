//! From what the cache said to jobs with the broker.

use common::broker::{Enqueued, SharedBroker};
use common::fault::Fault;
use common::ids::RunId;
use common::job::{Job, WIRE_VERSION};
use futures::StreamExt;
use futures::stream;
use tokio_util::sync::CancellationToken;

use crate::cache::Checked;

/// Hands a job to the broker for each of `checked`, until `stop`; what was handed over by then is
/// confirmed all the same.
///
/// # Errors
/// Where the broker does not take them all.
pub async fn publish(
    broker: &SharedBroker,
    run: &RunId,
    checked: impl Iterator<Item = &Checked> + Send,
    stop: &CancellationToken,
) -> Result<Enqueued, Fault> {
    let jobs = checked.map(|checked| job(run, checked));
    let jobs = stream::iter(jobs).take_until(stop.cancelled());
    broker.enqueue(jobs.boxed()).await
}

/// The job of a repository that is not cached.
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
    }
}
