//! All slots of a process, and the children that work in them.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use common::failpoint;
use common::fault::Fault;
use common::telemetry::metrics::Metrics;
use rustix::process::{DumpableBehavior, Pid, Signal, kill_process_group, set_dumpable_behavior};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::decoder::{FrameDecoder, Framed, invalid, printable};
use super::protocol::{ARGUMENT, ChildRequest, Frame, MAX_LINE, MAX_PIECE};
use super::scratch::Scratch;
use super::{SlotConfig, SlotError, SlotOutput};
use crate::digest::{DigestLimits, Subject};
use crate::fetch::policy::{FetchPolicy, FetchSource};

/// For a local repository: its packs are mapped, and the operator chose it.
const LOCAL_ADDRESS_SPACE: u64 = 32 << 30;
/// A pack's index is smaller than its pack but for packs of very small objects.
const INDEX_BYTES: u64 = 64 << 20;
/// For a child with nothing to do to end.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// How much of the child's standard error is kept as evidence.
const EVIDENCE: u64 = 4096;

/// All slots of this process.
#[derive(Debug)]
pub struct Slots {
    config: SlotConfig,
    policy: FetchPolicy,
    limits: DigestLimits,
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
        limits: DigestLimits,
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
    pub fn limits(&self) -> &DigestLimits {
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
    ) -> Result<SlotOutput, SlotError> {
        // Refused without starting a process.
        let place = self.policy.source(url)?;
        let _slot = tokio::select! {
            slot = self.free.acquire() => slot.map_err(Fault::infra)?,
            () = stop.cancelled() => return Err(SlotError::Stopped),
        };
        let _busy = Busy::new(&self.metrics);
        self.work_in_slot(url, &place, subject, stop).await
    }

    async fn work_in_slot(
        &self,
        url: &str,
        place: &FetchSource,
        subject: Subject,
        stop: &CancellationToken,
    ) -> Result<SlotOutput, SlotError> {
        // Removed when dropped, whatever happens.
        let scratch = self.scratch.folder()?;
        let mut policy = self.policy.clone();
        let address_space = match place {
            FetchSource::Local(_) => LOCAL_ADDRESS_SPACE,
            FetchSource::Remote { url, .. } => {
                if policy.token_for(url).is_none() {
                    policy.token = None;
                }
                let child = &self.config.child;
                policy.max_bytes.saturating_add(child.address_space)
            }
        };
        let file_bytes = self.config.child.file_bytes;
        let request = ChildRequest {
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
        let mut running = ChildProcess::start(&self.spawner, command, &request).await?;
        let deadline = Instant::now() + Duration::from_secs(self.config.timeout);
        let stall = Duration::from_secs(self.config.stall);
        let mut alive = Instant::now();
        let mut making = FrameDecoder::new(request.policy.max_bytes, self.limits.max_text_bytes);
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
                    return Err(SlotError::Stopped);
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

/// A child that runs.
struct ChildProcess {
    child: Child,
    /// The child leads a process group of its own.
    group: Option<Pid>,
    output: BufReader<ChildStdout>,
    line: Vec<u8>,
}

impl ChildProcess {
    async fn start(
        spawner: &Spawner,
        command: Command,
        request: &ChildRequest,
    ) -> Result<Self, Fault> {
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
    async fn post_mortem(&mut self, making: &FrameDecoder, error: &io::Error) -> Fault {
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
