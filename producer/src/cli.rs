//! The producer's command line.

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use common::cli::file::FileConfig;
use common::cli::manual::{CompletionsCommand, ManCommand};
use common::cli::{BLOCKING_THREADS, Origin, Setting};
use common::exit;
use common::shutdown::Shutdown;
use common::telemetry::logs::LogConfig;
use tracing::warn;

use crate::bucket::{CatalogConfig, FailuresConfig, GetConfig, RestoreConfig, WithdrawOneConfig};
use crate::cancel::CancelConfig;
use crate::check::CheckCommand;
use crate::dead::DeadConfig;
use crate::observe::ObserveConfig;
use crate::run::RunConfig;
use crate::settings::SettingsCommand;
use crate::status::StatusConfig;
use crate::terminal::bar::Bar;
use crate::verify::VerifyConfig;

/// Turns a feed of git repositories into an always-fresh store of digests.
#[derive(Debug, Parser)]
#[command(name = "producer", version, about, after_long_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    log: LogConfig,
    #[command(flatten)]
    file: FileConfig,
    #[command(subcommand)]
    command: Command,
}

/// How long ending may take after a second signal.
const GRACE: Duration = Duration::from_secs(3);

const AFTER_HELP: &str = "\
Environment: GITHUB_TOKEN is sent to github.com, and to no other host; --token-for names more tokens.
AWS_* or R2_* variables say how to reach a store in a bucket; .env.example lists them. A proxy
(HTTPS_PROXY, ALL_PROXY) is for the feed, the cache API and a bucket: repositories are fetched
directly. OTEL_EXPORTER_OTLP_ENDPOINT and more OTEL_* variables, which the manual lists, send a trace
of each repository to a collector.

Exit codes:
  0    the run closed, and no more repositories failed than --max-failures allows
  1    a fault of this program
  2    the command line is wrong
  3    the run closed, but more repositories failed than --max-failures allows, or jobs of it were
       cancelled (`producer cancel`)
  4    an audit found something (`producer verify`)
  65   the feed is not one, too large, empty, or without a usable entry, and nothing was
       touched; or more digests would have been withdrawn than --withdraw-limit allows, and none was
  69   store, broker or disk could not be used for longer than --patience, the feed could not be
       fetched, or --metrics-addr is taken; or the run closed, and its catalogue could not be written
  70   the run did not close
  75   another run is at work on the same folder, or another producer on the same queues
  130  SIGINT stopped the run and left jobs open
  143  SIGTERM stopped the run and left jobs open";

#[derive(Debug, Subcommand)]
enum Command {
    /// Digest what the feed lists and the store does not have yet.
    #[command(after_long_help = "\
Examples:
  producer run --limit 20                       20 repositories of the UK government's feed
  producer run --feed deploy/sample/repos.json  this checkout, without a network
  producer run --only 'alphagov/*' --dry-run --explain
                                                what would be done, and why
  gh repo list alphagov --limit 1000 --json owner,name,url,pushedAt,isArchived | producer run --feed -
                                                the repositories of an account
  producer run --token-for gitlab.com=GITLAB_TOKEN --host-rate 5
                                                with the token of a variable, and gently
  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 producer run
                                                with a trace of each repository, to a collector")]
    Run(Box<RunConfig>),
    /// Check what a run needs, before one is started: feed, store, broker, hosts, tokens, this machine.
    #[command(after_long_help = CHECK_HELP)]
    Check(Box<CheckCommand>),
    /// Print the options that `run` would have, and where each comes from.
    #[command(after_long_help = CONFIG_HELP)]
    Config(Box<SettingsCommand>),
    /// Show how far a run has got, from any machine that reaches store and broker.
    #[command(after_long_help = STATUS_HELP)]
    Status(Box<StatusConfig>),
    /// End a run: take its jobs that still wait off the queues.
    #[command(after_long_help = CANCEL_HELP)]
    Cancel(Box<CancelConfig>),
    /// Serve the state of fleet and run as metrics, for as long as it is left to.
    #[command(after_long_help = OBSERVE_HELP)]
    Observe(Box<ObserveConfig>),
    /// Print a repository's digest.
    #[command(after_long_help = GET_HELP)]
    Get(Box<GetConfig>),
    /// Print the catalogue of the digests.
    #[command(after_long_help = CATALOG_HELP)]
    Catalog(Box<CatalogConfig>),
    /// List what failed in a run, and why.
    #[command(after_long_help = FAILURES_HELP)]
    Failures(Box<FailuresConfig>),
    /// Take a repository's digest down, and keep it down.
    #[command(after_long_help = WITHDRAW_HELP)]
    Withdraw(Box<WithdrawOneConfig>),
    /// Undo `withdraw`.
    #[command(after_long_help = RESTORE_HELP)]
    Restore(Box<RestoreConfig>),
    /// Audit the store: hold every digest against its record, the feed and the catalogue.
    #[command(after_long_help = VERIFY_HELP)]
    Verify(Box<VerifyConfig>),
    /// List, show, replay or remove the jobs that were given up.
    #[command(after_long_help = DEAD_HELP)]
    Dead(Box<DeadConfig>),
    /// Print completions for a shell.
    #[command(after_long_help = COMPLETIONS_HELP)]
    Completions(CompletionsCommand),
    /// Write pages for `man` into a folder.
    #[command(after_long_help = MAN_HELP)]
    Man(ManCommand),
}

