//! The consuming loop: takes deliveries, has them worked on, and does what the verdict on each says.

use std::sync::Arc;
use std::time::Duration;

use common::broker::{DELIVERY_LIMIT, Delivery, Event, Settlement, SharedBroker};
use common::failpoint;
use common::fault::{Fault, FaultKind};
use common::outcome::{Outcome, OutcomeRecord};
use common::shutdown::Shutdown;
use common::store::SharedStore;
use common::telemetry::traces::{Span, Traces};
use common::text::format_duration;
use futures::StreamExt;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, error_span, info, warn};
use url::Url;

use crate::backlog::{BacklogWatch, FRESH, place_for};
use crate::fetch::host::authority;
use crate::host_rate::HostRate;
use crate::host_throttle::{HostPermit, HostThrottle, stretch};
use crate::infra_gate::InfraGate;
use crate::job::{Attempt, Kept, Work};
use crate::metrics::{HandedBack, Metrics};
use crate::notices::{Notices, Taken};
use crate::resolver::Resolver;
use crate::slot::SlotError;
use crate::slot::slots::Slots;
use crate::verdict::{Pause, Progress, State, verdict};

/// How long the broker has to take what is left to say once the drain is over …
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(5);
/// … and after a second signal.
const LAST_WORD_AT_ONCE: Duration = Duration::from_millis(300);
/// What a worker works with. Clones share it.
#[derive(Clone, Debug)]
pub struct Worker {
    /// What it calls itself in what it records. Unique.
    pub name: String,
    /// Where jobs come from and outcomes go to.
    pub broker: SharedBroker,
    /// Where digests go to.
    pub store: SharedStore,
    /// Where the work is done.
    pub slots: Arc<Slots>,
    /// What is counted.
    pub metrics: Metrics,
    /// Receives a trace of each job.
    pub traces: Traces,
    /// How long jobs in hand may go on after a stop was asked for.
    pub drain: Duration,
    /// Most fetches that the whole fleet begins in a second, from one host.
    pub host_rate: Option<f64>,
    /// How long machine and store may be at fault before the worker gives up; `None` is for ever.
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

/// How the time that the broker lends a job for is divided. All `None` if it does so without limit.
#[derive(Clone, Copy, Debug)]
pub struct Loan {
    /// How long a job may be held before its last attempt begins.
    pub hold: Option<Duration>,
    /// How long that attempt and a drain may take together.
    pub work: Option<Duration>,
    /// How long after its delivery a job may still be recorded and settled. One that was let go
    /// sooner would come back, counted, to a broker that is no better.
    pub settle: Option<Duration>,
}

impl Loan {
    /// Divides `limit`: a third for waiting, half for work, the rest as a margin.
    pub fn of(limit: Option<Duration>) -> Self {
        Self {
            hold: limit.map(|limit| limit / 3),
            work: limit.map(|limit| limit / 2),
            settle: limit.map(|limit| limit * 5 / 6),
        }
    }
}

impl Worker {
    /// Works on up to `slots` jobs at a time until `shutdown`, then finishes or hands back what is
    /// in hand.
    ///
    /// # Errors
    /// When the broker is gone, or machine or store were at fault for longer than `patience`.
    pub async fn run(&self, slots: u16, shutdown: &Shutdown) -> Result<(), Fault> {
        self.run_behind(Arc::default(), slots, shutdown).await
    }

