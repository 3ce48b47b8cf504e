//! Following the ledger until a run's identity closes.

use std::time::Instant;

use common::broker::{Entries, Entry, Event};
use common::fault::{Fault, FaultKind};
use common::outcome::{Outcome, OutcomeRecord};
use common::run::Tally;
use futures::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::report::Reporter;

/// Why following ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// `total = cached + processed + failed`.
    Closed,
    /// It was told to stop.
    Stopped,
    /// The ledger ended.
    Lost,
}

/// Counts outcomes into `tally` and reports them, until the run closes or `stop`.
pub async fn follow(
    mut events: Entries,
    tally: &mut Tally,
    reporter: &mut Reporter,
    stop: &CancellationToken,
) -> Ended {
    while !tally.closes() {
        let due = reporter.next_due(Instant::now());
        let event = tokio::select! {
            biased;
            event = events.next() => event,
            () = tokio::time::sleep_until(due.into()) => {
                reporter.update(Instant::now(), tally);
                continue;
            }
            () = stop.cancelled() => {
                take_ready(&mut events, tally);
                return Ended::Stopped;
            }
        };
        let entry = match event {
            Some(Ok(entry)) => entry,
            Some(Err(fault)) => {
                error!(operation = "follow", "{fault}");
                return Ended::Lost;
            }
            None => return Ended::Lost,
        };
        if count(tally, entry.event) {
            reporter.update(Instant::now(), tally);
        }
    }
    Ended::Closed
}

/// Counts what is in the ledger already, without waiting for more.
fn take_ready(events: &mut (impl Stream<Item = Result<Entry, Fault>> + Unpin), tally: &mut Tally) {
    use futures::FutureExt;
    while let Some(Some(Ok(entry))) = events.next().now_or_never() {
        count(tally, entry.event);
    }
}

fn count(tally: &mut Tally, event: Event) -> bool {
    match event {
        Event::Job(_) => false,
        Event::Outcome(record) => tally.apply(&record),
        // Without an outcome of its own, or that one would have been counted before.
        Event::Dead(job) => tally.apply(&OutcomeRecord::without_work(
            job.key(),
            job.run,
            Outcome::Failed(FaultKind::Killed),
            "given up by the broker: delivered again and again, never settled",
        )),
    }
}
