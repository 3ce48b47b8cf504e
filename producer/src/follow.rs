//! Following the ledger until a run's identity closes.

use std::time::{Duration, Instant};

use common::broker::{Entries, LedgerEntry};
use common::fault::Fault;
use common::run::view::RunView;
use futures::{Stream, StreamExt};
use time::OffsetDateTime;
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
    /// Nothing became of any job for as long as was to be waited.
    Quiet,
    /// It was to be left alone.
    Detached,
    /// The ledger ended.
    Lost,
}

/// Counts outcomes into `view` and reports them, until the run closes, `stop`, or nothing became
/// of any of its jobs for as long as `quiet`.
pub async fn follow(
    events: &mut Entries,
    view: &mut RunView,
    reporter: &mut Reporter,
    stop: &CancellationToken,
    quiet: Option<Duration>,
) -> Ended {
    let mut heard = Instant::now();
    while !view.closes() {
        let due = Instant::now() + reporter.next_due(OffsetDateTime::now_utc());
        let due = quiet.map_or(due, |quiet| due.min(heard + quiet));
        let event = tokio::select! {
            biased;
            event = events.next() => event,
            () = tokio::time::sleep_until(due.into()) => {
                reporter.update(OffsetDateTime::now_utc(), view);
                if quiet.is_some_and(|quiet| heard.elapsed() >= quiet) {
                    return Ended::Quiet;
                }
                continue;
            }
            () = stop.cancelled() => {
                take_ready(events, view);
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
        if view.apply(&entry) {
            heard = Instant::now();
            reporter.update(OffsetDateTime::now_utc(), view);
        }
    }
    Ended::Closed
}

/// Counts what is in the ledger already, without waiting for more.
fn take_ready(
    events: &mut (impl Stream<Item = Result<LedgerEntry, Fault>> + Unpin),
    view: &mut RunView,
) {
    use futures::FutureExt;
    while let Some(Some(Ok(entry))) = events.next().now_or_never() {
        view.apply(&entry);
    }
}
