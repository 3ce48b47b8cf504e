//! From what the cache said to jobs with the broker.

use common::broker::{Enqueued, SharedBroker};
use common::fault::Fault;
use common::job::{Job, WIRE_VERSION};
use common::run::RunId;
use futures::StreamExt;
use futures::stream;

use crate::cache::Checked;

/// Hands a job to the broker for each repository that is not cached.
///
/// # Errors
/// Where the broker does not take them all.
pub async fn publish(
    broker: &SharedBroker,
    run: &RunId,
    checked: &[Checked],
) -> Result<Enqueued, Fault> {
    let jobs = checked
        .iter()
        .filter(|checked| !checked.is_cached())
        .map(|checked| job(run, checked));
    broker.enqueue(stream::iter(jobs).boxed()).await
}

fn job(run: &RunId, checked: &Checked) -> Job {
    let entry = &checked.entry;
    Job {
        version: WIRE_VERSION,
        run: run.clone(),
        repo: entry.repo.clone(),
        url: entry.url.clone(),
        pushed_at: entry.pushed_at.clone(),
        force: checked.force,
    }
}