impl Command {
    /// Whether standard output is for an answer, and the log belongs elsewhere.
    fn answers(&self) -> bool {
        !matches!(self, Self::Run(_) | Self::Observe(_))
    }
}

const CHECK_HELP: &str = "\
Examples:
  producer check --feed repos.json --store s3://digests
  producer check --worker --json | jq -r 'select(.state != \"ok\") | .message'
  docker compose run --rm producer check

Each line begins with ok, warning (a run would work, but perhaps not as it is meant to) or failed. It
takes the options of `producer run`. With a broker it leaves what only workers need, the scratch
folder, walls, hosts and tokens, to `--worker`, which is for a machine with workers. Of each host in
the feed it fetches one repository, up to 1 MiB.

Exit codes:
  0    nothing failed
  2    an option or a token is wrong; of several failures, the largest code counts
  65   the feed is not usable
  69   feed, store, broker, a host or the scratch folder cannot be used
  130  stopped by SIGINT (143: by SIGTERM)";

const CONFIG_HELP: &str = "\
Examples:
  producer config
  producer config --config fleet.toml --limit 5
  producer config --store s3://digests > fleet.toml

It takes the options of `producer run`. What it prints is a file for --config; secrets are left out.

Exit codes:
  0    printed
  2    the command line, a variable or the file is wrong";

const COMPLETIONS_HELP: &str = "\
Examples:
  producer completions bash > ~/.local/share/bash-completion/completions/producer
  producer completions fish > ~/.config/fish/completions/producer.fish

Exit codes:
  0    printed
  2    there are none for that shell";

const MAN_HELP: &str = "\
Example:
  producer man ~/.local/share/man/man1

Exit codes:
  0    written
  69   the folder cannot be written to";

const STATUS_HELP: &str = "\
Examples:
  producer status                          the run begun last, at this moment
  producer status --watch                  a live page, until the run closes
  producer status 20261123T130000Z-0a1b2c  another run, or a replay of dead letters
  producer status --json | jq .open        for programs
  producer status --workers                what each worker has in hand, and for how long

The numbers come from the run's documents in the store and from the broker's ledger. No broker is
needed for a run that has ended, whose summary.json is read, or for a run in one process, which stores
its progress every 10 s.

Members of --json; null is not known, or no longer to the point:
  run_id, started_at, feed, elapsed_seconds
  state                 running, closed (every job has its outcome), or stopped (jobs are open and
                        the producer has ended; workers may go on). In a fleet nobody can tell of a
                        run with --detach, or whose producer was killed: it counts as running. One
                        process is found to have stopped after a minute.
  source                ledger (now), progress (of one process, within 10 s) or summary (as the
                        producer left it)
  total_repos = cached + processed + failed + open; cache_hit_rate (percent), adopted
  unmoved, unchanged, superseded (all within processed), failed_before (within failed),
  failures_by_class
  outcomes_per_minute (over the last 5), eta_seconds
  oldest_open_repo, oldest_open_seconds
  waiting, waiting_retry, dead_letters     of all runs on this broker
  in_work_or_lost       open jobs beyond those that wait
  workers_connected, workers_seen (a record within the last minute)
  paused [{reason, workers}], hosts_paused [{host, until}]: why workers wait
  notes                 sentences about what limits these numbers
With --workers: worker, repo, run, seconds; one object for each repository in hand, and one with null
for a worker that has none

