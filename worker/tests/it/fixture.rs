//! Slots, and a git server for them to fetch from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::fault::Fault;
use common::telemetry::traces::Span;
use rustix::process::Pid;
use tempfile::TempDir;
use testing::git_server::GitServer;
use testing::repositories::Builder;
use testing::root;
use tokio_util::sync::CancellationToken;
use worker::digest::{DigestLimits, Subject};
use worker::fetch::policy::{FetchMode, FetchPolicy};
use worker::fetch::token::HostToken;
use worker::metrics::Metrics;
use worker::slot::protocol::ARGUMENT;
use worker::slot::slots::Slots;
use worker::slot::{ChildConfig, SlotConfig, SlotError, SlotOutput, SlotResult};
use worker::source::ObjectId;

/// The text of a good repository's file.
pub(crate) const TEXT: &str = "nothing is wrong with this one\n";

/// How long to wait for anything. Far more than any test needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server of the repositories below `root`, and the configuration of slots that fetch from it.
pub(crate) struct Fixture {
    pub(crate) root: TempDir,
    pub(crate) scratch: TempDir,
    pub(crate) server: GitServer,
    pub(crate) config: SlotConfig,
    pub(crate) policy: FetchPolicy,
    pub(crate) limits: DigestLimits,
}

impl Fixture {
    /// Serves `owner/good` and `owner/bad`, which are alike; tests add faults to the latter.
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for name in ["good", "bad"] {
            good(root.path(), name);
        }
        let scratch = tempfile::tempdir().unwrap();
        let server = GitServer::start(root.path());
        let config = SlotConfig {
            concurrency: Some(4),
            timeout: 60,
            stall: 30,
            scratch: Some(scratch.path().to_owned()),
            child: ChildConfig {
                program: env!("CARGO_BIN_EXE_worker").into(),
                ..ChildConfig::default()
            },
        };
        let policy = FetchPolicy {
            hosts: vec![server.authority().parse().unwrap()],
            http: true,
            local: false,
            max_bytes: 64 << 20,
            mode: FetchMode::Auto,
            tokens: Vec::new(),
            proxy: None,
        };
        Self {
            root,
            scratch,
            server,
            config,
            policy,
            limits: DigestLimits::default(),
        }
    }

    /// Has slots send this token to the server.
    pub(crate) fn add_token(&mut self, secret: &str) {
        self.policy.tokens.push(HostToken {
            host: self.server.authority().parse().unwrap(),
            secret: secret.to_owned().into(),
            source: String::new(),
        });
    }

    /// Returns slots as configured.
    pub(crate) fn slots(&self) -> Arc<Slots> {
        self.slots_counted(&Metrics::new())
    }

    /// Returns slots as configured, counting with `metrics`.
    pub(crate) fn slots_counted(&self, metrics: &Metrics) -> Arc<Slots> {
        let (config, policy) = (self.config.clone(), self.policy.clone());
        Slots::new(config, policy, self.limits.clone(), metrics.clone()).unwrap()
    }

    /// Returns the URL of `owner/{name}`.
    pub(crate) fn url(&self, name: &str) -> String {
        self.server.repo_url("owner", name)
    }

    /// Runs `owner/{name}` in new slots.
    pub(crate) async fn make(&self, name: &str) -> Result<SlotOutput, Fault> {
        self.make_url(&self.url(name)).await
    }

    /// Runs `url` in new slots. Asserts that `owner/good` succeeds beside and after it, and that nothing
    /// is left behind.
    pub(crate) async fn make_url(&self, url: &str) -> Result<SlotOutput, Fault> {
        let slots = self.slots();
        let good = self.url("good");
        let (made, beside) = tokio::join!(work(&slots, url), work(&slots, &good));
        assert!(beside.unwrap().content.contains(TEXT));
        if made.is_err() {
            let after = work(&slots, &good).await.unwrap();
            assert!(after.content.contains(TEXT));
        }
        drop(slots);
        self.assert_nothing_left();
        made
    }

    /// Returns the fault of `owner/bad` in new slots.
    pub(crate) async fn fault(&self) -> Fault {
        self.make("bad").await.expect_err("nothing is made of it")
    }

    /// Asserts that dropped slots left neither files nor processes.
    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.children(), []);
        let left: Vec<_> = fs::read_dir(self.scratch.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// Returns the slots' living children.
    pub(crate) fn children(&self) -> Vec<Pid> {
        let mut children = Vec::new();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let pid = process.file_name().to_str().and_then(|n| n.parse().ok());
            let (Some(pid), path) = (pid.and_then(Pid::from_raw), process.path()) else {
                continue;
            };
            // A slot's arguments are a word and its job's folder. Other tests' are elsewhere.
            let command = fs::read_to_string(path.join("cmdline")).unwrap_or_default();
            let mut words = command.trim_end_matches('\0').rsplit('\0');
            let folder = Path::new(words.next().unwrap_or_default());
            if folder.starts_with(self.scratch.path()) && words.next() == Some(ARGUMENT) {
                children.push(pid);
            }
        }
        children
    }

    /// Waits for a request for `owner/bad`, and returns the one child.
    pub(crate) fn child_at_work(&self) -> Pid {
        self.server.wait_for_requests("owner/bad", 1);
        match self.children()[..] {
            [child] => child,
            ref children => panic!("{children:?}"),
        }
    }
}

