//! The index never changes an answer: whatever became of it, and of the store, listing and looking
//! say the same.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::exit;
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::ids::RunId;
use common::job::DIGEST_FORMAT;
use common::run::documents::CacheReason;
use common::store::s3::S3Store;
use common::store::{Digest, DigestMeta, DigestStore, DocumentKey, Put};
use producer::cache::{self, CacheConfig, CacheSource, Check, Checked};
use producer::feed::entry::FeedRepo;
use producer::index::{Entry, Index, SETTLED};
use testing::s3_server::{Call, Fate, S3Server};

use crate::logs::{self, Logs};

const PUSHED: &str = "2026-01-01T00:00:00Z";
const PUSHED_LATER: &str = "2026-02-02T00:00:00Z";
const INDEX: &str = "runs/index.json";

fn config(check: Check) -> CacheConfig {
    CacheConfig {
        cache: CacheSource::Store,
        check,
        cache_url: None,
        cache_timeout: Duration::from_secs(10),
        force: false,
        explain: false,
        retry: common::retry::Policy::three_attempts(),
    }
}

fn entry(repo: &str, pushed_at: &str) -> FeedRepo {
    FeedRepo {
        index: 0,
        repo: repo.parse().unwrap(),
        url: format!("https://github.com/{repo}"),
        pushed_at: PushedAt::new(pushed_at).unwrap(),
        archived: false,
    }
}

fn feed(count: usize) -> Vec<FeedRepo> {
    // Some owners' names begin like others', and so do repositories'.
    let name = |i: usize| format!("{}/r-{i}", ["a", "a-b", "ab", "B"][i % 4]);
    (0..count).map(|i| entry(&name(i), PUSHED)).collect()
}

fn digest(text: &str, pushed_at: &str, format: &str) -> Digest {
    Digest {
        text: text.to_owned(),
        meta: DigestMeta {
            pushed_at: PushedAt::new(pushed_at).unwrap(),
            url: "https://github.com/a/b".to_owned(),
            processed_at: "2026-01-02T00:00:00Z".to_owned(),
            commit: None,
            format: format.to_owned(),
            bytes: text.len() as u64,
            truncated: false,
            run: RunId::new(),
        },
    }
}

async fn put(store: &S3Store, repo: &RepoRef, digest: &Digest) {
    let mut digest = digest.clone();
    digest.meta.url = format!("https://github.com/{repo}");
    let expected = store.head(repo).await.unwrap().expected();
    let put = store.put(repo, &digest, &expected).await.unwrap();
    assert_eq!(put, Put::Stored);
}

/// One run's check, which leaves its index as the producer does.
async fn check(store: &S3Store, feed: &[FeedRepo]) -> Vec<Checked> {
    logs::prepare();
    let config = config(Check::Index);
    let (checked, index) = cache::check(&config, store, feed.to_vec()).await.unwrap();
    if let Some(index) = index {
        index.save(store).await.unwrap();
    }
    checked
}

async fn check_by_looking(store: &S3Store, feed: &[FeedRepo]) -> Vec<Checked> {
    logs::prepare();
    let config = config(Check::Head);
    let (checked, index) = cache::check(&config, store, feed.to_vec()).await.unwrap();
    assert_eq!(index, None);
    checked
}

