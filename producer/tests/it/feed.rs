//! The feed over HTTP and from files.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use common::exit::{self, ExitError};
use producer::cache::CacheConfig;
use producer::feed::fetch::{DEFAULT_FEED, FeedConfig};
use producer::feed::filter::FilterConfig;
use producer::feed::{self, Feed, LocalPaths};
use testing::http_server::{HttpServer, Request, Response};

use crate::logs::{self, Logs};

/// Every configuration of this crate on one command line, as the binary will have them.
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    feed: FeedConfig,
    #[command(flatten)]
    filter: FilterConfig,
    #[command(flatten)]
    cache: CacheConfig,
}

/// The configuration for these arguments, with no pauses between attempts.
fn config(arguments: &[&str]) -> FeedConfig {
    let mut config = Cli::try_parse_from([&["producer"], arguments].concat())
        .unwrap()
        .feed;
    config.retry.pauses.fill(Duration::ZERO);
    config
}

async fn load(arguments: &[&str]) -> Result<Feed, ExitError> {
    logs::prepare();
    feed::load(&config(arguments), LocalPaths::Refused).await
}

fn entry(name: &str, url: &str) -> String {
    format!(
        r#"{{"owner":"example-org","name":"{name}","description":"An example","url":"{url}",
            "archived":false,"license":{{"key":"mit","name":"MIT License","spdxId":"MIT"}},
            "stargazersCount":3,"language":null,"forksCount":0,"openIssuesCount":1,
            "createdAt":"2020-01-01T00:00:00Z","updatedAt":"2026-01-01T00:00:00Z",
            "pushedAt":"2026-01-01T00:00:00Z"}}"#
    )
}

fn feed_of(names: &[&str]) -> String {
    let entries: Vec<_> = names
        .iter()
        .map(|name| entry(name, &format!("https://github.com/example-org/{name}")))
        .collect();
    format!("[{}]", entries.join(","))
}

fn names(feed: &Feed) -> Vec<&str> {
    let names = feed.repositories.iter().map(|entry| entry.repo.name());
    names.collect()
}

#[tokio::test]
async fn a_feed_comes_over_http() {
    let server = HttpServer::start(|request: &Request| match request.path.as_str() {
        "/moved" => Response::new(301, "").header("location", "/feed/repos.json"),
        _ => Response::new(200, feed_of(&["a", "b"])),
    });
    let url = format!("{}/moved", server.url());
    let feed = load(&["--feed", &url, "--contact", "https://example.org/us"])
        .await
        .unwrap();
    assert_eq!(names(&feed), ["a", "b"]);
    assert_eq!(feed.origin, url);
    assert_eq!(feed.sha256.len(), 64);

    let requests = server.requests();
    assert_eq!(requests[1].path, "/feed/repos.json");
    let version = env!("CARGO_PKG_VERSION");
    for request in requests {
        assert_eq!(request.header("accept"), Some("application/json"));
        assert_eq!(
            request.header("user-agent").unwrap(),
            format!("repofleet/{version} (+https://example.org/us)")
        );
    }
}

