//! Serves a directory of bare repositories (`DIR/{owner}/{name}.git`) over HTTP on this machine,
//! for benchmarks and demonstrations.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde_json::json;
use testing::git_server::{Dialect, Fault, GitServer};
use tokio::signal::unix::{SignalKind, signal};

/// Serves a directory of bare git repositories over HTTP until SIGTERM or SIGINT.
#[derive(Debug, Parser)]
#[command(name = "git-server")]
struct Arguments {
    /// The directory with the repositories, as {owner}/{name}.git
    #[arg(long, value_name = "DIR")]
    root: PathBuf,

    /// A loopback address; port 0 stands for any that is free
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: SocketAddr,

    /// How late each answer is, in milliseconds; a fetch has three of them
    #[arg(long, value_name = "N", default_value_t = 0)]
    latency_ms: u64,

    /// How much that differs between repositories: with 1, half of them take 0.6 of it and one in a
    /// hundred more than six times as long; each the same at every start
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = spread)]
    latency_spread: f64,

    /// git's configuration, such as transfer.advertiseObjectInfo=true; repeatable. Filters and any object are
    /// allowed unless it says otherwise
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    config: Vec<(&'static str, &'static str)>,

    /// Speak protocol v0, whatever a client asks for
    #[arg(long)]
    only_v0: bool,

    /// Use this filter in place of the one that a client asks for; an empty one is none
    #[arg(long, value_name = "FILTER")]
    filter: Option<String>,

    /// Limit anonymous downloads as GitHub does, from the first one on
    #[arg(long, value_name = "FORM")]
    throttle: Option<Form>,

    /// How long that lasts, in seconds
    #[arg(long, value_name = "N", default_value_t = 10)]
    throttle_seconds: u64,

    /// Print at the end what was asked for: a JSON object for each repository
    #[arg(long)]
    stats: bool,
}

/// How a limit on anonymous downloads is told.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Form {
    /// By status 401 in place of a pack.
    Status,
    /// Inside an answer with status 200.
    InBand,
}

impl Arguments {
    /// Makes a server differ from GitHub, or limit as it does.
    fn apply(self, server: &GitServer) {
        server.set_latency(Duration::from_millis(self.latency_ms));
        server.set_latency_spread(self.latency_spread);
        server.set_dialect(Dialect {
            only_v0: self.only_v0,
            config: self.config,
            filter: self.filter.map(|filter| &*filter.leak()),
            ..Dialect::default()
        });
        let limit = match self.throttle {
            Some(Form::Status) => Fault::github_limit(Some(1)),
            Some(Form::InBand) => Fault::github_limit_in_band(Some(1)),
            None => return,
        };
        server.fault_all(limit.lasting(Duration::from_secs(self.throttle_seconds)));
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = GitServer::start_at(&arguments.root, arguments.listen)?;
    let stats = arguments.stats.then_some(&server);
    arguments.apply(&server);
    {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "listening on {}", server.url())?;
        stdout.flush()?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let mut stdout = io::stdout().lock();
    for (repo, stats) in stats.iter().flat_map(|server| server.stats()) {
        let asked = json!({
            "repo": repo,
            "info_refs": stats.info_refs,
            "upload_packs": stats.upload_packs,
            "packs": stats.packs,
        });
        writeln!(stdout, "{asked}")?;
    }
    Ok(())
}

fn setting(text: &str) -> Result<(&'static str, &'static str), String> {
    let text: &'static str = text.to_owned().leak();
    text.split_once('=')
        .ok_or_else(|| "expected KEY=VALUE".to_owned())
}

fn spread(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(spread) if (0.0..=3.0).contains(&spread) => Ok(spread),
        _ => Err("a number from 0 to 3".to_owned()),
    }
}
