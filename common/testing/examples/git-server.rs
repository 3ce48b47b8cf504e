//! Serves a directory of bare repositories (`DIR/{owner}/{name}.git`) over HTTP on this machine,
//! for benchmarks and demonstrations.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use testing::git_server::GitServer;
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
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = GitServer::start_at(&arguments.root, arguments.listen)?;
    server.set_latency(Duration::from_millis(arguments.latency_ms));
    server.set_latency_spread(arguments.latency_spread);
    {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "listening on {}", server.url())?;
        stdout.flush()?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn spread(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(spread) if (0.0..=3.0).contains(&spread) => Ok(spread),
        _ => Err("a number from 0 to 3".to_owned()),
    }
}
