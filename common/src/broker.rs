//! The queue boundary: jobs, their deliveries and their ledger.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::fault::{Fault, FaultKind};
use crate::ids::RunId;
use crate::job::Job;
use crate::outcome::{Outcome, OutcomeRecord};
use crate::text::sha256;

pub mod memory;

pub mod config;

pub mod amqp;

/// A broker as the programs hold it.
pub type SharedBroker = Arc<dyn Broker>;

/// Delivers each job at least once, to one worker at a time, and keeps a record of its outcome.
///
/// What every implementation promises, and `testing::broker_contract` checks:
/// - a job that was enqueued is delivered until it is settled; a delivery that is dropped
///   unsettled goes back and is delivered again;
/// - a delivery is on loan to one consumer only;
/// - every job enqueued and every event recorded is in the ledger, in the order of the calls of
///   one caller, and a follower sees it exactly as it was recorded;
/// - one [`ProducerLock`] exists at a time;
/// - a dead letter stays until it is removed.
#[async_trait]
pub trait Broker: fmt::Debug + Send + Sync {
    /// Takes jobs; returns once each is safely with the broker.
    async fn enqueue(&self, jobs: BoxStream<'_, Job>) -> Result<Enqueued, Fault>;

    /// Jobs on loan, at most `prefetch` of them unsettled at a time. Ends only with the broker.
    async fn deliveries(&self, prefetch: u16) -> Result<BoxStream<'static, Delivery>, Fault> {
        let until = CancellationToken::new();
        self.deliveries_until(prefetch, until).await
    }

    /// [`Broker::deliveries`] that also end once `until` is cancelled, after what was delivered
    /// already.
    async fn deliveries_until(
        &self,
        prefetch: u16,
        until: CancellationToken,
    ) -> Result<BoxStream<'static, Delivery>, Fault>;

    /// The jobs that wait now, for a worker or for their pause to end, each on loan once the stream
    /// has given it. What is not wanted is settled with [`Settlement::Back`], and may be seen a second
    /// time. Ends early once `until` is cancelled, after what was taken already.
    async fn take_waiting(
        &self,
        until: CancellationToken,
    ) -> Result<BoxStream<'static, Result<Delivery, Fault>>, Fault>;

    /// Appends to the ledger; returns once the event is safely there.
    async fn record(&self, event: &Event) -> Result<(), Fault>;

    /// The ledger from `from` on, and then as it grows. Ends with the broker, or with an error when
    /// the ledger is lost.
    async fn events(&self, from: Position) -> Result<Entries, Fault>;

    /// The ledger from `from` to its end of now. An error is the last item: something is missing
    /// after the items before it.
    async fn history(&self, from: Position) -> Result<Entries, Fault>;

    /// Takes the lock of the one producer; `None` while another has it.
    async fn producer_lock(&self) -> Result<Option<ProducerLock>, Fault>;

    /// Counts the waiting jobs, without those on loan.
    async fn waiting(&self) -> Result<Waiting, Fault>;

    /// Looks at the jobs queue alone: cheap enough for every worker to do every other second.
    async fn backlog(&self) -> Result<Backlog, Fault>;

    /// The dead letters, each taken when the stream is polled for it, and then on loan: nobody else
    /// sees it. Those that are not removed go back once the stream and all letters are dropped.
    async fn dead_letters(&self) -> Result<BoxStream<'static, Result<DeadLetter, Fault>>, Fault>;

    /// Sends a notice to every process that listens now. It is not kept for later listeners, and
    /// may be lost.
    async fn announce(&self, notice: &Notice) -> Result<(), Fault>;

    /// Notices from now on, this process's own included. Ends with the broker.
    async fn announcements(&self) -> Result<BoxStream<'static, Notice>, Fault>;

    /// What OpenTelemetry's semantic conventions call this kind of broker.
    fn system(&self) -> &'static str;

    /// How long a delivery may stay unsettled before the broker takes it back; `None` if it does not
    /// while the consumer lives.
    fn loan_limit(&self) -> Option<Duration>;

    /// Checks that the broker can be reached now.
    async fn probe(&self) -> Result<(), Fault>;

    /// Ends streams and connections; jobs on loan go back at once. All later calls fail.
    async fn close(&self);
}

/// Entries of the ledger, oldest first.
pub type Entries = BoxStream<'static, Result<LedgerEntry, Fault>>;

/// How many jobs a call of [`Broker::enqueue`] took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enqueued {
    /// Jobs that are safely with the broker.
    pub jobs: u64,
}

/// Where to start reading the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// At its oldest event.
    Start,
    /// With what was recorded then. Clocks differ and a ledger is kept in chunks: the first entries
    /// may be older, but none that is newer is left out.
    Since(OffsetDateTime),
    /// After its newest event.
    Now,
}

/// An event and when it was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerEntry {
    /// By the clock of who recorded it, to the second; for an [`Event::Dead`], when its job was
    /// enqueued.
    pub at: OffsetDateTime,
    /// What was recorded.
    pub event: Event,
}

