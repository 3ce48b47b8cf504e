//! The audit: what was planted is found, and nothing else.

use std::collections::{BTreeSet, HashMap};
use std::fs;

use common::ids::{PushedAt, RepoRef, RunId};
use common::job::DIGEST_FORMAT;
use common::run::view::RunView;
use common::store::s3::S3Store;
use common::store::{Digest, DigestMeta, DigestStore, Expected, Found};
use producer::cache::index::{Entry, Index, Learned};
use producer::cache::{self, CacheConfig, CacheSource, Check};
use producer::catalog::update::{self, Known};
use producer::feed::entry::FeedRepo;
use producer::verify::{Finding, Wants, audit};
use producer::withdrawals::Withdrawals;
use testing::s3_server::S3Server;
use time::OffsetDateTime;

use crate::fleet::{Fleet, Running, bare_producer};

const PUSHED: &str = "2026-01-01T00:00:00Z";
const PUSHED_LATER: &str = "2026-02-02T00:00:00Z";
const FUTURE: &str = "2999-01-01T00:00:00Z";
/// How many of each kind are planted.
const EACH: usize = 20;

fn entry(repo: &RepoRef) -> FeedRepo {
    FeedRepo {
        index: 0,
        repo: repo.clone(),
        url: format!("https://github.com/{repo}"),
        pushed_at: PushedAt::new(PUSHED).unwrap(),
        details: Default::default(),
    }
}

fn digest(repo: &RepoRef, pushed_at: &str) -> Digest {
    let text = format!("The text of {repo}");
    Digest {
        meta: DigestMeta {
            pushed_at: PushedAt::new(pushed_at).unwrap(),
            url: format!("https://github.com/{repo}"),
            processed_at: "2026-01-02T00:00:00Z".to_owned(),
            commit: None,
            format: DIGEST_FORMAT.to_owned(),
            bytes: text.len() as u64,
            truncated: false,
            run: RunId::new(),
            sha256: Some(common::text::sha256(&text)),
            tokens: Some(5),
            files: Some(1),
        },
        text,
    }
}

async fn put(store: &dyn DigestStore, repo: &RepoRef, digest: &Digest) {
    let expected = store.head(repo).await.unwrap().expected();
    assert!(
        store
            .put(repo, digest, &expected)
            .await
            .unwrap()
            .is_stored()
    );
}

/// A store with a digest of each repository, catalogue and index, as a run leaves them.
async fn filled(server: &S3Server, repos: &[RepoRef]) -> S3Store {
    let store = server.store();
    for repo in repos {
        let put = store
            .put(repo, &digest(repo, PUSHED), &Expected::Absent)
            .await;
        assert!(put.unwrap().is_stored());
    }
    let config = CacheConfig {
        cache: CacheSource::Store,
        check: Check::Index,
        cache_url: None,
        cache_timeout: std::time::Duration::from_secs(10),
        force: false,
        retry_failed: false,
        explain: false,
        retry: common::retry::Policy::three_attempts(),
    };
    let feed = repos.iter().map(entry).collect();
    let (checked, index) = cache::check(&config, &store, feed).await.unwrap();
    index.unwrap().save(&store).await.unwrap();
    let known = Known {
        checked: &checked,
        view: &RunView::new(RunId::new(), None, None),
        learned: &Learned::default(),
        feed: None,
        stored: None,
        withdrawals: &Withdrawals::new(),
    };
    assert_eq!(update::update(&store, known).await.unwrap(), repos.len());
    store
}

type Planted = BTreeSet<(String, Finding)>;

