//! `worker health`, as a container's engine calls it.

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use common::telemetry::http::MetricsConfig;
use tokio::sync::watch;
use worker::metrics::Metrics;

/// Exit code, standard error, and how long it took.
fn ask(arguments: &[&str], address: Option<&str>) -> (i32, String, Duration) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
    command
        .arg("health")
        .args(arguments)
        .env_remove("METRICS_ADDR");
    if let Some(address) = address {
        command.env("METRICS_ADDR", address);
    }
    let start = Instant::now();
    let output = command.output().unwrap();
    assert!(output.stdout.is_empty(), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), stderr, start.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_alive_is_well_and_ready_once_it_can_work() {
    let (ready, readiness) = watch::channel(Err("the broker is away".to_owned()));
    let config = MetricsConfig {
        metrics_addr: Some("0.0.0.0:0".parse().unwrap()),
    };
    let served = config.serve(&Metrics::new(), &readiness).await.unwrap();
    let (address, _server) = served.unwrap();
    // All of this machine's addresses, as in a container.
    let address = address.to_string();
    assert!(address.starts_with("0.0.0.0:"), "{address}");

    let (code, stderr, _) = ask(&[], Some(&address));
    assert_eq!((code, stderr.as_str()), (0, ""));
    let (code, stderr, _) = ask(&["--ready"], Some(&address));
    assert_eq!(code, 1);
    assert!(stderr.contains("503"), "{stderr}");
    assert!(stderr.contains("the broker is away"), "{stderr}");

    ready.send(Ok(())).unwrap();
    let (code, stderr, _) = ask(&["--ready", "--metrics-addr", &address], None);
    assert_eq!((code, stderr.as_str()), (0, ""));
}

#[test]
fn a_worker_that_does_not_answer_is_not_well() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (code, stderr, took) = ask(&["--wait", "1"], Some(&address));
    assert_eq!(code, 1);
    assert!(stderr.contains("no answer within 1s"), "{stderr}");
    assert!(took < Duration::from_secs(30), "{took:?}");

    drop(listener);
    let (code, stderr, _) = ask(&[], Some(&address));
    assert_eq!(code, 1);
    assert!(stderr.contains("no answer: "), "{stderr}");
}

#[test]
fn without_an_address_nobody_is_asked() {
    let (code, stderr, _) = ask(&[], None);
    assert_eq!(code, 2);
    assert!(stderr.contains("--metrics-addr"), "{stderr}");
}
