//! The slots of a process, and the children that work in them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use crate::metrics::Metrics;
use common::failpoint;
use common::fault::Fault;
use common::telemetry::traces::Span;
use openssl_probe::{ENV_CERT_DIR, ENV_CERT_FILE};
use rustix::process::{Pid, Signal, kill_process_group};
use strum::VariantArray;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::confine::{self, Wall};
use super::decoder::{FrameDecoder, TokenNews, shown};
use super::protocol::{ARGUMENT, ChildRequest};
use super::scratch::Scratch;
use super::token::{TokenPool, TokenState, TokenTurn};
use super::{SlotConfig, SlotError, SlotResult};
use crate::digest::{DigestLimits, Subject};
use crate::fetch::policy::{FetchPolicy, FetchSource};
use crate::fetch::token::HostToken;
use crate::source::ObjectId;

/// For a local repository: its packs are mapped, and the operator chose it.
const LOCAL_ADDRESS_SPACE: u64 = 32 << 30;
/// Room for a pack's index, which is smaller than its pack unless its objects are very small.
pub const INDEX_BYTES: u64 = 64 << 20;
/// For a child without a job to end.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// For a killed child to end. One that hangs in the kernel is not waited for.
const KILL_TIMEOUT: Duration = Duration::from_millis(500);
/// Bytes of a crashed child's standard error that are kept as evidence.
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
    tokens: Arc<TokenPool>,
    /// Variables that tell a child which certificates to trust.
    certificates: Vec<(&'static str, OsString)>,
    metrics: Metrics,
    /// Those that stand around each child.
    walls: Vec<Wall>,
    /// Whether a fallback was logged.
    fell_back: AtomicBool,
}

impl Slots {
    /// Makes the scratch folder and removes what dead processes left there.
    ///
    /// # Errors
    /// [`FaultKind::Infra`](common::fault::FaultKind::Infra) if the folder cannot be written.
    pub fn new(
        config: SlotConfig,
        policy: FetchPolicy,
        limits: DigestLimits,
        metrics: Metrics,
    ) -> Result<Arc<Self>, Fault> {
        let parent = config.scratch.clone().unwrap_or_else(std::env::temp_dir);
        metrics.slots.set(config.slots().into());
        let scratch = Scratch::new(&parent)?;
        metrics.set_scratch(&parent);
        let walls = confine::tried();
        metrics.set_walls(&walls);
        let tokens = Arc::new(TokenPool::new(policy.tokens.clone()));
        metrics.set_tokens(&tokens);
        for host in policy.labels() {
            metrics.show_failures_of(&host);
        }
        Ok(Arc::new(Self {
            scratch,
            free: Semaphore::new(config.slots().into()),
            spawner: Spawner::start().map_err(Fault::infra)?,
            tokens,
            certificates: certificates(
                |name| std::env::var_os(name),
                || openssl_probe::probe().cert_file,
            ),
            config,
            policy,
            limits,
            metrics,
            walls,
            fell_back: AtomicBool::new(false),
        }))
    }

    /// What may be fetched.
    pub fn policy(&self) -> &FetchPolicy {
        &self.policy
    }

    /// Returns the limits of this process's digests.
    pub fn limits(&self) -> &DigestLimits {
        &self.limits
    }

    /// Logs which walls the kernel does not raise around slots, if any.
    pub fn tell_walls(&self) {
        match self.missing_walls() {
            None => {}
            Some((true, said)) => info!(operation = "slot", "{said}"),
            Some((false, said)) => warn!(operation = "slot", "{said}"),
        }
    }

    /// Counts each host's tokens by what the host said of them so far.
    pub fn token_states(&self) -> BTreeMap<(String, TokenState), i64> {
        self.tokens.count(now())
    }

