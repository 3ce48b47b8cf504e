//! `worker health`, as a container's engine calls it.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use common::telemetry::http::MetricsConfig;
use testing::root::assert_private;
use tokio::sync::watch;
use worker::metrics::Metrics;

use crate::fixture::as_root;

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

/// A container's engine gives it the worker's environment, secrets included.
#[test]
fn it_carries_no_secret_while_it_waits() {
    as_root("health::it_carries_no_secret_while_it_waits", async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut health = Command::new(env!("CARGO_BIN_EXE_worker"))
            .args(["health", "--wait", "60"])
            .env("METRICS_ADDR", &address)
            .env("AWS_SECRET_ACCESS_KEY", "sesame")
            .spawn()
            .unwrap();
        // Only root can look into it.
        let (_connection, _) = listener.accept().unwrap();
        let environment = fs::read(format!("/proc/{}/environ", health.id())).unwrap();
        let expected = format!("METRICS_ADDR={address}\0");
        assert_eq!(String::from_utf8(environment).unwrap(), expected);
        health.kill().unwrap();
        health.wait().unwrap();
    });
}

#[test]
fn it_lets_nobody_look_into_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut health = Command::new(env!("CARGO_BIN_EXE_worker"));
    health.args(["health", "--wait", "60", "--metrics-addr"]);
    health.arg(listener.local_addr().unwrap().to_string());
    assert_private(&mut health);
}

#[test]
fn without_an_address_nobody_is_asked() {
    let (code, stderr, _) = ask(&[], None);
    assert_eq!(code, 2);
    assert!(stderr.contains("--metrics-addr"), "{stderr}");
}
