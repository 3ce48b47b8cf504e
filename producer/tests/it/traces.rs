//! Traces: what a collector receives of a run, and what a run takes no notice of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use common::broker::Event;
use common::exit;
use rustix::process::Signal;
use testing::collector::{Collector, Span};
use testing::git_server::Fault;
use testing::http_server::Response;
use testing::rabbitmq::shared_url;
use testing::s3_server::{S3Server, SECRET_KEY};

use crate::distributed::Distributed;
use crate::fleet::{Ended, Fleet, Running, bare_producer};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// A fleet of these repositories, with a bucket in this process.
fn fleet_of(repos: &[&str]) -> (Distributed, S3Server) {
    let bucket = S3Server::start();
    let fleet = Distributed::new(Fleet::of(repos), shared_url(), bucket.url());
    (fleet, bucket)
}

/// Does a whole run with two workers, all with these variables.
fn run_with(fleet: &Distributed, variables: &[(&str, &str)]) -> Ended {
    let with = |mut command: Command| Running::start(command.envs(variables.iter().copied()));
    let workers = [(); 2].map(|()| {
        let worker = with(fleet.worker(&["--concurrency", "2", "--log", "json"]));
        worker.wait_for_line("slots, digests to");
        worker
    });
    let mut run = with(fleet.producer(&["--log", "json"])).wait();
    for worker in workers {
        worker.signal(Signal::TERM);
        let worker = worker.wait().with(exit::OK);
        run.stdout = worker.stdout + &run.stdout;
    }
    run
}

/// The spans of each trace, oldest first.
fn traces(spans: Vec<Span>) -> Vec<Vec<Span>> {
    let mut traces: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for span in spans {
        traces.entry(span.trace_id.clone()).or_default().push(span);
    }
    let mut traces: Vec<_> = traces.into_values().collect();
    for trace in &mut traces {
        trace.sort_by_key(|span| span.begin);
    }
    traces
}

/// The trace of a repository, of which there is one.
fn trace_of<'a>(traces: &'a [Vec<Span>], repo: &str) -> &'a [Span] {
    let is_of = |trace: &&Vec<Span>| {
        let of = |span: &Span| span.attribute("repofleet.repository") == repo;
        trace.iter().any(of)
    };
    let found: Vec<_> = traces.iter().filter(is_of).collect();
    assert_eq!(found.len(), 1, "traces of {repo}");
    found[0]
}

/// A trace as its names, each behind those of the spans that it is a part of.
fn paths(trace: &[Span]) -> Vec<String> {
    fn path(trace: &[Span], span: &Span) -> String {
        match trace.iter().find(|whole| whole.span_id == span.parent) {
            Some(whole) => format!("{}/{}", path(trace, whole), span.name),
            None => {
                assert_eq!(span.parent, "", "{span:?} is a part of nothing");
                span.name.clone()
            }
        }
    }
    let mut paths: Vec<_> = trace.iter().map(|span| path(trace, span)).collect();
    paths.sort();
    paths
}

/// What there is of a job that is digested at once.
const DIGESTED: [&str; 10] = [
    "enqueue",
    "enqueue/job",
    "enqueue/job/lookup",
    "enqueue/job/put",
    "enqueue/job/record",
    "enqueue/job/slot",
    "enqueue/job/slot/digest",
    "enqueue/job/slot/fetch",
    "enqueue/job/tokens",
    "enqueue/job/wait",
];