    /// Says which walls the kernel does not raise around slots, if any, and whether most kernels do not.
    pub fn missing_walls(&self) -> Option<(bool, String)> {
        let lacks = |wall: &&Wall| !self.walls.contains(wall);
        let missing: Vec<_> = Wall::VARIANTS.iter().filter(lacks).collect();
        let names: Vec<_> = missing.iter().map(|wall| wall.as_ref()).collect();
        let could: Vec<_> = missing.iter().map(|wall| wall.without()).collect();
        let said = format!(
            "slots are not confined by {}, which this kernel lacks or does not allow: a repository that \
             took one over could {}",
            names.join(", "),
            could.join("; ")
        );
        match &missing[..] {
            [] => None,
            // Most kernels that servers have today: nothing is wrong there.
            [Wall::LandlockNetwork, Wall::LandlockSignals] | [Wall::LandlockSignals] => {
                Some((true, said))
            }
            _ => Some((false, said)),
        }
    }

    /// Checks that the scratch folder can be written and a child can be started.
    ///
    /// # Errors
    /// [`FaultKind::Infra`](common::fault::FaultKind::Infra) if not.
    pub async fn probe(&self) -> Result<(), Fault> {
        self.scratch.probe()?;
        let folder = self.scratch.folder()?;
        let mut command = self.command(folder.path());
        // Without a job it ends at once.
        command.stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = self.spawner.spawn(command).await?;
        let ended = timeout(PROBE_TIMEOUT, child.wait()).await;
        ended
            .map_err(|_| Fault::infra("a slot without a job does not end"))?
            .map_err(Fault::infra)?;
        Ok(())
    }

    /// Fetches and digests `url` once a slot is free, unless its HEAD is `known`. `stop` ends it
    /// within half a second. Each step becomes a child of `span`.
    pub async fn work(
        &self,
        url: &str,
        subject: Subject,
        known: Option<ObjectId>,
        stop: &CancellationToken,
        span: &Span,
    ) -> Result<SlotResult, SlotError> {
        // Refused without starting a process.
        let source = self.policy.source(url)?;
        let slot = stop.run_until_cancelled(self.free.acquire()).await;
        let _slot = slot.ok_or(SlotError::Stopped)?.map_err(Fault::infra)?;
        let _busy = Busy::new(&self.metrics);

        let url_of_source = match &source {
            FetchSource::Remote { url, .. } => Some(url),
            FetchSource::Local(_) => None,
        };
        let mut tokens = self.tokens.turn(url_of_source, now())?;
        loop {
            // Removed when dropped, whatever happens.
            let scratch = self.scratch.folder()?;
            let request = self.request(url, &source, &subject, known, tokens.token());
            match self
                .attempt(&request, scratch.path(), &mut tokens, stop, span)
                .await
            {
                Ok(mut result) => {
                    tokens.worked();
                    if let SlotResult::Digest(output) = &mut result {
                        // Not for the child to say.
                        output.facts.subject = subject;
                    }
                    return Ok(result);
                }
                Err(SlotError::Fault(fault)) => tokens.after(fault, now())?,
                Err(SlotError::Stopped) => return Err(SlotError::Stopped),
            }
        }
    }

    /// Has a child do what is requested, in `scratch`.
    async fn attempt(
        &self,
        request: &ChildRequest,
        scratch: &Path,
        tokens: &mut TokenTurn<'_>,
        stop: &CancellationToken,
        span: &Span,
    ) -> Result<SlotResult, SlotError> {
        let start = ChildProcess::start(&self.spawner, self.command(scratch), request);
        let child = stop.run_until_cancelled(start).await;
        let mut child = child.ok_or(SlotError::Stopped)??;
        let result = stop
            .run_until_cancelled(self.attend(&mut child, request, tokens, span))
            .await;
        child.kill().await;
        let Some(result) = result else {
            self.metrics.slot_killed("stopped");
            return Err(SlotError::Stopped);
        };
        Ok(result?)
    }

    fn request(
        &self,
        url: &str,
        source: &FetchSource,
        subject: &Subject,
        known: Option<ObjectId>,
        token: Option<HostToken>,
    ) -> ChildRequest {
        let child = &self.config.child;
        let policy = FetchPolicy {
            tokens: token.into_iter().collect(),
            ..self.policy.clone()
        };
        let address_space = match source {
            FetchSource::Local(_) => LOCAL_ADDRESS_SPACE,
            FetchSource::Remote { .. } => policy.max_bytes.saturating_add(child.address_space),
        };
        let pack_and_index = policy.max_bytes.saturating_add(INDEX_BYTES);
        ChildRequest {
            url: url.to_owned(),
            subject: subject.clone(),
            known,
            limits: self.limits.clone(),
            policy,
            parent: std::process::id().cast_signed(),
            address_space,
            file_bytes: child.file_bytes.unwrap_or(pack_and_index),
            cpu_seconds: self.config.timeout,
            walls: self.walls.clone(),
        }
    }

