//! The cache check against a real store and a real HTTP server.

use std::fmt;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::ids::RunId;
use common::job::DIGEST_FORMAT;
use common::retry::Policy;
use common::run::documents::CacheReason;
use common::store::fs::FsStore;
use common::store::{
    Digest, DigestMeta, DigestStore, DocumentKey, Expected, Found, Listed, Put, Renewal,
    SharedStore, Version,
};
use futures::stream::BoxStream;
use producer::cache::{self, CacheConfig, CacheSource, Check, Checked};
use producer::feed::entry::FeedRepo;
use serde_json::{Value, json};
use testing::http_server::{HttpServer, Request, Response};
use tokio::sync::Barrier;

use crate::logs::{self, Logs};

const PUSHED: &str = "2026-01-01T00:00:00Z";

fn config(cache: CacheSource, url: Option<&str>) -> CacheConfig {
    CacheConfig {
        cache,
        check: Check::Index,
        cache_url: url.map(|url| url.parse().unwrap()),
        cache_timeout: Duration::from_secs(10),
        force: false,
        retry_failed: false,
        explain: false,
        retry: Policy {
            pauses: vec![Duration::ZERO; 2],
        },
    }
}

fn repositories(names: impl IntoIterator<Item = impl fmt::Display>) -> Vec<FeedRepo> {
    let entry = |name: String| FeedRepo {
        index: 0,
        repo: RepoRef::new("example-org", &name).unwrap(),
        url: format!("https://github.com/example-org/{name}"),
        pushed_at: PushedAt::new(PUSHED).unwrap(),
        details: Default::default(),
    };
    names
        .into_iter()
        .map(|name| entry(name.to_string()))
        .collect()
}

fn reasons(checked: &[Checked]) -> Vec<CacheReason> {
    checked.iter().map(|checked| checked.reason).collect()
}

async fn check(
    config: &CacheConfig,
    store: &dyn DigestStore,
    repositories: Vec<FeedRepo>,
) -> Result<Vec<Checked>, ExitError> {
    logs::prepare();
    let (checked, index) = cache::check(config, store, repositories).await?;
    assert_eq!(index, None, "only a bucket has one");
    Ok(checked)
}

/// A store of which only `head` is asked, answered by a closure.
struct Heads<F>(F);

impl<F> fmt::Debug for Heads<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Heads")
    }
}

#[async_trait]
impl<F, Fut> DigestStore for Heads<F>
where
    F: Fn(RepoRef) -> Fut + Send + Sync,
    Fut: Future<Output = Result<Found, Fault>> + Send,
{
    async fn head(&self, repo: &RepoRef) -> Result<Found, Fault> {
        (self.0)(repo.clone()).await
    }

    async fn get(&self, _: &RepoRef) -> Result<Option<Digest>, Fault> {
        unreachable!("a check reads no digest")
    }

    async fn put(&self, _: &RepoRef, _: &Digest, _: &Expected) -> Result<Put, Fault> {
        unreachable!("a check writes nothing")
    }

    async fn renew(&self, _: &RepoRef, _: &DigestMeta, _: &Version) -> Result<Renewal, Fault> {
        unreachable!("a check writes nothing")
    }

    fn list(&self, _: &str) -> BoxStream<'_, Result<Listed, Fault>> {
        unreachable!("a check lists nothing")
    }

    async fn owners(&self) -> Result<Vec<String>, Fault> {
        Ok(Vec::new())
    }

    async fn strays(&self) -> Result<Vec<String>, Fault> {
        unreachable!("a check does not look for them")
    }

    async fn remove(&self, _: &RepoRef, _: &Version) -> Result<bool, Fault> {
        unreachable!("a check removes nothing")
    }

    fn withdrawn(&self) -> SharedStore {
        unreachable!("a check does not look there")
    }

    async fn write_document(
        &self,
        _: &DocumentKey,
        _: &[u8],
        _: Option<&Expected>,
    ) -> Result<Put, Fault> {
        unreachable!("a check writes nothing")
    }

    async fn read_document(&self, _: &DocumentKey) -> Result<Option<(Vec<u8>, Version)>, Fault> {
        Ok(None)
    }

    async fn reachable(&self) -> Result<(), Fault> {
        unreachable!("a check does not ask for nothing")
    }

    async fn probe(&self) -> Result<(), Fault> {
        unreachable!("a check does not probe")
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn location(&self) -> String {
        "s3://bucket".to_owned()
    }
}

/// No store must be asked at all.
fn no_store() -> impl DigestStore {
    Heads(|repo: RepoRef| async move { panic!("asked the store about {repo}") })
}

async fn check_api(
    server: &HttpServer,
    repositories: Vec<FeedRepo>,
) -> Result<Vec<Checked>, ExitError> {
    let url = format!("{}/batch", server.url());
    check(
        &config(CacheSource::Api, Some(&url)),
        &no_store(),
        repositories,
    )
    .await
}

