//! How long the cache check of 24,500 repositories takes against a bucket that is far away:
//! `cargo run --release --example cache_speed`, or with the round trip's milliseconds.
//!
//! The server is in the same process, behind a proxy that adds the latency. 90 % of the
//! repositories are stored; 3 % of these were stored again after the index was written.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use common::job::{DIGEST_FORMAT, PushedAt};
use common::repo::RepoRef;
use common::retry::Policy;
use common::run::CacheReason;
use common::store::s3::S3Store;
use common::testing::delay_proxy::DelayProxy;
use common::testing::s3_server::{BUCKET, S3Server, StoredObject, config};
use producer::cache::{self, CacheConfig, CacheSource, Check};
use producer::feed::FeedRepo;
use producer::index::Index;

const REPOSITORIES: usize = 24_500;
const OLD: Duration = Duration::from_secs(86_400);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let millis = std::env::args().nth(1).map_or(Ok(40), |arg| arg.parse())?;
    let server = S3Server::start();
    let feed: Vec<FeedRepo> = (0..REPOSITORIES).map(entry).collect::<Result<_, _>>()?;
    let stored = || feed.iter().enumerate().filter(|(i, _)| i % 10 != 9);
    for (i, entry) in stored() {
        server.insert(&entry.repo.digest_key(), object(i, SystemTime::now() - OLD));
    }
    // The index of a run before, made without a way to go.
    let (_, index) = check(&server.store(), Check::Index, &feed).await?;
    index
        .unwrap_or_default()
        .save(&server.store())
        .await
        .map_err(anyhow::Error::msg)?;
    let mut changed = 0;
    for (i, entry) in stored().filter(|(i, _)| i % 33 == 0) {
        server.insert(&entry.repo.digest_key(), object(i + 1, SystemTime::now()));
        changed += 1;
    }
    println!(
        "{REPOSITORIES} repositories, {} stored, {changed} changed since the index; {millis} ms",
        stored().count()
    );

    let proxy = DelayProxy::bind().await?;
    let far = format!("http://{}", proxy.address);
    let address = server.url().trim_start_matches("http://").parse()?;
    let _way = tokio::spawn(proxy.run(address, Duration::from_millis(millis)));
    for (what, how, lost) in [
        ("index and listing", Check::Index, false),
        ("listing, index lost", Check::Index, true),
        ("HEAD of each", Check::Head, true),
    ] {
        if lost {
            server.remove("runs/index.json");
        }
        let mut seconds = Vec::new();
        let mut counts = BTreeMap::new();
        for _ in 0..3 {
            // A process of its own begins without connections.
            let store = S3Store::new(&config(&far, BUCKET));
            server.forget_calls();
            let started = Instant::now();
            (counts, _) = check(&store, how, &feed).await?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        println!(
            "{what}: median {:.2} s of {seconds:.2?}; {} LIST, {} HEAD, {} GET; {counts:?}",
            seconds[1],
            server.calls("LIST"),
            server.calls("HEAD"),
            server.calls("GET"),
        );
    }
    Ok(())
}

async fn check(
    store: &S3Store,
    check: Check,
    feed: &[FeedRepo],
) -> anyhow::Result<(BTreeMap<CacheReason, u64>, Option<Index>)> {
    let config = CacheConfig {
        cache: CacheSource::Store,
        check,
        cache_url: None,
        cache_timeout: Duration::from_secs(10),
        force: false,
        explain: false,
        retry: Policy::three_attempts(),
    };
    let (checked, index) = cache::check(&config, store, feed.to_vec()).await?;
    let mut counts = cache::counts(&checked);
    counts.retain(|_, count| *count > 0);
    Ok((counts, index))
}

fn entry(i: usize) -> anyhow::Result<FeedRepo> {
    // Owners of very different sizes, as in the real feed: the largest has a tenth.
    let owner = match i % 10 {
        0 => "alphagov".to_owned(),
        1 => "hmrc".to_owned(),
        2..5 => format!("department-{}", i % 37),
        _ => format!("{}-council-{}", ["north", "south", "east"][i % 3], i % 211),
    };
    Ok(FeedRepo {
        repo: RepoRef::new(&owner, &format!("service-{i}"))?,
        url: String::new(),
        pushed_at: PushedAt::new("2026-10-01T08:00:00Z")?,
        archived: false,
    })
}

fn object(i: usize, modified: SystemTime) -> StoredObject {
    let content = format!("text {i}");
    let metadata = [
        ("pushedat", "2026-10-01T08:00:00Z"),
        ("url", "https://github.com/a/b"),
        ("processedat", "2026-10-02T08:00:00Z"),
        ("run", "20261002T080000Z-000000"),
        ("format", DIGEST_FORMAT),
        ("truncated", "false"),
        ("bytes", &content.len().to_string()),
        ("mark", &format!("{i:016x}")),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    StoredObject {
        metadata: metadata.into(),
        content: content.into(),
        content_type: None,
        modified,
    }
}
