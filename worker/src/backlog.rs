//! The jobs queue as a worker sees it, and how long a job whose host is busy may take up a place.

use std::time::Duration;

use common::broker::{Backlog, SharedBroker};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tracing::debug;

/// For how long a look at the queue is good enough.
pub(crate) const FRESH: Duration = Duration::from_secs(2);
/// How long a look may take.
const LOOKING: Duration = Duration::from_secs(2);
/// How long jobs of other hosts may be held up by those before them, unless [`MOST_RETURNS`] is too few …
const SWEEP: f64 = 1.0;
/// Most jobs that the fleet hands back in a second for that.
const MOST_RETURNS: f64 = 200.0;

/// Looks at the queue for the jobs of a worker.
#[derive(Debug)]
pub(crate) struct BacklogWatch {
    broker: SharedBroker,
    /// When it was looked at last, and what was seen last.
    last: Mutex<(Option<Instant>, Option<Backlog>)>,
}

impl BacklogWatch {
    pub(crate) fn new(broker: &SharedBroker) -> Self {
        Self {
            broker: SharedBroker::clone(broker),
            last: Mutex::default(),
        }
    }

    /// Returns what the queue looks like; `None` if the broker has never told. An old look is better than
    /// none.
    pub(crate) async fn look(&self) -> Option<Backlog> {
        // Of many who want to know, one asks.
        let (looked, seen) = &mut *self.last.lock().await;
        if looked.is_none_or(|at| at.elapsed() >= FRESH) {
            match timeout(LOOKING, self.broker.backlog()).await {
                Ok(Ok(backlog)) => *seen = Some(backlog),
                failed => debug!(operation = "backlog", "no look at the queue: {failed:?}"),
            }
            *looked = Some(Instant::now());
        }
        *seen
    }
}

/// Returns how long a job may wait for its host in a worker of `slots` slots before it goes back, so that
/// another has its place: those that wait for a worker are looked through within [`SWEEP`], by at most
/// [`MOST_RETURNS`]. If none waits, it may stay.
pub(crate) fn place_for(backlog: Backlog, slots: u16) -> Option<Duration> {
    let places = backlog.workers.max(1) as f64 * f64::from(slots);
    let returns = (backlog.ready as f64 / SWEEP).min(MOST_RETURNS);
    Duration::try_from_secs_f64(places / returns).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use common::broker::Broker;
    use common::broker::memory::MemoryBroker;

    use super::*;

    #[test]
    fn places_are_given_up_as_far_as_others_need_them() {
        for (ready, workers, slots, seconds) in [
            (0, 40, 2, None),
            (1, 1, 1, Some(1.0)),
            (2, 1, 1, Some(0.5)),
            (400, 1, 4, Some(0.02)),
            (24_500, 1, 4, Some(0.02)),
            (24_500, 40, 2, Some(0.4)),
            (10, 0, 1, Some(0.1)),
        ] {
            let place = place_for(Backlog { ready, workers }, slots);
            let expected = seconds.map(Duration::from_secs_f64);
            assert_eq!(place, expected, "{ready} {workers} {slots}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_is_used_for_a_while_and_an_old_one_if_there_is_no_other() {
        let memory = Arc::new(MemoryBroker::default());
        let broker: SharedBroker = Arc::<MemoryBroker>::clone(&memory);
        let watch = BacklogWatch::new(&broker);
        let workers = async || watch.look().await.map(|backlog| backlog.workers);
        assert_eq!(workers().await, Some(0));
        let _deliveries = memory.deliveries(1).await.unwrap();
        assert_eq!(workers().await, Some(0));
        tokio::time::advance(FRESH).await;
        assert_eq!(workers().await, Some(1));
        memory.close().await;
        tokio::time::advance(FRESH).await;
        assert_eq!(workers().await, Some(1));
        assert_eq!(BacklogWatch::new(&broker).look().await, None);
    }
}
