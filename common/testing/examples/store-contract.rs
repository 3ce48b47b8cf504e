//! Runs the contract of a store on an S3 server of yours: `AWS_*` or `R2_*` variables say where it is, the
//! one argument is s3://BUCKET[/PREFIX]. Everything is written below PREFIX/contract-…/, and stays there.
#![expect(clippy::print_stdout, reason = "its answer")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::store::s3::S3Store;
use common::store::s3::config::S3Config;
use common::store::{DigestStore, SharedStore};
use testing::store_contract;

#[tokio::main]
async fn main() {
    let url = std::env::args().nth(1);
    let config = S3Config::from_env(url.as_deref(), |name| std::env::var(name).ok());
    let config = config.expect("a bucket, and a server");
    let stores = AtomicUsize::new(0);
    let run = fastrand::u32(..);
    let fresh = || {
        let mut config = config.clone();
        let number = stores.fetch_add(1, Ordering::Relaxed);
        let prefix = config.prefix.trim_end_matches('/');
        let slash = if prefix.is_empty() { "" } else { "/" };
        config.prefix = format!("{prefix}{slash}contract-{run:08x}/{number}");
        S3Store::new(&config)
    };
    let store = fresh();
    store.probe().await.expect("a server that answers");
    println!("{store:?}");
    store_contract::check(async || Arc::new(fresh()) as SharedStore).await;
    println!("the contract is kept");
}