/// Plants faults of every kind in the store, in the feed and in the index.
async fn plant(
    server: &S3Server,
    store: &S3Store,
    feed: &mut HashMap<RepoRef, FeedRepo>,
    repos: &[RepoRef],
) -> Planted {
    let mut planted = Planted::new();
    let mut index = Index::load(store).await.unwrap();
    for (place, repo) in repos.iter().take(10 * EACH).enumerate() {
        let key = repo.digest_key();
        let mut object = server.objects().remove(&key).unwrap();
        let mut expect = |key: &str, finding| planted.insert((key.to_owned(), finding));
        match place % 10 {
            0 => {
                server.remove(&key).unwrap();
                expect(&key, Finding::Missing);
                expect(&key, Finding::Catalog);
            }
            1 => {
                feed.get_mut(repo).unwrap().pushed_at = PushedAt::new(PUSHED_LATER).unwrap();
                expect(&key, Finding::Stale);
            }
            2 => {
                object.content = object.content.slice(1..);
                server.insert(&key, object);
                expect(&key, Finding::Torn);
            }
            3 => {
                let mut bytes = object.content.to_vec();
                bytes[0] ^= 1;
                object.content = bytes.into();
                server.insert(&key, object);
                expect(&key, Finding::WrongHash);
            }
            4 => {
                object.metadata.clear();
                server.insert(&key, object);
                expect(&key, Finding::Foreign);
                let stray = format!("gitingest/{repo}/notes.txt");
                server.insert(&stray, server.objects()[&key].clone());
                expect(&stray, Finding::Foreign);
            }
            5 => {
                put(store, repo, &digest(repo, FUTURE)).await;
                expect(&key, Finding::FutureDated);
                expect(&key, Finding::Catalog);
            }
            6 => {
                let copy = format!("gitingest/{}/summary.txt", repo.to_string().to_uppercase());
                server.insert(&copy, object);
                expect(&copy, Finding::WrongCase);
            }
            7 => {
                let other: RepoRef = format!("{repo}-gone").parse().unwrap();
                put(store, &other, &digest(&other, PUSHED)).await;
                expect(&other.digest_key(), Finding::Orphaned);
                expect(&other.digest_key(), Finding::Catalog);
                put(&*store.withdrawn(), &other, &digest(&other, PUSHED)).await;
                let withdrawn = format!("withdrawn/{other}/summary.txt");
                expect(&withdrawn, Finding::Orphaned);
            }
            8 => {
                // Renewed by a run that died before it wrote the catalogue.
                let Found::Stored { meta, version } = store.head(repo).await.unwrap() else {
                    panic!("it is stored");
                };
                let processed_at = "2026-03-03T00:00:00Z".to_owned();
                let meta = DigestMeta {
                    processed_at,
                    ..meta
                };
                store.renew(repo, &meta, &version).await.unwrap();
                expect(&key, Finding::Catalog);
            }
            _ => {
                let Found::Stored { version, .. } = store.head(repo).await.unwrap() else {
                    panic!("it is stored");
                };
                let entry = Entry {
                    etag: version.etag().to_owned(),
                    modified_millis: None,
                    meta: digest(repo, PUSHED_LATER).meta,
                };
                index.insert(repo.clone(), entry);
                expect(&key, Finding::Index);
            }
        }
    }
    index.save(store).await.unwrap();
    planted
}

#[tokio::test]
async fn what_was_planted_is_found_and_nothing_else() {
    let server = S3Server::start();
    let repos: Vec<RepoRef> = (0..2_000)
        .map(|i| format!("owner-{}/name-{i}", i % 37).parse().unwrap())
        .collect();
    let store = filled(&server, &repos).await;
    let mut feed: HashMap<_, _> = repos
        .iter()
        .map(|repo| (repo.clone(), entry(repo)))
        .collect();
    let found = async |feed: &HashMap<RepoRef, FeedRepo>, deep| -> Planted {
        let wants = Wants {
            feed,
            whole: true,
            deep,
            now: OffsetDateTime::now_utc(),
        };
        let defects = audit(&store, wants).await.unwrap();
        let found = defects
            .iter()
            .map(|defect| (defect.key.clone(), defect.finding));
        found.collect()
    };
    assert_eq!(found(&feed, true).await, Planted::new());
    let mut planted = plant(&server, &store, &mut feed, &repos).await;
    assert!(planted.len() >= 10 * EACH);
    assert_eq!(found(&feed, true).await, planted);
    planted.retain(|(_, finding)| *finding != Finding::WrongHash);
    assert_eq!(found(&feed, false).await, planted);
}

#[test]
fn what_is_found_is_repaired() {
    let fleet = Fleet::of(&["a/b", "a/c", "a/d", "a/e"]);
    fleet.run(&[]).with(0);
    let verify = |options: &[&str], code: u8| {
        let mut command = bare_producer();
        command.arg("verify").args(fleet.arguments(options));
        Running::start(&mut command).wait().with(code)
    };
    let folder = fleet.store_folder().join("gitingest/a");
    let text = fs::read_to_string(folder.join("b/summary.txt")).unwrap();
    verify(&[], 0);
    fs::write(folder.join("b/summary.txt"), &text[1..]).unwrap();
    let changed = fs::read_to_string(folder.join("c/summary.txt"))
        .unwrap()
        .replace('a', "b");
    // Only the whole text shows it: the beginning is what a look compares.
    fs::write(folder.join("c/summary.txt"), &changed).unwrap();
    fs::remove_file(folder.join("d/summary.txt")).unwrap();
    fleet.write_feed(&fleet.entries(&["a/b", "a/c", "a/d"]));

    let found = verify(&["--json", "--deep"], 4);
    let found: Vec<_> = found
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| {
            format!(
                "{} {}",
                line["repo"].as_str().unwrap(),
                line["finding"].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            "a/b torn",
            "a/c torn",
            "a/d missing",
            "a/d catalog",
            "a/e orphaned"
        ]
    );

    let repaired = verify(&["--repair", "--prune"], 0);
    assert!(
        repaired.stdout.contains("a/e/summary.txt"),
        "{}",
        repaired.stdout
    );
    assert_eq!(
        fs::read_to_string(folder.join("b/summary.txt")).unwrap(),
        text
    );
    assert_eq!(fleet.stored(), ["a/b", "a/c", "a/d"]);
    // The catalogue of the whole feed is that of the next run.
    fleet.run(&[]).with(0);
    verify(&["--deep"], 0);
}
