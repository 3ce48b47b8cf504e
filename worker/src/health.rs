//! `worker health`: whether the worker on this machine is well, asked as a container's engine asks.

use std::env;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use common::exit::{self, ExitError};
use common::telemetry::http::parse_address;
use common::text::{format_duration, seconds_within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The variable with the address of the worker.
const ADDRESS: &str = "METRICS_ADDR";
/// Longest answer that is read: a status and a sentence.
const MAX_ANSWER: u64 = 4096;

/// Asks a worker on this machine whether it is well.
#[derive(Args, Debug)]
pub struct HealthCommand {
    /// The address that the worker was given as --metrics-addr.
    #[arg(long, env = ADDRESS, value_name = "ADDRESS", value_parser = parse_address)]
    metrics_addr: SocketAddr,
    /// Ask whether it can do its work (broker, store and scratch folder are well), not only whether it is alive.
    #[arg(long)]
    ready: bool,
    /// Longest wait for the answer.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = seconds_within("1s", "1m"))]
    wait: u64,
}

/// Goes on as a program without environment, if there is more in it than this command needs: a
/// container's engine gives it all that the worker has, secrets included.
pub fn without_environment() {
    if env::vars_os().all(|(name, _)| name == ADDRESS) {
        return;
    }
    let mut again = Command::new("/proc/self/exe");
    again.env_clear().args(env::args_os().skip(1));
    if let Some(address) = env::var_os(ADDRESS) {
        again.env(ADDRESS, address);
    }
    // Returns only if it fails. The answer matters more.
    _ = again.exec();
}

impl HealthCommand {
    /// Gives the exit code for a worker that is well.
    ///
    /// # Errors
    /// With an [`ExitError`] that says what is wrong, where it is not.
    pub async fn run(&self) -> Result<u8> {
        let address = on_this_machine(self.metrics_addr);
        let path = if self.ready { "/ready" } else { "/health" };
        let unwell = |why: String| {
            ExitError::new(exit::INTERNAL, format!("http://{address}{path}: {why}")).into()
        };
        let limit = Duration::from_secs(self.wait);
        let answer = match tokio::time::timeout(limit, get(address, path)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(unwell(format!("no answer: {error}"))),
            Err(_) => {
                return Err(unwell(format!(
                    "no answer within {}",
                    format_duration(limit)
                )));
            }
        };
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.lines().next().unwrap_or_default();
        match status.split(' ').nth(1) {
            Some("200") => Ok(exit::OK),
            _ => Err(unwell(format!("{status}: {}", body.trim()))),
        }
    }
}

/// Where a server that listens on all addresses can be reached.
fn on_this_machine(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