#[tokio::test]
async fn what_may_pass_is_tried_three_times_and_logged() {
    type Answer = fn() -> Response;
    let faults: [(&str, Answer); 7] = [
        ("500 Internal Server Error", || Response::new(500, "")),
        ("503 Service Unavailable", || Response::new(503, "")),
        ("408 Request Timeout", || Response::new(408, "")),
        ("429 Too Many Requests", || Response::new(429, "")),
        ("Connection reset", Response::reset),
        ("timed out", Response::hang),
        ("end of file before message length reached", || {
            Response::new(200, feed_of(&["a"])).cut(20)
        }),
    ];
    for (why, fault) in faults {
        let logs = Logs::collect();
        let server = HttpServer::start(move |_| fault());
        let error = load(&["--feed", &server.url(), "--feed-timeout", "0.3"])
            .await
            .unwrap_err();
        assert_eq!(error.code, exit::UNAVAILABLE, "{error}");
        let beginning = format!(
            "Failed to fetch repos.json after 3 attempts: {}/: ",
            server.url()
        );
        assert!(error.message.starts_with(&beginning), "{error}");
        assert!(
            error.message.to_lowercase().contains(&why.to_lowercase()),
            "{why}: {error}"
        );
        assert_eq!(server.request_count(), 3);
        for attempt in ["(attempt 1 of 3)", "(attempt 2 of 3)"] {
            assert_eq!(logs.lines(attempt).len(), 1, "{}", logs.text());
        }
    }
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_said() {
    let url = "https://feed.invalid/repos.json";
    let error = load(&["--feed", url]).await.unwrap_err();
    assert_eq!(error.code, exit::UNAVAILABLE, "{error}");
    let said = format!("{url}: cannot resolve feed.invalid: ");
    assert!(error.message.contains(&said), "{error}");
}

#[tokio::test]
async fn nobody_there_is_tried_three_times() {
    let url = HttpServer::start(|_| Response::hang()).url();
    let logs = Logs::collect();
    let error = load(&["--feed", &url]).await.unwrap_err();
    assert_eq!(error.code, exit::UNAVAILABLE);
    assert!(error.message.contains("refused"), "{error}");
    assert_eq!(logs.lines("trying again").len(), 2);
}

#[tokio::test]
async fn the_third_attempt_may_succeed() {
    let answers = std::sync::atomic::AtomicUsize::new(0);
    let server = HttpServer::start(move |_| {
        match answers.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => Response::new(502, ""),
            1 => Response::new(200, feed_of(&["a"])).cut(7),
            _ => Response::new(200, feed_of(&["a"])),
        }
    });
    let feed = load(&["--feed", &server.url()]).await.unwrap();
    assert_eq!(names(&feed), ["a"]);
}

#[tokio::test]
async fn a_final_answer_is_not_asked_for_again() {
    for status in [400, 401, 403, 404, 410, 304] {
        let server = HttpServer::start(move |_| Response::new(status, "no"));
        let error = load(&["--feed", &server.url()]).await.unwrap_err();
        assert_eq!(error.code, exit::UNAVAILABLE);
        assert!(error.message.contains(&status.to_string()), "{error}");
        assert_eq!(server.request_count(), 1, "{error}");
    }
}

#[tokio::test]
async fn redirects_do_not_lead_to_plain_http_or_in_circles() {
    let server = HttpServer::start(|request: &Request| {
        let to = match request.path.as_str() {
            "/circle" => "/circle",
            _ => "http://feed.example/repos.json",
        };
        Response::new(302, "").header("location", to)
    });
    for (path, why, requests) in [
        ("/plain", "redirected to plain http", 1),
        ("/circle", "more than 10 redirects", 12),
    ] {
        let url = format!("{}{path}", server.url());
        let error = load(&["--feed", &url]).await.unwrap_err();
        assert_eq!(error.code, exit::UNAVAILABLE);
        assert!(error.message.contains(why), "{error}");
        assert_eq!(server.request_count(), requests);
    }
    let error = load(&["--feed", "http://feed.example/repos.json"])
        .await
        .unwrap_err();
    assert_eq!(error.code, exit::USAGE);
    assert!(error.message.contains("--allow-http-feed"), "{error}");
}

/// A query may hold a secret, which is none of the next server's business.
#[tokio::test]
async fn a_redirect_tells_nobody_where_it_came_from() {
    let feed = feed_of(&["a"]);
    let server = HttpServer::start(move |request: &Request| match request.path.as_str() {
        "/there" if request.header("referer").is_none() => Response::new(200, feed.clone()),
        "/there" => Response::new(400, "a Referer"),
        _ => Response::new(302, "").header("location", "/there"),
    });
    let url = format!("{}/here?token=T", server.url());
    load(&["--feed", &url]).await.unwrap();
}

#[tokio::test]
async fn a_feed_over_the_cap_is_left_where_it_is() {
    let feed = feed_of(&["a", "b"]);
    let length = feed.len();
    // Told beforehand; not told and without end; told, and not even believable.
    let server = HttpServer::start(move |request: &Request| match request.path.as_str() {
        "/told" => Response::new(200, feed.clone()),
        "/endless" => Response::endless("[", "{},".repeat(10_000)),
        _ => Response::endless("[", "{},".repeat(10_000)).header("content-length", "99999999999"),
    });
    for (path, cap) in [
        ("/told", length - 1),
        ("/endless", 1 << 20),
        ("/told-more", 1 << 20),
    ] {
        let url = format!("{}{path}", server.url());
        let before = server.request_count();
        let error = load(&["--feed", &url, "--max-feed-bytes", &cap.to_string()])
            .await
            .unwrap_err();
        assert_eq!(error.code, exit::BAD_FEED, "{error}");
        assert!(
            error.message.contains(&format!("larger than {cap} bytes"))
                && error.message.contains(&url),
            "{error}"
        );
        assert_eq!(server.request_count(), before + 1);
    }
    let url = format!("{}/told", server.url());
    let exactly = load(&["--feed", &url, "--max-feed-bytes", &length.to_string()]).await;
    assert_eq!(names(&exactly.unwrap()), ["a", "b"]);
}