#[tokio::test]
async fn the_store_decides_in_the_feeds_order() {
    let folder = tempfile::tempdir().unwrap();
    let store = FsStore::new(folder.path());
    for (name, pushed_at, format) in [
        ("hit", PUSHED, DIGEST_FORMAT),
        ("stale", "2025-01-01T00:00:00Z", DIGEST_FORMAT),
        ("format", PUSHED, "another"),
        ("unreadable", PUSHED, DIGEST_FORMAT),
    ] {
        let digest = Digest {
            text: "Files analyzed: 0".to_owned(),
            meta: DigestMeta {
                pushed_at: PushedAt::new(pushed_at).unwrap(),
                url: format!("https://github.com/example-org/{name}"),
                processed_at: "2026-01-02T00:00:00Z".to_owned(),
                commit: None,
                format: format.to_owned(),
                bytes: 0,
                truncated: false,
                run: RunId::new(),
                sha256: None,
                tokens: None,
                files: None,
            },
        };
        let repo = RepoRef::new("example-org", name).unwrap();
        let put = store.put(&repo, &digest, &Expected::Absent).await;
        assert!(put.unwrap().is_stored());
    }
    let unreadable = folder.path().join("gitingest/example-org/unreadable");
    fs::write(unreadable.join("summary.txt"), "someone else's").unwrap();

    let all = repositories(["miss", "hit", "unreadable", "stale", "format"]);
    let checked = check(&config(CacheSource::Store, None), &store, all.clone())
        .await
        .unwrap();
    assert_eq!(
        reasons(&checked),
        [
            CacheReason::Miss,
            CacheReason::Hit,
            CacheReason::Unreadable,
            CacheReason::Stale,
            CacheReason::Format
        ]
    );
    let entries: Vec<_> = checked
        .iter()
        .map(|checked| checked.entry.clone())
        .collect();
    assert_eq!(entries, all);
    let counts = cache::counts(&checked);
    assert_eq!(counts[&CacheReason::Hit], 1);
    assert_eq!(counts[&CacheReason::Forced], 0);

    let mut forced = config(CacheSource::Store, None);
    forced.force = true;
    for config in [forced, config(CacheSource::None, None)] {
        let checked = check(&config, &no_store(), all.clone()).await.unwrap();
        assert_eq!(reasons(&checked), [CacheReason::Forced; 5]);
    }
}

#[tokio::test]
async fn the_store_is_asked_256_at_a_time() {
    const WIDTH: usize = 256;
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    // Nobody gets an answer before 256 have asked.
    let barrier = Arc::new(Barrier::new(WIDTH));
    let store = {
        let most = Arc::clone(&most);
        Heads(move |_| {
            let (now, most, barrier) = (Arc::clone(&now), Arc::clone(&most), Arc::clone(&barrier));
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                barrier.wait().await;
                now.fetch_sub(1, Ordering::SeqCst);
                Ok(Found::Absent)
            }
        })
    };
    let all = repositories(0..WIDTH * 4);
    let checked = check(&config(CacheSource::Store, None), &store, all)
        .await
        .unwrap();
    assert_eq!(reasons(&checked), [CacheReason::Miss; WIDTH * 4]);
    assert_eq!(most.load(Ordering::SeqCst), WIDTH);
}

#[tokio::test]
async fn a_read_that_fails_is_a_miss() {
    let logs = Logs::collect();
    let store = Heads(|repo: RepoRef| async move {
        if repo.name().len() == 3 {
            return Err(Fault::infra("403 Forbidden"));
        }
        Ok(Found::Absent)
    });
    let checked = check(
        &config(CacheSource::Store, None),
        &store,
        repositories(90..120),
    )
    .await
    .unwrap();
    assert_eq!(reasons(&checked), [CacheReason::Miss; 30]);
    assert_eq!(checked[9].to_string(), "example-org/99: miss");
    assert_eq!(
        checked[10].to_string(),
        "example-org/100: miss (not known: 403 Forbidden)"
    );
    let warnings = logs.lines("WARN");
    assert_eq!(warnings.len(), 11, "{warnings:#?}");
    assert!(warnings[0].contains("example-org/100 counts as a miss: 403 Forbidden"));
    assert!(
        warnings[10].contains("20 repositories in all"),
        "{warnings:#?}"
    );
}

#[tokio::test]
async fn a_store_that_answers_nothing_ends_the_run() {
    for count in [1, 20, 24_500] {
        let asked = Arc::new(AtomicUsize::new(0));
        let store = {
            let asked = Arc::clone(&asked);
            Heads(move |_| {
                asked.fetch_add(1, Ordering::SeqCst);
                async { Err(Fault::infra("connection refused")) }
            })
        };
        let error = check(
            &config(CacheSource::Store, None),
            &store,
            repositories(0..count),
        )
        .await
        .unwrap_err();
        assert_eq!(error.code, exit::UNAVAILABLE);
        assert!(
            error.message.contains("s3://bucket") && error.message.contains("connection refused"),
            "{error}"
        );
        assert!(asked.load(Ordering::SeqCst) <= 512, "gives up soon");
    }
    let nothing = check(&config(CacheSource::Store, None), &no_store(), Vec::new()).await;
    assert_eq!(nothing.unwrap(), []);
}

