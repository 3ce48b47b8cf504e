//! Each broker keeps the contract.

use std::sync::Arc;

use common::broker::SharedBroker;
use common::broker::amqp::AmqpBroker;
use common::broker::amqp::options::Options;
use common::broker::memory::MemoryBroker;
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
