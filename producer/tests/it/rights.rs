//! The policies in `deploy/rights`: each program with a user of its own on RabbitMQ and on an S3
//! server, and what such a user may not do.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::broker::amqp::AmqpBroker;
use common::broker::amqp::options::Options;
use common::broker::{Broker, Position, Settlement};
use common::exit;
use common::fault::Fault;
use common::ids::RunId;
use common::outcome::Outcome;
use common::store::s3::S3Store;
use common::store::s3::config::S3Config;
use common::store::{DigestStore, Document, DocumentKey, Expected, Found};
use futures::stream;
use futures::{StreamExt, TryStreamExt};
use rustix::process::Signal;
use serde_json::Value;
use testing::broker_contract::{job, outcome};
use testing::rabbitmq::Node;
use testing::s3_server::BUCKET;
use testing::seaweedfs::{SeaweedFs, role_keys};

use crate::distributed::Distributed;
use crate::fleet::{Fleet, Running, bare_producer, wait_until};
use crate::metrics::{address, get};

/// The programs, and one who reads digests.
const ROLES: [&str; 4] = ["producer", "worker", "observer", "reader"];

/// Of every user of the broker.
const PASSWORD: &str = "open-sesame";

fn rights() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rights")
}

/// The policy of a role, for the tests' bucket.
fn policy(role: &str) -> String {
    let policy = std::fs::read_to_string(rights().join(format!("s3-{role}.json"))).unwrap();
    policy.replace("BUCKET", BUCKET)
}

async fn bucket() -> SeaweedFs {
    SeaweedFs::start_with_roles(&ROLES.map(|role| (role, policy(role)))).await
}

/// Makes a user of each role.
fn add_users(node: &Node, prefix: &str) {
    for role in ["producer", "worker", "observer"] {
        node.control(&["add_user", role, PASSWORD]);
        let script = Command::new(rights().join("rabbitmq.sh"))
            .args([role, role, prefix])
            .env("RABBITMQCTL", "echo")
            .output()
            .unwrap();
        assert!(script.status.success(), "{script:?}");
        let commands = String::from_utf8(script.stdout).unwrap();
        assert_eq!(commands.lines().count(), 2, "{commands}");
        for line in commands.lines() {
            node.control(&line.split(' ').collect::<Vec<_>>());
        }
    }
}

fn url(node: &Node, role: &str) -> String {
    format!("amqp://{role}:{PASSWORD}@127.0.0.1:{}", node.port())
}

/// Has a program be of this role.
fn as_role<'a>(command: &'a mut Command, node: &Node, role: &str) -> &'a mut Command {
    let [access, secret] = role_keys(role);
    command
        .env("BROKER_URL", url(node, role))
        .env("AWS_ACCESS_KEY_ID", access)
        .env("AWS_SECRET_ACCESS_KEY", secret)
        .env_remove("GITHUB_TOKEN")
}

