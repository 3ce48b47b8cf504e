//! Slots: places where one job at a time is worked on, each in a child process of its own.
//!
//! What strangers wrote is parsed in the child ([`child`]), which is the same binary, has no
//! secrets but the token for the host it fetches from, and is limited in address space, file size
//! and CPU. This side starts it, watches that it gets on, ends it with all its descendants when it
//! does not, and removes what it left.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use clap::Args;
use common::failpoint;
use common::fault::{Fault, FaultKind};
use common::telemetry::Metrics;
use rustix::process::{DumpableBehavior, Pid, Signal, kill_process_group, set_dumpable_behavior};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::digest::{Facts, Limits, Part, Subject};
use crate::fetch::policy::{FetchPolicy, Place};

pub mod child;
mod scratch;

use scratch::Scratch;

/// The first argument that makes a binary a slot's child.
pub const ARGUMENT: &str = "slot";

/// Address space beyond the pack, which libgit2 maps: programs, threads' stacks, one file of the
/// repository, the digest. The largest of 29 real repositories needs 128 MiB (design notes).
const ADDRESS_SPACE: u64 = 512 << 20;
/// For a local repository: its packs are mapped, and the operator chose it.
const LOCAL_ADDRESS_SPACE: u64 = 32 << 30;
/// A pack's index is smaller than its pack but for packs of very small objects.
const INDEX_BYTES: u64 = 64 << 20;
/// A day: the longest time limit of a slot, in seconds.
const MAX_SECONDS: u64 = 86_400;
/// For a child with nothing to do to end.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest line of the child's that is read.
const MAX_LINE: u64 = 1 << 20;
/// Longest piece of text in one frame.
const MAX_PIECE: usize = 1 << 20;
/// How much of the child's standard error is kept as evidence.
const EVIDENCE: u64 = 4096;
/// Longest text of a fault, in characters: it goes to logs and into the run's summary.
const MAX_MESSAGE: usize = 1000;
/// The longest pause that a host may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// How slots work.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Slots")]
pub struct SlotConfig {
    /// Repositories worked on at the same time [default: 2 × cores]
    #[arg(long, env = "CONCURRENCY", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: Option<u16>,
    /// Seconds for one repository; over it the repository fails as too_large.
    #[arg(long, env = "TIMEOUT", value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS))]
    pub timeout: u64,
    /// Seconds without progress (1,000 bytes count as progress) after which an attempt is given up.
    #[arg(long, env = "STALL", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS))]
    pub stall: u64,
    /// Folder for what is fetched, removed after each job [default: the system's temporary folder]
    #[arg(long, env = "SCRATCH", value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Not on the command line.
    #[arg(skip)]
    pub child: ChildConfig,
}

/// What a slot's child is and may use. Only tests have another than the default.
#[derive(Clone, Debug)]
pub struct ChildConfig {
    /// The program, which calls [`child::main_if_slot`].
    pub program: PathBuf,
    /// Address space beyond the byte budget of a fetch.
    pub address_space: u64,
    /// Largest file; by default what a pack within the byte budget needs.
    pub file_bytes: Option<u64>,
}

impl Default for ChildConfig {
    /// This program, even if its file has been replaced since it was started.
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            address_space: ADDRESS_SPACE,
            file_bytes: None,
        }
    }
}

impl SlotConfig {
    /// `--concurrency`, or its default.
    pub fn slots(&self) -> u16 {
        self.concurrency.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            u16::try_from(2 * cores).unwrap_or(u16::MAX)
        })
    }
}

/// What a child is to do: one JSON line on its standard input.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    url: String,
    subject: Subject,
    limits: Limits,
    policy: FetchPolicy,
    scratch: PathBuf,
    /// The child ends when this process does.
    parent: i32,
    address_space: u64,
    file_bytes: u64,
    cpu_seconds: u64,
}

/// What a child says: JSON lines on its standard output, each `Text` followed by that many bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Frame {
    /// It got on.
    Progress {
        fetched_bytes: u64,
    },
    /// The repository is there to be read.
    Fetched {
        fetched_bytes: u64,
        millis: u64,
    },
    Text {
        part: Part,
        bytes: usize,
    },
    Done {
        facts: Facts,
        millis: u64,
    },
    Failed(Fault),
}

/// What a slot made of a repository.
#[derive(Debug)]
pub struct Made {
    /// For the summary.
    pub facts: Facts,
    /// The tree's text.
    pub tree: String,
    /// The contents' text.
    pub content: String,
    /// Bytes that came over the network.
    pub fetched_bytes: u64,
    /// How long the fetch took.
    pub fetch: Duration,
    /// How long the digest took.
    pub digest: Duration,
}