#[test]
fn a_repository_of_a_fleet_has_one_trace_with_all_of_its_attempts() {
    let repos = ["t/a", "t/b", "t/late", "t/gone"];
    let (fleet, _bucket) = fleet_of(&repos);
    let server = &fleet.fleet.server;
    server.fault("t/late", Fault::status(500).times(1));
    server.fault("t/gone", Fault::status(404));
    let collector = Collector::start();
    let run = run_with(&fleet, &[(ENDPOINT, &collector.endpoint())]).with(exit::TOO_MANY_FAILED);
    let traces = traces(collector.spans());
    assert_eq!(traces.len(), repos.len());
    for repo in ["t/a", "t/b"] {
        assert_eq!(paths(trace_of(&traces, repo)), DIGESTED, "{repo}");
    }

    let trace = trace_of(&traces, "t/a");
    let named = |name: &str| trace.iter().find(|span| span.name == name).unwrap();
    let (enqueue, job) = (named("enqueue"), named("job"));
    let services = [enqueue, job].map(|span| (&*span.service, span.kind));
    assert_eq!(
        services,
        [("repofleet-producer", 4), ("repofleet-worker", 5)]
    );
    let authority = fleet.fleet.server.authority();
    let (address, port) = authority.split_once(':').unwrap();
    let id = format!("{}/t/a@{}", run.run_id(), crate::fleet::PUSHED);
    for (key, value) in [
        ("messaging.system", "rabbitmq"),
        ("messaging.operation.type", "process"),
        ("messaging.message.id", &id),
        ("repofleet.run", &run.run_id()),
        ("repofleet.attempt", "0"),
        ("repofleet.outcome", "processed"),
        ("url.full", &server.repo_url("t", "a")),
        ("server.address", address),
        ("server.port", port),
    ] {
        assert_eq!(job.attribute(key), value, "{key}");
    }
    let number = |span: &Span, key: &str| span.attribute(key).parse::<u64>().unwrap();
    assert!(number(job, "repofleet.fetched_bytes") > 100);
    assert_eq!(
        job.attribute("repofleet.stored_bytes"),
        named("put").attribute("repofleet.stored_bytes")
    );
    assert_eq!(named("fetch").attribute("repofleet.fetch_way"), "v2");
    // Each part lies within its whole, and one comes after the other.
    for span in trace {
        if let Some(whole) = trace.iter().find(|s| s.span_id == span.parent)
            && whole.name != "enqueue"
        {
            assert!(
                whole.begin <= span.begin && span.end <= whole.end,
                "{span:?} in {whole:?}"
            );
        }
    }
    let order = [
        "enqueue", "wait", "lookup", "fetch", "digest", "tokens", "put", "record",
    ];
    for two in order.windows(2) {
        assert!(named(two[0]).end <= named(two[1]).begin, "{two:?}");
    }
    // The log names the trace.
    let said = run
        .stdout
        .lines()
        .find(|line| line.contains("retrying t/late"));
    let late = trace_of(&traces, "t/late");
    assert!(said.unwrap().contains(&late[0].trace_id), "{said:?}");

    // The second attempt is a part of the same trace.
    let jobs: Vec<_> = late.iter().filter(|span| span.name == "job").collect();
    let attempts: Vec<_> = jobs
        .iter()
        .map(|job| job.attribute("repofleet.attempt"))
        .collect();
    assert_eq!(attempts, ["0", "1"]);
    assert_eq!(jobs[0].attribute("repofleet.outcome"), "retry");
    assert_eq!(jobs[0].attribute("error.type"), "transient");
    assert!(jobs[0].error.as_ref().unwrap().contains("500"), "{jobs:?}");
    assert_eq!(jobs[1].attribute("repofleet.outcome"), "processed");
    assert_eq!(jobs[1].error, None);
    assert!(paths(late).ends_with(&["enqueue/job/wait".to_owned(), "enqueue/job/wait".to_owned()]));

    let gone = trace_of(&traces, "t/gone");
    let failed: BTreeSet<_> = gone
        .iter()
        .filter(|s| s.error.is_some())
        .map(|s| &*s.name)
        .collect();
    assert_eq!(failed, BTreeSet::from(["fetch", "job"]));
    let job = gone.iter().find(|span| span.name == "job").unwrap();
    assert_eq!(job.attribute("repofleet.outcome"), "failed");
    assert_eq!(job.attribute("error.type"), "gone");
}

/// What an operator's own things may carry, and no collector is to see.
#[test]
fn no_secret_is_sent_and_the_collector_gets_its_own() {
    let (fleet, _bucket) = fleet_of(&["t/a"]);
    let collector = Collector::start();
    let secret = fleet.fleet.path().join("headers");
    fs::write(&secret, "api-key=s3%20cret,x-team=a\n").unwrap();
    let run = run_with(
        &fleet,
        &[
            (ENDPOINT, &format!("{}/otlp/", collector.endpoint())),
            ("OTEL_EXPORTER_OTLP_HEADERS_FILE", secret.to_str().unwrap()),
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "deployment.environment.name=te%20st",
            ),
            ("OTEL_SERVICE_NAME", "ours"),
            ("GITHUB_TOKEN", "ghp_hidden"),
        ],
    )
    .with(exit::OK);
    assert!(!run.stdout.contains("s3 cret") && !run.stdout.contains("s3%20cret"));
    let requests = collector.requests();
    for request in &requests {
        assert_eq!(
            (&*request.method, &*request.path),
            ("POST", "/otlp/v1/traces")
        );
        assert_eq!(request.header("api-key"), Some("s3 cret"));
        assert_eq!(request.header("x-team"), Some("a"));
        assert_eq!(
            request.header("content-type"),
            Some("application/x-protobuf")
        );
        let body = String::from_utf8_lossy(&request.body).into_owned();
        assert!(body.contains("te st"));
        for secret in ["cret", "ghp_hidden", SECRET_KEY, &fleet.broker_url] {
            assert!(!body.contains(secret), "{secret} in {body}");
        }
    }
    let services: BTreeSet<_> = collector.spans().into_iter().map(|s| s.service).collect();
    assert_eq!(services, BTreeSet::from(["ours".to_owned()]));
}

