//! The producer's command line.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use common::exit;
use common::shutdown::Shutdown;
use common::telemetry::LogConfig;
use tracing::{error, warn};

use crate::report::Bar;
use crate::run::RunConfig;

/// Turns a feed of git repositories into an always-fresh store of digests.
#[derive(Debug, Parser)]
#[command(name = "producer", version, about, after_long_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    log: LogConfig,
    #[command(subcommand)]
    command: Command,
}

/// How long something may take to end that was told to.
const GRACE: Duration = Duration::from_secs(3);

const AFTER_HELP: &str = "\
Environment: GITHUB_TOKEN is sent to github.com, and to no other host. AWS_* or R2_* variables
say how to reach a store in a bucket; .env.example lists them. A proxy (HTTPS_PROXY, ALL_PROXY) is
for the feed, the cache API and a bucket: repositories are fetched directly.

Exit codes:
  0    the run closed, failed repositories included; or it was stopped by SIGTERM
  1    a fault of this program
  2    the command line is wrong
  65   the feed is not a JSON array, or too large; nothing was touched
  69   feed or store cannot be reached, a disk stayed full, or --metrics-addr is taken
  70   the run did not close
  75   another run is at work on the same store
  130  stopped by SIGINT";

#[derive(Debug, Subcommand)]
enum Command {
    /// Digest what the feed lists and the store does not have yet.
    #[command(after_long_help = "\
Examples:
  producer run --limit 20                       20 repositories of the UK government's feed
  producer run --feed deploy/sample/repos.json  this checkout, without a network
  producer run --only 'alphagov/*' --dry-run    what would be done, and why")]
    Run(Box<RunConfig>),
}

impl Cli {
    /// Does what was asked for, and prints what went wrong.
    pub fn main(self) -> ExitCode {
        let human = self.log.is_human();
        let result = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("cannot start")
            .and_then(|runtime| {
                let result = runtime.block_on(self.run());
                // Not for ever: a read of a dead disk never ends.
                runtime.shutdown_timeout(GRACE);
                result
            });
        match result {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                let exit_code = exit::code_of(&error);
                // Whoever reads a log by program does not see standard error.
                if !human {
                    error!(operation = "exit", exit_code, "{error:#}");
                }
                writeln!(io::stderr(), "error: {error:#}").ok();
                ExitCode::from(exit_code)
            }
        }
    }

    async fn run(self) -> Result<u8> {
        let bar = match io::stderr().is_terminal() {
            true => Bar::on_terminal(),
            false => Bar::hidden(),
        };
        let lines = bar.clone();
        self.log.init(move || lines.writer(io::stdout()))?;
        let shutdown = Shutdown::on_signals().context("cannot listen to signals")?;
        match self.command {
            Command::Run(config) => tokio::select! {
                code = config.run(bar, &shutdown) => code,
                () = overdue(&shutdown) => {
                    warn!(operation = "shutdown", "something hangs; leaving it as it is");
                    Ok(shutdown.code())
                }
            },
        }
    }
}

/// Returns when a second signal has come and things should have ended since.
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