/// Why a slot made nothing.
#[derive(Debug)]
pub enum Unmade {
    /// The job's fault, or the machine's.
    Fault(Fault),
    /// It was told to stop.
    Stopped,
}

impl From<Fault> for Unmade {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// All slots of this process.
#[derive(Debug)]
pub struct Slots {
    config: SlotConfig,
    policy: FetchPolicy,
    limits: Limits,
    scratch: Scratch,
    free: Semaphore,
    spawner: Spawner,
    metrics: Metrics,
}

impl Slots {
    /// Makes the scratch folder and clears away what dead processes left there.
    ///
    /// # Errors
    /// [`FaultKind::Infra`] where it cannot be written.
    pub fn new(
        config: SlotConfig,
        policy: FetchPolicy,
        limits: Limits,
        metrics: Metrics,
    ) -> Result<Arc<Self>, Fault> {
        // Children share this process's user: without this, one that was taken over could read
        // this one's memory and environment.
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Fault::infra)?;
        let parent = config.scratch.clone().unwrap_or_else(std::env::temp_dir);
        metrics.slots.set(config.slots().into());
        let scratch = Scratch::new(&parent)?;
        metrics.set_scratch(&parent);
        Ok(Arc::new(Self {
            scratch,
            free: Semaphore::new(config.slots().into()),
            spawner: Spawner::start().map_err(Fault::infra)?,
            config,
            policy,
            limits,
            metrics,
        }))
    }

    /// What this process digests by.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Finds out whether the scratch folder can be written and a child can be started.
    ///
    /// # Errors
    /// [`FaultKind::Infra`], saying what is wrong.
    pub async fn probe(&self) -> Result<(), Fault> {
        self.scratch.probe()?;
        let folder = self.scratch.folder()?;
        let mut command = self.command(folder.path());
        // With nothing to do it ends at once.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = self.spawner.spawn(command).await?;
        let ended = tokio::time::timeout(PROBE_TIMEOUT, child.wait()).await;
        ended
            .map_err(|_| Fault::infra("a slot with nothing to do does not end"))?
            .map_err(Fault::infra)?;
        Ok(())
    }

    /// Fetches and digests `url`, when a slot is free, until `stop`.
    pub async fn work(
        &self,
        url: &str,
        subject: Subject,
        stop: &CancellationToken,
    ) -> Result<Made, Unmade> {
        // Refused without starting a process.
        let place = self.policy.place(url)?;
        let _slot = tokio::select! {
            slot = self.free.acquire() => slot.map_err(Fault::infra)?,
            () = stop.cancelled() => return Err(Unmade::Stopped),
        };
        let _busy = Busy::new(&self.metrics);
        self.work_in_slot(url, &place, subject, stop).await
    }

    async fn work_in_slot(
        &self,
        url: &str,
        place: &Place,
        subject: Subject,
        stop: &CancellationToken,
    ) -> Result<Made, Unmade> {
        // Removed when dropped, whatever happens.
        let scratch = self.scratch.folder()?;
        let mut policy = self.policy.clone();
        let address_space = match place {
            Place::Local(_) => LOCAL_ADDRESS_SPACE,
            Place::Remote { url, .. } => {
                if policy.token_for(url).is_none() {
                    policy.token = None;
                }
                let child = &self.config.child;
                policy.max_bytes.saturating_add(child.address_space)
            }
        };
        let file_bytes = self.config.child.file_bytes;
        let request = Request {
            url: url.to_owned(),
            subject: subject.clone(),
            limits: self.limits.clone(),
            file_bytes: file_bytes.unwrap_or(policy.max_bytes.saturating_add(INDEX_BYTES)),
            policy,
            scratch: scratch.path().to_owned(),
            parent: std::process::id().cast_signed(),
            address_space,
            cpu_seconds: self.config.timeout,
        };
        let command = self.command(scratch.path());
        let mut running = Running::start(&self.spawner, command, &request).await?;
        let deadline = Instant::now() + Duration::from_secs(self.config.timeout);
        let stall = Duration::from_secs(self.config.stall);
        let mut alive = Instant::now();
        let mut making = Making::new(request.policy.max_bytes, self.limits.max_text_bytes);
        let end = loop {
            tokio::select! {
                frame = running.next() => {
                    match frame.and_then(|frame| making.take(frame)) {
                        Ok(None) => {
                            alive = Instant::now();
                            failpoint::hit("during-fetch");
                        }
                        Ok(Some(end)) => break end,
                        Err(error) => {
                            self.metrics.slot_killed("crash");
                            return Err(running.post_mortem(&making, &error).await.into());
                        }
                    }
                }
                () = sleep_until(deadline) => {
                    self.metrics.slot_killed("timeout");
                    running.kill().await;
                    return Err(Fault::too_large(format!(
                        "not done after {} s, {} (--timeout)",
                        self.config.timeout, making
                    )).into());
                }
                () = sleep_until(alive + stall) => {
                    self.metrics.slot_killed("stall");
                    running.kill().await;
                    return Err(Fault::transient(format!(
                        "no progress for {} s, {} (--stall)",
                        self.config.stall, making
                    )).into());
                }
                () = stop.cancelled() => {
                    self.metrics.slot_killed("stopped");
                    running.kill().await;
                    return Err(Unmade::Stopped);
                }
            }
        };
        // It has said its last word: nothing of it is needed any more.
        running.kill().await;
        let mut made = end?;
        // What the digest is about is not for the child to say.
        made.facts.subject = subject;
        Ok(made)
    }