Exit codes:
  0    shown; with --watch, the run has closed
  2    the command line is wrong, there is no such run, or a broker is needed and not named
  69   store or broker cannot be reached
  130  stopped by SIGINT (143: by SIGTERM)";

const CANCEL_HELP: &str = "\
Examples:
  producer cancel latest                   the run begun last
  producer cancel 20261123T130000Z-0a1b2c  another one
  producer cancel latest --dry-run         how many jobs that would be

For a run that was begun with the wrong feed or options. Its jobs that wait, for a worker or for their
next attempt, count as failed, class cancelled. Workers finish the jobs that they already have, and jobs
of other runs stay. The run then closes; its producer, if it still runs, ends with 3. While it is still
publishing, this command goes on until every job is published and cancelled. The next run digests what
this one did not.

It may be repeated, as after a crash. A run without a broker is stopped where it runs, by Ctrl-C.

Exit codes:
  0    nothing of the run waits any more; also where nothing did, and where the run has closed
  2    the command line is wrong, the run does not exist, no broker is given, or the broker has no job
       of this run
  69   store or broker cannot be reached
  130  stopped by SIGINT before it was done (143: by SIGTERM)";

const OBSERVE_HELP: &str = "\
Example:
  producer observe --store s3://digests --broker-url amqp://rabbit --metrics-addr 0.0.0.0:9100

A run's producer ends with its run, so what alerts need is told by this: how far the latest run has
got, when a run closed last, what waits on the queues, and who works. It looks at store and broker
every 15 seconds, writes nothing, and waits for a broker or store that is away. Without a broker it
tells what the documents in the store say. The README lists the metrics.

Exit codes:
  0    stopped by SIGTERM
  2    the command line is wrong
  69   the address is taken, or the broker refuses
  130  stopped by SIGINT";

const GET_HELP: &str = "\
Examples:
  producer get alphagov/whitehall | less
  producer get alphagov/whitehall -o whitehall.txt --store s3://digests

Exit codes:
  0    printed
  2    the command line is wrong, or there is no such digest; the message says why
  69   the store cannot be reached, or the file not be written";

const CATALOG_HELP: &str = "\
Examples:
  producer catalog | jq -r 'select(.state == \"stale\") | .id'
  producer catalog --form vertex --base gs://digests > documents.jsonl
  producer catalog --write                after digests were changed by hand

It is the store's catalog.jsonl.gz, which every run that closes brings up to date.

Exit codes:
  0    printed
  2    the command line is wrong, or there is no catalogue yet
  69   the store cannot be reached";

const FAILURES_HELP: &str = "\
Examples:
  producer failures                                      of the run begun last
  producer failures 20261123T130000Z-0a1b2c --class gone
  producer failures --json | jq -r .repo

Exit codes:
  0    listed, also where nothing failed
  2    the command line is wrong, or there is no such run that has ended
  69   the store cannot be reached";

const WITHDRAW_HELP: &str = "\
Examples:
  producer withdraw example-org/secrets        out of the readers' sight; kept for a while
  producer withdraw example-org/secrets --now  and deleted

The digest leaves gitingest/ and the catalogue at once, and no run makes it again until
`producer restore`. A job of it that is under way may still store it: the next run that closes takes
that down as well.

Exit codes:
  0    withdrawn
  2    the command line is wrong
  69   the store cannot be reached";

const RESTORE_HELP: &str = "\
Example:
  producer restore example-org/useful

What is still kept of its digest is put back; otherwise the next run makes it anew.

Exit codes:
  0    restored
  2    the command line is wrong, or the repository is not withdrawn
  69   the store cannot be reached";

const VERIFY_HELP: &str = "\
Examples:
  producer verify --feed repos.json                  every record
  producer verify --feed repos.json --deep --json    every text as well
  producer verify --feed repos.json --repair         and what is wrong is digested anew
  producer verify --feed repos.json --prune          and what is nobody's is removed

Findings: missing, stale, torn, wrong_hash (with --deep), foreign, future_dated: a digest is needed;
--repair makes it, with the options of `producer run`. wrong_case, orphaned: nobody's; --prune removes
them. catalog, index: a document says something else than the store; the next run that closes repairs
the catalogue, and the cache check the index. What failed for a reason that is known is not missing.

Exit codes:
  0    nothing found; with --repair, as `producer run`
  2    the command line is wrong
  4    something was found
  65   the feed is not usable
  69   store or feed cannot be reached
  130  stopped by SIGINT (143: by SIGTERM)";

