//! The consuming loop: takes deliveries, has them worked on, records outcomes, settles.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::broker::{Delivery, Event, HostPause, Notice, Settlement, SharedBroker};
use common::failpoint;
use common::fault::{Fault, FaultKind};
use common::outcome::{Decision, Outcome, OutcomeRecord, decide};
use common::shutdown::Shutdown;
use common::store::SharedStore;
use common::telemetry::metrics::{HandedBack, Metrics};
use common::text::format_duration;
use futures::StreamExt;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use url::Url;

use crate::fetch::policy::authority;
use crate::hosts::{Hosts, Turn};
use crate::job::{Attempt, attempt};
use crate::slot::SlotError;
use crate::slot::slots::Slots;

/// The pause after which a job comes back that its worker could not finish.
const HANDED_BACK: Duration = Duration::from_secs(1);
/// The pauses between looks at a machine or store that is not well grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often a job may fail on a machine and store that then look well, until it fails for good:
/// a repository that is larger than the scratch folder's disk must not stop all others for ever.
/// With pauses that double that is eight seconds. The design's rule that no machine's fault is
/// charged to a repository holds in spirit: its class is `infra`, and the next run tries it again.
const WELL_BUT_FAILED: u32 = 4;
/// How long a job may be held while machine or store are not well: then it is handed back, and its
/// worker or another takes the next. RabbitMQ takes back by force, and counts against the job, what
/// was not settled within thirty minutes.
pub(crate) const LONGEST_HOLD: Duration = Duration::from_secs(10 * 60);
/// How often a job whose attempts take that long and then fail on the machine is handed back.
const HELD_AND_FAILED: u32 = 2;
/// The pause after which such a job comes back. Waiting for that long resets the broker's count.
const HELD_TOO_LONG: Duration = Duration::from_secs(60);
/// Up to this long the rest of a host's pause is waited for in [`PIECES`]: between 4 s and a minute
/// the broker has no pause, and a minute for the sake of seconds would hold up a run's last jobs.
/// Just over the little more that is added to a pause of a minute.
const SHORT_REST: Duration = Duration::from_secs(16);
/// A pause that the broker has.
const PIECES: Duration = Duration::from_secs(4);
/// The longest pause that is taken from what another worker says.
const LONGEST_HEARSAY: Duration = Duration::from_secs(3600);
/// How long telling the other workers may take.
const ANNOUNCING: Duration = Duration::from_secs(5);
/// How long after its delivery an outcome may still be recorded, or the job settled: until the
/// broker takes the job back by force. A job that was let go sooner would come back, counted, to a
/// broker that is no better.
const LONGEST_WAIT_FOR_BROKER: Duration = Duration::from_secs(25 * 60);
/// How long the broker has for that once the worker is to stop.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a worker works with. Clones share it.
#[derive(Clone, Debug)]
pub struct Worker {
    /// What it calls itself in what it records: nobody else has this name.
    pub name: String,
    /// Where jobs come from and outcomes go to.
    pub broker: SharedBroker,
    /// Where digests go to.
    pub store: SharedStore,
    /// Where the work is done.
    pub slots: Arc<Slots>,
    /// What is counted.
    pub metrics: Metrics,
    /// How long jobs in hand may go on once a stop was asked for.
    pub drain: Duration,
    /// How long one job may wait for machine and store to get well before the worker gives up;
    /// `None` is for ever.
    pub patience: Option<Duration>,
}

/// A name for the worker in this process: its machine's (in a container, the container's) and its
/// process id.
pub fn own_name() -> String {
    let system = rustix::system::uname();
    format!(
        "{}-{}",
        system.nodename().to_string_lossy(),
        std::process::id()
    )
}

/// What the jobs of one worker share.
#[derive(Debug, Default)]
struct Shared {
    /// Hosts to be left alone.
    hosts: Mutex<Hosts>,
    /// When machine and store were last found well again. Written while they are not well: nobody
    /// starts a job then, and one looks after them.
    well: tokio::sync::RwLock<Option<Instant>>,
    /// Set when patience ran out.
    given_up: Mutex<Option<Fault>>,
}