    /// A child in `scratch`, with nothing of this process's environment that it does not need.
    fn command(&self, scratch: &Path) -> Command {
        let mut command = Command::new(&self.config.child.program);
        command
            .arg(ARGUMENT)
            .current_dir(scratch)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        for name in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
    }
}

/// A slot at work, counted as such until dropped.
struct Busy<'a>(&'a Metrics);

impl<'a> Busy<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        metrics.slots_busy.inc();
        Self(metrics)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.slots_busy.dec();
    }
}

/// A digest while its frames come in.
///
/// The child parses what strangers wrote, so what it says is checked as a stranger's word: it may
/// spoil its own repository's digest, and nothing else.
#[derive(Default)]
struct Making {
    tree: String,
    content: String,
    fetched_bytes: u64,
    max_fetched_bytes: u64,
    /// How long the fetch took, once it is done.
    fetch: Option<Duration>,
    /// What a child may send of text at most.
    room: Option<u64>,
}

/// A frame with the text that came after it.
type Framed = (Frame, Vec<u8>);

impl Making {
    fn new(max_fetched_bytes: u64, max_text_bytes: Option<u64>) -> Self {
        Self {
            max_fetched_bytes,
            // Each of the two parts may run over the limit by one piece.
            room: max_text_bytes.map(|max| 2 * (max + MAX_PIECE as u64)),
            ..Self::default()
        }
    }

    /// `Some` with the end, once it has come.
    fn take(&mut self, (frame, text): Framed) -> io::Result<Option<Result<Made, Fault>>> {
        match frame {
            Frame::Progress { fetched_bytes } => self.fetched(fetched_bytes)?,
            Frame::Fetched {
                fetched_bytes,
                millis,
            } => {
                self.fetched(fetched_bytes)?;
                self.fetch = Some(Duration::from_millis(millis));
            }
            Frame::Text { part, .. } => {
                if let Some(room) = &mut self.room {
                    *room = room
                        .checked_sub(text.len() as u64)
                        .ok_or_else(|| invalid("more text than it may send"))?;
                }
                let text = String::from_utf8(text).map_err(invalid)?;
                match part {
                    Part::Tree => self.tree.push_str(&text),
                    Part::Content => self.content.push_str(&text),
                }
            }
            Frame::Done { facts, millis } => {
                let is_name =
                    |id: &String| id.len() == 40 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
                if !facts.commit.as_ref().is_none_or(is_name) {
                    return Err(invalid("a commit with no commit's name"));
                }
                let made = std::mem::take(self);
                return Ok(Some(Ok(Made {
                    facts,
                    tree: made.tree,
                    content: made.content,
                    fetched_bytes: made.fetched_bytes,
                    fetch: made.fetch.unwrap_or_default(),
                    digest: Duration::from_millis(millis),
                })));
            }
            Frame::Failed(fault) => return Ok(Some(Err(checked(&fault)?))),
        }
        Ok(None)
    }

    fn fetched(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.max_fetched_bytes {
            return Err(invalid("more bytes fetched than it may"));
        }
        self.fetched_bytes = bytes;
        Ok(())
    }
}

impl std::fmt::Display for Making {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let phase = match self.fetch {
            Some(_) => "digesting",
            None => "fetching",
        };
        write!(f, "{phase}, {} bytes fetched", self.fetched_bytes)
    }
}

/// A child's fault, if it is one that a child can meet.
fn checked(fault: &Fault) -> io::Result<Fault> {
    match fault.kind {
        FaultKind::Poison | FaultKind::InvalidEntry => {
            Err(invalid("a fault that is not for it to find"))
        }
        kind => Ok(Fault {
            kind,
            message: printable(&fault.message),
            retry_after: fault.retry_after.map(|pause| pause.min(MAX_RETRY_AFTER)),
        }),
    }
}