const DEAD_HELP: &str = "\
Examples:
  producer dead list --older-than 3d               what has been lying here for long
  producer dead show alphagov/whitehall            all that is known about it
  producer dead replay --class killed --dry-run    what would be tried again
  producer dead replay --owner 'alphagov' --rate 5 five jobs a second, each as if it were new
  producer dead purge --older-than 7d --yes        removed for good

A job becomes a dead letter when the broker has delivered it again and again without an answer, as
when it kills its worker; so does a message that is no job. A job that failed in an ordinary way is
none: the next run does it again.

While one of these commands looks at the letters, no other sees them.

Exit codes:
  0    done; also where nothing matched, or SIGTERM stopped it between two letters
  2    the command line is wrong, no broker is named, or no letter has that id
  69   the broker cannot be reached
  130  stopped by SIGINT (143: by SIGTERM, before it knew the letters)";

impl Cli {
    /// Does what was asked for, and prints what went wrong.
    pub fn main(self, settings: &[Setting]) -> ExitCode {
        // An answer's log goes to standard error, where the error is printed anyway.
        let programs = !self.log.is_human() && !self.command.answers();
        let result = tokio::runtime::Builder::new_multi_thread()
            .max_blocking_threads(BLOCKING_THREADS)
            .enable_all()
            .build()
            .context("cannot start")
            .and_then(|runtime| {
                let result = runtime.block_on(self.run(settings));
                // Not for ever: a read of a dead disk never ends.
                runtime.shutdown_timeout(GRACE);
                result
            });
        match result {
            Ok(code) => ExitCode::from(code),
            Err(error) => exit::fail(&error, programs),
        }
    }

    async fn run(mut self, settings: &[Setting]) -> Result<u8> {
        // Its lines say all that matters.
        let by_default = |s: &Setting| s.name == "log-level" && s.origin == Origin::Default;
        if matches!(self.command, Command::Check(_)) && settings.iter().any(by_default) {
            self.log.log_level = "error".to_owned();
        }
        let bar = match io::stderr().is_terminal() {
            true => Bar::on_terminal(),
            false => Bar::hidden(),
        };
        if self.command.answers() {
            let colored = self.log.is_colored(&io::stderr());
            self.log.init(io::stderr, colored)?;
        } else {
            let lines = bar.clone();
            let colored = self.log.is_colored(&io::stdout());
            self.log.init(move || lines.writer(io::stdout()), colored)?;
        }
        let shutdown = Shutdown::on_signals().context("cannot listen to signals")?;
        let asked = async {
            match self.command {
                Command::Run(config) => config.run(bar, &shutdown).await,
                Command::Status(config) => config.run(&shutdown).await,
                Command::Observe(config) => config.run(&shutdown).await,
                Command::Dead(config) => config.run(&shutdown).await,
                Command::Cancel(config) => config.run(&shutdown).await,
                Command::Get(config) => unless_stopped(config.run(), &shutdown).await,
                Command::Catalog(config) => unless_stopped(config.run(), &shutdown).await,
                Command::Failures(config) => unless_stopped(config.run(), &shutdown).await,
                Command::Withdraw(config) => unless_stopped(config.run(), &shutdown).await,
                Command::Verify(config) => config.run(bar, &shutdown).await,
                Command::Restore(config) => unless_stopped(config.run(), &shutdown).await,
                Command::Check(command) => {
                    command
                        .run(self.log.is_colored(&io::stdout()), &shutdown)
                        .await
                }
                Command::Config(command) => Ok(command.run(settings)),
                Command::Completions(command) => Ok(command.run::<Self>()),
                Command::Man(command) => Ok(command.run::<Self>()?),
            }
        };
        tokio::select! {
            code = asked => code,
            () = overdue(&shutdown) => {
                warn!(operation = "shutdown", "something hangs; leaving it as it is");
                Ok(shutdown.unfinished())
            }
        }
    }
}

/// Does one step that may be broken off anywhere, unless a signal comes.
async fn unless_stopped(step: impl Future<Output = Result<u8>>, shutdown: &Shutdown) -> Result<u8> {
    tokio::select! {
        code = step => code,
        () = shutdown.soft.cancelled() => Ok(shutdown.unfinished()),
    }
}

/// Returns once a second signal has come and [`GRACE`] has passed.
async fn overdue(shutdown: &Shutdown) {
    shutdown.hard.cancelled().await;
    tokio::time::sleep(GRACE).await;
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
