//! The index never changes an answer: whatever became of it, and of the store, listing and looking
//! say the same.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::exit;
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::ids::RunId;
use common::job::DIGEST_FORMAT;
use common::outcome::{Outcome, OutcomeRecord, StoredDigest};
use common::run::documents::CacheReason;
use common::store::fs::FsStore;
use common::store::s3::S3Store;
use common::store::{Digest, DigestMeta, DigestStore, DocumentKey, Found, Put, Renewal};
use producer::cache::index::{Entry, Index, Learned, SETTLED};
use producer::cache::{self, CacheConfig, CacheSource, Check, Checked};
use producer::feed::entry::FeedRepo;
use testing::s3_server::{Call, Fate, S3Server};

use crate::logs::{self, Logs};

const PUSHED_EARLIER: &str = "2025-12-31T00:00:00Z";
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
        retry_failed: false,
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
        details: Default::default(),
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
            sha256: Some(common::text::sha256(text)),
            tokens: None,
            files: None,
        },
    }
}

async fn put(store: &dyn DigestStore, repo: &RepoRef, digest: &Digest) -> Put {
    let mut digest = digest.clone();
    digest.meta.url = format!("https://github.com/{repo}");
    let expected = store.head(repo).await.unwrap().expected();
    let put = store.put(repo, &digest, &expected).await.unwrap();
    assert!(put.is_stored());
    put
}

/// One run's check, which leaves its index as the producer does.
async fn check(store: &dyn DigestStore, feed: &[FeedRepo]) -> Vec<Checked> {
    logs::prepare();
    let config = config(Check::Index);
    let (checked, index) = cache::check(&config, store, feed.to_vec()).await.unwrap();
    if let Some(index) = index {
        index.save(store).await.unwrap();
    }
    checked
}

async fn check_by_looking(store: &dyn DigestStore, feed: &[FeedRepo]) -> Vec<Checked> {
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
    assert_eq!(server.calls("HEAD"), 1);
    // The text is that of this push, whatever its metadata say of another.
    assert_eq!(checked[0].reason, CacheReason::Hit);
    assert_eq!(checked[1].reason, CacheReason::Hit);
    assert_eq!(checked[2].reason, CacheReason::Miss);
    let by_looking = check_by_looking(&store, &feed).await;
    assert_eq!(by_looking[0].reason, CacheReason::Newer);
    assert_eq!(checked[1..], by_looking[1..]);
    assert_eq!(Index::load(&store).await.unwrap().len(), 39);
}

/// The same text, at the same moment by the store's clock: a listing cannot tell the difference.
#[tokio::test]
async fn a_digest_that_could_be_replaced_unseen_is_not_taken_for_stale() {
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
    // Once that push is wanted, the entry does not make its digest stale.
    let feed = [entry("a/b", PUSHED_LATER)];
    assert_eq!(check(&store, &feed).await[0].reason, CacheReason::Hit);
}