    /// Like [`Worker::run`]; `gate` shows whether machine and store are well.
    ///
    /// # Errors
    /// As [`Worker::run`].
    pub async fn run_behind(
        &self,
        gate: Arc<InfraGate>,
        slots: u16,
        shutdown: &Shutdown,
    ) -> Result<(), Fault> {
        self.slots.tell_walls();
        let shift = Arc::new(Shift::new(self, gate, slots, shutdown));
        self.metrics.show(&shift.throttle, &shift.gate);
        let mut beside = JoinSet::new();
        let notices = Arc::clone(&shift.notices);
        beside.spawn(async move { notices.listen().await });
        let notices = Arc::clone(&shift.notices);
        beside.spawn(async move { notices.tell().await });
        let this = Arc::clone(&shift);
        beside.spawn(async move {
            let patience = this.worker.patience;
            this.gate.look_after(patience, || this.probe()).await;
        });
        let mut jobs = JoinSet::new();
        let consumed = shift.consume(&mut jobs).await;
        tokio::select! {
            () = finished(&mut jobs) => {}
            () = sleep(self.drain) => {}
            _ = shift.gate.given_up() => {}
            () = shift.hard.cancelled() => {}
        }
        shift.stop.cancel();
        finished(&mut jobs).await;
        beside.shutdown().await;
        tokio::select! {
            () = shift.notices.tell_the_end() => {}
            () = shift.last_words() => {}
        }
        match shift.gate.watch().borrow().given_up() {
            Some(fault) => Err(fault.clone()),
            None => consumed,
        }
    }
}

/// One call of [`Worker::run`].
#[derive(Debug)]
struct Shift {
    worker: Worker,
    gate: Arc<InfraGate>,
    throttle: Arc<HostThrottle>,
    rate: Option<HostRate>,
    backlog: BacklogWatch,
    /// How many jobs it may have in hand.
    slots: u16,
    resolver: Resolver,
    loan: Loan,
    notices: Arc<Notices>,
    /// Take no more jobs.
    soft: CancellationToken,
    /// End slots: the drain is over.
    stop: CancellationToken,
    /// End everything.
    hard: CancellationToken,
}

/// What a worker remembers of a delivery while it holds it.
struct Held {
    _taken: Taken,
    start: Instant,
    span: Span,
    host: String,
    /// When the last attempt began.
    attempted: Instant,
    /// How much of the time it spent waiting for the gate.
    waited: Duration,
    /// [`State::infra_failures`].
    infra_failures: u32,
    /// Its last attempt closed the gate.
    closed_gate: bool,
    /// Its host is asked by it before others.
    probes: bool,
    last_fault: Option<Fault>,
    /// Of its last attempt.
    bytes: Option<Attempt>,
    /// What its last attempt made and the store did not take. At most half a megabyte, and as many
    /// of them as there are slots.
    kept: Option<Kept>,
}

/// Why a job's host is not asked now.
enum Busy {
    /// So much time has to pass, unless something changes.
    Wait(Duration, HandedBack),
    /// It has rate-limited everybody for too long to wait for it.
    GiveUp(Fault),
}

impl Held {
    /// Tells the trace how it ends here.
    fn ends(&mut self, progress: &Progress, outcome: Option<Outcome>) {
        let how = match (&outcome, progress.handed_back()) {
            (Some(outcome), _) => outcome.as_ref(),
            (None, Some(_)) => "handed_back",
            (None, None) => "retry",
        };
        self.span.set("repofleet.outcome", how.to_owned());
        if let Some(why) = progress.handed_back() {
            self.span.set("repofleet.reason", why.as_ref().to_owned());
        }
        if let Some(fault) = progress.fault() {
            self.span.fail(fault);
        }
        if let Some(attempt) = &self.bytes {
            self.span
                .set("repofleet.fetched_bytes", attempt.fetched_bytes);
            self.span
                .set("repofleet.stored_bytes", attempt.stored_bytes);
        }
    }

    fn state(&self, delivery: &Delivery) -> State {
        State {
            attempt: delivery.attempt,
            waits: delivery.waits,
            returns: delivery.returns,
            infra_failures: self.infra_failures,
            stretch: stretch(),
        }
    }
}

impl Shift {
    fn new(worker: &Worker, gate: Arc<InfraGate>, slots: u16, shutdown: &Shutdown) -> Self {
        let throttle = Arc::default();
        let tokens = worker.slots.policy().tokens.iter();
        let tokens = tokens.map(|token| token.host.to_string()).collect();
        Self {
            rate: worker
                .host_rate
                .map(|rate| HostRate::new(rate, Instant::now())),
            backlog: BacklogWatch::new(&worker.broker),
            slots,
            notices: Notices::new(&worker.name, &worker.broker, &gate, &throttle, tokens),
            gate,
            throttle,
            resolver: Resolver::new(worker.slots.policy().names()),
            loan: Loan::of(worker.broker.loan_limit()),
            soft: shutdown.soft.clone(),
            stop: shutdown.hard.child_token(),
            hard: shutdown.hard.clone(),
            worker: worker.clone(),
        }
    }