#[test]
fn a_run_needs_no_more_than_the_policies_allow() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bucket = runtime.block_on(bucket());
    let node = Node::start();
    let endpoint = bucket.config().endpoint.unwrap();
    let fleet = Distributed::new(Fleet::of(&["a/b", "a/c", "d/e"]), node.url(), endpoint);
    add_users(&node, &fleet.prefix);
    let mut entries = fleet.fleet.entries(&["a/b", "a/c", "d/e"]);
    entries.push(fleet.fleet.entry("a/gone", crate::fleet::PUSHED));
    fleet.fleet.write_feed(&entries);

    // May not declare, so it waits for one who may.
    let worker = Running::start(as_role(&mut fleet.worker(&[]), &node, "worker"));
    worker.wait_for_line("this user may not declare it: start a producer once");
    let run = Running::start(as_role(
        &mut fleet.producer(&["--max-failures", "100%"]),
        &node,
        "producer",
    ));
    let ended = run.wait().with(exit::OK);
    let counts = "Pipeline complete: 4 total, 0 cached (0.0%), 3 processed, 1 failed";
    assert!(ended.sentence().starts_with(counts), "{}", ended.sentence());

    let mut cancel = bare_producer();
    fleet.tell(&mut cancel);
    cancel.args(["cancel", "latest", "--store", "s3://digests"]);
    let cancel = Running::start(as_role(&mut cancel, &node, "producer"));
    let closed = cancel.wait().with(exit::OK).stdout;
    assert!(closed.ends_with("has closed: nothing waits\n"), "{closed}");

    let mut status = bare_producer();
    fleet.tell(&mut status);
    status.args(["status", "--json", "--store", "s3://digests"]);
    let status = Running::start(as_role(&mut status, &node, "observer"));
    let status: Value = serde_json::from_str(&status.wait().with(exit::OK).stdout).unwrap();
    assert_eq!(status["processed"], 3, "{status}");

    let mut observe = bare_producer();
    fleet.tell(&mut observe);
    observe.args([
        "observe",
        "--metrics-addr",
        "127.0.0.1:0",
        "--store",
        "s3://digests",
    ]);
    let observer = Running::start(as_role(&mut observe, &node, "observer"));
    let shown = address(&observer);
    wait_until("the observer sees the worker", || {
        get(&shown, "/metrics")
            .lines()
            .any(|line| line == "repofleet_workers_connected 1")
    });
    for running in [observer, worker] {
        running.signal(Signal::TERM);
        let ended = running.wait().with(exit::OK);
        for word in ["AccessDenied", "access_refused", "ACCESS_REFUSED"] {
            assert!(!ended.stdout.contains(word), "{}", ended.stdout);
        }
    }
}

