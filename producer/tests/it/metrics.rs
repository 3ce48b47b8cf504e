//! What `--metrics-addr` shows while a run is at work.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use common::exit::{TERMINATED, UNAVAILABLE};
use rustix::process::Signal;
use serde_json::Value;
use testing::git_server::Fault;

use crate::fleet::{Fleet, PUSHED_LATER, Running, wait_until};

pub(crate) fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The address that a run says it listens on.
pub(crate) fn address(run: &Running) -> String {
    let line: Value = serde_json::from_str(&run.wait_for_line("\"metrics\"")).unwrap();
    let address = &line["context"]["metadata"]["address"];
    address.as_str().unwrap().to_owned()
}

#[test]
fn a_run_shows_what_it_has_counted() {
    let fleet = Fleet::of(&["m/a", "m/b", "m/c", "m/gone", "m/hangs"]);
    fleet.run(&["--only", "m/[ab]"]).with(0);
    let mut entries = fleet.entries(&["m/a", "m/b", "m/c", "m/gone", "m/hangs"]);
    entries[1] = fleet.entry("m/b", PUSHED_LATER);
    fleet.write_feed(&entries);
    fleet.server.fault("m/gone", Fault::status(404));
    fleet.server.fault("m/c", Fault::status(500).times(1));
    fleet.server.fault("m/hangs", Fault::Hang);
    let arguments = [
        "--metrics-addr",
        "127.0.0.1:0",
        "--concurrency",
        "2",
        "--drain",
        "0",
    ];
    let run = fleet.start(&arguments);
    let address = address(&run);

    assert!(get(&address, "/health").starts_with("HTTP/1.1 200 "));
    assert!(get(&address, "/other").starts_with("HTTP/1.1 404 "));
    let metrics = || get(&address, "/metrics");
    wait_until("the jobs that do not hang", || {
        let metrics = metrics();
        ["processed", "unmoved"].into_iter().all(|outcome| {
            let line = format!("repofleet_jobs_total{{class=\"\",outcome=\"{outcome}\"}} 1");
            metrics.contains(&line)
        })
    });
    let text = metrics();
    // Without it Prometheus 3 takes nothing.
    let head = text.split_once("\r\n\r\n").unwrap().0;
    let format = "content-type: text/plain; version=0.0.4";
    assert!(head.lines().any(|line| line == format), "{head}");
    let host = fleet.server.authority();
    let gone = format!(r#"repofleet_failures_total{{class="gone",host="{host}"}} 1"#);
    for line in [
        &gone,
        r#"repofleet_jobs_total{class="gone",outcome="failed"} 1"#,
        r#"repofleet_jobs_total{class="transient",outcome="failed"} 0"#,
        r#"repofleet_cache_checks_total{reason="hit"} 1"#,
        r#"repofleet_cache_checks_total{reason="miss"} 3"#,
        r#"repofleet_cache_checks_total{reason="stale"} 1"#,
        r#"repofleet_retries_total{class="transient"} 1"#,
        "repofleet_slots 2",
        "repofleet_slots_busy 1",
        "repofleet_fetch_seconds_count 1",
        "repofleet_digest_seconds_count 1",
        "repofleet_store_seconds_count 1",
        "repofleet_queue_to_stored_seconds_count 2",
        r#"repofleet_handed_back_total{reason="stopping"} 0"#,
        "repofleet_throttled_hosts 0",
        "repofleet_infra_paused 0",
        concat!(
            "repofleet_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\"} 1"
        ),
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} in {text}");
    }
    for number in [
        "repofleet_fetched_bytes_total",
        "repofleet_stored_bytes_total",
        "repofleet_scratch_free_bytes",
        "repofleet_scratch_size_bytes",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_start_time_seconds",
    ] {
        let line = text.lines().find(|l| l.starts_with(number)).unwrap();
        assert_ne!(line, format!("{number} 0"));
    }
    assert!(!text.contains("m/a"), "never a series per repository");
    run.signal(Signal::TERM);
    run.wait().with(TERMINATED);
}

#[test]
fn a_port_that_is_taken_is_said() {
    let fleet = Fleet::of(&["m/a"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let run = fleet.run(&["--metrics-addr", &address]).with(UNAVAILABLE);
    for part in [&*address, "in use", "another", "--metrics-addr"] {
        assert!(run.stderr.contains(part), "{part:?} in {}", run.stderr);
    }
    assert!(!fleet.store_folder().exists());
}
