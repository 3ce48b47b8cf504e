//! A fleet to run the real producer on: repositories, their server, feeds, scratch and store, all
//! in one temporary folder.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::ids::RepoRef;
use common::store::fs::FsStore;
use common::store::{Digest, DigestMeta, DigestStore};
use futures::TryStreamExt;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use testing::git_server::GitServer;
use testing::repositories::Builder;
use worker::digest::assemble::assemble;
use worker::digest::write::write;
use worker::digest::{DigestLimits, Part, Subject};
use worker::fetch::objects::Objects;
use worker::slot::protocol::ARGUMENT;

/// Far longer than anything here takes; then a test fails loudly instead of hanging.
const PATIENCE: Duration = Duration::from_secs(120);

/// The `pushedAt` of entries that do not say otherwise.
pub(crate) const PUSHED: &str = "2026-01-02T03:04:05Z";
/// A later one.
pub(crate) const PUSHED_LATER: &str = "2026-01-03T03:04:05Z";

/// See the module.
pub(crate) struct Fleet {
    pub(crate) server: GitServer,
    folder: TempDir,
}

impl Fleet {
    /// Without repositories, and with an empty feed.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("git")).unwrap();
        fs::create_dir(folder.path().join("scratch")).unwrap();
        let fleet = Self {
            server: GitServer::start(folder.path().join("git")),
            folder,
        };
        fleet.write_feed(&[]);
        fleet
    }

    /// With a small repository for each of these names (`owner/name`), all in the feed.
    pub(crate) fn of(repos: &[&str]) -> Self {
        let fleet = Self::new();
        for repo in repos {
            fleet.small_repository(repo);
        }
        fleet.write_feed(&fleet.entries(repos));
        fleet
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn repositories(&self) -> PathBuf {
        self.path().join("git")
    }

    pub(crate) fn feed_file(&self) -> PathBuf {
        self.path().join("repos.json")
    }

    pub(crate) fn store_folder(&self) -> PathBuf {
        self.path().join("digests")
    }

    pub(crate) fn scratch_folder(&self) -> PathBuf {
        self.path().join("scratch")
    }

    pub(crate) fn small_repository(&self, repo: &str) {
        let (owner, name) = repo.split_once('/').unwrap();
        Builder::new()
            .file("README.md", format!("# {repo}\n"))
            .file("src/main.rs", "fn main() {}\n")
            .build(&self.repositories(), owner, name);
    }

    /// The feed's entry for a repository of the server.
    pub(crate) fn entry(&self, repo: &str, pushed_at: &str) -> Value {
        let (owner, name) = repo.split_once('/').unwrap();
        json!({
            "owner": owner,
            "name": name,
            "description": "An example",
            "url": self.server.repo_url(owner, name),
            "archived": false,
            "license": {"key": "mit", "name": "MIT License", "spdxId": "MIT"},
            "stargazersCount": 3,
            "language": null,
            "forksCount": 0,
            "openIssuesCount": 1,
            "createdAt": "2020-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z",
            "pushedAt": pushed_at,
        })
    }

    pub(crate) fn entries(&self, repos: &[&str]) -> Vec<Value> {
        repos.iter().map(|repo| self.entry(repo, PUSHED)).collect()
    }

    pub(crate) fn write_feed(&self, entries: &[Value]) {
        fs::write(self.feed_file(), json!(entries).to_string()).unwrap();
    }

    /// `producer run` on this fleet's feed, server, store and scratch, where `arguments` do not
    /// name others.
    pub(crate) fn producer(&self, arguments: &[&str]) -> Command {
        let mut command = bare_producer();
        command.arg("run").args(self.arguments(arguments));
        command
    }

    /// What [`Fleet::producer`] adds to its own `arguments`, and these.
    pub(crate) fn arguments(&self, arguments: &[&str]) -> Vec<OsString> {
        let mut all: Vec<OsString> = Vec::new();
        for (option, path) in [
            ("--feed", self.feed_file()),
            ("--store", self.store_folder()),
            ("--scratch", self.scratch_folder()),
        ] {
            if !arguments.contains(&option) {
                all.extend([option.into(), path.into()]);
            }
        }
        let authority = self.server.authority();
        all.extend(["--allow-http", "--allow-host", &authority].map(Into::into));
        all.extend(arguments.iter().map(Into::into));
        all
    }

    /// Starts a run.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        Running::start(&mut self.producer(arguments))
    }

    /// Does a whole run.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.start(arguments).wait()
    }

    pub(crate) fn store(&self) -> FsStore {
        FsStore::new(self.store_folder())
    }

    /// The digest that the store has for `repo`, if it has one.
    pub(crate) fn digest(&self, repo: &str) -> Option<Digest> {
        let repo: RepoRef = repo.parse().unwrap();
        block_on(self.store().get(&repo)).unwrap()
    }

    /// The metadata of the digest for `repo`.
    pub(crate) fn meta(&self, repo: &str) -> DigestMeta {
        let digest = self.digest(repo);
        digest.unwrap_or_else(|| panic!("no digest of {repo}")).meta
    }

    /// Every repository of which the store has something, sorted.
    pub(crate) fn stored(&self) -> Vec<String> {
        let store = self.store();
        let listed = block_on(store.list("").try_collect::<Vec<_>>()).unwrap();
        let mut listed: Vec<_> = listed.iter().map(|l| l.repo.to_string()).collect();
        listed.sort();
        listed
    }

    /// A document of a run.
    pub(crate) fn document(&self, run: &str, name: &str) -> Value {
        let path = self.store_folder().join("runs").join(run).join(name);
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// How many requests the server has seen.
    pub(crate) fn requests(&self) -> u64 {
        let stats = self.server.stats();
        stats.values().map(|s| s.info_refs + s.upload_packs).sum()
    }

    /// The repositories that the server was asked for, sorted.
    pub(crate) fn asked_for(&self) -> Vec<String> {
        self.server.stats().into_keys().collect()
    }

    /// Nothing that a run works with is left: no slot, no scratch.
    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.slots(), [0; 0], "slots");
        assert_eq!(names_in(&self.scratch_folder()), [""; 0], "scratch");
    }

    /// The slots that work in the scratch folder.
    pub(crate) fn slots(&self) -> Vec<i32> {
        let scratch = self.scratch_folder();
        let mut slots = Vec::new();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let name = process.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A slot's arguments are a word and its job's folder. Of one that has ended there are none.
            let command = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            let mut words = command.trim_end_matches('\0').rsplit('\0');
            let folder = Path::new(words.next().unwrap_or_default());
            if folder.starts_with(&scratch) && words.next() == Some(ARGUMENT) {
                slots.push(id);
            }
        }
        slots
    }
}

