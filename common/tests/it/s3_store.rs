//! The store in a bucket keeps the contract, on a server in this process.

use std::sync::{Arc, Mutex};

use common::store::SharedStore;
use common::testing::s3_server::S3Server;
use common::testing::store_contract;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contract() {
    let servers: Mutex<Vec<S3Server>> = Mutex::default();
    store_contract::check(async || {
        let server = S3Server::start();
        let store: SharedStore = Arc::new(server.store());
        servers.lock().unwrap().push(server);
        store
    })
    .await;
}