impl Worker {
    /// Works on up to `slots` jobs at a time until `shutdown`, then finishes or hands back what is
    /// in hand.
    ///
    /// # Errors
    /// When the broker is gone, or machine or store were not well for longer than `patience`.
    pub async fn run(&self, slots: u16, shutdown: &Shutdown) -> Result<(), Fault> {
        let mut deliveries = self.broker.deliveries(slots).await?;
        let shared = Arc::new(Shared::default());
        // Ends slots: at the end of the drain, or at once.
        let stop = shutdown.hard.child_token();
        let give_up = CancellationToken::new();
        let mut jobs = JoinSet::new();
        let listener = AbortOnDrop(tokio::spawn(listen(
            Arc::clone(&self.broker),
            self.name.clone(),
            Arc::clone(&shared),
            self.metrics.clone(),
        )));
        loop {
            let delivery = tokio::select! {
                biased;
                () = shutdown.soft.cancelled() => break,
                () = shutdown.hard.cancelled() => break,
                () = give_up.cancelled() => break,
                Some(ended) = jobs.join_next() => {
                    log_panic(ended);
                    continue;
                }
                // As many as there are slots, also when jobs of a lost connection are still in hand.
                delivery = deliveries.next(), if jobs.len() < usize::from(slots) => delivery,
            };
            let Some(delivery) = delivery else {
                return Err(Fault::infra("the broker delivers no more"));
            };
            let (worker, shared) = (self.clone(), Arc::clone(&shared));
            let (stop, soft, give_up) = (stop.clone(), shutdown.soft.clone(), give_up.clone());
            jobs.spawn(async move {
                worker
                    .handle(delivery, &shared, &stop, &soft, &give_up)
                    .await;
            });
        }
        drop(listener);
        // No more are taken; what the broker handed out already goes back as this is dropped.
        drop(deliveries);
        let drained = async {
            while let Some(ended) = jobs.join_next().await {
                log_panic(ended);
            }
        };
        let drain = if give_up.is_cancelled() {
            Duration::ZERO
        } else {
            self.drain
        };
        tokio::select! {
            () = drained => {}
            () = tokio::time::sleep(drain) => stop.cancel(),
            () = shutdown.hard.cancelled() => {}
        }
        while let Some(ended) = jobs.join_next().await {
            log_panic(ended);
        }
        let given_up = shared
            .given_up
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        given_up.map_or(Ok(()), Err)
    }