#[tokio::test]
async fn what_is_no_feed_is_named_with_what_was_found() {
    let server = HttpServer::start(|request: &Request| {
        let body = match request.path.as_str() {
            "/page" => "<!DOCTYPE html><title>Sign in</title>".to_owned(),
            "/object" => r#"{"message":"API rate limit exceeded"}"#.to_owned(),
            "/nothing" => String::new(),
            _ => feed_of(&["a", "b"])[..700].to_owned(),
        };
        let response = Response::new(200, body.clone());
        if request.path == "/told-less" {
            let body = futures::stream::iter([Ok(body.into())]);
            return Response::streamed(200, Box::pin(body)).header("content-length", "9");
        }
        response
    });
    for (path, found) in [
        (
            "/page",
            r#"found something else: "<!DOCTYPE html><title>Sign in"#,
        ),
        (
            "/object",
            r#"found a JSON object: "{\"message\":\"API rate limit"#,
        ),
        ("/nothing", "found nothing"),
        ("/truncated", "after 1 entry it ends in the middle"),
        ("/told-less", "after 0 entries it ends in the middle"),
    ] {
        let url = format!("{}{path}", server.url());
        let error = load(&["--feed", &url]).await.unwrap_err();
        assert_eq!(error.code, exit::BAD_FEED);
        assert!(
            error.message.contains(found) && error.message.contains(&url),
            "{error}"
        );
    }
    assert_eq!(server.request_count(), 5, "asking again would not help");
}

#[tokio::test]
async fn no_secret_of_a_feed_is_told() {
    let server = HttpServer::start(|request: &Request| match request.path.as_str() {
        "/feed" => Response::new(
            200,
            format!(
                "[{},{}]",
                entry("a", "https://me:s3cret@github.com/example-org/a"),
                entry("b", "https://github.com/example-org/b")
            ),
        ),
        "/bad" => Response::new(200, "no"),
        "/gone" => Response::new(404, ""),
        _ => Response::reset(),
    });
    let logs = Logs::collect();
    let url = |path: &str| format!("http://me:s3cret@{}{path}?token=s3cret", server.authority());
    let feed = load(&["--feed", &url("/feed")]).await.unwrap();
    assert_eq!(names(&feed), ["b"]);
    assert!(!format!("{feed:?}").contains("s3cret"), "{feed:?}");
    for path in ["/bad", "/gone", "/reset"] {
        let error = load(&["--feed", &url(path)]).await.unwrap_err();
        assert!(!error.message.contains("s3cret"), "{error}");
        assert!(error.message.contains(path), "{error}");
    }
    let authorization = server.requests()[0]
        .header("authorization")
        .map(str::to_owned);
    assert!(authorization.unwrap().starts_with("Basic "));
    assert!(logs.text().contains("trying again"));
    assert!(!logs.text().contains("s3cret"), "{}", logs.text());
}

#[tokio::test]
async fn a_file_may_name_repositories_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    fs::create_dir_all(root.join("sample")).unwrap();
    let path = root.join("sample/repos.json");
    fs::write(
        &path,
        format!("[{},{}]", entry("own", "../.."), entry("absent", "no/such")),
    )
    .unwrap();
    let feed = load(&["--feed", path.to_str().unwrap()]).await.unwrap();
    let urls: Vec<_> = feed.repositories.iter().map(|entry| &entry.url).collect();
    let shown = |path: &Path| path.to_str().unwrap().to_owned();
    assert_eq!(
        urls,
        [
            &shown(root.parent().unwrap()),
            &shown(&root.join("sample/no/such"))
        ]
    );

    let text = fs::read_to_string(&path).unwrap();
    let server = HttpServer::start(move |_| Response::new(200, text.clone()));
    let error = load(&["--feed", &server.url()]).await.unwrap_err();
    assert_eq!(error.code, exit::BAD_FEED);
    assert!(error.message.contains("entry 1: url is"), "{error}");
    let feed = load(&["--feed", &server.url(), "--allow-empty-feed"])
        .await
        .unwrap();
    assert_eq!(names(&feed), [""; 0]);
    for entry in feed.invalid {
        assert!(entry.reason.contains("only a local feed"), "{entry:?}");
        assert_eq!(entry.repo.unwrap().owner(), "example-org");
    }
}