    /// Takes jobs until the worker is to stop.
    ///
    /// A job that came back unsettled may have killed the worker that had it. It is worked on
    /// alone, so that its neighbours are not charged if it does so again.
    async fn consume(self: &Arc<Self>, jobs: &mut JoinSet<()>) -> Result<(), Fault> {
        let ended = async {
            tokio::select! {
                () = self.soft.cancelled() => {}
                () = self.hard.cancelled() => {}
                _ = self.gate.given_up() => {}
            }
        };
        tokio::pin!(ended);
        loop {
            let until = CancellationToken::new();
            let deliveries = self
                .worker
                .broker
                .deliveries_until(self.slots, until.clone());
            let mut deliveries = tokio::select! {
                deliveries = deliveries => deliveries?,
                () = &mut ended => return Ok(()),
            };
            let suspect = loop {
                let delivery = tokio::select! {
                    biased;
                    () = &mut ended => return Ok(()),
                    Some(ended) = jobs.join_next() => {
                        log_panic(ended);
                        continue;
                    }
                    delivery = deliveries.next() => delivery,
                };
                match delivery {
                    Some(delivery) if delivery.returns > 0 => {
                        break (self.hold(&delivery), delivery);
                    }
                    Some(delivery) => self.start(delivery, jobs),
                    None => return Err(Fault::infra("the broker delivers no more")),
                }
            };
            until.cancel();
            while let Some(delivery) = deliveries.next().await {
                let (this, held) = (Arc::clone(self), self.hold(&delivery));
                jobs.spawn(async move {
                    this.conclude(delivery, Progress::MadeWay, held).await;
                });
            }
            self.alone(suspect, jobs).await;
        }
    }

    /// Works on a job once no other is in hand.
    async fn alone(self: &Arc<Self>, (held, delivery): (Held, Delivery), jobs: &mut JoinSet<()>) {
        info!(
            operation = "suspect",
            repo = %delivery.job.repo,
            returns = delivery.returns,
            "{} came back unsettled: working on it alone",
            delivery.job.repo
        );
        tokio::select! {
            () = finished(jobs) => {}
            () = self.soft.cancelled() => {}
            _ = self.gate.given_up() => {}
        }
        let this = Arc::clone(self);
        jobs.spawn(async move { this.handle(delivery, held).await });
        tokio::select! {
            () = finished(jobs) => {}
            () = self.soft.cancelled() => {}
            _ = self.gate.given_up() => {}
        }
    }

    fn start(self: &Arc<Self>, delivery: Delivery, jobs: &mut JoinSet<()>) {
        let (this, held) = (Arc::clone(self), self.hold(&delivery));
        jobs.spawn(async move { this.handle(delivery, held).await });
    }

    fn hold(&self, delivery: &Delivery) -> Held {
        let start = Instant::now();
        Held {
            _taken: self.notices.take(delivery.job.id()),
            start,
            span: self
                .worker
                .traces
                .job(delivery, self.worker.broker.system()),
            host: host_of(&delivery.job.url),
            attempted: start,
            waited: Duration::ZERO,
            infra_failures: 0,
            closed_gate: false,
            probes: false,
            last_fault: None,
            bytes: None,
            kept: None,
        }
    }

    /// Takes one delivery to its settlement. Dropped unsettled, it goes back.
    async fn handle(&self, delivery: Delivery, held: Held) {
        let job = &delivery.job;
        let trace_id = held.span.trace_id();
        let span = error_span!(
            "job",
            id = job.id(),
            repo = %job.repo,
            attempt = delivery.attempt,
            trace_id
        );
        let handling = async {
            let mut kept = Some((delivery, held));
            while let Some((delivery, mut held)) = kept {
                let progress = self.progress(&delivery, &mut held).await;
                kept = self.conclude(delivery, progress, held).await;
            }
        };
        handling.instrument(span).await;
    }

    /// Makes an attempt, if the job's host and this machine allow one.
    async fn progress(&self, delivery: &Delivery, held: &mut Held) -> Progress {
        // The broker's own count begins anew each time that the job is handed back.
        if delivery.returns > DELIVERY_LIMIT {
            return Progress::KillsWorkers(Fault::killed(format!(
                "came back unsettled {} times: it may kill its worker",
                delivery.returns
            )));
        }
        let waiting = held.span.child("wait");
        if let Some(ended) = self.wait_at_gate(held).await {
            return ended;
        }
        if let Some(ended) = self.wait_for_host(held).await {
            return ended;
        }
        drop(waiting);
        held.attempted = Instant::now();
        let Worker {
            store,
            slots,
            metrics,
            ..
        } = &self.worker;
        let work = Work {
            job: &delivery.job,
            store,
            slots,
            metrics,
            span: &held.span,
            stop: &self.stop,
        };
        match work.attempt(&mut held.kept).await {
            Ok(attempt) => {
                let outcome = attempt.outcome;
                held.bytes = Some(attempt);
                Progress::Done(outcome)
            }
            Err(SlotError::Stopped) => Progress::Stopping,
            Err(SlotError::Fault(fault)) => Progress::Failed(self.charged(fault).await),
        }
    }

