//! How long the cache check of 24,500 repositories takes against a bucket that is far away, and after it
//! the catalogue and the audit:
//! `cargo run --release --example cache_speed`, or with the round trip's milliseconds.
//!
//! The server is in the same process, behind a proxy that adds the latency. 90 % of the
//! repositories are stored; 3 % of these were stored again after the index was written.
//!
//! Beside the seconds stands the ratio to a bare listing of the same keys, page after page, over
//! the same way: on a noisy machine that is the figure to compare. A check that counts wrongly ends
//! the program with exit code 1.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use common::ids::{PushedAt, RepoRef, RunId};
use common::job::DIGEST_FORMAT;
use common::retry::Policy;
use common::run::documents::CacheReason;
use common::run::view::RunView;
use common::store::DigestStore;
use common::store::s3::S3Store;
use futures::TryStreamExt;
use producer::cache::index::{Index, Learned};
use producer::cache::{self, CacheConfig, CacheSource, Check};
use producer::catalog::update::{self, Known};
use producer::feed::details::Details;
use producer::feed::entry::FeedRepo;
use producer::verify::{Wants, audit};
use producer::withdrawals::Withdrawals;
use testing::s3_server::{BUCKET, S3Server, StoredObject, config};
use time::OffsetDateTime;

use crate::delay_proxy::DelayProxy;

mod delay_proxy;

const REPOSITORIES: usize = 24_500;
/// What a feed tells of a repository, beyond what a job needs.
const DETAILS: &str = r#"{"description":"A service that does one of the things that a department does","archived":false,"license":{"key":"mit","name":"MIT License","spdxId":"MIT"},"stargazersCount":7,"language":"Ruby","forksCount":4,"openIssuesCount":2,"createdAt":"2019-03-04T10:00:00Z","updatedAt":"2026-10-01T08:00:00Z"}"#;
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
    let held = stored().count();
    println!(
        "{REPOSITORIES} repositories, {held} stored, {changed} changed since the index; {millis} ms"
    );
    // What was stored again is of the same push.
    let expected = BTreeMap::from([
        (CacheReason::Hit, held as u64),
        (CacheReason::Miss, (REPOSITORIES - held) as u64),
    ]);

    let proxy = DelayProxy::bind().await?;
    let far = format!("http://{}", proxy.address);
    let address = server.url().trim_start_matches("http://").parse()?;
    let _way = tokio::spawn(proxy.run(address, Duration::from_millis(millis)));
    let bare = median_of_three(async || {
        let store = S3Store::new(&config(&far, BUCKET));
        let listed: Vec<_> = store.list("").try_collect().await?;
        ensure!(listed.len() == held, "{} keys listed", listed.len());
        Ok(())
    })
    .await?;
    println!("a bare listing: median {bare:.2} s");
    for (what, how, lost, heads) in [
        ("index and listing", Check::Index, false, changed),
        ("listing, index lost", Check::Index, true, held),
        ("HEAD of each", Check::Head, true, REPOSITORIES),
    ] {
        if lost {
            server.remove("runs/index.json");
        }
        let seconds = median_of_three(async || {
            // A process of its own begins without connections.
            let store = S3Store::new(&config(&far, BUCKET));
            server.forget_calls();
            let (counts, _) = check(&store, how, &feed).await?;
            ensure!(counts == expected, "{what}: {counts:?}, not {expected:?}");
            // One that got no answer in time is sent again.
            let sent = server.calls("HEAD");
            ensure!(sent >= heads, "{what}: {sent} HEAD, not {heads}");
            ensure!(
                sent < heads + heads / 10 + 10,
                "{what}: {sent} HEAD, not {heads}"
            );
            Ok(())
        })
        .await?;
        println!(
            "{what}: median {seconds:.2} s, {:.1} times the listing; {} LIST, {} HEAD, {} GET; \
             {expected:?}",
            seconds / bare,
            server.calls("LIST"),
            server.calls("HEAD"),
            server.calls("GET"),
        );
    }
    readers_documents(&server, &far, &feed).await
}

/// The catalogue, made and found unchanged, and the audit of all records.
async fn readers_documents(server: &S3Server, far: &str, feed: &[FeedRepo]) -> anyhow::Result<()> {
    let store = S3Store::new(&config(far, BUCKET));
    let (checked, _) = cache::check(&cache_config(Check::Head), &store, feed.to_vec()).await?;
    let (view, learned) = (RunView::new(RunId::new(), None, None), Learned::default());
    let withdrawals = Withdrawals::new();
    let known = Known {
        checked: &checked,
        view: &view,
        learned: &learned,
        feed: None,
        stored: None,
        withdrawals: &withdrawals,
    };
    for what in ["catalogue, made", "catalogue, unchanged"] {
        server.forget_calls();
        let (before, started) = (peak_megabytes()?, Instant::now());
        let lines = update::update(&store, known)
            .await
            .map_err(anyhow::Error::msg)?;
        ensure!(lines == feed.len(), "{lines} lines");
        println!(
            "{what}: {:.2} s; {} HEAD, {} GET, {} PUT; peak memory {} MB more",
            started.elapsed().as_secs_f64(),
            server.calls("HEAD"),
            server.calls("GET"),
            server.calls("PUT"),
            peak_megabytes()? - before
        );
    }
    for (key, object) in server.objects() {
        if !key.starts_with("gitingest/") {
            println!("{key}: {} bytes", object.content.len());
        }
    }
    let entries = feed
        .iter()
        .map(|entry| (entry.repo.clone(), entry.clone()))
        .collect();
    let wants = Wants {
        feed: &entries,
        whole: true,
        deep: false,
        now: OffsetDateTime::now_utc(),
    };
    let started = Instant::now();
    let defects = audit(&store, wants).await.map_err(anyhow::Error::msg)?;
    println!(
        "audit of every record: {:.2} s, {} defects",
        started.elapsed().as_secs_f64(),
        defects.len()
    );
    Ok(())
}

/// The most memory that this process has had, the server's objects included.
fn peak_megabytes() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let number = line
        .and_then(|line| line.split_whitespace().nth(1))
        .context("VmHWM")?;
    Ok(number.parse::<u64>()? / 1024)
}

/// How many seconds `work` takes.
async fn median_of_three(work: impl AsyncFn() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut seconds = [0.0; 3];
    for seconds in &mut seconds {
        let started = Instant::now();
        work().await?;
        *seconds = started.elapsed().as_secs_f64();
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[1])
}

async fn check(
    store: &S3Store,
    check: Check,
    feed: &[FeedRepo],
) -> anyhow::Result<(BTreeMap<CacheReason, u64>, Option<Index>)> {
    let config = cache_config(check);
    let (checked, index) = cache::check(&config, store, feed.to_vec()).await?;
    let mut counts = cache::counts(&checked);
    counts.retain(|_, count| *count > 0);
    Ok((counts, index))
}

fn cache_config(check: Check) -> CacheConfig {
    CacheConfig {
        cache: CacheSource::Store,
        check,
        cache_url: None,
        cache_timeout: Duration::from_secs(10),
        force: false,
        retry_failed: false,
        explain: false,
        retry: Policy::three_attempts(),
    }
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
        index: i,
        repo: RepoRef::new(&owner, &format!("service-{i}"))?,
        url: "https://github.com/a/b".to_owned(),
        pushed_at: PushedAt::new("2026-10-01T08:00:00Z")?,
        details: Details::of(DETAILS),
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
