//! Serves a directory of bare repositories (`DIR/{owner}/{name}.git`) over HTTP on this machine,
//! for benchmarks and demonstrations.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use common::testing::git_server::GitServer;
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

    /// How late each answer is, in milliseconds
    #[arg(long, value_name = "N", default_value_t = 0)]
    latency_ms: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = GitServer::start_at(&arguments.root, arguments.listen)?;
    server.set_latency(Duration::from_millis(arguments.latency_ms));
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
