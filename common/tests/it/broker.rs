//! The memory broker keeps the contract.

use std::sync::Arc;

use common::broker::SharedBroker;
use common::broker::memory::MemoryBroker;
use common::testing::broker_contract;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory() {
    broker_contract::check(async || Arc::new(MemoryBroker::default()) as SharedBroker).await;
}