/// Each file in `tests/feeds` is what that source answers, shortened by hand.
#[tokio::test]
async fn feeds_are_read_as_people_have_them() {
    const WHITEHALL: &str =
        "alphagov/whitehall https://github.com/alphagov/whitehall 2026-11-22T10:00:00Z";
    for (file, repositories, invalid, recognised) in [
        (
            "github-api.json",
            &[
                WHITEHALL,
                "alphagov/empty https://github.com/alphagov/empty 2026-11-20T08:00:00Z",
            ][..],
            &[][..],
            "2 arrays, fields of GitHub's API",
        ),
        (
            "github-search.json",
            &[WHITEHALL],
            &[],
            "the list `items` of an object, fields of GitHub's API",
        ),
        (
            "gh-repo-list.json",
            &[WHITEHALL],
            &[],
            "fields of `gh repo list`",
        ),
        (
            "gh-repo-list.ndjson",
            &[
                WHITEHALL,
                "nhsx/site https://github.com/nhsx/site 2026-11-23T10:00:00Z",
            ],
            &[],
            "an entry a line, fields of `gh repo list`",
        ),
        (
            "gitlab.json",
            &[
                "ons.data/pipelines https://gitlab.com/ons/data/pipelines.git 2026-11-22T10:00:00.000Z",
                "ons/site https://gitlab.com/ons/site 2026-11-22T10:00:00.000Z",
            ],
            &["owner \"ons.gov\" has a dot, which here separates nested groups"],
            "fields of GitLab",
        ),
        (
            "gitea.json",
            &["city/maps https://codeberg.org/city/maps 2026-11-22T11:00:00+01:00"],
            &[],
            "the list `data` of an object, fields of Gitea or Forgejo",
        ),
        (
            "ecosystems.json",
            &["alphagov/whitehall https://github.com/alphagov/whitehall 2026-11-22T10:00:00.000Z"],
            &[],
            "fields of GitHub's API",
        ),
        (
            "code.json",
            &["18F/site https://github.com/18F/site.git 2026-11-22T00:00:00Z"],
            &[
                "pushedAt or pushed_at is missing",
                "owner or org is missing",
            ],
            "the list `releases` of an object, fields of code.json",
        ),
    ] {
        let path = format!("{}/tests/feeds/{file}", env!("CARGO_MANIFEST_DIR"));
        let feed = load(&["--feed", &path]).await.unwrap();
        let found = feed.repositories.iter();
        let found: Vec<_> = found
            .map(|entry| format!("{} {} {}", entry.repo, entry.url, entry.pushed_at))
            .collect();
        assert_eq!(found, repositories, "{file}");
        let reasons: Vec<_> = feed.invalid.iter().map(|entry| &entry.reason).collect();
        assert_eq!(reasons, invalid, "{file}");
        assert_eq!(feed.recognised(), recognised, "{file}");
    }
}

#[tokio::test]
async fn an_odd_entry_costs_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("repos.json");
    let odd = r#"{"owner":"example-org","name":"odd","stars":NaN}"#;
    let [a, b] = ["a", "b"].map(|name| entry(name, &format!("https://github.com/x/{name}")));
    fs::write(&path, format!("[{a},{odd},{b}]")).unwrap();
    let feed = load(&["--feed", path.to_str().unwrap()]).await.unwrap();
    assert_eq!(names(&feed), ["a", "b"]);
    let [invalid] = feed.invalid.as_slice() else {
        panic!("{:?}", feed.invalid)
    };
    assert_eq!(invalid.index, 1);
    assert!(invalid.reason.contains("expected value"), "{invalid:?}");
}

