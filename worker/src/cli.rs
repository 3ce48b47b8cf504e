//! The worker's command line.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use common::cli::BLOCKING_THREADS;
use common::cli::file::FileConfig;
use common::cli::manual::{CompletionsCommand, ManCommand};
use common::exit::{self, ExitError};
use common::fault::{Fault, FaultKind};
use common::ids::RepoRef;
use common::shutdown::Shutdown;
use common::telemetry::logs::LogConfig;
use common::telemetry::traces::Span;
use tracing::{info, warn};
use url::Url;

use crate::digest::assemble::assemble;
use crate::digest::{DigestLimits, Subject};
use crate::fetch::address;
use crate::fetch::policy::FetchConfig;
use crate::health::{self, HealthCommand};
use crate::metrics::Metrics;
use crate::run::RunConfig;
use crate::slot::slots::Slots;
use crate::slot::{SlotConfig, SlotError, SlotResult};

/// How long the process may take to end after a second signal.
const AT_ONCE: Duration = Duration::from_millis(800);

/// Makes digests of git repositories: one text each, for a language model to read.
#[derive(Debug, Parser)]
#[command(name = "worker", version, about, after_long_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    log: LogConfig,
    #[command(flatten)]
    file: FileConfig,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Environment: GITHUB_TOKEN is sent to github.com, and to no other host; --token-for names more tokens.
AWS_* or R2_* variables say how to reach a store in a bucket; .env.example lists them.
OTEL_EXPORTER_OTLP_ENDPOINT and more OTEL_* variables, which the manual lists, send a trace of each
repository to a collector.

Exit codes:
  0    done; or, of `worker run`, stopped by SIGTERM
  1    a fault of this program or machine; of `worker health`: not well
  2    the command line is wrong, or the source is not allowed
  69   the repository cannot be had: gone, throttled, too large, or its host is away;
       of `worker run`: the broker refuses, or --metrics-addr is taken
  130  stopped by SIGINT
  143  stopped by SIGTERM";

#[derive(Debug, Subcommand)]
enum Command {
    /// Work on the jobs that a producer puts on RabbitMQ, until stopped.
    Run(Box<RunConfig>),
    /// Write the digest of one repository.
    Digest(Box<DigestCommand>),
    /// Ask a worker on this machine whether it is well: 0 if so, else 1 and a sentence.
    Health(HealthCommand),
    /// Print completions for a shell.
    Completions(CompletionsCommand),
    /// Write pages for `man` into a folder.
    Man(ManCommand),
}

/// Writes the digest of one repository to standard output or a file.
#[derive(Args, Debug)]
// There is one repository, and whoever names a path means it.
#[command(mut_arg("concurrency", |arg| arg.hide(true)), mut_arg("allow_local", |arg| arg.hide(true)))]
#[command(after_long_help = "\
Examples:
  worker digest https://github.com/octocat/Hello-World
  worker digest . -o digest.txt
  worker digest ../whitehall --name alphagov/whitehall --no-limit --gitingest-limits")]
struct DigestCommand {
    /// An https URL (also `github.com/OWNER/NAME` or `git@HOST:OWNER/NAME`), or the path of a repository on this machine, of which HEAD is read.
    source: String,
    /// Write to this file instead of standard output; `-` is standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Name the repository so in the digest, as gitingest names one that it cloned.
    #[arg(long, value_name = "OWNER/NAME")]
    name: Option<RepoRef>,
    /// Do not cut the text at 512 KiB.
    #[arg(long)]
    no_limit: bool,
    /// Leave out files over gitingest's own 10 MiB instead of 512 KiB.
    #[arg(long)]
    gitingest_limits: bool,
    #[command(flatten)]
    fetch: FetchConfig,
    #[command(flatten)]
    slot: SlotConfig,
}