    /// Waits until jobs may start; `Some` if that won't be in time.
    async fn wait_at_gate(&self, held: &mut Held) -> Option<Progress> {
        let since = Instant::now();
        let opened = tokio::select! {
            biased;
            () = self.soft.cancelled() => Some(false),
            () = self.stop.cancelled() => Some(false),
            () = self.held_too_long(held.start) => None,
            opened = self.gate.opened() => Some(opened),
        };
        held.waited += since.elapsed();
        held.infra_failures += u32::from(std::mem::take(&mut held.closed_gate));
        match opened {
            Some(true) => None,
            Some(false) => Some(Progress::Stopping),
            None => {
                debug!(operation = "infra", "handed back: held too long");
                // If the time went into waiting instead, its last fault is the machine's.
                let worked = held.waited < held.start.elapsed() / 2;
                let fault = held.last_fault.take().filter(|_| worked);
                Some(Progress::HeldTooLong(fault))
            }
        }
    }

    /// Returns once a job held since `start` must go back before another attempt begins.
    async fn held_too_long(&self, start: Instant) {
        match self.loan.hold {
            Some(hold) => sleep_until(start + hold).await,
            None => std::future::pending().await,
        }
    }

    /// Waits until the job's host may be asked; `Some` if the job goes back before.
    async fn wait_for_host(&self, held: &mut Held) -> Option<Progress> {
        let start = held.start;
        tokio::select! {
            biased;
            () = self.soft.cancelled() => Some(Progress::Stopping),
            () = self.stop.cancelled() => Some(Progress::Stopping),
            () = self.held_too_long(start) => Some(Progress::HeldTooLong(None)),
            ended = self.permitted(held) => ended,
        }
    }

    /// Returns once the job's host may be asked; `Some` if it may not before others need the job's place.
    async fn permitted(&self, held: &mut Held) -> Option<Progress> {
        let since = Instant::now();
        let mut changes = self.throttle.watch();
        loop {
            changes.mark_unchanged();
            let (wait, why) = match self.ask_host(held).await {
                Ok(()) => return None,
                Err(Busy::Wait(wait, why)) => (wait, why),
                Err(Busy::GiveUp(fault)) => return Some(Progress::HostGivenUp(fault)),
            };
            let backlog = self.backlog.look().await;
            let place = backlog.and_then(|backlog| place_for(backlog, self.slots));
            let left = place.map(|place| place.saturating_sub(since.elapsed()));
            if left == Some(Duration::ZERO) {
                return Some(Progress::HostBusy(why));
            }
            tokio::select! {
                _ = changes.changed() => {}
                // Others may need the place later.
                () = sleep(wait.min(left.unwrap_or(FRESH)).min(FRESH)) => {}
            }
        }
    }

    /// Takes the permit to ask a job's host, if there is one now.
    async fn ask_host(&self, held: &mut Held) -> Result<(), Busy> {
        let host = &held.host;
        // Before the host's permit, since it may take a while.
        let backlog = match &self.rate {
            Some(_) => self.backlog.look().await,
            None => None,
        };
        let now = Instant::now();
        let permit = self.throttle.permit(host, now);
        match permit {
            HostPermit::Granted | HostPermit::Probe => {}
            HostPermit::Wait(wait) => return Err(Busy::Wait(wait, HandedBack::Host)),
            HostPermit::GiveUp(since) => {
                let since = format_duration(since);
                let why = format!("not fetched: {host} has rate-limited everybody for {since}");
                return Err(Busy::GiveUp(Fault::throttled(why, None)));
            }
        }
        let is_probe = permit == HostPermit::Probe;
        // A path has no host.
        if let Some(rate) = self.rate.as_ref().filter(|_| !host.is_empty()) {
            let begun = match backlog {
                Some(backlog) => rate.begin(host, backlog.workers, now),
                None => Err(FRESH),
            };
            if let Err(wait) = begun {
                if is_probe {
                    self.throttle.probed(host);
                }
                return Err(Busy::Wait(wait, HandedBack::Rate));
            }
        }
        held.probes = is_probe;
        Ok(())
    }

