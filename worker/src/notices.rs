//! What a worker and the other processes tell each other: host pauses, jobs in hand, why it waits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::broker::{Event, HostPause, InHand, Notice, SharedBroker, WorkerState};
use common::fault::Fault;
use common::retry;
use common::text::{format_duration, unix_millis};
use futures::StreamExt;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info};

use crate::host_throttle::{HostThrottle, stretch};
use crate::infra_gate::InfraGate;

/// The longest pause of a host that is taken from another worker's word: clocks differ.
const LONGEST_HEARSAY: Duration = Duration::from_secs(3600);
/// Most notices that are heeded in a second: one is soon said again, and each costs a line in the log or
/// an answer to everybody.
const HEEDED_A_SECOND: u32 = 20;
/// How long an announcement may take.
const ANNOUNCING: Duration = Duration::from_secs(5);
/// How often a worker that waits records so again, for those who did not see it before.
const STILL_WAITING: Duration = Duration::from_secs(60);
/// Pauses after something could not be recorded or listened to.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub(crate) struct Notices {
    name: String,
    broker: SharedBroker,
    gate: Arc<InfraGate>,
    throttle: Arc<HostThrottle>,
    /// The hosts that this worker has a token for.
    tokens: Vec<String>,
    /// [`Job::id`](common::job::Job::id) of each delivery that is not settled yet, and when it was
    /// taken, in milliseconds of Unix time.
    in_hand: Mutex<Vec<(String, i64)>>,
    /// What was last recorded, if anything, says that the worker waits.
    told_waiting: AtomicBool,
    /// Since when notices are counted, and how many were heeded since.
    heeded: Mutex<(Instant, u32)>,
}

/// A job that is listed as in hand until this is dropped.
#[derive(Debug)]
pub(crate) struct Taken {
    notices: Arc<Notices>,
    id: String,
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut in_hand = self.notices.in_hand();
        // Two copies of a job have the same id.
        if let Some(place) = in_hand.iter().position(|(id, _)| *id == self.id) {
            in_hand.swap_remove(place);
        }
    }
}

fn now_millis() -> i64 {
    unix_millis(OffsetDateTime::now_utc())
}