impl Cli {
    /// Does what was asked for, and prints what went wrong.
    pub fn main(self) -> ExitCode {
        if matches!(self.command, Command::Health(_)) {
            health::without_environment();
        }
        // The log of the others goes to standard error, where the error is printed anyway.
        let programs = !self.log.is_human() && matches!(self.command, Command::Run(_));
        let runtime = match tokio::runtime::Builder::new_multi_thread()
            .max_blocking_threads(BLOCKING_THREADS)
            .enable_all()
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => return exit::fail(&error.into(), programs),
        };
        let ended = runtime.block_on(self.run());
        // Not waited for: a read of a dead disk never ends.
        runtime.shutdown_background();
        match ended {
            Ok(code) => ExitCode::from(code),
            Err(error) => exit::fail(&error, programs),
        }
    }

    async fn run(self) -> Result<u8> {
        match self.command {
            Command::Run(_) => self
                .log
                .init(io::stdout, self.log.is_colored(&io::stdout()))?,
            // Standard output is the digest's.
            Command::Digest(_) => self
                .log
                .init(io::stderr, self.log.is_colored(&io::stderr()))?,
            Command::Health(_) | Command::Completions(_) | Command::Man(_) => {}
        }
        match self.command {
            Command::Run(config) => {
                let shutdown = Shutdown::on_signals().context("cannot listen to signals")?;
                tokio::select! {
                    code = config.run(&shutdown) => code,
                    () = overdue(&shutdown) => {
                        warn!(operation = "shutdown", "something hangs; leaving it as it is");
                        Ok(shutdown.code())
                    }
                }
            }
            Command::Digest(command) => command.run().await,
            Command::Health(command) => command.run().await,
            Command::Completions(command) => Ok(command.run::<Self>()),
            Command::Man(command) => Ok(command.run::<Self>()?),
        }
    }
}

/// Returns when everything should have ended after a second signal.
async fn overdue(shutdown: &Shutdown) {
    shutdown.hard.cancelled().await;
    tokio::time::sleep(AT_ONCE).await;
}

impl DigestCommand {
    /// Finds out what the source is, and rewrites it; returns its URL if it is not a path.
    fn locate(&mut self) -> Result<Option<Url>> {
        let on_disk = fs::canonicalize(&self.source);
        let usage = |message: String| ExitError::new(exit::USAGE, message);
        let address = match &on_disk {
            Ok(_) => None,
            Err(_) => address::parse(&self.source)
                .map_err(|why| usage(format!("cannot use this address: it {why}")))?,
        };
        if let Some(address) = address {
            if let Some(page) = address.page {
                warn!(
                    operation = "digest",
                    "leaving out {page:?}: a digest is always of HEAD, of the whole repository"
                );
            }
            self.source = address.url;
            let url = Url::parse(&self.source);
            return url
                .map(Some)
                .map_err(|error| usage(error.to_string()).into());
        }
        let path = on_disk.map_err(|error| nowhere(&self.source, &error))?;
        // Whoever names a path here means it.
        self.fetch.allow_local = true;
        let path = path.into_os_string().into_string();
        self.source = path.map_err(|path| anyhow::anyhow!("{path:?} is not UTF-8"))?;
        Ok(None)
    }

