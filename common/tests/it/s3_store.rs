//! The store in a bucket keeps the contract, on a server in this process and on a real one, and
//! its promises about lost answers, wrong answers and strange objects.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Seek;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use common::fault::{Fault, FaultKind};
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::ids::RunId;
use common::job::DIGEST_FORMAT;
use common::store::s3::S3Store;
use common::store::s3::config::{Limits, S3Config};
use common::store::{
    DigestStore, Document, DocumentKey, Expected, Found, Put, Renewal, SharedStore, Version,
};
use futures::TryStreamExt;
use testing::http_server::{HttpServer, Response};
use testing::s3_server::{self, Call, Fate, S3Server, SECRET_KEY, StoredObject};
use testing::seaweedfs::SeaweedFs;
use testing::store_contract::{self, digest};
use tokio::net::{TcpSocket, TcpStream};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contract_on_seaweedfs() {
    let server = SeaweedFs::start().await;
    let stores = AtomicUsize::new(0);
    let fresh = || {
        let mut config = server.config();
        config.prefix = format!("tests/{}", stores.fetch_add(1, SeqCst));
        S3Store::new(&config)
    };
    store_contract::check(async || Arc::new(fresh()) as SharedStore).await;

    newer_is_never_replaced_by_older(fresh()).await;

    let store = fresh();
    let strange = digest("text", "1").with_url("https://git.example/ö/😀 %41");
    assert!(put(&store, &strange, &Expected::Absent).await.is_stored());
    assert_eq!(store.get(&repo()).await.unwrap(), Some(strange));
    assert!(format!("{store:?}").contains("Kept"));

    // Other parts of the same bucket are not seen.
    assert_eq!(
        store.location(),
        format!("s3://digests/tests/{}", stores.load(SeqCst) - 1)
    );
    let listed: Vec<_> = store.list("").try_collect().await.unwrap();
    assert_eq!(listed.len(), 1);

    let place = server.config().endpoint.unwrap();
    let store = S3Store::new(&keys(&place, "another", SECRET_KEY));
    says(&store, &["check AWS_ACCESS_KEY_ID"]).await;
    let store = S3Store::new(&keys(&place, s3_server::ACCESS_KEY, "another"));
    says(&store, &["check AWS_SECRET_ACCESS_KEY"]).await;
}

fn repo() -> RepoRef {
    "owner/name".parse().unwrap()
}

const KEY: &str = "gitingest/owner/name/summary.txt";

trait WithUrl {
    fn with_url(self, url: &str) -> Self;
}

impl WithUrl for common::store::Digest {
    fn with_url(mut self, url: &str) -> Self {
        self.meta.url = url.to_owned();
        self
    }
}

async fn put(store: &S3Store, digest: &common::store::Digest, expected: &Expected) -> Put {
    store.put(&repo(), digest, expected).await.unwrap()
}

async fn expected(store: &S3Store) -> Expected {
    store.head(&repo()).await.unwrap().expected()
}

/// What each writer does: the loop of `worker::job::attempt`.
async fn store_unless_newer(store: &S3Store, digest: &common::store::Digest) -> bool {
    loop {
        let found = store.head(&repo()).await.unwrap();
        if let Found::Stored { meta, .. } = &found
            && meta.pushed_at >= digest.meta.pushed_at
        {
            return false;
        }
        if put(store, digest, &found.expected()).await.is_stored() {
            return true;
        }
    }
}

const WRITERS: u32 = 32;

fn pushed(n: u32) -> String {
    format!("2026-01-01T00:00:{n:02}Z")
}