    /// Reads what the child sends until its last frame, its end, or a limit.
    async fn attend(
        &self,
        child: &mut ChildProcess,
        request: &ChildRequest,
        tokens: &mut TokenTurn<'_>,
        span: &Span,
    ) -> Result<SlotResult, Fault> {
        let stdout = child.process.stdout.take().expect("it is piped");
        let mut decoder = FrameDecoder::new(stdout, request, span);
        let result = self.follow(child, &mut decoder, tokens).await;
        if let Err(fault) = &result {
            decoder.phase.fail(fault);
        }
        if let Some((way, why)) = decoder.way() {
            self.metrics.fetched_by(way);
            if let Some(instead) = way.instead()
                && !self.fell_back.swap(true, Ordering::Relaxed)
            {
                let url = request.url.as_str();
                info!(
                    operation = "fetch",
                    url,
                    "fetched {url} {instead}, since {why}; further ones are counted \
                     (repofleet_fetch_ways_total)"
                );
            }
        }
        result
    }

    async fn follow(
        &self,
        child: &mut ChildProcess,
        decoder: &mut FrameDecoder<'_>,
        tokens: &mut TokenTurn<'_>,
    ) -> Result<SlotResult, Fault> {
        let SlotConfig { timeout, stall, .. } = self.config;
        let mut alive = Instant::now();
        let deadline = alive + Duration::from_secs(timeout);
        let (reason, fault) = loop {
            tokio::select! {
                frame = decoder.next() => match frame {
                    Ok(None) => {
                        alive = Instant::now();
                        // Believed: a child knows no token but its own.
                        match decoder.token_news() {
                            Some(TokenNews::Refused(why)) => tokens.refused(why, now()),
                            Some(TokenNews::UsedUp(rest)) => tokens.used_up(rest, now()),
                            None => {}
                        }
                        failpoint::hit("during-fetch");
                    }
                    Ok(Some(result)) => return result,
                    Err(error) => break ("crash", child.post_mortem(decoder, &error).await),
                },
                () = sleep_until(deadline) => {
                    let why = format!("not done after {timeout} s, {decoder} (--timeout)");
                    break ("timeout", Fault::too_large(why));
                }
                () = sleep_until(alive + Duration::from_secs(stall)) => {
                    let why = format!("no progress for {stall} s, {decoder} (--stall)");
                    break ("stall", Fault::transient(why));
                }
            }
        };
        self.metrics.slot_killed(reason);
        Err(fault)
    }