impl Notices {
    pub(crate) fn new(
        name: &str,
        broker: &SharedBroker,
        gate: &Arc<InfraGate>,
        throttle: &Arc<HostThrottle>,
        tokens: Vec<String>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            broker: Arc::clone(broker),
            gate: Arc::clone(gate),
            throttle: Arc::clone(throttle),
            tokens,
            in_hand: Mutex::default(),
            told_waiting: AtomicBool::new(false),
            heeded: Mutex::new((Instant::now(), 0)),
        })
    }

    fn in_hand(&self) -> MutexGuard<'_, Vec<(String, i64)>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists the job `id` as in hand.
    pub(crate) fn take(self: &Arc<Self>, id: String) -> Taken {
        self.in_hand().push((id.clone(), now_millis()));
        let notices = Arc::clone(self);
        Taken { notices, id }
    }

    /// Tells the other workers that `host` is paused. They can do without.
    pub(crate) async fn host_paused(&self, host: &str, pause: Duration) {
        let pause = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
        self.announce(Notice::HostPause(HostPause {
            host: host.to_owned(),
            until_millis: now_millis().saturating_add(pause),
            worker: self.name.clone(),
        }))
        .await;
    }

    async fn announce(&self, notice: Notice) {
        let announced = timeout(ANNOUNCING, self.broker.announce(&notice)).await;
        if !matches!(announced, Ok(Ok(()))) {
            debug!(operation = "announce", "not announced: {notice:?}");
        }
    }

    /// Heeds other workers' pauses and answers roll calls. Ends with the broker.
    pub(crate) async fn listen(&self) {
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            match self.broker.announcements().await {
                Ok(mut announcements) => {
                    while let Some(notice) = announcements.next().await {
                        self.heed(notice).await;
                    }
                    return;
                }
                Err(fault) => debug!(
                    operation = "announce",
                    "not listening to other workers: {fault}"
                ),
            }
            sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }

    /// Whether one more notice may be heeded.
    fn may_heed(&self, now: Instant) -> bool {
        let mut heeded = self.heeded.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(heeded.0) >= Duration::from_secs(1) {
            *heeded = (now, 0);
        }
        heeded.1 += 1;
        heeded.1 <= HEEDED_A_SECOND
    }

    async fn heed(&self, notice: Notice) {
        match notice {
            // For producers.
            Notice::InHand(_) => {}
            Notice::HostPause(_) | Notice::RollCall(_) if !self.may_heed(Instant::now()) => {}
            Notice::RollCall(call) => {
                let (jobs, since_millis) = self.in_hand().iter().cloned().unzip();
                let (answers, worker) = (call.roll_call, self.name.clone());
                let answer = InHand {
                    answers,
                    worker,
                    jobs,
                    since_millis,
                    tokens: Some(self.tokens.clone()),
                };
                self.announce(Notice::InHand(answer)).await;
            }
            Notice::HostPause(pause) if pause.worker != self.name => {
                let left = pause.until_millis.saturating_sub(now_millis());
                let left = u64::try_from(left).unwrap_or(0);
                let left = Duration::from_millis(left).min(LONGEST_HEARSAY);
                let left = left.mul_f64(stretch());
                if self.throttle.heard(&pause.host, left, Instant::now()) {
                    info!(
                        operation = "throttled",
                        host = pause.host,
                        host_paused = true,
                        pause_seconds = left.as_secs(),
                        "{} rate-limited {}; pausing it here too for {}",
                        pause.host,
                        pause.worker,
                        format_duration(left)
                    );
                }
            }
            // Its own.
            Notice::HostPause(_) => {}
        }
    }

    /// Records why this worker waits whenever that changes, and once a minute.
    pub(crate) async fn tell(&self) {
        let (mut gate, mut hosts) = (self.gate.watch(), self.throttle.watch());
        let mut told = WorkerState::default();
        let mut tell_again = Instant::now() + STILL_WAITING;
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            let now = Instant::now();
            gate.mark_unchanged();
            hosts.mark_unchanged();
            let state = WorkerState {
                worker: String::new(),
                infra: self.gate.watch().borrow().reason().map(str::to_owned),
                hosts: self.throttle.paused(now),
            };
            let is_due = now >= tell_again;
            if is_due {
                tell_again = now + STILL_WAITING;
            }
            if told != state || (is_due && state != WorkerState::default()) {
                match self.record(&state).await {
                    Ok(()) => {
                        told = state;
                        tell_again = now + STILL_WAITING;
                    }
                    Err(fault) => {
                        debug!(operation = "record", "state is not recorded: {fault}");
                        tell_again = now + pauses.next().unwrap_or(LONGEST_PAUSE);
                    }
                }
            }
            let mut next = tell_again;
            if let Some(end) = self.throttle.next_end(now) {
                next = next.min(end);
            }
            tokio::select! {
                _ = gate.changed() => {}
                _ = hosts.changed() => {}
                () = sleep_until(next) => {}
            }
        }
    }

    /// Records that a worker that ends does not wait any more.
    pub(crate) async fn tell_the_end(&self) {
        if self.told_waiting.load(Ordering::Relaxed) {
            _ = self.record(&WorkerState::default()).await;
        }
    }

    async fn record(&self, state: &WorkerState) -> Result<(), Fault> {
        let waits = *state != WorkerState::default();
        let state = WorkerState {
            worker: self.name.clone(),
            ..state.clone()
        };
        self.told_waiting.fetch_or(waits, Ordering::Relaxed);
        self.broker.record(&Event::Worker(state)).await?;
        self.told_waiting.store(waits, Ordering::Relaxed);
        Ok(())
    }
}