    /// Charges this machine instead of a repository if no name at all can be resolved.
    async fn charged(&self, fault: Fault) -> Fault {
        let Some(host) = &fault.unresolved else {
            return fault;
        };
        let answers = self.resolver.answers(host, Instant::now());
        // Whoever stops doesn't need to know.
        match self.stop.run_until_cancelled(answers).await {
            Some(false) => self.resolver.dead(),
            _ => fault,
        }
    }

    /// Finds out whether jobs can be worked on.
    async fn probe(&self) -> Result<(), Fault> {
        let no_names = self.gate.watch().borrow().no_names();
        if no_names {
            self.resolver.probe().await?;
        }
        self.worker.store.probe().await?;
        self.worker.slots.probe().await
    }

    /// Does what the verdict says; gives back a delivery that is to be tried again here.
    async fn conclude(
        &self,
        delivery: Delivery,
        progress: Progress,
        mut held: Held,
    ) -> Option<(Delivery, Held)> {
        let verdict = verdict(&held.state(&delivery), &progress);
        match verdict.pause {
            Some(Pause::Host { pause, asked }) => {
                let why = progress.fault();
                self.pause_host(&delivery, &held.host, asked, pause, why)
                    .await;
            }
            Some(Pause::Machine) => {
                if let Progress::Failed(fault) = &progress {
                    held.closed_gate = self.gate.close(fault, held.attempted, held.infra_failures);
                    held.last_fault = Some(fault.clone());
                }
            }
            None => self.note_answer(&progress, &held.host),
        }
        if std::mem::take(&mut held.probes) {
            self.throttle.probed(&held.host);
        }
        let Some(settlement) = verdict.settle else {
            return Some((delivery, held));
        };
        match verdict.record {
            Some(outcome) => {
                let fault = progress.fault();
                if let Err(fault) = self.record(&delivery, outcome, fault, &held).await {
                    // Comes back, since its outcome is not safe.
                    held.span.fail(&fault);
                    return None;
                }
            }
            None => self.note_return(&delivery, &progress, &settlement),
        }
        held.ends(&progress, verdict.record);
        self.settle(delivery, settlement, held.start).await;
        None
    }

    /// Takes note of what a host did for a job.
    fn note_answer(&self, progress: &Progress, host: &str) {
        match progress {
            Progress::Done(outcome) if outcome.is_processed() => {
                self.throttle.served(host, Instant::now());
            }
            Progress::Failed(fault) if fault.kind == FaultKind::TooLarge => {
                self.throttle.served(host, Instant::now());
            }
            Progress::Failed(fault) if fault.kind == FaultKind::Gone => {
                self.throttle.answered(host);
            }
            _ => {}
        }
    }

    /// Counts, and logs, that a job goes back.
    fn note_return(&self, delivery: &Delivery, progress: &Progress, settlement: &Settlement) {
        if let Some(why) = progress.handed_back() {
            self.worker.metrics.handed_back(why);
        }
        let (Progress::Failed(fault), Settlement::Again { after, .. }) = (progress, settlement)
        else {
            return;
        };
        self.worker.metrics.retried(fault.kind);
        // A paused host has been logged.
        if fault.kind != FaultKind::Throttled {
            info!(
                operation = "retry",
                attempt = delivery.attempt + 1,
                pause_seconds = after.as_secs(),
                "retrying {} in {}: {fault}",
                delivery.job.repo,
                format_duration(*after)
            );
        }
    }

    /// Pauses the host that rate-limited a job, if it is not the repository's own affair.
    async fn pause_host(
        &self,
        delivery: &Delivery,
        host: &str,
        asked: bool,
        pause: Duration,
        why: Option<&Fault>,
    ) {
        let repo = &delivery.job.repo;
        let throttle = &self.throttle;
        let paused = throttle.rate_limited(host, repo, asked, pause, Instant::now());
        let what = if paused { host } else { repo.name() };
        warn!(
            operation = "throttled",
            host,
            host_paused = paused,
            pause_seconds = pause.as_secs(),
            "{host} rate-limited {repo}; pausing {what} for {}{}",
            format_duration(pause),
            why.map(|fault| format!(": {fault}")).unwrap_or_default()
        );
        if paused {
            let announcing = self.notices.host_paused(host, pause);
            self.stop.run_until_cancelled(announcing).await;
        }
    }