/// Without what would command a terminal, and not endless: servers choose parts of these texts.
fn printable(text: &str) -> String {
    let visible = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let text = text.trim().chars().map(visible);
    text.take(MAX_MESSAGE).collect()
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A child that runs.
struct Running {
    child: Child,
    /// The child leads a process group of its own.
    group: Option<Pid>,
    output: BufReader<ChildStdout>,
    line: Vec<u8>,
}

impl Running {
    async fn start(spawner: &Spawner, command: Command, request: &Request) -> Result<Self, Fault> {
        let mut child = spawner.spawn(command).await?;
        let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let output = child.stdout.take().expect("it was asked to be piped");
        let mut input = child.stdin.take().expect("it was asked to be piped");
        let request = serde_json::to_vec(request).map_err(Fault::infra)?;
        // A child that ends before it has read this is found out by its silence.
        input.write_all(&request).await.ok();
        input.shutdown().await.ok();
        Ok(Self {
            child,
            group,
            output: BufReader::new(output),
            line: Vec::new(),
        })
    }

    /// The next frame. Not to be called again after it was abandoned in the middle.
    async fn next(&mut self) -> io::Result<Framed> {
        self.line.clear();
        let mut line = (&mut self.output).take(MAX_LINE);
        line.read_until(b'\n', &mut self.line).await?;
        match self.line.pop() {
            Some(b'\n') => {}
            Some(_) if self.line.len() as u64 >= MAX_LINE - 1 => {
                return Err(invalid("a longer line than it may send"));
            }
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        let frame = serde_json::from_slice(&self.line)?;
        let mut text = Vec::new();
        if let Frame::Text { bytes, .. } = frame {
            if bytes > MAX_PIECE {
                return Err(invalid("a longer piece of text than it may send"));
            }
            text.resize(bytes, 0);
            self.output.read_exact(&mut text).await?;
        }
        Ok((frame, text))
    }

    /// Ends the child and whatever it started.
    async fn kill(&mut self) {
        if let Some(group) = self.group.take() {
            // Gone already is as good.
            kill_process_group(group, Signal::KILL).ok();
        }
        self.child.wait().await.ok();
    }

    /// What to say of a child that broke off.
    async fn post_mortem(&mut self, making: &Making, error: &io::Error) -> Fault {
        let status = match error.kind() {
            // It has closed its output: it is ending by itself, and its status says why.
            io::ErrorKind::UnexpectedEof => {
                let ended = tokio::time::timeout(Duration::from_secs(5), self.child.wait()).await;
                ended.ok().and_then(Result::ok)
            }
            _ => None,
        };
        let stderr = self.child.stderr.take();
        self.kill().await;
        let mut evidence = Vec::new();
        if let Some(stderr) = stderr {
            // What it said is still in the pipe. A descendant that has left the group may hold
            // that open.
            let mut stderr = stderr.take(EVIDENCE);
            let read = stderr.read_to_end(&mut evidence);
            tokio::time::timeout(Duration::from_secs(1), read)
                .await
                .ok();
        }
        let how = match status {
            Some(status) => ending(status),
            None => format!("broke the protocol: {error}"),
        };
        let evidence = String::from_utf8_lossy(&evidence);
        let colon = if evidence.is_empty() { "" } else { ": " };
        let message = format!("slot {how}, {making}{colon}{evidence}");
        Fault::killed(printable(&message))
    }
}

fn ending(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(9), _) => "was killed (signal 9; out of memory, if nobody sent it)".to_owned(),
        (Some(24), _) => "was over its CPU limit (signal 24)".to_owned(),
        (Some(6), _) => "aborted (signal 6; over its memory limit, as a rule)".to_owned(),
        (Some(signal), _) => format!("crashed (signal {signal})"),
        (None, code) => format!("ended with code {}", code.unwrap_or_default()),
    }
}

/// Starts children from a thread that lives as long as the process.
///
/// The kernel sends a child its parent-death signal when the *thread* that started it ends, and
/// threads of a runtime come and go.
#[derive(Debug)]
struct Spawner {
    orders: mpsc::Sender<(Command, oneshot::Sender<io::Result<Child>>)>,
}

impl Spawner {
    fn start() -> io::Result<Self> {
        let (orders, received) = mpsc::channel::<(Command, oneshot::Sender<io::Result<Child>>)>();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name("slot-spawner".to_owned())
            .spawn(move || {
                let _runtime = runtime.enter();
                for (mut command, reply) in received {
                    // Nobody waits any more: the child is killed as it is dropped.
                    reply.send(command.spawn()).ok();
                }
            })?;
        Ok(Self { orders })
    }

    async fn spawn(&self, command: Command) -> Result<Child, Fault> {
        let program = command.as_std().get_program().display().to_string();
        let (reply, child) = oneshot::channel();
        let gone = || Fault::infra("the thread that starts slots is gone");
        self.orders.send((command, reply)).map_err(|_| gone())?;
        child
            .await
            .map_err(|_| gone())?
            .map_err(|e| Fault::infra(format!("cannot start a slot with {program}: {e}")))
    }
}