#[tokio::test]
async fn what_is_known_is_not_looked_at() {
    let server = S3Server::start();
    let store = server.store();
    let feed = feed(50);
    for entry in &feed[..40] {
        put(&store, &entry.repo, &digest("text", PUSHED, DIGEST_FORMAT)).await;
    }
    server.age(SETTLED * 2);

    server.forget_calls();
    let first = check(&store, &feed).await;
    // What is not listed is not there; the rest is not known yet.
    assert_eq!(server.calls("HEAD"), 40);
    assert_eq!(Index::load(&store).await.unwrap().len(), 40);
    let writes = server.writes(INDEX).len();

    server.forget_calls();
    assert_eq!(check(&store, &feed).await, first);
    assert_eq!(server.calls("HEAD"), 0);
    assert_eq!(server.writes(INDEX).len(), writes, "nothing has changed");

    // Replaced by the same text of another push, and by another text of the same push.
    put(&store, &feed[0].repo, &digest("text", PUSHED_LATER, "f")).await;
    put(
        &store,
        &feed[1].repo,
        &digest("more", PUSHED, DIGEST_FORMAT),
    )
    .await;
    server.remove("gitingest/ab/r-2/summary.txt").unwrap();
    server.forget_calls();
    let checked = check(&store, &feed).await;
    assert_eq!(server.calls("HEAD"), 2);
    assert_eq!(checked[0].reason, CacheReason::Newer);
    assert_eq!(checked[1].reason, CacheReason::Hit);
    assert_eq!(checked[2].reason, CacheReason::Miss);
    assert_eq!(checked, check_by_looking(&store, &feed).await);
    // Too young to be remembered, or gone.
    assert_eq!(Index::load(&store).await.unwrap().len(), 37);
}

/// The same text, at the same moment by the store's clock: a listing cannot tell the difference.
#[tokio::test]
async fn a_digest_that_could_be_replaced_unseen_is_not_remembered() {
    let server = S3Server::start();
    let store = server.store();
    let feed = [entry("a/b", PUSHED)];
    let key = feed[0].repo.digest_key();
    put(
        &store,
        &feed[0].repo,
        &digest("text", PUSHED, DIGEST_FORMAT),
    )
    .await;
    let modified = server.objects()[&key].modified;
    assert_eq!(check(&store, &feed).await[0].reason, CacheReason::Hit);

    let other = digest("text", PUSHED_LATER, DIGEST_FORMAT);
    put(&store, &feed[0].repo, &other).await;
    let mut object = server.remove(&key).unwrap();
    object.modified = modified;
    server.insert(&key, object);
    assert_eq!(check(&store, &feed).await[0].reason, CacheReason::Newer);
}

/// Does something to the store that may happen between two runs.
async fn change(server: &S3Server, store: &S3Store, repo: &RepoRef, random: &mut fastrand::Rng) {
    let key = repo.digest_key();
    let text = ["text", "another", ""][random.usize(..3)];
    let pushed_at = [PUSHED, PUSHED, PUSHED_LATER][random.usize(..3)];
    let format = [DIGEST_FORMAT, DIGEST_FORMAT, "old"][random.usize(..3)];
    match random.u8(..10) {
        0..6 => put(store, repo, &digest(text, pushed_at, format)).await,
        6..8 => drop(server.remove(&key)),
        // The predecessor's, somebody's, or torn.
        _ => {
            put(store, repo, &digest("a text", pushed_at, format)).await;
            let mut object = server.remove(&key).unwrap();
            match random.u8(..4) {
                0 => drop(object.metadata.remove("format")),
                1 => drop(object.metadata.insert("pushedat".to_owned(), String::new())),
                2 => object.metadata.clear(),
                _ => object.content = object.content.slice(..2),
            }
            server.insert(&key, object);
        }
    }
    // Most of it happened long enough ago.
    if let Some(mut object) = server.remove(&key) {
        object.modified -= Duration::from_secs(random.u64(..6000));
        server.insert(&key, object);
    }
}