    async fn run(mut self) -> Result<u8> {
        let shutdown = Shutdown::on_signals().context("cannot listen to signals")?;
        let url = self.locate()?;
        let subject = match (&self.name, &url) {
            (Some(repo), _) => repository(repo),
            (None, Some(url)) => repository(&repo_of(url)?),
            (None, None) => Subject::Directory {
                slug: self.source.trim_matches('/').to_owned(),
            },
        };
        let mut limits = match self.gitingest_limits {
            true => DigestLimits::gitingest(),
            false => DigestLimits::default(),
        };
        limits.max_text_bytes = match self.no_limit {
            true => None,
            false => DigestLimits::default().max_text_bytes,
        };
        if url.is_none() && Path::new(&self.source).join(".git").exists() {
            info!(
                operation = "digest",
                "the digest is of HEAD: what is not committed is left out"
            );
        }
        self.slot.concurrency = Some(1);
        let policy = self.fetch.policy(|name| std::env::var_os(name))?;
        let max_text_bytes = limits.max_text_bytes;
        let slots = Slots::new(self.slot, policy, limits, Metrics::new())
            .map_err(|fault| exit_error(&fault))?;
        let made = match slots
            .work(
                &self.source,
                subject,
                None,
                &shutdown.soft,
                &Span::default(),
            )
            .await
        {
            Ok(SlotResult::Digest(made)) => made,
            Ok(SlotResult::Unmoved { .. }) => unreachable!("no commit is known"),
            Err(SlotError::Fault(fault)) => return Err(exit_error(&fault).into()),
            // Unlike a run, this has nothing to show that was stopped.
            Err(SlotError::Stopped) => {
                return Ok(match shutdown.code() {
                    exit::INTERRUPTED => exit::INTERRUPTED,
                    _ => exit::TERMINATED,
                });
            }
        };
        let text = assemble(&made.facts, &made.tree, &made.content, max_text_bytes);
        match &self.output {
            Some(path) if path.as_os_str() != "-" => {
                write_whole(path, text.text.as_bytes()).map_err(|error| {
                    let path = path.display();
                    anyhow::anyhow!("cannot write {path}: {error}; nothing was written there")
                })?;
            }
            _ => match io::stdout().write_all(text.text.as_bytes()) {
                // Whoever reads it has had enough, as `head` has.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                written => written.context("cannot write to standard output")?,
            },
        }
        Ok(exit::OK)
    }
}

/// Says why a source is neither a URL nor a path, and what to give instead.
fn nowhere(source: &str, error: &io::Error) -> ExitError {
    let hint = match source.parse::<RepoRef>() {
        Ok(repo) => format!("; for the repository on GitHub give https://github.com/{repo}"),
        Err(_) => String::new(),
    };
    let message = format!("{source:?} is neither a URL nor a path: {error}{hint}");
    ExitError::new(exit::USAGE, message)
}

/// Writes a file whose end may be missing at no time: half a digest looks like one.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // A pipe or a terminal is written to as it is.
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return fs::write(path, bytes);
    }
    // Where a link points to, not in its place.
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let beside = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(beside.unwrap_or(Path::new(".")))?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}

fn repository(repo: &RepoRef) -> Subject {
    Subject::Repository {
        owner: repo.owner().to_owned(),
        name: repo.name().to_owned(),
    }
}

/// `owner/name` of a URL: its last two segments, without `.git`.
fn repo_of(url: &Url) -> Result<RepoRef> {
    let path = url.path().trim_end_matches('/');
    let path = path.strip_suffix(".git").unwrap_or(path);
    let mut segments = path.rsplit('/');
    let (name, owner) = (segments.next(), segments.next());
    RepoRef::new(owner.unwrap_or_default(), name.unwrap_or_default()).map_err(|error| {
        let message = format!("{url}: {error}; give its name with --name OWNER/NAME");
        ExitError::new(exit::USAGE, message).into()
    })
}

fn exit_error(fault: &Fault) -> ExitError {
    let code = match fault.kind {
        FaultKind::Refused => exit::USAGE,
        FaultKind::Infra | FaultKind::Killed => exit::INTERNAL,
        _ => exit::UNAVAILABLE,
    };
    ExitError::new(code, format!("{}: {fault}", fault.kind))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_url_names_its_repository() {
        for (url, expected) in [
            (
                "https://github.com/octocat/Hello-World",
                Some("octocat/Hello-World"),
            ),
            (
                "https://github.com/octocat/Hello-World.git",
                Some("octocat/Hello-World"),
            ),
            ("https://gitlab.com/group/sub/project/", Some("sub/project")),
            ("https://github.com/octocat", None),
            ("https://github.com/", None),
        ] {
            let repo = repo_of(&Url::parse(url).unwrap()).ok();
            assert_eq!(repo.map(|r| r.to_string()).as_deref(), expected, "{url}");
        }
    }
}