    /// Records an outcome.
    async fn record(
        &self,
        delivery: &Delivery,
        outcome: Outcome,
        fault: Option<&Fault>,
        held: &Held,
    ) -> Result<(), Fault> {
        let job = &delivery.job;
        let bytes = held.bytes.clone().unwrap_or(outcome.into());
        let record = OutcomeRecord {
            run: job.run.clone(),
            repo: job.repo.clone(),
            pushed_at: job.pushed_at.clone(),
            outcome,
            message: fault.map(|fault| fault.message.clone()).unwrap_or_default(),
            attempt: delivery.attempt,
            millis: u64::try_from(held.start.elapsed().as_millis()).unwrap_or(u64::MAX),
            fetched_bytes: bytes.fetched_bytes,
            stored_bytes: bytes.stored_bytes,
            digest: bytes.digest,
            renamed_to: bytes.renamed_to,
            worker: self.worker.name.clone(),
        };
        log_outcome(&record);
        if outcome.is_processed() {
            self.worker.metrics.stored_after(delivery.enqueued);
        }
        let event = Event::Outcome(record);
        let mut span = held.span.call("record");
        let recorded = self
            .in_time(held.start, self.worker.broker.record(&event))
            .await;
        match &recorded {
            Ok(()) => {
                self.worker.metrics.job_ended(outcome);
                if let Outcome::Failed(class) = outcome {
                    let host = self.worker.slots.policy().label(&job.url);
                    self.worker.metrics.failed_at(&host, class);
                }
                failpoint::hit("after-outcome");
            }
            Err(fault) => {
                span.fail(fault);
                warn!(
                    operation = "record",
                    "the outcome of {} could not be recorded: {fault}",
                    job.id()
                );
            }
        }
        recorded
    }

    async fn settle(&self, delivery: Delivery, settlement: Settlement, start: Instant) {
        let id = delivery.job.id();
        if let Err(fault) = self.in_time(start, delivery.settle(settlement)).await {
            // It comes again; store or ledger then say that it is done.
            warn!(operation = "settle", "{id} could not be settled: {fault}");
        }
    }

    /// Waits for the broker as long as there is any use in it for a delivery of `start`.
    async fn in_time(
        &self,
        start: Instant,
        call: impl Future<Output = Result<(), Fault>>,
    ) -> Result<(), Fault> {
        let too_late = async {
            match self.loan.settle {
                Some(settle) => sleep_until(start + settle).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            done = call => done,
            () = too_late => Err(Fault::infra("no answer")),
            () = self.last_words() => Err(Fault::infra("no answer before the worker stopped")),
        }
    }

    /// Returns when a worker that stops must have said what there is to say.
    async fn last_words(&self) {
        self.stop.cancelled().await;
        tokio::select! {
            () = sleep(LAST_WORDS) => {}
            () = async {
                self.hard.cancelled().await;
                sleep(LAST_WORD_AT_ONCE).await;
            } => {}
        }
    }
}

fn log_outcome(record: &OutcomeRecord) {
    let (repo, outcome, millis) = (&record.repo, record.outcome, record.millis);
    match outcome {
        Outcome::Failed(class) => warn!(
            operation = "job",
            class = %class,
            millis,
            "{repo} {outcome}: {}",
            record.message
        ),
        // Nothing was done, though the feed asked for it.
        Outcome::Superseded => info!(
            operation = "job",
            pushed_at = record.pushed_at.as_str(),
            "{repo} {outcome}: the store has a newer push than {}",
            record.pushed_at
        ),
        _ => debug!(operation = "job", millis, "{repo} {outcome}"),
    }
}

/// The host of a URL with its port; empty for a path.
fn host_of(url: &str) -> String {
    Url::parse(url)
        .map(|url| authority(&url))
        .unwrap_or_default()
}

/// Returns when all jobs have ended.
async fn finished(jobs: &mut JoinSet<()>) {
    while let Some(ended) = jobs.join_next().await {
        log_panic(ended);
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
    fn a_broker_without_a_loan_limit_cuts_nothing_short() {
        let loan = Loan::of(None);
        assert_eq!((loan.hold, loan.work, loan.settle), (None, None, None));
        let loan = Loan::of(Some(Duration::from_secs(1800)));
        let minutes = |minutes: u64| Some(Duration::from_secs(60 * minutes));
        assert_eq!(loan.hold, minutes(10));
        assert_eq!((loan.work, loan.settle), (minutes(15), minutes(25)));
    }
}