/// Does something to the index that must not matter.
async fn damage(server: &S3Server, store: &S3Store, old: &[u8], random: &mut fastrand::Rng) {
    let Some(mut object) = server.remove(INDEX) else {
        return;
    };
    match random.u8(..8) {
        // As it was left, mostly.
        0..3 => {}
        3 => return,
        4 => object.content = object.content.slice(..random.usize(..object.content.len())),
        5 => {
            let mut bytes = object.content.to_vec();
            let place = random.usize(..bytes.len());
            bytes[place] ^= 1 << random.u8(..8);
            object.content = bytes.into();
        }
        6 => object.content = old.to_vec().into(),
        // With a sum that fits, but of objects that are not.
        _ => {
            let mut index = Index::default();
            for (key, object) in server.objects() {
                let name = key.trim_start_matches("gitingest/");
                let name = name.trim_end_matches("/summary.txt");
                let Ok(repo) = name.parse::<RepoRef>() else {
                    continue;
                };
                let listed = list_one(store, &repo).await;
                let lie = random.u8(..3);
                let entry = Entry {
                    etag: if lie == 0 {
                        "0".repeat(32)
                    } else {
                        listed.etag
                    },
                    modified_millis: listed.modified_millis - i64::from(lie == 1),
                    bytes: object.content.len() as u64 + u64::from(lie == 2),
                    pushed_at: PushedAt::new(PUSHED).unwrap(),
                    url: format!("https://github.com/{repo}"),
                    format: DIGEST_FORMAT.to_owned(),
                };
                index.insert(repo, entry);
            }
            object.content = index.encode().into();
        }
    }
    server.insert(INDEX, object);
}

async fn list_one(store: &S3Store, repo: &RepoRef) -> common::store::Listed {
    use futures::TryStreamExt;
    let mut listed = store.list(&format!("{repo}/"));
    listed.try_next().await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_became_of_the_index_the_answers_are_those_of_looking() {
    let server = Arc::new(S3Server::start());
    let store = server.store();
    let feed = feed(40);
    let lists_fail = Arc::new(Mutex::new(fastrand::Rng::with_seed(7)));
    let mut looks_saved = 0;
    for seed in 0..60 {
        let random = &mut fastrand::Rng::with_seed(seed);
        let old = match store.document(&DocumentKey::Index).await.unwrap() {
            Some(old) if random.bool() => old,
            _ => b"{}".to_vec(),
        };
        for entry in &feed {
            if random.u8(..4) == 0 {
                change(&server, &store, &entry.repo, random).await;
            }
        }
        damage(&server, &store, &old, random).await;

        let expected = check_by_looking(&store, &feed).await;
        if random.u8(..8) == 0 {
            let lists_fail = Arc::clone(&lists_fail);
            server.decide(move |call: &Call| {
                let list = call.key.is_empty() && call.query.contains("list-type");
                let fails = list && lists_fail.lock().unwrap().bool();
                match fails {
                    true => Fate::Denied(403, "AccessDenied"),
                    false => Fate::Answered,
                }
            });
        }
        server.forget_calls();
        let answers = check(&store, &feed).await;
        looks_saved += feed.len() - server.calls("HEAD");
        server.decide(|_| Fate::Answered);
        assert_eq!(answers, expected, "seed {seed}");
        assert_eq!(check(&store, &feed).await, expected, "seed {seed}, again");
    }
    assert!(
        looks_saved > 300,
        "{looks_saved}: the index was hardly used"
    );
}

#[tokio::test]
async fn an_index_that_cannot_be_used_is_warned_of_and_replaced() {
    let server = S3Server::start();
    let store = server.store();
    let feed = feed(4);
    for entry in &feed {
        put(&store, &entry.repo, &digest("text", PUSHED, DIGEST_FORMAT)).await;
    }
    server.age(SETTLED * 2);
    store
        .put_document(&DocumentKey::Index, b"{\"version\":9")
        .await
        .unwrap();
    let logs = Logs::collect();
    let checked = check(&store, &feed).await;
    assert!(checked.iter().all(Checked::is_cached));
    assert_eq!(
        logs.lines("the index s3://digests/runs/index.json").len(),
        1
    );
    assert_eq!(Index::load(&store).await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_bucket_that_cannot_be_read_ends_the_run() {
    let server = S3Server::start();
    let store = server.store();
    server.decide(|_| Fate::Denied(403, "AccessDenied"));
    for how in [Check::Index, Check::Head] {
        logs::prepare();
        let error = cache::check(&config(how), &store, feed(20)).await;
        let error = error.unwrap_err();
        assert_eq!(error.code, exit::UNAVAILABLE);
        for part in ["s3://digests", "rights to list"] {
            assert!(error.message.contains(part), "{error}");
        }
    }
}