fn refused<T>(what: &str, done: Result<T, Fault>) {
    let Err(fault) = done else {
        panic!("{what} is not refused");
    };
    assert!(fault.message.contains("ACCESS_REFUSED"), "{what}: {fault}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_the_broker_a_role_may_not_do_what_is_anothers() {
    let node = Node::start();
    let prefix = "fleet.one";
    add_users(&node, prefix);
    let connect = async |role| {
        let mut options = Options::new(&url(&node, role), prefix).unwrap();
        options.patience = Duration::from_secs(1);
        AmqpBroker::connect(options).await.unwrap()
    };
    let producer = connect("producer").await;
    let run = RunId::new();
    let all = |count| stream::iter((0..count).map(|n| job(&run, n)).collect::<Vec<_>>()).boxed();
    producer.enqueue(all(3)).await.unwrap();

    let worker = connect("worker").await;
    let mut deliveries = worker.deliveries(3).await.unwrap();
    let again = Settlement::Again {
        after: Duration::from_secs(1),
        attempt: 1,
        waits: 0,
        returns: 0,
    };
    for settlement in [Settlement::Dead, again, Settlement::Done] {
        deliveries
            .next()
            .await
            .unwrap()
            .settle(settlement)
            .await
            .unwrap();
    }
    deliveries
        .next()
        .await
        .unwrap()
        .settle(Settlement::Done)
        .await
        .unwrap();
    let done = outcome(&job(&run, 0), Outcome::Processed);
    worker.record(&done).await.unwrap();
    refused("enqueueing", worker.enqueue(all(1)).await);
    refused(
        "reading the ledger",
        worker.events(Position::Start).await.map(drop),
    );
    refused("the lock", worker.producer_lock().await.map(drop));
    let mut letters = worker.dead_letters().await.unwrap();
    refused("a dead letter", letters.next().await.unwrap());

    // `producer cancel` is the producer's.
    producer.enqueue(all(1)).await.unwrap();
    let delivery = deliveries.next().await.unwrap();
    let later = Settlement::Again {
        after: Duration::from_secs(60),
        attempt: 0,
        waits: 1,
        returns: 0,
    };
    delivery.settle(later).await.unwrap();
    let taken = worker.take_waiting(Default::default()).await.unwrap();
    refused("what waits", taken.try_collect::<Vec<_>>().await);
    for settlement in [Settlement::Back, Settlement::Done] {
        let mut taken = producer.take_waiting(Default::default()).await.unwrap();
        let delivery = taken.next().await.unwrap().unwrap();
        delivery.settle(settlement).await.unwrap();
    }

    let observer = connect("observer").await;
    assert_eq!(observer.waiting().await.unwrap().dead, 1);
    let history = observer.history(Position::Start).await.unwrap();
    assert!(history.count().await >= 4);
    refused("a job", observer.deliveries(1).await.map(drop));
    refused("an outcome", observer.record(&done).await);
    refused("listening", observer.announcements().await.map(drop));
    // The letters are the producer's.
    let mut letters = producer.dead_letters().await.unwrap();
    letters
        .next()
        .await
        .unwrap()
        .unwrap()
        .remove()
        .await
        .unwrap();
}

fn store(bucket: &SeaweedFs, role: &str) -> S3Store {
    let [access, secret] = role_keys(role);
    let endpoint = bucket.config().endpoint.unwrap();
    let config = S3Config::from_env(Some("s3://digests"), |name| match name {
        "AWS_ENDPOINT_URL" => Some(endpoint.clone()),
        "AWS_ACCESS_KEY_ID" => Some(access.clone()),
        "AWS_SECRET_ACCESS_KEY" => Some(secret.clone()),
        _ => None,
    });
    S3Store::new(&config.unwrap())
}

fn denied<T: Debug>(what: &str, done: Result<T, Fault>) {
    let fault = done.expect_err(what);
    assert!(fault.message.contains("AccessDenied"), "{what}: {fault}");
}

#[test]
fn in_the_bucket_a_role_may_not_do_what_is_anothers() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bucket = runtime.block_on(bucket());
    let [producer, worker, observer, reader] = ROLES.map(|role| store(&bucket, role));
    let repo = "a/b".parse().unwrap();
    runtime.block_on(async {
        for writer in [&producer, &worker] {
            writer.probe().await.unwrap();
            assert_eq!(writer.head(&repo).await.unwrap(), Found::Absent);
        }
        let digest = testing::store_contract::digest("the text", crate::fleet::PUSHED);
        let put = worker.put(&repo, &digest, &Expected::Absent).await.unwrap();
        assert!(put.is_stored());
        producer
            .put_document(&DocumentKey::Latest, b"{}")
            .await
            .unwrap();
        producer
            .put_document(&DocumentKey::Catalog, b"")
            .await
            .unwrap();

        let of_run = DocumentKey::OfRun {
            run: RunId::new(),
            document: Document::Summary,
        };
        denied(
            "a worker writes a run",
            worker.put_document(&of_run, b"{}").await,
        );
        denied("a worker reads a run", worker.document(&of_run).await);
        denied(
            "a worker writes the catalogue",
            worker.put_document(&DocumentKey::Catalog, b"").await,
        );
        let Found::Stored { version, .. } = worker.head(&repo).await.unwrap() else {
            panic!("it was stored");
        };
        denied(
            "a worker removes a digest",
            worker.remove(&repo, &version).await,
        );

        observer.reachable().await.unwrap();
        assert_eq!(observer.document(&of_run).await.unwrap(), None);
        denied("an observer reads a digest", observer.get(&repo).await);
        denied(
            "an observer writes",
            observer.put_document(&DocumentKey::Latest, b"{}").await,
        );

        assert_eq!(reader.get(&repo).await.unwrap().unwrap().text, digest.text);
        assert!(
            reader
                .document(&DocumentKey::Catalog)
                .await
                .unwrap()
                .is_some()
        );
        denied(
            "a reader reads a run",
            reader.document(&DocumentKey::Latest).await,
        );
        denied(
            "a reader writes",
            reader
                .put(&repo, &digest, &Expected::Version(version.clone()))
                .await,
        );

        assert!(producer.remove(&repo, &version).await.unwrap());
    });
}