    /// Returns a child to start in `scratch`, with as little of this process's environment as it
    /// needs.
    fn command(&self, scratch: &Path) -> Command {
        let mut command = Command::new(&self.config.child.program);
        command
            .arg(ARGUMENT)
            .arg(scratch)
            .current_dir(scratch)
            .env_clear()
            // glibc would set 64 MiB of the address space aside for each thread, of which but one works.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        command.envs(self.certificates.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// Tells a child which certificates to trust: those that this process's environment names, or else the
/// system's bundle. Left to itself, a child would also read the system's folder: 147 files that are in
/// the bundle too.
fn certificates(
    variable: impl Fn(&str) -> Option<OsString>,
    bundle: impl FnOnce() -> Option<PathBuf>,
) -> Vec<(&'static str, OsString)> {
    let mut named = Vec::new();
    for name in [ENV_CERT_FILE, ENV_CERT_DIR] {
        let value = variable(name).filter(|value| !value.is_empty());
        named.extend(value.map(|value| (name, value)));
    }
    if named.is_empty() {
        named.extend(bundle().map(|bundle| (ENV_CERT_FILE, bundle.into())));
    }
    named
}

fn now() -> std::time::Instant {
    std::time::Instant::now()
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

/// A child with a job.
struct ChildProcess {
    process: Child,
    /// The child leads a process group of its own. `None` once it has been killed.
    group: Option<Pid>,
}

impl ChildProcess {
    async fn start(
        spawner: &Spawner,
        command: Command,
        request: &ChildRequest,
    ) -> Result<Self, Fault> {
        let mut process = spawner.spawn(command).await?;
        let group = process.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let mut input = process.stdin.take().expect("it is piped");
        // The token is in it.
        let request = Zeroizing::new(serde_json::to_vec(request).map_err(Fault::infra)?);
        // If this fails the child is dying, and its output ends.
        input.write_all(&request).await.ok();
        input.shutdown().await.ok();
        Ok(Self { process, group })
    }

    /// Kills the child and its descendants.
    async fn kill(&mut self) {
        if let Some(group) = self.group.take() {
            // Fails if they are gone already.
            kill_process_group(group, Signal::KILL).ok();
        }
        timeout(KILL_TIMEOUT, self.process.wait()).await.ok();
    }

    /// Kills a child that broke off, and says why it did.
    async fn post_mortem(&mut self, decoder: &FrameDecoder<'_>, error: &io::Error) -> Fault {
        let mut how = format!("broke the protocol: {error}");
        // Its output ended, so it is ending by itself, and its status says why.
        if error.kind() == io::ErrorKind::UnexpectedEof
            && let Ok(Ok(status)) = timeout(Duration::from_secs(5), self.process.wait()).await
        {
            how = ending(status);
        }
        let stderr = self.process.stderr.take();
        self.kill().await;
        let mut evidence = Vec::new();
        if let Some(stderr) = stderr {
            let mut stderr = stderr.take(EVIDENCE);
            let read = stderr.read_to_end(&mut evidence);
            // A descendant that has left the group may hold the pipe open.
            timeout(Duration::from_secs(1), read).await.ok();
        }
        let evidence = String::from_utf8_lossy(&evidence);
        let colon = if evidence.is_empty() { "" } else { ": " };
        Fault::killed(shown(&format!("slot {how}, {decoder}{colon}{evidence}")))
    }
}

fn ending(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(9), _) => "was killed (signal 9; probably out of memory)".to_owned(),
        (Some(24), _) => "exceeded its CPU limit (signal 24)".to_owned(),
        (Some(6), _) => "aborted (signal 6; probably over its memory limit)".to_owned(),
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
        let spawn = move || {
            let _runtime = runtime.enter();
            for (mut command, reply) in received {
                // If nobody waits any more, the child is dropped and thereby killed.
                reply.send(command.spawn()).ok();
            }
        };
        let thread = std::thread::Builder::new().name("slot-spawner".to_owned());
        thread.spawn(spawn).map(|_| Self { orders })
    }

    async fn spawn(&self, command: Command) -> Result<Child, Fault> {
        let program = command.as_std().get_program().display().to_string();
        let (reply, child) = oneshot::channel();
        let gone = || Fault::infra("the thread that starts slots has ended");
        self.orders.send((command, reply)).map_err(|_| gone())?;
        child
            .await
            .map_err(|_| gone())?
            .map_err(|e| Fault::infra(format!("cannot start a slot with {program}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_told_one_place_of_certificates_unless_more_are_named() {
        for (file, folder, expected) in [
            (None, None, vec![(ENV_CERT_FILE, "system")]),
            (Some(""), Some(""), vec![(ENV_CERT_FILE, "system")]),
            (Some("mine"), None, vec![(ENV_CERT_FILE, "mine")]),
            (None, Some("folder"), vec![(ENV_CERT_DIR, "folder")]),
            (
                Some("mine"),
                Some("folder"),
                vec![(ENV_CERT_FILE, "mine"), (ENV_CERT_DIR, "folder")],
            ),
        ] {
            let variable = |name: &str| match name {
                ENV_CERT_FILE => file.map(OsString::from),
                _ => folder.map(OsString::from),
            };
            let named = certificates(variable, || Some("system".into()));
            let expected = expected.into_iter().map(|(name, at)| (name, at.into()));
            assert_eq!(named, expected.collect::<Vec<_>>());
        }
        assert_eq!(certificates(|_| None, || None), []);
    }
}