/// Does something to the store that may happen between two runs.
async fn change(server: &S3Server, store: &S3Store, repo: &RepoRef, random: &mut fastrand::Rng) {
    let key = repo.digest_key();
    let pushed_at = [PUSHED, PUSHED, PUSHED_LATER][random.usize(..3)];
    let format = [DIGEST_FORMAT, DIGEST_FORMAT, "old"][random.usize(..3)];
    // A text belongs to its push and format, mostly to one of them only.
    let text = match random.u8(..3) {
        0 => String::new(),
        1 => format!("text of {format}"),
        _ => format!("{pushed_at} {format}"),
    };
    match random.u8(..10) {
        0..6 => drop(put(store, repo, &digest(&text, pushed_at, format)).await),
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
                    modified_millis: Some(listed.modified_millis - i64::from(lie == 1)),
                    meta: DigestMeta {
                        bytes: object.content.len() as u64 + u64::from(lie == 2),
                        url: format!("https://github.com/{repo}"),
                        // Never current: what an index says of a text is true.
                        ..digest("", PUSHED_EARLIER, DIGEST_FORMAT).meta
                    },
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

/// An index may call current what metadata call newer: the same text of a later push.
fn assert_same(answers: &[Checked], expected: &[Checked], seed: u64) {
    for (answer, expected) in answers.iter().zip(expected) {
        // Of the same text stored again, the index knows an earlier record.
        let plain = |checked: &Checked| Checked {
            stored: None,
            ..checked.clone()
        };
        let same_text = answer.reason == CacheReason::Hit && expected.reason == CacheReason::Newer;
        assert!(
            plain(answer) == plain(expected) || same_text,
            "seed {seed}: {answer}, {expected}"
        );
    }
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
        assert_same(&answers, &expected, seed);
        assert_same(&check(&store, &feed).await, &expected, seed);
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

/// A check minutes after a large run: nothing is read that the run's own outcomes tell.
#[tokio::test]
async fn what_a_run_stored_is_not_read_by_the_next() {
    let server = S3Server::start();
    let store = server.store();
    let feed = feed(200);
    let jobs = check(&store, &feed).await;
    let mut learned = Learned::default();
    for (i, entry) in feed.iter().enumerate() {
        let digest = digest(&format!("text {i}"), PUSHED, DIGEST_FORMAT);
        let Put::Stored(version) = put(&store, &entry.repo, &digest).await else {
            panic!("it is stored");
        };
        let processed =
            OutcomeRecord::without_work(jobs[i].key(), RunId::new(), Outcome::Processed, "");
        learned.record(&OutcomeRecord {
            stored_bytes: digest.meta.bytes,
            digest: Some(StoredDigest {
                etag: version.etag().to_owned(),
                format: DIGEST_FORMAT.to_owned(),
                bytes: digest.meta.bytes,
                meta: Some(DigestMeta {
                    url: entry.url.clone(),
                    ..digest.meta.clone()
                }),
            }),
            ..processed
        });
    }
    learned.save(&store).await.unwrap();
    // One is replaced meanwhile, one vanishes.
    let other = digest("another text", PUSHED_LATER, DIGEST_FORMAT);
    put(&store, &feed[0].repo, &other).await;
    server.remove(&feed[1].repo.digest_key()).unwrap();

    server.forget_calls();
    let checked = check(&store, &feed).await;
    assert_eq!(server.calls("HEAD"), 1);
    assert_eq!(checked, check_by_looking(&store, &feed).await);
    assert_eq!(checked[0].reason, CacheReason::Newer);
    assert_eq!(checked[1].reason, CacheReason::Miss);
    assert!(checked[2..].iter().all(Checked::is_cached));

    // Another push: now the metadata have to be read, which are as young.
    let later: Vec<_> = feed
        .iter()
        .map(|entry| FeedRepo {
            pushed_at: PushedAt::new(PUSHED_LATER).unwrap(),
            ..entry.clone()
        })
        .collect();
    let expected = check_by_looking(&store, &later).await;
    server.forget_calls();
    assert_eq!(check(&store, &later).await, expected);
    assert_eq!(server.calls("HEAD"), 198);
}

/// A renewed record: in a listing only its time differs, and it is current for another push.
#[tokio::test]
async fn what_a_run_renewed_is_not_read_by_the_next() {
    let server = S3Server::start();
    let store = server.store();
    let feed = feed(20);
    for entry in &feed {
        put(&store, &entry.repo, &digest("text", PUSHED, DIGEST_FORMAT)).await;
    }
    server.age(2 * SETTLED);
    check(&store, &feed).await;
    let feed: Vec<_> = feed
        .into_iter()
        .map(|entry| FeedRepo {
            pushed_at: PushedAt::new(PUSHED_LATER).unwrap(),
            ..entry
        })
        .collect();
    let jobs = check(&store, &feed).await;
    assert!(jobs.iter().all(|job| job.reason == CacheReason::Stale));
    let mut learned = Learned::default();
    for job in &jobs {
        let repo = &job.entry.repo;
        let Found::Stored { meta, version } = store.head(repo).await.unwrap() else {
            panic!("it is stored");
        };
        let meta = DigestMeta {
            pushed_at: job.entry.pushed_at.clone(),
            ..meta
        };
        let renewal = store.renew(repo, &meta, &version).await.unwrap();
        let Renewal::Renewed(version) = renewal else {
            panic!("{renewal:?}");
        };
        let unmoved = OutcomeRecord::without_work(job.key(), RunId::new(), Outcome::Unmoved, "");
        learned.record(&OutcomeRecord {
            digest: Some(StoredDigest {
                etag: version.etag().to_owned(),
                format: meta.format.clone(),
                bytes: meta.bytes,
                meta: Some(meta),
            }),
            ..unmoved
        });
    }
    learned.save(&store).await.unwrap();
    server.forget_calls();
    let checked = check(&store, &feed).await;
    assert_eq!(server.calls("HEAD"), 0);
    assert!(
        checked
            .iter()
            .all(|checked| checked.reason == CacheReason::Hit)
    );
    assert_eq!(checked, check_by_looking(&store, &feed).await);
}

/// The same text of another push: a young object costs a read once its push is not the wanted one.
#[tokio::test]
async fn a_digest_stored_a_minute_ago_is_read_once() {
    let server = S3Server::start();
    let store = server.store();
    let feed = feed(50);
    for entry in &feed {
        put(&store, &entry.repo, &digest("text", PUSHED, DIGEST_FORMAT)).await;
    }
    for heads in [50, 0] {
        server.forget_calls();
        let checked = check(&store, &feed).await;
        assert!(
            checked
                .iter()
                .all(|checked| checked.reason == CacheReason::Hit)
        );
        assert_eq!(server.calls("HEAD"), heads);
    }
}

/// Letter case does not tell repositories apart: the digest that is there is found and used.
async fn spellings(store: &dyn DigestStore) {
    let stored = ["AlphaGov/Site", "alphagov/both", "AlphaGov/Both", "x/Y"];
    for name in stored {
        let digest = digest(name, PUSHED, DIGEST_FORMAT);
        put(store, &name.parse().unwrap(), &digest).await;
    }
    let mut feed = Vec::new();
    for name in [
        "alphagov/site",
        "alphagov/both",
        "X/y",
        "alphagov/new",
        "New/Owner",
    ] {
        feed.push(FeedRepo {
            url: format!("https://github.com/{name}"),
            ..entry(name, PUSHED)
        });
    }
    let expected = [
        "AlphaGov/Site: hit",
        "alphagov/both: hit",
        "x/Y: hit",
        "alphagov/new: miss",
        "New/Owner: miss",
    ];
    let lines =
        |checked: &[Checked]| -> Vec<_> { checked.iter().map(Checked::to_string).collect() };
    for _ in 0..2 {
        assert_eq!(lines(&check(store, &feed).await), expected);
        assert_eq!(lines(&check_by_looking(store, &feed).await), expected);
    }
    // A job keeps the store's spelling, also where the store was not asked what it holds.
    logs::prepare();
    let forced = CacheConfig {
        force: true,
        ..config(Check::Index)
    };
    let (checked, _) = cache::check(&forced, store, feed).await.unwrap();
    let repos: Vec<_> = checked
        .iter()
        .map(|checked| checked.entry.repo.to_string())
        .collect();
    assert_eq!(
        repos,
        [
            "AlphaGov/Site",
            "alphagov/both",
            "x/Y",
            "alphagov/new",
            "New/Owner"
        ]
    );
}

#[tokio::test]
async fn a_digest_in_another_spelling_is_used_in_a_bucket() {
    let server = S3Server::start();
    spellings(&server.store()).await;
}

#[tokio::test]
async fn a_digest_in_another_spelling_is_used_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    spellings(&FsStore::new(folder.path())).await;
}