#[tokio::test]
async fn the_api_is_asked_500_at_a_time() {
    let server = HttpServer::start(|request: &Request| {
        let question: Value = serde_json::from_slice(&request.body).unwrap();
        let mut answer = json!({"someone/else": false});
        for (i, repo) in question["repos"].as_array().unwrap().iter().enumerate() {
            let key = format!(
                "{}/{}",
                repo["org"].as_str().unwrap(),
                repo["name"].as_str().unwrap()
            );
            match i % 4 {
                0 => answer[key] = json!(false),
                1 => answer[key] = json!(true),
                2 => answer[key] = json!("yes"),
                _ => {}
            }
        }
        Response::json(&answer)
    });
    let all = repositories(0..1204);
    let checked = check_api(&server, all.clone()).await.unwrap();
    use CacheReason::{Hit, Miss};
    assert_eq!(reasons(&checked), [Hit, Miss, Miss, Miss].repeat(301));
    let forced: Vec<_> = checked.iter().map(|checked| checked.force).collect();
    assert_eq!(forced, [false, true, false, false].repeat(301));
    assert_eq!(
        checked[2].to_string(),
        "example-org/2: miss (not known: the API said neither true nor false)"
    );
    assert_eq!(
        checked[3].to_string(),
        "example-org/3: miss (not known: the API did not speak of it)"
    );

    let requests = server.requests();
    let mut sizes = Vec::new();
    for request in &requests {
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            ("POST", "/batch")
        );
        assert_eq!(request.header("content-type"), Some("application/json"));
        let question: Value = serde_json::from_slice(&request.body).unwrap();
        assert_eq!(question.as_object().unwrap().len(), 1);
        let repos = question["repos"].as_array().unwrap();
        let name = repos[0]["name"].as_str().unwrap();
        assert_eq!(
            repos[0],
            json!({
                "org": "example-org",
                "name": name,
                "pushedAt": PUSHED,
                "url": format!("https://github.com/example-org/{name}"),
            })
        );
        sizes.push(repos.len());
    }
    sizes.sort_unstable();
    assert_eq!(sizes, [204, 500, 500]);
}

#[tokio::test]
async fn an_api_that_fails_makes_misses_and_a_warning() {
    type Answer = fn() -> Response;
    let faults: [(&str, Answer, usize); 7] = [
        ("500 Internal Server Error", || Response::new(500, ""), 3),
        ("429 Too Many Requests", || Response::new(429, ""), 3),
        ("reset", Response::reset, 3),
        ("404 Not Found", || Response::new(404, ""), 1),
        ("no JSON object", || Response::new(200, "<html>"), 1),
        ("no JSON object", || Response::new(200, "[true]"), 1),
        (
            "more than 1048576 bytes",
            || Response::endless("{", " ".repeat(10_000)),
            1,
        ),
    ];
    for (why, fault, requests) in faults {
        let logs = Logs::collect();
        let server = HttpServer::start(move |_| fault());
        let checked = check_api(&server, repositories(0..20)).await.unwrap();
        assert_eq!(reasons(&checked), [CacheReason::Miss; 20]);
        assert!(checked.iter().all(|checked| !checked.force));
        assert!(checked[0].detail.contains(why), "{}", checked[0]);
        assert_eq!(server.request_count(), requests, "{why}");
        assert_eq!(
            logs.lines("20 repositories count as misses").len(),
            1,
            "{}",
            logs.text()
        );
    }
}

#[tokio::test]
async fn an_api_that_is_away_is_not_asked_for_ever() {
    let server = HttpServer::start(|_| Response::hang());
    let mut config = config(CacheSource::Api, Some(&server.url()));
    config.cache_timeout = Duration::from_millis(100);
    let checked = check(&config, &no_store(), repositories(0..24_500))
        .await
        .unwrap();
    assert_eq!(reasons(&checked), [CacheReason::Miss; 24_500]);
    // 49 batches; those under way had their three attempts, the rest was spared.
    assert!(server.request_count() <= 24, "{}", server.request_count());
    let last = checked.last().unwrap();
    assert!(last.detail.contains("not asked again"), "{last}");
}

#[tokio::test]
async fn an_api_without_an_address_is_a_usage_error() {
    let error = check(&config(CacheSource::Api, None), &no_store(), Vec::new())
        .await
        .unwrap_err();
    assert_eq!(error.code, exit::USAGE);
}

/// The check may be spawned.
#[test]
fn the_check_is_send() {
    fn is_send(_: impl Send) {}
    let (config, store) = (config(CacheSource::Store, None), no_store());
    is_send(cache::check(&config, &store, Vec::new()));
}