/// The digest that `repo`, which lies in `path`, is to have.
pub(crate) fn expected_text(path: &Path, repo: &str) -> String {
    let (owner, name) = repo.split_once('/').unwrap();
    let subject = Subject::Repository {
        owner: owner.to_owned(),
        name: name.to_owned(),
    };
    let limits = DigestLimits::default();
    let (mut tree, mut content) = (String::new(), String::new());
    let source = Objects::open(path).unwrap();
    let facts = write(&source, &subject, &limits, &mut |part, text| {
        match part {
            Part::Tree => tree.push_str(text),
            Part::Content => content.push_str(text),
        }
        Ok(())
    })
    .unwrap();
    assemble(&facts, &tree, &content, limits.max_text_bytes).text
}

/// The producer with nothing of this process's environment but `PATH`.
pub(crate) fn bare_producer() -> Command {
    in_clean_environment(Command::new(env!("CARGO_BIN_EXE_producer")))
}

pub(crate) fn in_clean_environment(mut command: Command) -> Command {
    command
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

/// The names in a folder, sorted; none if it is not there.
pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Every file below a folder, relative to it, sorted.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path.strip_prefix(folder).unwrap().to_owned()),
            }
        }
    }
    files.sort();
    files
}

/// Returns when `there` holds.
pub(crate) fn wait_until(what: &str, there: impl FnMut() -> bool) {
    wait_closely(Duration::from_millis(5), what, there);
}

/// Returns within about a `pause` after `there` holds.
pub(crate) fn wait_closely(pause: Duration, what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        thread::sleep(pause);
    }
}

/// A producer at work. Killed when dropped.
pub(crate) struct Running {
    child: Child,
    output: Arc<Output>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Output {
    stdout: Growing,
    stderr: Growing,
}

/// What has come of a stream.
#[derive(Default)]
struct Growing {
    text: Mutex<String>,
    grown: Condvar,
}

impl Growing {
    /// Reads a stream to its end.
    fn read(&self, stream: impl Read) {
        let (mut stream, mut line) = (BufReader::new(stream), String::new());
        while stream.read_line(&mut line).unwrap() > 0 {
            self.text.lock().unwrap().push_str(&line);
            self.grown.notify_all();
            line.clear();
        }
    }