async fn newer_is_never_replaced_by_older(store: S3Store) {
    let store = Arc::new(store);
    let mut order: Vec<_> = (0..WRITERS).collect();
    fastrand::shuffle(&mut order);
    let mut tasks = tokio::task::JoinSet::new();
    for n in order {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let digest = digest(&format!("text {n}"), &pushed(n));
            store_unless_newer(&store, &digest).await
        });
    }
    let stored = tasks.join_all().await;
    assert!(stored.contains(&true));
    let last = store.get(&repo()).await.unwrap().unwrap();
    assert_eq!(last.meta.pushed_at.as_str(), pushed(WRITERS - 1));
    assert_eq!(last.text, format!("text {}", WRITERS - 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_32_writers_none_replaces_a_newer_digest_whatever_gets_lost() {
    for round in 0..10 {
        let server = S3Server::start();
        let mut random = fastrand::Rng::with_seed(round);
        server.decide(move |call: &Call| match random.u8(..100) {
            // Half the rounds all goes well, so that the writers meet at full speed.
            _ if round % 2 == 0 => Fate::Answered,
            0..5 => Fate::Denied(503, "SlowDown"),
            5..10 => Fate::Lost,
            10..20 if call.method == "PUT" => Fate::AnswerLost,
            20..30 => Fate::Late(Duration::from_millis(5)),
            _ => Fate::Answered,
        });
        let mut config = server.config();
        // So many losses in a row are for other tests.
        config.limits.attempts = 10;
        newer_is_never_replaced_by_older(S3Store::new(&config)).await;
        let writes: Vec<_> = server
            .writes(KEY)
            .into_iter()
            .map(|metadata| metadata["pushedat"].clone())
            .collect();
        assert!(writes.is_sorted_by(|a, b| a < b), "{round}: {writes:?}");
    }
}

/// Has the first `count` requests of `method` for the digest meet `fate`.
fn first(count: usize, method: &'static str, fate: Fate) -> impl FnMut(&Call) -> Fate + Send {
    let mut left = count;
    move |call| {
        if call.method == method && call.key == KEY && left > 0 {
            left -= 1;
            return fate;
        }
        Fate::Answered
    }
}

#[tokio::test]
async fn a_put_that_meets_its_own_earlier_self_is_stored() {
    for lost in 1..=2 {
        for replaces in [false, true] {
            let server = S3Server::start();
            let store = server.store();
            if replaces {
                put(&store, &digest("old", "1"), &Expected::Absent).await;
            }
            let expected = expected(&store).await;
            server.decide(first(lost, "PUT", Fate::AnswerLost));
            let new = digest("new", "2");
            assert!(put(&store, &new, &expected).await.is_stored());
            assert_eq!(store.get(&repo()).await.unwrap(), Some(new));
            // Done once, and once only.
            assert_eq!(server.writes(KEY).len(), 1 + usize::from(replaces));
        }
    }
}

#[tokio::test]
async fn a_renewal_whose_answer_is_lost_is_done_once() {
    for lost in 1..=2 {
        let server = S3Server::start();
        let store = server.store();
        put(&store, &digest("text", "1"), &Expected::Absent).await;
        let Expected::Version(version) = expected(&store).await else {
            panic!("it is stored");
        };
        server.decide(first(lost, "PUT", Fate::AnswerLost));
        let later = digest("text", "2");
        let renewal = store.renew(&repo(), &later.meta, &version).await.unwrap();
        assert!(matches!(renewal, Renewal::Renewed(_)), "{renewal:?}");
        assert_eq!(store.get(&repo()).await.unwrap(), Some(later));
        assert_eq!(
            server.objects()[KEY].content_type.as_deref(),
            Some("text/plain")
        );
    }
}

#[tokio::test]
async fn what_is_no_text_is_not_renewed() {
    let server = S3Server::start();
    let store = server.store();
    put(&store, &digest("text", "1"), &Expected::Absent).await;
    let mut object = server.remove(KEY).unwrap();
    object.content = vec![0xff; 4].into();
    server.insert(KEY, object.clone());
    let Found::Stored { version, .. } = store.head(&repo()).await.unwrap() else {
        panic!("a look sees no difference");
    };
    let later = digest("text", "2").meta;
    let renewal = store.renew(&repo(), &later, &version).await.unwrap();
    assert_eq!(renewal, Renewal::Torn);
    assert_eq!(server.objects()[KEY], object);
}

#[tokio::test]
async fn a_put_that_meets_somebody_elses_is_a_conflict() {
    let server = Arc::new(S3Server::start());
    let store = server.store();
    // The other's digest is the same to the last letter, but for whose it is.
    let same = digest("text", "1");
    let theirs = {
        let scratch = S3Server::start();
        put(&scratch.store(), &same, &Expected::Absent).await;
        scratch.objects()[KEY].clone()
    };
    let weak = Arc::downgrade(&server);
    let mut fate = Some(Fate::Lost);
    server.decide(move |call| {
        if call.method != "PUT" || call.key != KEY {
            return Fate::Answered;
        }
        if let Some(server) = weak.upgrade() {
            server.insert(KEY, theirs.clone());
        }
        fate.take().unwrap_or(Fate::Answered)
    });
    assert_eq!(put(&store, &same, &Expected::Absent).await, Put::Conflict);
}

#[tokio::test]
async fn a_put_is_tried_three_times() {
    for (times, stored) in [(2, true), (3, false)] {
        let server = S3Server::start();
        let store = server.store();
        store.probe().await.unwrap();
        server.forget_calls();
        server.decide(first(times, "PUT", Fate::Denied(503, "SlowDown")));
        let put = store
            .put(&repo(), &digest("x", "1"), &Expected::Absent)
            .await;
        assert_eq!(put.is_ok(), stored, "{put:?}");
        assert_eq!(server.calls("PUT"), 3);
        if let Err(fault) = put {
            assert_eq!(fault.kind, FaultKind::Infra);
            assert!(fault.message.contains("patience"), "{fault}");
        }
    }
}

/// The SDK's own quota of retries is shared by all of a process, and sixty at once were too many.
#[tokio::test]
async fn what_others_had_to_try_again_takes_nothing_from_a_put() {
    let server = S3Server::start();
    let store = Arc::new(server.store());
    store.probe().await.unwrap();
    for round in 0..3 {
        let mut seen = BTreeSet::new();
        server.decide(move |call| match call.method.as_str() {
            "PUT" if seen.insert(call.key.clone()) => Fate::Denied(503, "SlowDown"),
            _ => Fate::Answered,
        });
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..60 {
            let store = Arc::clone(&store);
            tasks.spawn(async move {
                let repo = RepoRef::new("owner", &format!("name-{round}-{n}")).unwrap();
                let text = digest("x", "1");
                store.put(&repo, &text, &Expected::Absent).await
            });
        }
        for put in tasks.join_all().await {
            assert!(put.unwrap().is_stored());
        }
    }
}

#[tokio::test]
async fn too_many_requests_are_tried_again_but_not_asked_about() {
    let server = S3Server::start();
    let store = server.store();
    store.probe().await.unwrap();
    // A word that the SDK does not know.
    let fate = Fate::Denied(429, "TooManyRequests");
    server.decide(first(2, "PUT", fate));
    let stored = put(&store, &digest("x", "1"), &Expected::Absent).await;
    assert!(stored.is_stored());

    server.forget_calls();
    server.decide(move |_| fate);
    let fault = store.head(&repo()).await.unwrap_err();
    assert!(fault.message.contains("patience"), "{fault}");
    assert_eq!((server.calls("HEAD"), server.calls("LIST")), (3, 0));
}

/// R2 answers 429 to those who write one key more than once a second.
#[tokio::test]
async fn no_key_is_written_twice_within_a_second() {
    let server = S3Server::start();
    let mut written: BTreeMap<String, Instant> = BTreeMap::new();
    server.decide(move |call| {
        let now = Instant::now();
        match call.method.as_str() {
            "PUT" => match written.insert(call.key.clone(), now) {
                Some(last) if now - last < Duration::from_secs(1) => {
                    Fate::Denied(429, "TooManyRequests")
                }
                _ => Fate::Answered,
            },
            _ => Fate::Answered,
        }
    });
    let mut config = server.config();
    config.limits = Limits {
        attempts: 1,
        ..Limits::default()
    };
    let store = S3Store::new(&config);
    store.probe().await.unwrap();
    store.probe().await.unwrap();
}

#[tokio::test]
async fn a_probe_leaves_nothing_and_writes_where_others_do() {
    let server = S3Server::start();
    server.decide(|call| match call.key.as_str() {
        "" => Fate::Answered,
        key if key.starts_with("runs/") || key.starts_with("gitingest/.probe-") => Fate::Answered,
        _ => Fate::Denied(403, "AccessDenied"),
    });
    let store = server.store();
    store.probe().await.unwrap();
    assert!(format!("{store:?}").contains("Kept"));
    assert!(server.objects().is_empty(), "{:?}", server.objects());

    // Without the right to remove it is as good, which is said once.
    server.decide(|call| match call.method.as_str() {
        "DELETE" => Fate::Denied(403, "AccessDenied"),
        _ => Fate::Answered,
    });
    let mut log = tempfile::tempfile().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(log.try_clone().unwrap())
        .finish();
    {
        let _logging = tracing::subscriber::set_default(subscriber);
        store.probe().await.unwrap();
        store.probe().await.unwrap();
    }
    let left = server.objects();
    let (small, large): (Vec<_>, Vec<_>) = left.keys().partition(|key| key.starts_with("runs/"));
    assert_eq!(small.len(), 2);
    assert!(large.len() <= 2 && large.iter().all(|key| key.starts_with("gitingest/.probe-")));
    log.rewind().unwrap();
    let said = std::io::read_to_string(log).unwrap();
    assert_eq!(said.matches("stays behind").count(), 1, "{said}");
    assert!(said.contains("rights to list"), "{said}");
}

/// If-Match of what is no longer there: 404 and NoSuchKey at Amazon and here, 412 elsewhere.
#[tokio::test]
async fn a_put_that_meets_nothing_in_place_of_what_it_saw_is_a_conflict() {
    let server = Arc::new(S3Server::start());
    let store = server.store();
    put(&store, &digest("old", "1"), &Expected::Absent).await;
    let expected = expected(&store).await;
    let weak = Arc::downgrade(&server);
    server.decide(move |call| {
        if let ("PUT", Some(server)) = (call.method.as_str(), weak.upgrade()) {
            server.remove(KEY);
        }
        Fate::Answered
    });
    let new = digest("new", "2");
    assert_eq!(put(&store, &new, &expected).await, Put::Conflict);
    assert!(server.objects().is_empty());
}

/// A proxy's own page, say, while the server behind it starts.
#[tokio::test]
async fn a_404_that_does_not_come_from_s3_is_no_conflict() {
    // Of the first PUT of all, and of the digest's own.
    for key in ["runs/probe-", KEY] {
        let server = S3Server::start();
        let store = server.store();
        server.decide(move |call| match call.method.as_str() {
            "PUT" if call.key.starts_with(key) => Fate::Denied(404, ""),
            _ => Fate::Answered,
        });
        let text = digest("x", "1");
        let fault = store.put(&repo(), &text, &Expected::Absent).await;
        let fault = fault.unwrap_err();
        assert_eq!(fault.kind, FaultKind::Infra);
        assert!(fault.message.contains("answered 404"), "{fault}");
        let found_out = format!("{store:?}").contains("Kept");
        assert_eq!(found_out, key == KEY);

        server.decide(|_| Fate::Answered);
        let stored = put(&store, &text, &Expected::Absent).await;
        assert!(stored.is_stored());
        assert!(format!("{store:?}").contains("Kept"));
    }
}

#[tokio::test]
async fn who_waits_for_anothers_look_at_the_conditions_does_not_wait_for_ever() {
    let server = S3Server::start();
    server.decide(|call| match call.method.as_str() {
        "PUT" => Fate::Silence,
        _ => Fate::Answered,
    });
    let mut config = server.config();
    config.limits.operation = Duration::from_secs(1);
    let store = S3Store::new(&config);
    let text = digest("x", "1");
    let started = Instant::now();
    let (store, text, repo) = (&store, &text, &repo());
    let puts = (0..8).map(|_| store.put(repo, text, &Expected::Absent));
    for put in futures::future::join_all(puts).await {
        let fault = put.unwrap_err();
        assert_eq!(fault.kind, FaultKind::Infra);
        assert!(fault.message.contains("within 1 s"), "{fault}");
    }
    assert!(started.elapsed() < Duration::from_secs(4), "not in turn");
}

#[tokio::test]
async fn content_that_breaks_off_or_does_not_end_is_said() {
    let server = S3Server::start();
    let mut config = server.config();
    config.limits.operation = Duration::from_secs(1);
    let store = S3Store::new(&config);
    let document = DocumentKey::Latest;
    let content = [b'x'; 4096];
    store.put_document(&document, &content).await.unwrap();
    let text = digest(&"x".repeat(4096), "1");
    put(&store, &text, &Expected::Absent).await;

    for (fate, parts) in [
        (Fate::Cut(100), ["broke off", "end of file before"]),
        (Fate::Dripped(10), ["did not come to an end", "within 1 s"]),
    ] {
        server.decide(move |call| match call.method.as_str() {
            "GET" => fate,
            _ => Fate::Answered,
        });
        for read in [
            store.document(&document).await.map(drop),
            store.get(&repo()).await.map(drop),
        ] {
            let fault = read.unwrap_err();
            assert_eq!(fault.kind, FaultKind::Infra);
            for part in parts {
                assert!(fault.message.contains(part), "{part:?} in {fault}");
            }
        }
    }
}

#[tokio::test]
async fn a_slow_answer_is_not_waited_for_and_no_answer_is_named() {
    let server = S3Server::start();
    let mut config = server.config();
    config.limits.attempt = Duration::from_secs(2);
    let store = S3Store::new(&config);
    store.probe().await.unwrap();
    // Written, but too late said so: the next attempt meets it.
    server.decide(first(1, "PUT", Fate::Late(Duration::from_secs(60))));
    let stored = put(&store, &digest("x", "1"), &Expected::Absent).await;
    assert!(stored.is_stored());

    config.limits.attempt = Duration::from_millis(300);
    let store = S3Store::new(&config);
    server.decide(|_| Fate::Silence);
    says(&store, &["no answer within"]).await;
}

/// Every operation fails as `infra`, names bucket and place, and says each of `parts`.
async fn says(store: &S3Store, parts: &[&str]) {
    let document = DocumentKey::OfRun {
        run: RunId::new(),
        document: Document::Manifest,
    };
    let version = Expected::Version(Version("0 0".to_owned()));
    let text = digest("x", "1");
    // All at once: some of them take their time to fail.
    let (head, get, put, replace, list, read, write, probe, reachable) = tokio::join!(
        async { store.head(&repo()).await.map(drop) },
        async { store.get(&repo()).await.map(drop) },
        async { store.put(&repo(), &text, &Expected::Absent).await.map(drop) },
        async { store.put(&repo(), &text, &version).await.map(drop) },
        async { store.list("").try_collect::<Vec<_>>().await.map(drop) },
        async { store.document(&document).await.map(drop) },
        store.put_document(&document, b"{}"),
        store.probe(),
        store.reachable(),
    );
    let failed: [(&str, Result<(), Fault>); 9] = [
        ("head", head),
        ("get", get),
        ("put", put),
        ("replace", replace),
        ("list", list),
        ("document", read),
        ("put document", write),
        ("probe", probe),
        ("reachable", reachable),
    ];
    for (what, failed) in failed {
        let Err(fault) = failed else {
            panic!("{what} did well");
        };
        assert_eq!(fault.kind, FaultKind::Infra, "{what}: {fault}");
        for part in parts.iter().chain([&"store s3://", &" at http://"]) {
            assert!(
                fault.message.contains(part),
                "{what}: {part:?} in {:?}",
                fault.message
            );
        }
        assert!(!fault.message.contains(SECRET_KEY), "{what}: {fault}");
    }
    assert!(!format!("{store:?}").contains(SECRET_KEY));
}

fn keys(endpoint: &str, key: &str, secret: &str) -> S3Config {
    let mut config = S3Config::from_env(Some("s3://digests"), |name| {
        let value = match name {
            "AWS_ENDPOINT_URL" => endpoint,
            "AWS_ACCESS_KEY_ID" => key,
            "AWS_SECRET_ACCESS_KEY" => secret,
            _ => return None,
        };
        Some(value.to_owned())
    })
    .unwrap();
    config.limits.first_pause = Duration::from_millis(1);
    config
}

#[tokio::test]
async fn what_is_wrong_with_the_configuration_is_said() {
    let server = S3Server::start();
    let url = server.url();
    let store = S3Store::new(&keys(&url, "another", SECRET_KEY));
    says(&store, &["check AWS_ACCESS_KEY_ID", &url]).await;
    let store = S3Store::new(&keys(&url, s3_server::ACCESS_KEY, "another"));
    says(&store, &["check AWS_SECRET_ACCESS_KEY", &url]).await;
    let store = S3Store::new(&s3_server::config(&url, "no-such-bucket"));
    says(&store, &["there is no bucket no-such-bucket"]).await;
    assert!(server.objects().is_empty());
}

#[tokio::test]
async fn what_the_server_says_is_told_with_the_remedy() {
    let server = S3Server::start();
    let store = server.store();
    for (status, code, remedy) in [
        (403, "RequestTimeTooSkewed", "clock"),
        (
            403,
            "AccessDenied",
            "rights to list, read, write and delete",
        ),
        (400, "ExpiredToken", "AWS_SESSION_TOKEN"),
        (500, "InternalError", "server is at fault"),
    ] {
        server.decide(move |_| Fate::Denied(status, code));
        says(&store, &[remedy]).await;
    }
    server.decide(|_| Fate::Lost);
    says(&store, &["AWS_ENDPOINT_URL"]).await;
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said() {
    // Held, so that nobody else begins to listen there.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    let store = S3Store::new(&s3_server::config(&url, "digests"));
    says(&store, &["connection refused", "AWS_ENDPOINT_URL", &url]).await;
}

#[tokio::test]
async fn a_host_that_has_no_address_is_said() {
    let mut config = s3_server::config("http://s3.invalid", "digests");
    // A resolver may well take its time to say no.
    config.limits.connect = Duration::from_secs(20);
    let fault = S3Store::new(&config).head(&repo()).await.unwrap_err();
    assert!(fault.message.contains("cannot be resolved"), "{fault}");
}

#[tokio::test]
async fn a_server_that_is_no_s3_server_is_said() {
    let server = HttpServer::start(|_| Response::new(404, "<html>not here</html>"));
    let store = S3Store::new(&s3_server::config(&server.url(), "digests"));
    for failed in [
        store.head(&repo()).await.map(drop),
        store.get(&repo()).await.map(drop),
        store.probe().await,
        store
            .put(&repo(), &digest("x", "1"), &Expected::Absent)
            .await
            .map(drop),
    ] {
        let fault = failed.unwrap_err();
        assert!(fault.message.contains("AWS_ENDPOINT_URL"), "{fault}");
    }
}

#[tokio::test]
async fn a_server_that_ignores_conditions_is_found_out_once() {
    let server = S3Server::start();
    server.ignore_conditions();
    let store = server.store();
    assert!(
        put(&store, &digest("one", "1"), &Expected::Absent)
            .await
            .is_stored()
    );
    assert_eq!(
        put(&store, &digest("two", "2"), &Expected::Absent).await,
        Put::Conflict
    );
    let of_one = expected(&store).await;
    assert!(put(&store, &digest("two", "2"), &of_one).await.is_stored());
    assert_eq!(
        put(&store, &digest("three", "3"), &of_one).await,
        Put::Conflict
    );
    store.probe().await.unwrap();
    // Four to find out, two for the digest, two for the probe.
    assert_eq!(server.calls("PUT"), 8);
    let keys: Vec<_> = server.objects().into_keys().collect();
    assert_eq!(keys, [KEY], "nothing else is left");
    assert!(format!("{store:?}").contains("Ignored"));
}

#[tokio::test]
async fn a_server_that_refuses_conditions_is_as_good_as_one_that_ignores_them() {
    let server = S3Server::start();
    let mut first = true;
    server.decide(move |call| {
        if call.method == "PUT" && std::mem::take(&mut first) {
            return Fate::Denied(501, "NotImplemented");
        }
        Fate::Answered
    });
    let store = server.store();
    assert!(
        put(&store, &digest("one", "1"), &Expected::Absent)
            .await
            .is_stored()
    );
    assert!(format!("{store:?}").contains("Ignored"));
}

#[tokio::test]
async fn an_object_is_as_its_readers_know_it() {
    let server = S3Server::start();
    let store = server.store();
    let digest = digest("text", "2026-01-02T03:04:05Z").with_url("https://git.example/ö b");
    put(&store, &digest, &Expected::Absent).await;
    let object = server.objects().remove(KEY).unwrap();
    assert_eq!(object.content_type.as_deref(), Some("text/plain"));
    assert_eq!(object.content, "text");
    for (name, value) in [
        ("pushedat", "2026-01-02T03:04:05Z"),
        ("url", "https://git.example/%C3%B6%20b"),
        ("processedat", "2026-01-01T00:00:00Z"),
        ("commit", "0123456789012345678901234567890123456789"),
        ("format", DIGEST_FORMAT),
        ("truncated", "false"),
        ("bytes", "4"),
        ("run", digest.meta.run.as_str()),
    ] {
        assert_eq!(object.metadata[name], value, "{name}");
    }
    assert_eq!(store.get(&repo()).await.unwrap(), Some(digest));
}

/// Somebody else's object.
fn object(content: &str, metadata: &[(&str, &str)]) -> StoredObject {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    StoredObject {
        content: content.to_owned().into(),
        metadata: metadata.iter().map(owned).collect::<BTreeMap<_, _>>(),
        content_type: None,
        modified: SystemTime::now(),
    }
}

#[tokio::test]
async fn strange_objects_are_unreadable_and_replaced() {
    const PUSHED: &str = "2026-01-02T03:04:05Z";
    for (object, why) in [
        (object("", &[]), "no pushedat"),
        (object("text", &[]), "no pushedat"),
        (object("text", &[("pushedat", "")]), "predecessor"),
        (object("text", &[("pushedat", "a b")]), "pushedAt"),
        (
            object(
                "te",
                &[("pushedat", PUSHED), ("format", "x"), ("bytes", "4")],
            ),
            "2 bytes",
        ),
    ] {
        let server = S3Server::start();
        let store = server.store();
        server.insert(KEY, object);
        match store.head(&repo()).await.unwrap() {
            Found::Unreadable { why: said, .. } => assert!(said.contains(why), "{said}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(store.get(&repo()).await.unwrap(), None);
        let digest = digest("text", PUSHED);
        assert_eq!(put(&store, &digest, &Expected::Absent).await, Put::Conflict);
        let expected = expected(&store).await;
        assert!(put(&store, &digest, &expected).await.is_stored());
        assert_eq!(store.get(&repo()).await.unwrap(), Some(digest));
    }
}

#[tokio::test]
async fn the_predecessors_digest_is_one_of_no_format() {
    let server = S3Server::start();
    let metadata = [
        ("pushedat", "2026-01-02T03:04:05Z"),
        ("url", "https://github.com/a/b"),
        ("processedat", "2026-01-03T00:00:00Z"),
    ];
    server.insert(KEY, object("text", &metadata));
    match server.store().head(&repo()).await.unwrap() {
        Found::Stored { meta, .. } => {
            assert_eq!(meta.pushed_at, PushedAt::new(metadata[0].1).unwrap());
            assert_eq!((meta.format.as_str(), meta.bytes), ("", 4));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_listing_goes_on_over_many_pages_and_past_other_things() {
    let server = S3Server::start();
    for i in 0..2500 {
        let key = format!("gitingest/owner/name-{i}/summary.txt");
        server.insert(&key, object("x", &[]));
    }
    for key in [
        "gitingest/owner/name-0/summary.txt.bak",
        "gitingest/owner/name-0/more/summary.txt",
        "gitingest/owner/summary.txt",
        "gitingest/-/-/summary.txt",
        "gitingest/owner/name.git/summary.txt",
        "other/gitingest/owner/name/summary.txt",
    ] {
        server.insert(key, object("x", &[]));
    }
    let listed: Vec<_> = server.store().list("").try_collect().await.unwrap();
    assert_eq!(listed.len(), 2500);
    assert_eq!(server.calls("LIST"), 3);
}

#[tokio::test]
async fn a_lane_goes_on_over_its_pages_and_fails_with_any_of_them() {
    let server = S3Server::start();
    for i in 0..1500 {
        for owner in ["a", "ab", "b"] {
            let key = format!("gitingest/{owner}/name-{i}/summary.txt");
            server.insert(&key, object("x", &[]));
        }
    }
    let store = server.store();
    let lane = async || store.list("ab/").try_collect::<Vec<_>>().await;
    let listed = lane().await.unwrap();
    assert!(listed.iter().all(|listed| listed.repo.owner() == "ab"));
    assert_eq!((listed.len(), server.calls("LIST")), (1500, 2));

    server.decide(|call| {
        if call.query.contains("continuation-token") {
            return Fate::Denied(503, "SlowDown");
        }
        Fate::Answered
    });
    let fault = lane().await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Infra);
    assert!(
        fault.message.contains("cannot list gitingest/ab/"),
        "{fault}"
    );
}

/// What `list` makes of pages of one key each, the first of which ends with `more`.
async fn listed_in_two_pages(more: &'static str) -> Result<usize, Fault> {
    let server = HttpServer::start(move |request| {
        let (name, more) = if request.query.contains("continuation-token") {
            ("second", "")
        } else {
            ("first", more)
        };
        let page = format!(
            "<ListBucketResult><Contents><Key>gitingest/owner/{name}/summary.txt</Key>\
             <ETag>\"0\"</ETag><Size>1</Size></Contents>{more}</ListBucketResult>"
        );
        Response::new(200, page).header("content-type", "application/xml")
    });
    let store = S3Store::new(&s3_server::config(&server.url(), "digests"));
    let listed: Vec<_> = store.list("").try_collect().await?;
    Ok(listed.len())
}

#[tokio::test]
async fn a_listing_that_does_not_say_where_it_goes_on_is_not_taken_for_whole() {
    const TOKEN: &str = "<NextContinuationToken>t</NextContinuationToken>";
    const CUT: &str = "<IsTruncated>true</IsTruncated>";
    assert_eq!(listed_in_two_pages("").await.unwrap(), 1);
    assert_eq!(listed_in_two_pages(TOKEN).await.unwrap(), 2);
    let fault = listed_in_two_pages(CUT).await.unwrap_err();
    assert_eq!(fault.kind, FaultKind::Infra);
    assert!(fault.message.contains("without its last page"), "{fault}");
}

/// A host that swallows what comes: its queue of connections is full.
#[tokio::test]
async fn a_server_that_lets_nobody_in_is_said_with_its_own_limit() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    let connect = || tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address));
    while let Ok(connected) = connect().await {
        waiting.push(connected.unwrap());
    }
    let mut config = s3_server::config(&format!("http://{address}"), "digests");
    config.limits.connect = Duration::from_millis(250);
    let fault = S3Store::new(&config).head(&repo()).await.unwrap_err();
    assert!(
        fault.message.contains("no connection within 0.25 s"),
        "{fault}"
    );
    assert!(fault.message.contains("AWS_ENDPOINT_URL"), "{fault}");
}