#[tokio::test]
async fn a_compressed_feed_counts_as_long_as_it_is() {
    let text = feed_of(&["a", "b"]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(text.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    let sent = gzip.clone();
    let server = HttpServer::start(move |_| Response::new(200, sent.clone()));
    let url = server.url();
    let limit = |bytes: usize| bytes.to_string();
    let whole = load(&["--feed", &url, "--max-feed-bytes", &limit(text.len())]).await;
    let whole = whole.unwrap();
    assert_eq!(names(&whole), ["a", "b"]);
    assert_eq!(whole.recognised(), "gzip");
    assert_eq!(
        whole.sha256,
        common::text::sha256(&gzip),
        "of what was sent"
    );
    let over = load(&["--feed", &url, "--max-feed-bytes", &limit(text.len() - 1)]).await;
    assert_eq!(over.unwrap_err().code, exit::BAD_FEED);
}

/// As `gh repo list … | producer run --feed -` and `--feed <(…)` do.
#[test]
fn a_feed_comes_through_a_pipe() {
    for feed in ["-", "/dev/stdin", "/dev/fd/0"] {
        let mut producer = std::process::Command::new(env!("CARGO_BIN_EXE_producer"))
            .args(["run", "--dry-run", "--log", "human", "--feed", feed])
            .args(["--store", "/nonexistent/store"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = producer.stdin.take().unwrap();
        stdin.write_all(feed_of(&["a", "b"]).as_bytes()).unwrap();
        drop(stdin);
        let ended = producer.wait_with_output().unwrap();
        let said = String::from_utf8(ended.stdout).unwrap();
        assert!(said.contains(": 2 repositories\n"), "{feed}: {said}");
    }
}

#[tokio::test]
async fn files_fail_like_servers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("repos.json");
    let feed = path.to_str().unwrap();
    for (content, cap, code) in [
        (None, "100", exit::UNAVAILABLE),
        (Some("no"), "100", exit::BAD_FEED),
        (Some("[{},{},{}]"), "9", exit::BAD_FEED),
        (Some("[{},{}"), "100", exit::BAD_FEED),
    ] {
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let error = load(&["--feed", feed, "--max-feed-bytes", cap])
            .await
            .unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(feed), "{error}");
    }
    let error = load(&["--feed", folder.path().to_str().unwrap()])
        .await
        .unwrap_err();
    assert_eq!(error.code, exit::UNAVAILABLE);
}

#[tokio::test]
async fn an_empty_feed_is_an_error_or_a_warning() {
    let logs = Logs::collect();
    let server = HttpServer::start(|_| Response::new(200, " [ ]\n"));
    let error = load(&["--feed", &server.url()]).await.unwrap_err();
    assert_eq!(error.code, exit::BAD_FEED);
    assert!(error.message.contains("is empty"), "{error}");
    assert_eq!(logs.lines("WARN").len(), 0, "{}", logs.text());

    let feed = load(&["--feed", &server.url(), "--allow-empty-feed"])
        .await
        .unwrap();
    assert_eq!((feed.repositories.len(), feed.invalid.len()), (0, 0));
    assert_eq!(logs.lines("WARN").len(), 1, "{}", logs.text());
    assert_eq!(logs.lines("is empty").len(), 1);
}

#[test]
fn the_command_line_is_sound() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
    let cli = Cli::try_parse_from(["producer"]).unwrap();
    assert_eq!(cli.feed.feed.to_string(), DEFAULT_FEED);
    assert_eq!(cli.feed.max_feed_bytes, 256 * 1024 * 1024);
    assert_eq!(cli.feed.feed_timeout, Duration::from_secs(30));
    assert_eq!(cli.feed.retry.pauses.len(), 2);
    let repeated = ["producer", "--only", "a/*", "--only", "b/* c/*"];
    assert_eq!(Cli::try_parse_from(repeated).unwrap().filter.only.len(), 2);

    for (arguments, named) in [
        (["--only", "alpha["], "alpha["),
        (["--exclude", "alphagov"], "alphagov/*"),
        (["--feed", "ftp://h/repos.json"], "ftp"),
        (["--feed-timeout", "-1"], "-1"),
        (["--limit", "many"], "many"),
        (["--cache", "api"], "--cache-url"),
        (["--cache-url", "redis://h"], "redis"),
    ] {
        let error = Cli::try_parse_from([&["producer"], &arguments[..]].concat()).unwrap_err();
        assert_eq!(error.exit_code(), i32::from(exit::USAGE));
        assert!(error.to_string().contains(named), "{error}");
    }
}