    /// Takes one delivery to its settlement. Dropping it unsettled gives it back.
    async fn handle(
        &self,
        delivery: Delivery,
        shared: &Shared,
        stop: &CancellationToken,
        soft: &CancellationToken,
        give_up: &CancellationToken,
    ) {
        let host = host_of(&delivery.job.url);
        let start = Instant::now();
        let hold = Hold { start, stop };
        let turn = shared.hosts().turn(&host, start);
        match turn {
            Turn::Go => {}
            Turn::Wait(rest) => {
                debug!(repo = %delivery.job.repo, host, "waits for its host");
                return self
                    .hand_back(delivery, HandedBack::Host, first_piece(rest), &hold)
                    .await;
            }
            Turn::GiveUp(duration) => {
                let fault = Fault::throttled(
                    format!(
                        "not asked: {host} has turned everybody away for {}",
                        format_duration(duration)
                    ),
                    None,
                );
                let outcome = Outcome::Failed(fault.kind);
                return self
                    .finish(delivery, outcome, &Err(fault), &hold, Settlement::Done)
                    .await;
            }
        }
        let mut ill = Ill::default();
        let held = start + LONGEST_HOLD;
        let mut last = None;
        let result = loop {
            // Nobody starts while somebody looks after machine or store.
            let well = tokio::time::timeout_at(held.into(), shared.well.read()).await;
            if well.is_err() || Instant::now() >= held {
                debug!(operation = "infra", repo = %delivery.job.repo, "handed back: held too long");
                // Most of the time went into attempts, not into waiting for what was not well: such
                // a job must not come back for ever.
                let worked = ill.since.is_none_or(|ill| ill.elapsed() < LONGEST_HOLD / 2);
                if let Some(fault) = last.filter(|_| worked) {
                    if delivery.waits >= HELD_AND_FAILED {
                        break Err(fault);
                    }
                    self.metrics.handed_back(HandedBack::Infra);
                    return self
                        .again(delivery, HELD_TOO_LONG, Counts::Wait, &hold)
                        .await;
                }
                return self
                    .hand_back(delivery, HandedBack::Infra, HELD_TOO_LONG, &hold)
                    .await;
            }
            drop(well);
            if soft.is_cancelled() || give_up.is_cancelled() {
                return self
                    .hand_back(delivery, HandedBack::Stopping, HANDED_BACK, &hold)
                    .await;
            }
            let started = Instant::now();
            match attempt(&delivery.job, &self.store, &self.slots, &self.metrics, stop).await {
                Ok(attempt) => break Ok(attempt),
                Err(SlotError::Stopped) => {
                    return self
                        .hand_back(delivery, HandedBack::Stopping, HANDED_BACK, &hold)
                        .await;
                }
                Err(SlotError::Fault(fault)) if fault.kind == FaultKind::Infra => {
                    let since = *ill.since.get_or_insert_with(Instant::now);
                    last = Some(fault.clone());
                    let waited = since.elapsed();
                    if ill.well_but_failed >= WELL_BUT_FAILED {
                        break Err(fault);
                    }
                    if self.patience.is_some_and(|patience| waited >= patience) {
                        debug!(
                            operation = "infra",
                            repo = %delivery.job.repo,
                            "giving up after {} s, {} not done: {fault}",
                            waited.as_secs(),
                            delivery.job.repo
                        );
                        *shared
                            .given_up
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner) = Some(fault);
                        give_up.cancel();
                        return self
                            .hand_back(delivery, HandedBack::Stopping, HANDED_BACK, &hold)
                            .await;
                    }
                    tokio::select! {
                        () = self.until_well(shared, &fault, started, &mut ill) => {}
                        // Handed back above.
                        () = tokio::time::sleep_until(held.into()) => {}
                        () = soft.cancelled() => {}
                        () = stop.cancelled() => {}
                        () = give_up.cancelled() => {}
                    }
                }
                Err(SlotError::Fault(fault)) => break Err(fault),
            }
        };
        self.conclude(delivery, result, shared, &host, &hold).await;
    }

    async fn conclude(
        &self,
        delivery: Delivery,
        result: Result<Attempt, Fault>,
        shared: &Shared,
        host: &str,
        hold: &Hold<'_>,
    ) {
        let repo = delivery.job.repo.clone();
        let outcome = result.as_ref().map(|attempt| attempt.outcome);
        if outcome == Ok(Outcome::Processed) {
            self.metrics.stored_after(delivery.enqueued);
        }
        let class = result.as_ref().err().map(|fault| fault.kind);
        if !matches!(
            class,
            Some(FaultKind::Throttled | FaultKind::Transient | FaultKind::Killed)
        ) {
            shared.hosts().answered(host);
        }
        match decide(outcome, delivery.attempt, delivery.waits) {
            Decision::Finish(outcome) => {
                self.finish(delivery, outcome, &result, hold, Settlement::Done)
                    .await;
            }
            Decision::Bury => {
                let outcome = Outcome::Failed(FaultKind::Poison);
                self.finish(delivery, outcome, &result, hold, Settlement::Dead)
                    .await;
            }
            Decision::Retry(pause) => {
                let why = result.err().map(|fault| fault.message).unwrap_or_default();
                self.metrics.retried(class.unwrap_or(FaultKind::Transient));
                info!(
                    operation = "retry",
                    repo = %repo,
                    attempt = delivery.attempt + 1,
                    pause_seconds = pause.as_secs(),
                    "trying {repo} again in {} s: {why}",
                    pause.as_secs()
                );
                self.again(delivery, pause, Counts::Attempt, hold).await;
            }
            Decision::Wait(pause) => {
                self.metrics.retried(FaultKind::Throttled);
                // And a little more, so that not all come back at once.
                let pause = pause.mul_f64(1.0 + fastrand::f64() / 4.0);
                let asked = result.is_err_and(|fault| fault.retry_after.is_some());
                let now = Instant::now();
                let paused = shared.hosts().turned_away(host, &repo, asked, pause, now);
                let what = if paused { host } else { repo.name() };
                warn!(
                    operation = "throttled",
                    repo = %repo,
                    host,
                    host_paused = paused,
                    pause_seconds = pause.as_secs(),
                    "{host} turned {repo} away: leaving {what} alone for {} s",
                    pause.as_secs()
                );
                if paused {
                    self.metrics.host_paused(host, pause);
                    self.announce(host, pause).await;
                }
                self.again(delivery, pause, Counts::Wait, hold).await;
            }
            // The caller has paused, and the job failed again and again on a machine that was well.
            Decision::Pause => {
                let outcome = Outcome::Failed(FaultKind::Infra);
                self.finish(delivery, outcome, &result, hold, Settlement::Done)
                    .await;
            }
        }
    }

    /// Tells the other workers that `host` wants to be left alone.
    async fn announce(&self, host: &str, pause: Duration) {
        let until = OffsetDateTime::now_utc() + pause;
        let pause = HostPause {
            host: host.to_owned(),
            until_millis: i64::try_from(until.unix_timestamp_nanos() / 1_000_000)
                .unwrap_or(i64::MAX),
            worker: self.name.clone(),
        };
        let announced =
            tokio::time::timeout(ANNOUNCING, self.broker.announce(&Notice::HostPause(pause))).await;
        if !matches!(announced, Ok(Ok(()))) {
            // Each of them finds out by itself.
            debug!(
                operation = "throttled",
                host, "the others could not be told"
            );
        }
    }

    /// Records the outcome, then settles: a job whose outcome is not safe comes back.
    async fn finish(
        &self,
        delivery: Delivery,
        outcome: Outcome,
        result: &Result<Attempt, Fault>,
        hold: &Hold<'_>,
        settlement: Settlement,
    ) {
        let (attempt, message) = match result {
            Ok(attempt) => (*attempt, String::new()),
            Err(fault) => (outcome.into(), fault.message.clone()),
        };
        let repo = &delivery.job.repo;
        let millis = u64::try_from(hold.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let record = OutcomeRecord {
            run: delivery.job.run.clone(),
            repo: repo.clone(),
            pushed_at: delivery.job.pushed_at.clone(),
            outcome,
            message: message.clone(),
            attempt: delivery.attempt,
            millis,
            fetched_bytes: attempt.fetched_bytes,
            stored_bytes: attempt.stored_bytes,
            worker: self.name.clone(),
        };
        match outcome {
            Outcome::Failed(class) => warn!(
                operation = "job",
                repo = %repo,
                class = %class,
                attempt = delivery.attempt,
                millis,
                "{repo} {outcome}: {message}"
            ),
            // Nothing was done, though the feed asked for it.
            Outcome::Superseded => info!(
                operation = "job",
                repo = %repo,
                pushed_at = delivery.job.pushed_at.as_str(),
                "{repo} {outcome}: the store has a newer push than {}",
                delivery.job.pushed_at
            ),
            _ => debug!(operation = "job", repo = %repo, millis, "{repo} {outcome}"),
        }
        let event = Event::Outcome(record);
        if let Err(fault) = hold.wait_for(self.broker.record(&event)).await {
            let id = delivery.job.id();
            warn!(
                operation = "record",
                job = id,
                "the outcome of {id} could not be recorded: {fault}"
            );
            return;
        }
        self.metrics.job_ended(outcome);
        failpoint::hit("after-outcome");
        settle(delivery, settlement, hold).await;
    }

    /// Gives a job back with nothing said against it.
    async fn hand_back(
        &self,
        delivery: Delivery,
        why: HandedBack,
        after: Duration,
        hold: &Hold<'_>,
    ) {
        self.metrics.handed_back(why);
        self.again(delivery, after, Counts::Neither, hold).await;
    }

    async fn again(&self, delivery: Delivery, after: Duration, counts: Counts, hold: &Hold<'_>) {
        let settlement = Settlement::Again {
            after,
            attempt: delivery.attempt + u32::from(counts == Counts::Attempt),
            waits: delivery.waits + u32::from(counts == Counts::Wait),
            returns: 0,
        };
        settle(delivery, settlement, hold).await;
    }

    /// Returns when machine and store look well again after an attempt that `started` then and
    /// failed on them.
    async fn until_well(&self, shared: &Shared, fault: &Fault, started: Instant, ill: &mut Ill) {
        // One looks; the others wait here for it.
        let mut well = shared.well.write().await;
        if well.is_some_and(|well| well >= started) {
            ill.since = None;
            return;
        }
        error!(
            operation = "infra",
            "not a repository's fault, no job is started until it is mended: {fault}"
        );
        let _pause = self.metrics.infra_pause();
        let since = ill.since.unwrap_or(started);
        let mut pause = SHORTEST_PAUSE * 2_u32.pow(ill.well_but_failed);
        loop {
            tokio::time::sleep(pause).await;
            let looked = match self.slots.probe().await {
                Ok(()) => self.store.probe().await,
                unwell => unwell,
            };
            match looked {
                Ok(()) => {
                    info!(operation = "infra", "machine and store are well again");
                    *well = Some(Instant::now());
                    *ill = Ill {
                        since: None,
                        well_but_failed: ill.well_but_failed + 1,
                    };
                    return;
                }
                Err(fault) if self.patience.is_some_and(|p| since.elapsed() >= p) => {
                    // The caller gives up when its job fails once more.
                    warn!(operation = "infra", "still not well: {fault}");
                    return;
                }
                Err(fault) => warn!(operation = "infra", "still not well: {fault}"),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// What a job has met of a machine or store that was not well.
#[derive(Debug, Default)]
struct Ill {
    /// When it first did; `None` while they are well.
    since: Option<Instant>,
    /// How often they were found well after that, by this job's own look.
    well_but_failed: u32,
}

/// For how long a delivery can be held.
struct Hold<'a> {
    /// When it came.
    start: Instant,
    stop: &'a CancellationToken,
}

impl Hold<'_> {
    /// Waits for the broker as long as there is any use in that.
    async fn wait_for(&self, call: impl Future<Output = Result<(), Fault>>) -> Result<(), Fault> {
        let stopping = async {
            self.stop.cancelled().await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        let too_late = self.start + LONGEST_WAIT_FOR_BROKER;
        tokio::select! {
            biased;
            done = call => done,
            () = tokio::time::sleep_until(too_late.into()) => Err(Fault::infra("no answer")),
            () = stopping => Err(Fault::infra("no answer before the worker stopped")),
        }
    }
}

/// How long to wait for now, of a host's pause of which `rest` is left.
fn first_piece(rest: Duration) -> Duration {
    match rest <= SHORT_REST {
        true => rest.min(PIECES),
        false => rest,
    }
}

/// Which of a delivery's counts goes up when it is delivered again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Counts {
    Attempt,
    Wait,
    Neither,
}

impl Shared {
    fn hosts(&self) -> MutexGuard<'_, Hosts> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task that is not to outlive whoever started it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Leaves hosts alone that other workers were turned away by.
async fn listen(broker: SharedBroker, name: String, shared: Arc<Shared>, metrics: Metrics) {
    let mut announcements = match broker.announcements().await {
        Ok(announcements) => announcements,
        Err(fault) => {
            // This worker finds out by itself.
            warn!(
                operation = "throttled",
                "not told of what other workers meet: {fault}"
            );
            return;
        }
    };
    while let Some(notice) = announcements.next().await {
        let Notice::HostPause(pause) = notice else {
            continue;
        };
        if pause.worker == name {
            continue;
        }
        let now = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        let left = u64::try_from(i128::from(pause.until_millis) - now).unwrap_or(0);
        // Clocks differ, and a fleet is not to be stopped by a wrong one. A little more, so that
        // not all come back at once.
        let left = Duration::from_millis(left).min(LONGEST_HEARSAY);
        let left = left.mul_f64(1.0 + fastrand::f64() / 4.0);
        if shared.hosts().heard(&pause.host, left, Instant::now()) {
            metrics.host_paused(&pause.host, left);
            info!(
                operation = "throttled",
                host = pause.host,
                host_paused = true,
                pause_seconds = left.as_secs(),
                "{} turned {} away: leaving it alone for {} s",
                pause.host,
                pause.worker,
                left.as_secs()
            );
        }
    }
}

/// The host of a URL with its port; empty for a path.
fn host_of(url: &str) -> String {
    Url::parse(url)
        .map(|url| authority(&url))
        .unwrap_or_default()
}

async fn settle(delivery: Delivery, settlement: Settlement, hold: &Hold<'_>) {
    let id = delivery.job.id();
    if let Err(fault) = hold.wait_for(delivery.settle(settlement)).await {
        // It comes again, and the store or the ledger says then that it is done.
        warn!(
            operation = "settle",
            job = id,
            "{id} could not be settled: {fault}"
        );
    }
}

fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(panic) = ended {
        // Its delivery was dropped, so it comes again, up to the broker's limit.
        error!(operation = "job", "a job's task panicked: {panic}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_seconds_of_a_pause_do_not_cost_a_minute() {
        for (rest, piece) in [(1, 1), (4, 4), (5, 4), (15, 4), (17, 17), (60, 60)] {
            let piece = Duration::from_secs(piece);
            assert_eq!(first_piece(Duration::from_secs(rest)), piece, "{rest}");
        }
    }
}