#[test]
fn nothing_is_told_or_asked_unless_traces_are_on() {
    let collector = Collector::start();
    for variables in [
        &[][..],
        &[
            ("OTEL_SERVICE_NAME", "x"),
            ("OTEL_TRACES_SAMPLER", "always_on"),
        ],
        &[
            (ENDPOINT, &*collector.endpoint()),
            ("OTEL_SDK_DISABLED", "TRUE"),
        ],
        &[
            (ENDPOINT, &*collector.endpoint()),
            ("OTEL_TRACES_EXPORTER", "none"),
        ],
    ] {
        let (fleet, _bucket) = fleet_of(&["t/a"]);
        run_with(&fleet, variables).with(exit::OK);
        assert_eq!(traceparents(&fleet), [None], "{variables:?}");
    }
    assert_eq!(collector.requests().len(), 0);
}

/// The `traceparent` of each job in the ledger.
fn traceparents(fleet: &Distributed) -> Vec<Option<String>> {
    let ledger = fleet.look(&fleet.broker_url).ledger().into_iter();
    let jobs = ledger.filter_map(|entry| match entry.event {
        Event::Job(job) => Some(job.traceparent),
        _ => None,
    });
    jobs.collect()
}

#[test]
fn workers_heed_what_was_decided_where_the_trace_began() {
    let collector = Collector::start();
    let (fleet, _bucket) = fleet_of(&["t/a", "t/b"]);
    let worker = Running::start(fleet.worker(&[]).env(ENDPOINT, collector.endpoint()));
    let mut run = fleet.producer(&[]);
    run.env(ENDPOINT, collector.endpoint())
        .env("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        .env("OTEL_TRACES_SAMPLER_ARG", "0");
    Running::start(&mut run).wait().with(exit::OK);
    let told = traceparents(&fleet);
    assert!(
        told.iter().flatten().all(|parent| parent.ends_with("-00")),
        "{told:?}"
    );
    // One whose producer has no traces is begun by the worker.
    Running::start(&mut fleet.producer(&["--force", "--limit", "1"]))
        .wait()
        .with(exit::OK);
    worker.signal(Signal::TERM);
    worker.wait().with(exit::OK);
    let traces = traces(collector.spans());
    assert_eq!(traces.len(), 1);
    let job = traces[0].iter().find(|span| span.name == "job").unwrap();
    assert_eq!(job.parent, "");
}

#[test]
fn one_process_tells_the_same() {
    let fleet = Fleet::of(&["t/a", "t/b"]);
    let collector = Collector::start();
    let mut run = fleet.producer(&[]);
    run.env(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        collector.endpoint() + "/here",
    );
    Running::start(&mut run).wait().with(exit::OK);
    let traces = traces(collector.spans());
    assert_eq!(traces.len(), 2);
    for repo in ["t/a", "t/b"] {
        assert_eq!(paths(trace_of(&traces, repo)), DIGESTED, "{repo}");
    }
    assert!(
        collector
            .requests()
            .iter()
            .all(|request| request.path == "/here")
    );
}

/// Spans that end while others are under way are sent too, though that is the end.
#[test]
fn the_last_spans_wait_for_a_slow_collector() {
    const REPOS: usize = 60;
    let names: Vec<_> = (0..REPOS).map(|i| format!("t/r{i:02}")).collect();
    let fleet = Fleet::of(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let slow = Collector::answering(|_| Response::new(200, "").after(Duration::from_millis(500)));
    let mut run = fleet.producer(&["--log", "json"]);
    let run = Running::start(run.env(ENDPOINT, slow.endpoint())).wait();
    let said = run.with(exit::OK).messages("traces");
    assert_eq!(said.len(), 1, "none is dropped: {said:#?}");
    let traces = traces(slow.spans());
    assert_eq!(traces.len(), REPOS);
    for name in &names {
        assert_eq!(paths(trace_of(&traces, name)), DIGESTED, "{name}");
    }
}

#[test]
fn a_collector_that_is_not_well_costs_spans_alone() {
    let failing = Collector::answering(|_| Response::new(500, "no"));
    let hanging = Collector::answering(|_| Response::hang());
    let resetting = Collector::answering(|_| Response::reset());
    let away = {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", free.local_addr().unwrap())
    };
    for (endpoint, why) in [
        (failing.endpoint(), "the collector answered 500"),
        (hanging.endpoint(), "the collector does not answer"),
        (resetting.endpoint(), "the collector cannot be reached"),
        (away, "the collector cannot be reached"),
    ] {
        let fleet = Fleet::of(&["t/a", "t/b", "t/c"]);
        let mut run = fleet.producer(&["--log", "json"]);
        let start = Instant::now();
        let run = Running::start(run.env(ENDPOINT, &endpoint))
            .wait()
            .with(exit::OK);
        assert!(start.elapsed() < Duration::from_secs(20), "{why}");
        let said = run.messages("traces");
        assert_eq!(said.len(), 2, "{said:#?}");
        assert!(
            said[0].starts_with("Traces: to http://127.0.0.1:"),
            "{said:#?}"
        );
        assert!(said[1].contains(why), "{said:#?}");
        assert_eq!(run.summary()["processed"], 3);
        fleet.assert_nothing_left();
    }
}

#[test]
fn a_wrong_variable_is_refused_or_ignored_as_the_specification_has_it() {
    let fleet = Fleet::of(&[]);
    for (name, value, why) in [
        (ENDPOINT, "localhost:4318", "is not an http or https URL"),
        (ENDPOINT, "http://${HOST}:4318", "is a literal ${…}"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "s3cret", "is not NAME=VALUE"),
        (
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
            "a b=s3cret",
            "an invalid header name or value",
        ),
    ] {
        let mut run = fleet.producer(&[]);
        run.env("OTEL_TRACES_EXPORTER", "otlp").env(name, value);
        let ended = Running::start(&mut run).wait().with(exit::USAGE);
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(said.contains(why) && !said.contains("s3cret"), "{said}");
    }
    let fleet = Fleet::of(&["t/a"]);
    let collector = Collector::start();
    let mut run = fleet.producer(&["--log", "json"]);
    run.env(ENDPOINT, collector.endpoint())
        .env("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        .env("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
        .env("OTEL_TRACES_EXPORTER", "zipkin")
        .env("OTEL_TRACES_SAMPLER", "traceidratio")
        .env("OTEL_TRACES_SAMPLER_ARG", "2")
        .env("OTEL_RESOURCE_ATTRIBUTES", "nothing");
    let run = Running::start(&mut run).wait().with(exit::OK);
    let said = run.messages("traces");
    assert_eq!(said.len(), 6, "{said:#?}");
    assert_eq!(traces(collector.spans()).len(), 1);
    // `check` asks as well.
    let check = |endpoint: &str| {
        let mut check = bare_producer();
        check.arg("check").args(fleet.arguments(&["--json"]));
        let ended = Running::start(check.env(ENDPOINT, endpoint)).wait();
        let line = ended
            .log()
            .into_iter()
            .find(|line| line["check"] == "traces");
        line.map(|line| (line["state"].clone(), line["exit_code"].clone()))
    };
    let refusing = Collector::answering(|_| Response::new(404, "no"));
    assert_eq!(check(&collector.endpoint()), Some(("ok".into(), 0.into())));
    assert_eq!(
        check(&refusing.endpoint()),
        Some(("warning".into(), 0.into()))
    );
    assert_eq!(check("c:4318"), Some(("failed".into(), exit::USAGE.into())));
    assert_eq!(check(""), None);
    // Neither is a value shown.
    let mut config = bare_producer();
    config
        .arg("config")
        .env("OTEL_EXPORTER_OTLP_HEADERS", "api-key=s3cret");
    let shown = Running::start(&mut config).wait().with(exit::OK).stdout;
    assert!(shown.contains("OTEL_EXPORTER_OTLP_HEADERS") && !shown.contains("s3cret"));
}