/// How many jobs wait, by what they wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Waiting {
    /// For a worker.
    pub ready: u64,
    /// For their pause to end.
    pub retry: u64,
    /// For a person.
    pub dead: u64,
    /// Workers that take jobs now.
    pub workers: u64,
}

/// What the jobs queue looks like, see [`Broker::backlog`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// [`Waiting::ready`].
    pub ready: u64,
    /// [`Waiting::workers`].
    pub workers: u64,
}

/// A message from one process to all others, see [`Broker::announce`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Notice {
    /// A host rate-limited a worker.
    HostPause(HostPause),
    /// A producer asks which jobs are in work.
    RollCall(RollCall),
    /// A worker's answer to a [`RollCall`].
    InHand(InHand),
}

/// Longest notice that is read, in bytes: an answer with a thousand jobs.
const MAX_NOTICE_BYTES: usize = 256 << 10;
/// Longest name in a notice, of a host or a worker.
const MAX_NOTICE_NAME: usize = 300;

impl Notice {
    /// Parses a message. Whoever may announce may announce anything, so none is read that none of
    /// our processes would send.
    ///
    /// # Errors
    /// With what is wrong with it.
    pub fn parse(message: &[u8]) -> Result<Self, String> {
        if message.len() > MAX_NOTICE_BYTES {
            return Err(format!("{} bytes are too many", message.len()));
        }
        let notice: Self = serde_json::from_slice(message).map_err(|error| error.to_string())?;
        let names = match &notice {
            Self::HostPause(pause) => vec![&pause.host, &pause.worker],
            Self::RollCall(call) => vec![&call.roll_call],
            Self::InHand(answer) => vec![&answer.answers, &answer.worker],
        };
        let is_name = |name: &&String| {
            (1..=MAX_NOTICE_NAME).contains(&name.len()) && !name.contains(char::is_control)
        };
        match names.iter().all(is_name) {
            true => Ok(notice),
            false => Err("it names something by no name".to_owned()),
        }
    }
}

/// Asks every worker to answer with the jobs that it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RollCall {
    /// Random; answers repeat it.
    pub roll_call: String,
}

/// The jobs that a worker holds: delivered to it and not settled yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InHand {
    /// [`RollCall::roll_call`] of the question.
    pub answers: String,
    /// The worker's name.
    pub worker: String,
    /// [`Job::id`] of each.
    pub jobs: Vec<String>,
    /// When each was taken, in milliseconds of Unix time; empty from a worker that does not tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub since_millis: Vec<i64>,
    /// The hosts that it has a token for; `None` from a worker that does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<String>>,
}

/// A host that rate-limited a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPause {
    /// The host, with its port where that is not the scheme's.
    pub host: String,
    /// Until when, in milliseconds of Unix time.
    pub until_millis: i64,
    /// The worker that it rate-limited.
    pub worker: String,
}

/// An entry of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A job was enqueued.
    Job(Job),
    /// A job ended.
    Outcome(OutcomeRecord),
    /// The broker dead-lettered a job. Where there is an [`Event::Outcome`] too, that one counts.
    Dead(DeadJob),
    /// A worker began or ended to wait.
    Worker(WorkerState),
}

/// Why a worker waits. Recorded when it changes; a worker's last record holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerState {
    /// The worker's name.
    pub worker: String,
    /// Why it starts no job: machine or store are at fault. `None` while it works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub infra: Option<String>,
    /// Hosts that rate-limited it, each with the Unix time in milliseconds until which it pauses.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hosts: BTreeMap<String, i64>,
}

/// A job that the broker dead-lettered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadJob {
    /// The job.
    pub job: Job,
    /// Why.
    #[serde(default)]
    pub cause: DeathCause,
}

impl From<Job> for DeadJob {
    fn from(job: Job) -> Self {
        let cause = DeathCause::Unknown;
        Self { job, cause }
    }
}

/// Why the broker dead-lettered a message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeathCause {
    /// Returned unsettled more often than [`DELIVERY_LIMIT`] allows.
    DeliveryLimit,
    /// A worker rejected it ([`Settlement::Dead`]).
    Rejected,
    /// Older than a message TTL that a policy of the broker's sets on this queue.
    Expired(String),
    /// Dropped from this queue, to which a policy of the broker's sets a maximum length.
    Overflow(String),
    /// The ledger does not say.
    #[default]
    Unknown,
}

impl DeathCause {
    /// The class of a job's failure if it has no outcome: a policy is not the repository's fault.
    fn kind(&self) -> FaultKind {
        match self {
            Self::Expired(_) | Self::Overflow(_) => FaultKind::Infra,
            Self::DeliveryLimit | Self::Rejected | Self::Unknown => FaultKind::Killed,
        }
    }
}

impl fmt::Display for DeathCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeliveryLimit => f.write_str(
                "given up by the broker: delivered again and again, never settled",
            ),
            Self::Rejected => f.write_str("rejected by a worker that recorded no outcome"),
            Self::Expired(queue) => write!(
                f,
                "expired: a policy sets message-ttl on {queue}; if it matches the dead-letter queue too, the dead letter is lost"
            ),
            Self::Overflow(queue) => write!(f, "dropped: a policy sets max-length on {queue}"),
            Self::Unknown => f.write_str(
                "given up by the broker, which does not say why: delivered too often, or expired or dropped by a policy",
            ),
        }
    }
}

