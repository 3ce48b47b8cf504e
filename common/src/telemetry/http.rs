//! The HTTP server of `/metrics`, `/health` and `/ready`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::TEXT_FORMAT;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tracing::info;

use super::registry::Expose;
use crate::exit::{self, ExitError};

/// Connections served at a time: clients must not exhaust the file descriptors that work needs. For one
/// more, the oldest is closed, most likely an idle one: an answer is there at once.
const MAX_CONNECTIONS: usize = 32;
/// Longest wait for a request, the next one of a kept connection included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Where to serve metrics.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs and metrics")]
pub struct MetricsConfig {
    /// Serve Prometheus metrics at http://ADDRESS/metrics, liveness at /health, readiness at /ready;
    /// IP:PORT, such as 0.0.0.0:9100 for every address of this machine.
    #[arg(long, env = "METRICS_ADDR", value_name = "ADDRESS", value_parser = parse_address)]
    pub metrics_addr: Option<SocketAddr>,
}

/// Parses an address to listen on.
///
/// # Errors
/// Says how an address is written.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let wrong = |_| "an address is IP:PORT, such as 127.0.0.1:9100 or 0.0.0.0:9100".to_owned();
    text.parse().map_err(wrong)
}

/// Whether a process can do its work now, or why not.
pub type Readiness = watch::Receiver<Result<(), String>>;

/// Returns the readiness of a process that is ready as long as it lives.
pub fn always_ready() -> Readiness {
    watch::channel(Ok(())).1
}

impl MetricsConfig {
    /// Serves `metrics` in the background if an address was given, and gives the address it
    /// listens on.
    ///
    /// # Errors
    /// Where the address cannot be listened on.
    pub async fn serve(
        &self,
        metrics: &impl Expose,
        readiness: &Readiness,
    ) -> anyhow::Result<Option<(SocketAddr, JoinHandle<()>)>> {
        let Some(address) = self.metrics_addr else {
            return Ok(None);
        };
        let listener = TcpListener::bind(address).await.map_err(|e| {
            let message = format!(
                "--metrics-addr {address}: {e}; choose another address or port, port 0 for any"
            );
            ExitError::new(exit::UNAVAILABLE, message)
        })?;
        let address = listener.local_addr()?;
        info!(
            operation = "metrics",
            address = address.to_string(),
            "Metrics: http://{address}/metrics; also /health (alive) and /ready"
        );
        let (metrics, readiness) = (metrics.clone(), readiness.clone());
        let server = tokio::spawn(async move {
            let mut open: VecDeque<AbortHandle> = VecDeque::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // Out of file descriptors, most likely: let others close some.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                open.retain(|connection| !connection.is_finished());
                if open.len() >= MAX_CONNECTIONS
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                let (metrics, readiness) = (metrics.clone(), readiness.clone());
                let connection = tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let response = answer(&request, &metrics, &readiness);
                        async { Ok::<_, Infallible>(response) }
                    });
                    // A client that goes away is its own business.
                    hyper::server::conn::http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(REQUEST_TIMEOUT)
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                        .ok();
                });
                open.push_back(connection.abort_handle());
            }
        });
        Ok(Some((address, server)))
    }
}

fn answer<B>(
    request: &Request<B>,
    metrics: &impl Expose,
    readiness: &Readiness,
) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, metrics.render()),
        (&Method::GET, "/health") => (StatusCode::OK, b"ok\n".to_vec()),
        (&Method::GET, "/ready") => match &*readiness.borrow() {
            Ok(()) => (StatusCode::OK, b"ok\n".to_vec()),
            Err(why) => (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{why}\n").into_bytes(),
            ),
        },
        _ => (
            StatusCode::NOT_FOUND,
            b"try /metrics, /health or /ready\n".to_vec(),
        ),
    };
    // Prometheus 3 takes nothing without it.
    let text = match status {
        StatusCode::OK if request.uri().path() == "/metrics" => TEXT_FORMAT,
        _ => "text/plain; charset=utf-8",
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(text));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[derive(Clone)]
    struct Nothing;

    impl Expose for Nothing {
        fn render(&self) -> Vec<u8> {
            Vec::new()
        }
    }

    #[tokio::test]
    async fn idle_connections_keep_nobody_waiting() {
        let config = MetricsConfig {
            metrics_addr: Some("127.0.0.1:0".parse().unwrap()),
        };
        let served = config.serve(&Nothing, &always_ready()).await.unwrap();
        let (address, server) = served.unwrap();
        let mut idle = Vec::new();
        for _ in 0..200 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        for _ in 0..12 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            let mut answer = String::new();
            // An idle one would be waited for two seconds.
            let reading = stream.read_to_string(&mut answer);
            tokio::time::timeout(Duration::from_secs(1), reading)
                .await
                .unwrap()
                .unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        server.abort();
    }

    #[test]
    fn metrics_say_which_format_they_are_in() {
        let format = |path: &str| {
            let request = Request::get(path).body(()).unwrap();
            let response = answer(&request, &Nothing, &always_ready());
            response.headers()[CONTENT_TYPE].clone()
        };
        assert_eq!(format("/metrics"), "text/plain; version=0.0.4");
        assert_eq!(format("/health"), "text/plain; charset=utf-8");
        assert_eq!(format("/metric"), "text/plain; charset=utf-8");
    }
}