    /// Returns the first line with `part` in it, when it is there.
    fn wait_for_line(&self, part: &str) -> String {
        let find = |text: &str| {
            let mut lines = text.lines();
            lines.find(|line| line.contains(part)).map(str::to_owned)
        };
        let text = self.text.lock().unwrap();
        let waited = self
            .grown
            .wait_timeout_while(text, PATIENCE, |text| find(text).is_none());
        let (text, _) = waited.unwrap();
        find(&text).unwrap_or_else(|| panic!("waited for {part:?} in {text}"))
    }
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let output = Arc::new(Output::default());
        let stdout = child.stdout.take().unwrap();
        let stderr = child.stderr.take().unwrap();
        let out = Arc::clone(&output);
        let err = Arc::clone(&output);
        let readers = vec![
            thread::spawn(move || out.stdout.read(stdout)),
            thread::spawn(move || err.stderr.read(stderr)),
        ];
        Self {
            child,
            output,
            readers,
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn pid(&self) -> Pid {
        // Not reaped before `wait`, so it is still this process's.
        Pid::from_raw(self.child.id().cast_signed()).unwrap()
    }

    /// Returns the first log line with `part` in it, when it is there.
    pub(crate) fn wait_for_line(&self, part: &str) -> String {
        self.output.stdout.wait_for_line(part)
    }

    /// The same of standard error.
    pub(crate) fn wait_for_error(&self, part: &str) -> String {
        self.output.stderr.wait_for_line(part)
    }

    /// Whether there is a log line with `part` in it by now.
    pub(crate) fn has_said(&self, part: &str) -> bool {
        self.output.stdout.text.lock().unwrap().contains(part)
    }

    /// Returns when it has ended.
    pub(crate) fn wait(self) -> Ended {
        self.wait_within(PATIENCE)
    }

    /// Returns when it has ended, if that is soon enough.
    pub(crate) fn wait_within(mut self, patience: Duration) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > patience {
                self.child.kill().unwrap();
                let stdout = self.output.stdout.text.lock().unwrap();
                panic!("did not end within {patience:?}:\n{stdout}");
            }
            thread::sleep(Duration::from_millis(2));
        };
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        Ended {
            status,
            stdout: std::mem::take(&mut self.output.stdout.text.lock().unwrap()),
            stderr: std::mem::take(&mut self.output.stderr.text.lock().unwrap()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Ended and reaped already, as a rule.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A producer that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The exit code.
    pub(crate) fn code(&self) -> i32 {
        let code = self.status.code();
        code.unwrap_or_else(|| panic!("ended by signal {:?}: {self:?}", self.status.signal()))
    }

    /// With this code, or the test fails with all that was said.
    #[track_caller]
    pub(crate) fn with(self, code: u8) -> Self {
        assert_eq!(
            self.code(),
            i32::from(code),
            "\n{}\n{}",
            self.stdout,
            self.stderr
        );
        self
    }

    /// The log, line by line.
    pub(crate) fn log(&self) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        self.stdout.lines().map(parse).collect()
    }

    /// The messages of an operation.
    pub(crate) fn messages(&self, operation: &str) -> Vec<String> {
        let log = self.log();
        let lines = log
            .iter()
            .filter(|line| line["context"]["operation"] == operation);
        lines
            .map(|line| line["message"].as_str().unwrap().to_owned())
            .collect()
    }

    /// The metadata of the last line, which must be the run's summary.
    #[track_caller]
    pub(crate) fn summary(&self) -> Value {
        let last = self.log().pop().expect("a log");
        assert_eq!(
            last["context"]["operation"], "orchestrator-completion",
            "{last}"
        );
        last["context"]["metadata"].clone()
    }

    /// The last line's sentence, without how long it took.
    pub(crate) fn sentence(&self) -> String {
        let last = self.log().pop().expect("a log");
        let sentence = last["message"].as_str().unwrap();
        let end = [", completed in ", ", stopped after "]
            .iter()
            .find_map(|end| sentence.find(end));
        sentence[..end.unwrap_or(sentence.len())].to_owned()
    }

    /// The run's id.
    pub(crate) fn run_id(&self) -> String {
        self.summary()["run_id"].as_str().unwrap().to_owned()
    }
}

/// The class and the message of each failed repository in a summary.
pub(crate) fn failures<'a>(summary: &'a Value) -> Vec<(&'a str, &'a str, &'a str)> {
    let failures = summary["failures"].as_array().unwrap();
    let part = |failure: &'a Value, key: &str| failure[key].as_str().unwrap();
    failures
        .iter()
        .map(|failure| {
            let [repo, class, message] = ["repo", "class", "message"].map(|key| part(failure, key));
            (repo, class, message)
        })
        .collect()
}