impl Event {
    /// The run of its job; `None` if it is not about a job.
    pub fn run(&self) -> Option<&RunId> {
        match self {
            Self::Job(job) | Self::Dead(DeadJob { job, .. }) => Some(&job.run),
            Self::Outcome(record) => Some(&record.run),
            Self::Worker(_) => None,
        }
    }

    /// The outcome that it is, or that an [`Event::Dead`] stands for; `None` for all others.
    pub fn into_outcome(self) -> Option<OutcomeRecord> {
        match self {
            Self::Job(_) | Self::Worker(_) => None,
            Self::Outcome(record) => Some(record),
            Self::Dead(DeadJob { job, cause }) => Some(OutcomeRecord::without_work(
                job.key(),
                job.run,
                Outcome::Failed(cause.kind()),
                &cause.to_string(),
            )),
        }
    }
}

/// How often an unsettled job comes back before the broker dead-letters it: the last line of defence
/// against a job that kills its worker.
pub const DELIVERY_LIMIT: u32 = 8;

/// A job on loan. Settling consumes it; dropped unsettled, it goes back to the queue.
#[derive(Debug)]
pub struct Delivery {
    /// What to do.
    pub job: Job,
    /// Earlier attempts that count against the job.
    pub attempt: u32,
    /// How often it was sent to wait for a throttling host.
    pub waits: u32,
    /// How often it came back unsettled since an attempt at it last ended: its worker died, or
    /// lost its connection.
    pub returns: u32,
    /// When the job was enqueued first, by the clock of who did.
    pub enqueued: OffsetDateTime,
    pub(crate) receipt: Box<dyn Receipt>,
}

impl Delivery {
    /// Settles the job. After an error it may be delivered again.
    pub async fn settle(self, settlement: Settlement) -> Result<(), Fault> {
        self.receipt.settle(settlement).await
    }
}

/// What an implementation of [`Broker`] keeps to settle a delivery. Dropping it unused must return
/// the job.
#[async_trait]
pub trait Receipt: fmt::Debug + Send + Sync {
    /// See [`Delivery::settle`].
    async fn settle(self: Box<Self>, settlement: Settlement) -> Result<(), Fault>;
}

/// How a delivery ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Its outcome is recorded; it is never seen again.
    Done,
    /// Deliver it again, not before this long from now, with these counts.
    Again {
        /// The pause.
        after: Duration,
        /// [`Delivery::attempt`] of the next delivery.
        attempt: u32,
        /// [`Delivery::waits`] of the next delivery.
        waits: u32,
        /// [`Delivery::returns`] of the next delivery: 0 once the job has proved harmless.
        returns: u32,
    },
    /// It was only looked at: behind all others that wait for the same, with the counts that it came
    /// with. A pause begins anew.
    Back,
    /// To the dead letters.
    Dead,
}

/// A dead-lettered message, on loan. Dropped, it stays a dead letter.
#[derive(Debug)]
pub struct DeadLetter {
    /// The message's id: [`Job::id`] for a job. Never empty, see [`DeadLetter::payload_id`].
    pub id: String,
    /// The job, or why the message cannot be decoded as one.
    pub job: Result<Job, String>,
    /// The message as it was sent.
    pub payload: Vec<u8>,
    /// [`Delivery::attempt`] of its last delivery.
    pub attempt: u32,
    /// When its job was enqueued; `None` where the message does not say.
    pub at: Option<OffsetDateTime>,
    receipt: Box<dyn Receipt>,
}

impl DeadLetter {
    /// For implementations of [`Broker`], which settle `receipt` as [`Settlement::Done`] or not at
    /// all.
    pub fn new(
        id: String,
        job: Result<Job, String>,
        payload: Vec<u8>,
        attempt: u32,
        at: Option<OffsetDateTime>,
        receipt: Box<dyn Receipt>,
    ) -> Self {
        Self {
            id,
            job,
            payload,
            attempt,
            at,
            receipt,
        }
    }

    /// The id of a message that came without one, the same each time it is read.
    pub fn payload_id(payload: &[u8]) -> String {
        format!("payload-{}", &sha256(payload)[..12])
    }

    /// Removes it for good.
    pub async fn remove(self) -> Result<(), Fault> {
        self.receipt.settle(Settlement::Done).await
    }
}

/// The lock of the one producer; dropping it releases the lock.
#[derive(Debug)]
pub struct ProducerLock {
    /// Cancelled when the lock was lost: there may be another producer now.
    pub lost: CancellationToken,
    _release: Box<dyn Send + Sync + fmt::Debug>,
}

impl ProducerLock {
    /// For implementations of [`Broker`]: dropping `release` releases the lock.
    pub fn new(lost: CancellationToken, release: impl Send + Sync + fmt::Debug + 'static) -> Self {
        Self {
            lost,
            _release: Box::new(release),
        }
    }
}