/// Makes an ordinary repository `owner/{name}` below `root`.
pub(crate) fn good(root: &Path, name: &str) -> PathBuf {
    Builder::new()
        .file("README.md", TEXT)
        .file("src/lib.rs", "pub fn f() {}\n")
        .build(root, "owner", name)
}

/// Makes `owner/over-memory`, whose pack goes to a file on either way.
pub(crate) fn build_over_memory(root: &Path) {
    let mut random = fastrand::Rng::with_seed(7);
    let mut files = Builder::new().file("README", TEXT);
    for i in 0..90 {
        let file: Vec<u8> = (0..400 << 10).map(|_| random.u8(..)).collect();
        files = files.file(format!("noise{i}"), file);
    }
    files.build(root, "owner", "over-memory");
}

/// Runs git in the repository `path` and returns its output.
pub(crate) fn git<const N: usize>(path: &Path, arguments: [&str; N]) -> String {
    let output = Command::new("git")
        .current_dir(path)
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .output()
        .unwrap();
    assert!(output.status.success(), "git {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Returns the subject of the tests' digests.
pub(crate) fn subject() -> Subject {
    Subject::Repository {
        owner: "owner".to_owned(),
        name: "name".to_owned(),
    }
}

/// Runs `url` in `slots`.
pub(crate) async fn work(slots: &Slots, url: &str) -> Result<SlotOutput, Fault> {
    match work_unless_at(slots, url, None).await? {
        SlotResult::Digest(made) => Ok(*made),
        unmoved @ SlotResult::Unmoved { .. } => panic!("no commit is known: {unmoved:?}"),
    }
}

/// Runs `url` in `slots`, unless its HEAD is `known`.
pub(crate) async fn work_unless_at(
    slots: &Slots,
    url: &str,
    known: Option<&str>,
) -> Result<SlotResult, Fault> {
    let known = known.map(|commit| ObjectId::parse(commit).unwrap());
    let stop = CancellationToken::new();
    match slots
        .work(url, subject(), known, &stop, &Span::default())
        .await
    {
        Ok(result) => Ok(result),
        Err(SlotError::Fault(fault)) => Err(fault),
        Err(SlotError::Stopped) => panic!("nobody stops it"),
    }
}

/// Returns once `there` returns true; panics if it never does.
pub(crate) async fn until(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether there is a process with this id, zombies included.
pub(crate) fn exists(pid: Pid) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

/// Returns incompressible bytes, always the same.
pub(crate) fn noise(count: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(7);
    (0..count).map(|_| random.u8(..)).collect()
}

/// Runs a test that needs root, see [`root::as_root`].
pub(crate) fn as_root(name: &str, test: impl Future<Output = ()>) {
    root::as_root(name, || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test);
    });
}
