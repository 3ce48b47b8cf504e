//! Each broker keeps the contract.

use std::sync::Arc;

use common::broker::amqp::AmqpBroker;
use common::broker::amqp::options::Options;
use common::broker::memory::MemoryBroker;
use common::broker::{HostPause, Notice, SharedBroker};
use testing::{broker_contract, rabbitmq};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    broker_contract::check(async || Arc::new(MemoryBroker::default()) as SharedBroker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq() {
    let url = rabbitmq::shared_url();
    broker_contract::check(async || {
        let options = Options::new(&url, &rabbitmq::fresh_prefix()).unwrap();
        Arc::new(AmqpBroker::connect(options).await.unwrap()) as SharedBroker
    })
    .await;
}

#[test]
fn notices_that_no_process_sends_are_not_read() {
    let pause = |host: &str, worker: &str| {
        let pause = HostPause {
            host: host.to_owned(),
            until_millis: i64::MAX,
            worker: worker.to_owned(),
        };
        serde_json::to_vec(&Notice::HostPause(pause)).unwrap()
    };
    assert!(Notice::parse(&pause("github.com", "worker-1")).is_ok());
    let long = "x".repeat(301);
    for (message, why) in [
        (pause(&long, "worker-1"), "no name"),
        (pause("github.com", "a\nb"), "no name"),
        (pause("", "worker-1"), "no name"),
        (vec![b' '; 300_000], "300000 bytes"),
        (b"{}".to_vec(), "did not match"),
    ] {
        let error = Notice::parse(&message).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}
