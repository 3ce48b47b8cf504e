//! Fetching: every failure has its class, and affects no other repository.

use std::path::Path;
use std::time::Duration;

use common::fault::{Fault, FaultKind};
use common::telemetry::registry::Expose;
use common::text::printable;
use futures::future::join_all;
use testing::git_server::{
    Dialect, Fault as Trouble, GITHUB_LIMIT, GitServer, Kind, Place, Rule, authorization,
};
use testing::http_server::{HttpServer, Response};
use testing::repositories::{Builder, empty};
use time::OffsetDateTime;
use worker::fetch::policy::FetchMode;
use worker::metrics::Metrics;
use worker::slot::SlotResult;

use crate::fixture::{Fixture, TEXT, git, good, noise, work, work_unless_at};

/// Both ways to fetch.
const MODES: [FetchMode; 2] = [FetchMode::Auto, FetchMode::Git2];

use FaultKind::{Gone, Refused, Throttled, TooLarge, Transient};

impl Fixture {
    /// Fetches `owner/bad` with only `trouble`; asserts a fault of class `kind` and returns it.
    async fn fault_of(&self, trouble: impl Into<Rule>, kind: FaultKind) -> Fault {
        let trouble = trouble.into();
        self.server.clear_faults();
        self.server.fault("owner/bad", trouble.clone());
        let fault = self.fault().await;
        assert_eq!(fault.kind, kind, "{trouble:?}: {fault}");
        fault
    }
}

#[tokio::test]
async fn a_repository_is_fetched_shallowly_over_one_connection() {
    let fixture = Fixture::new();
    let path = fixture.root.path().join("owner/good.git");
    let first = git(&path, ["rev-parse", "HEAD"]);
    // A second commit on top, and a tag: neither history nor tags are fetched.
    let second = git(
        &path,
        [
            "-c",
            "user.name=x",
            "-c",
            "user.email=x",
            "commit-tree",
            "-m",
            "2",
            "-p",
            &first,
            "HEAD^{tree}",
        ],
    );
    git(&path, ["update-ref", "refs/heads/main", &second]);
    git(&path, ["tag", "v1", &first]);

    let made = work(&fixture.slots(), &fixture.url("good")).await.unwrap();
    assert_eq!(made.facts.commit, Some(second));
    assert_eq!(made.facts.files, 2);
    assert!(made.tree.contains("README.md"), "{}", made.tree);
    assert!(made.content.contains(TEXT), "{}", made.content);
    let stats = fixture.server.repo_stats("owner/good");
    assert_eq!(made.fetched_bytes, stats.bytes_sent);
    assert_eq!(
        (stats.info_refs, stats.upload_packs, stats.packs),
        (1, 2, 1)
    );
    assert_eq!(fixture.server.connections(), 1);
    assert!(stats.authorizations.is_empty());
    assert!(
        stats
            .user_agents
            .iter()
            .all(|agent| agent.starts_with("git/") && agent.contains("repofleet")),
        "{:?}",
        stats.user_agents
    );
    fixture.assert_nothing_left();
}

#[tokio::test]
async fn nothing_is_asked_for_but_the_refs_if_head_is_the_known_commit() {
    let mut fixture = Fixture::new();
    fixture.policy.local = true;
    let path = fixture.root.path().join("owner/good.git");
    let head = git(&path, ["rev-parse", "HEAD"]);
    let tree = git(&path, ["rev-parse", "HEAD^{tree}"]);
    empty(fixture.root.path(), "owner", "empty");
    let slots = fixture.slots();

    let result = work_unless_at(&slots, &fixture.url("good"), Some(&head)).await;
    let Ok(SlotResult::Unmoved { fetched_bytes, .. }) = result else {
        panic!("{result:?}");
    };
    let stats = fixture.server.repo_stats("owner/good");
    // The POST asks for HEAD alone.
    assert_eq!((stats.info_refs, stats.upload_packs), (1, 1));
    assert_eq!(fetched_bytes, stats.bytes_sent);

    // Another commit, and one that is somewhere else in the repository.
    for known in ["0".repeat(40), tree] {
        let result = work_unless_at(&slots, &fixture.url("good"), Some(&known)).await;
        let Ok(SlotResult::Digest(made)) = result else {
            panic!("{result:?}");
        };
        assert_eq!(made.facts.commit.as_ref(), Some(&head));
    }
    let stats = fixture.server.repo_stats("owner/good");
    assert_eq!((stats.info_refs, stats.packs), (3, 2));
    assert!(stats.upload_packs > 0);

    let result = work_unless_at(&slots, &fixture.url("empty"), Some(&head)).await;
    assert!(matches!(result, Ok(SlotResult::Digest(_))), "{result:?}");
    let local = work_unless_at(&slots, path.to_str().unwrap(), Some(&head)).await;
    let local = local.unwrap();
    assert!(
        matches!(
            local,
            SlotResult::Unmoved {
                fetched_bytes: 0,
                ..
            }
        ),
        "{local:?}"
    );
    drop(slots);
    fixture.assert_nothing_left();
}

#[tokio::test]
async fn heads_of_every_kind() {
    let mut fixture = Fixture::new();
    let root = fixture.root.path();
    empty(root, "owner", "empty");
    let detached = good(root, "detached");
    let commit = git(&detached, ["rev-parse", "main"]);
    git(&detached, ["update-ref", "--no-deref", "HEAD", &commit]);
    let elsewhere = good(root, "elsewhere");
    git(&elsewhere, ["branch", "-m", "main", "odd/branch"]);

    for mode in MODES {
        fixture.policy.mode = mode;
        let made = fixture.make("empty").await.unwrap();
        assert_eq!((made.facts.commit, made.facts.files), (None, 0));
        for name in ["detached", "elsewhere"] {
            let made = fixture.make(name).await.unwrap();
            assert_eq!(made.facts.commit.as_ref(), Some(&commit), "{name}");
            assert!(made.content.contains(TEXT), "{name}");
        }
    }
}

/// Not an empty one, from wherever it is read.
#[tokio::test]
async fn a_head_that_names_no_branch_is_told_if_there_are_others() {
    let mut fixture = Fixture::new();
    fixture.policy.local = true;
    let dangling = good(fixture.root.path(), "dangling");
    git(&dangling, ["symbolic-ref", "HEAD", "refs/heads/nowhere"]);
    let told = |branch: &str, there: &str| {
        format!(
            "HEAD names {branch}, which does not exist; there {there}; make an existing branch the default"
        )
    };
    let remote = fixture.url("dangling");
    for mode in MODES {
        fixture.policy.mode = mode;
        for url in [remote.as_str(), dangling.to_str().unwrap()] {
            let fault = fixture.make_url(url).await.unwrap_err();
            let expected = told("the branch \"nowhere\"", "is \"main\"");
            assert_eq!((fault.kind, fault.message), (Gone, expected), "{mode:?}");
        }
    }
    // Older servers do not tell.
    fixture.server.set_dialect(Dialect {
        config: vec![("lsrefs.unborn", "ignore")],
        ..Dialect::default()
    });
    for branch in 1..5 {
        git(&dangling, ["branch", &format!("b{branch}"), "main"]);
    }
    git(&dangling, ["update-ref", "refs/a/1", "main"]);
    for mode in MODES {
        fixture.policy.mode = mode;
        let fault = fixture.make("dangling").await.unwrap_err();
        let expected = told("a branch", "are \"b1\", \"b2\", \"b3\" and more");
        assert_eq!((fault.kind, fault.message), (Gone, expected), "{mode:?}");
    }
    for branch in ["main", "b1", "b2", "b3", "b4"] {
        git(
            &dangling,
            ["update-ref", "-d", &format!("refs/heads/{branch}")],
        );
    }
    for mode in MODES {
        fixture.policy.mode = mode;
        let fault = fixture.make("dangling").await.unwrap_err();
        let expected = told("a branch", "is \"refs/a/1\"");
        assert_eq!((fault.kind, fault.message), (Gone, expected), "{mode:?}");
    }
}

#[tokio::test]
async fn twenty_thousand_refs_are_not_sent_or_looked_through() {
    let mut fixture = Fixture::new();
    let path = fixture.root.path().join("owner/bad.git");
    let commit = git(&path, ["rev-parse", "main"]);
    let refs: String = (0..20_000)
        .map(|i| format!("{commit} refs/pull/{i}/head\n"))
        .collect();
    std::fs::write(
        path.join("packed-refs"),
        format!("# pack-refs with: peeled fully-peeled sorted \n{refs}"),
    )
    .unwrap();
    let made = fixture.make("bad").await.unwrap();
    assert_eq!(made.facts.commit.as_ref(), Some(&commit));
    assert!(made.fetched_bytes < 2_000, "{}", made.fetched_bytes);
    fixture.policy.mode = FetchMode::Git2;
    let made = fixture.make("bad").await.unwrap();
    assert_eq!(made.facts.commit, Some(commit));
    assert!(made.fetched_bytes > 20_000 * 60, "{}", made.fetched_bytes);
}

#[tokio::test]
async fn a_local_repository_is_read_in_place_if_that_is_allowed() {
    let mut fixture = Fixture::new();
    let path = fixture.root.path().join("owner/bad.git");
    let path = path.to_str().unwrap();
    let fault = fixture.make_url(path).await.unwrap_err();
    assert_eq!(fault.kind, Refused);
    assert!(fault.message.contains("--allow-local"), "{fault}");

    fixture.policy.local = true;
    let before = git(Path::new(path), ["count-objects", "-v"]);
    let made = fixture.make_url(path).await.unwrap();
    assert!(made.content.contains(TEXT));
    assert_eq!(made.fetched_bytes, 0);
    assert_eq!(git(Path::new(path), ["count-objects", "-v"]), before);

    for (path, kind) in [
        (fixture.root.path().join("nothing-here"), Gone),
        ("relative/path".into(), Refused),
    ] {
        let fault = fixture.make_url(path.to_str().unwrap()).await.unwrap_err();
        assert_eq!(fault.kind, kind, "{fault}");
    }
}

#[tokio::test]
async fn statuses_have_their_class_at_either_request() {
    let mut fixture = Fixture::new();
    let seconds = |s| Some(Duration::from_secs(s));
    let cases = [
        (Trouble::status(403), Throttled, None),
        (
            Trouble::with_body(403, "This repository has been disabled."),
            Gone,
            None,
        ),
        (Trouble::status(404), Gone, None),
        (Trouble::status(410), Gone, None),
        (Trouble::status(429), Throttled, seconds(30)),
        (Trouble::retry_after(429, 7), Throttled, seconds(7)),
        // No host can pause a worker for days.
        (
            Trouble::retry_after(429, u64::MAX),
            Throttled,
            seconds(3600),
        ),
        (Trouble::status(451), Gone, None),
        (
            Trouble::with_body(451, "DMCA \u{1b}[1mtakedown"),
            Gone,
            None,
        ),
        (
            Trouble::says(Place::Err, GITHUB_LIMIT),
            Throttled,
            seconds(30),
        ),
        (
            Trouble::says(Place::Err, "No space left on device"),
            Transient,
            None,
        ),
        (
            Trouble::says(Place::Err, "fatal: File too large"),
            Transient,
            None,
        ),
        (
            Trouble::says(Place::Err, "fatal: Cannot allocate memory"),
            Transient,
            None,
        ),
        (Trouble::status(500), Transient, None),
        (Trouble::status(503), Transient, None),
        (Trouble::retry_after(503, 9), Throttled, seconds(9)),
        (Trouble::WrongContentType, Transient, None),
    ];
    for mode in MODES {
        fixture.policy.mode = mode;
        for (trouble, kind, retry_after) in &cases {
            for at in [Kind::InfoRefs, Kind::UploadPack] {
                let fault = fixture.fault_of(trouble.clone().on(at), *kind).await;
                assert_eq!(fault.retry_after, *retry_after, "{trouble:?} at {at:?}");
                if let Trouble::Status { code, .. } = trouble {
                    assert!(fault.message.contains(&code.to_string()), "{fault}");
                }
                assert_quotes(&fault, trouble);
            }
        }
    }
}

/// The fault says what the host said, as far as that can be printed.
fn assert_quotes(fault: &Fault, trouble: &Trouble) {
    let words = match trouble {
        Trouble::Status { body, .. } => body.trim(),
        Trouble::Says { words, .. } => words,
        _ => return,
    };
    let words = printable(words);
    assert!(fault.message.contains(&format!("\"{words}\"")), "{fault}");
    assert!(!fault.message.contains(char::is_control), "{fault}");
}

#[tokio::test]
async fn a_limit_on_anonymous_downloads_is_the_hosts_and_asks_for_a_token() {
    let mut fixture = Fixture::new();
    let says = |place| Trouble::says(place, GITHUB_LIMIT);
    let with_body = Trouble::with_body(401, GITHUB_LIMIT);
    // Each form, the pause, and how many POSTs there are on either way.
    let limits = [
        (Trouble::github_limit(Some(7)), 7, [1, 1]),
        (Trouble::github_limit_in_band(Some(7)), 7, [1, 1]),
        (with_body.clone().on(Kind::InfoRefs), 30, [0, 0]),
        (with_body.on(Kind::UploadPack), 30, [1, 1]),
        (says(Place::Err).on(Kind::InfoRefs), 30, [0, 0]),
        (says(Place::Err).on(Kind::UploadPack), 30, [1, 1]),
        // Protocol v2 asks for refs before, v0 for what is shallow.
        (Rule::from(says(Place::SideBand3)), 30, [2, 2]),
    ];
    for mode in [FetchMode::Auto, FetchMode::V2, FetchMode::Git2] {
        fixture.policy.mode = mode;
        for (trouble, pause, posts) in &limits {
            let before = fixture.server.repo_stats("owner/bad");
            let fault = fixture.fault_of(trouble.clone(), Throttled).await;
            let pause = Some(Duration::from_secs(*pause));
            assert_eq!(fault.retry_after, pause, "{trouble:?}");
            for part in [GITHUB_LIMIT, "--token-for"] {
                assert!(fault.message.contains(part), "{trouble:?}: {fault}");
            }
            let after = fixture.server.repo_stats("owner/bad");
            assert_eq!(
                (
                    after.info_refs - before.info_refs,
                    after.upload_packs - before.upload_packs
                ),
                (1, posts[usize::from(mode == FetchMode::Git2)]),
                "no other way is tried: {mode:?}, {trouble:?}"
            );
        }
        // It is not there for us, if nothing more is said; but whoever shows refs has the repository.
        for (at, kind) in [(Kind::InfoRefs, Gone), (Kind::UploadPack, Throttled)] {
            let fault = fixture.fault_of(Trouble::status(401).on(at), kind).await;
            assert_eq!(fault.retry_after, None);
        }
    }
}

#[tokio::test]
async fn words_in_side_band_3_are_quoted() {
    let mut fixture = Fixture::new();
    let words = "fatal: No space left on device".repeat(20);
    let trouble = Trouble::says(Place::SideBand3, &words);
    for mode in MODES {
        fixture.policy.mode = mode;
        let fault = fixture.fault_of(trouble.clone(), Transient).await;
        assert!(fault.message.contains(&words[..299]), "{fault}");
        assert!(!fault.message.contains(&words[..300]), "{fault}");
    }
}

#[tokio::test]
async fn what_this_program_cannot_read_is_said_once_and_for_all() {
    let mut fixture = Fixture::new();
    let root = fixture.root.path();
    let sha256 = root.join("owner/sha256.git");
    for name in ["sha256", "sha256-empty"] {
        let path = format!("owner/{name}.git");
        git(root, ["init", "--bare", "--object-format=sha256", &path]);
    }
    let tree = git(&sha256, ["write-tree"]);
    let commit = git(
        &sha256,
        [
            "-c",
            "user.name=x",
            "-c",
            "user.email=x",
            "commit-tree",
            "-m",
            "1",
            &tree,
        ],
    );
    git(&sha256, ["update-ref", "HEAD", &commit]);
    let partial = root.join("partial");
    let from = root.join("owner/good.git");
    git(&from, ["config", "uploadpack.allowFilter", "true"]);
    git(
        root,
        [
            "clone",
            "--quiet",
            "--bare",
            "--filter=blob:none",
            &format!("file://{}", from.display()),
            "partial",
        ],
    );
    fixture.policy.local = true;
    let files = HttpServer::start(|request| match request.path.as_str() {
        "/owner/files/info/refs" => {
            Response::new(200, format!("{}\trefs/heads/main\n", "1".repeat(40)))
                .header("content-type", "text/plain")
        }
        _ => Response::new(404, ""),
    });
    fixture
        .policy
        .hosts
        .push(files.authority().parse().unwrap());
    let format = "the repository's object format is SHA-256, which is not supported";
    for mode in MODES {
        fixture.policy.mode = mode;
        for (url, said) in [
            (fixture.url("sha256"), format),
            (fixture.url("sha256-empty"), format),
            (sha256.display().to_string(), format),
            (format!("{}/owner/files", files.url()), "dumb protocol"),
            (partial.display().to_string(), "partial clone"),
        ] {
            let fault = fixture.make_url(&url).await.unwrap_err();
            assert_eq!(fault.kind, Gone, "{url}: {fault}");
            assert!(fault.message.contains(said), "{url}: {fault}");
        }
    }
}

#[tokio::test]
async fn a_renamed_repository_is_fetched_from_its_new_place() {
    let mut fixture = Fixture::new();
    good(fixture.root.path(), "new-name");
    let to = fixture.url("new-name");
    fixture.server.fault("owner/bad", Trouble::Moved { to });
    for (mode, fetches) in MODES.into_iter().zip(1..) {
        fixture.policy.mode = mode;
        let made = work(&fixture.slots(), &fixture.url("bad")).await.unwrap();
        assert!(made.content.contains(TEXT));
        assert_eq!(fixture.server.repo_stats("owner/bad").upload_packs, 0);
        assert_eq!(fixture.server.fetches("owner/new-name"), fetches);
        assert_eq!(fixture.server.connections(), fetches);
        assert_eq!(made.renamed_to, Some(fixture.url("new-name")));
    }
    // Another spelling is no other name.
    for url in ["good.git", "Good", "good/"].map(|name| fixture.url(name)) {
        fixture.server.clear_faults();
        let to = fixture.url("good");
        fixture
            .server
            .fault("owner/good", Trouble::Moved { to }.times(1));
        let made = work(&fixture.slots(), &url).await.unwrap();
        assert_eq!(made.renamed_to, None, "{url}");
    }
}

#[tokio::test]
async fn a_redirect_may_lead_to_another_host_that_is_allowed() {
    let mut fixture = Fixture::new();
    let elsewhere = tempfile::tempdir().unwrap();
    good(elsewhere.path(), "there");
    let other = GitServer::start(elsewhere.path());
    let to = other.repo_url("owner", "there");
    fixture.server.fault("owner/bad", Trouble::Moved { to });

    // It is on this machine, at a port that is not allowed.
    let fault = fixture.fault().await;
    assert_eq!(fault.kind, Refused);
    assert!(fault.message.contains(&other.authority()), "{fault}");
    assert!(fault.message.contains("--allow-host"), "{fault}");
    assert!(other.stats().is_empty());

    fixture
        .policy
        .hosts
        .push(other.authority().parse().unwrap());
    let made = fixture.make("bad").await.unwrap();
    assert!(made.content.contains(TEXT));
    assert_eq!(other.fetches("owner/there"), 1);
}

#[tokio::test]
async fn redirects_to_anywhere_else_are_not_followed() {
    let fixture = Fixture::new();
    let tail = "info/refs?service=git-upload-pack";
    for (location, kind) in [
        (format!("https://evil.example/owner/bad/{tail}"), Refused),
        (format!("http://169.254.169.254/latest/{tail}"), Refused),
        (
            format!("https://user:secret@github.com/x/y/{tail}"),
            Refused,
        ),
        (format!("ssh://github.com/x/y/{tail}"), Refused),
        (format!("file:///etc/{tail}"), Refused),
        ("/login".to_owned(), Gone),
        ("https://".to_owned(), Gone),
        (format!("//evil.example/x/y/{tail}"), Refused),
        // To itself, endlessly.
        (format!("/owner/bad/{tail}"), Gone),
    ] {
        let redirect = Trouble::Redirect {
            code: 302,
            location: location.clone(),
        };
        let fault = fixture.fault_of(redirect, kind).await;
        assert!(!fault.message.contains("secret"), "{fault}");
    }
}

#[tokio::test]
async fn a_redirected_post_is_refused() {
    let fixture = Fixture::new();
    let location = "/owner/good/git-upload-pack".to_owned();
    for code in [302, 307] {
        let location = location.clone();
        let redirect = Trouble::Redirect { code, location };
        fixture
            .fault_of(redirect.on(Kind::UploadPack), Refused)
            .await;
    }
}

#[tokio::test]
async fn hosts_and_schemes_that_are_not_allowed_are_not_asked() {
    let mut fixture = Fixture::new();
    let authority = fixture.server.authority();
    let (_, port) = authority.split_once(':').unwrap();
    for host in ["127.0.0.2", "localhost", "[::1]"] {
        // The same server, but only 127.0.0.1 is allowed.
        let url = format!("http://{host}:{port}/owner/bad");
        let fault = fixture.make_url(&url).await.unwrap_err();
        assert_eq!(fault.kind, Refused);
        let remedy = format!("--allow-host {host}:{port}");
        assert!(fault.message.contains(&remedy), "{fault}");
    }
    assert_eq!(fixture.server.repo_stats("owner/bad").info_refs, 0);

    let url = format!("http://localhost:{port}/owner/bad");
    let named = format!("localhost:{port}").parse().unwrap();
    fixture.policy.hosts.push(named);
    assert!(fixture.make_url(&url).await.is_ok());

    fixture.policy.http = false;
    let slots = fixture.slots();
    let fault = work(&slots, &fixture.url("good")).await.unwrap_err();
    assert_eq!(fault.kind, Refused);
    assert!(fault.message.contains("--allow-http"), "{fault}");
}

const TOKEN: &str = "sesame-open";

impl Fixture {
    fn with_token() -> Self {
        let mut fixture = Self::new();
        fixture.add_token(TOKEN);
        fixture
    }
}

#[tokio::test]
async fn the_token_opens_what_is_private() {
    let fixture = Fixture::with_token();
    let private = Trouble::RequireToken(TOKEN.to_owned());
    fixture.server.fault("owner/bad", private);
    assert!(fixture.make("bad").await.is_ok());
    assert_eq!(
        fixture.server.repo_stats("owner/bad").authorizations.len(),
        3
    );
}

#[tokio::test]
async fn a_refused_token_is_not_needed_for_what_is_public() {
    let fixture = Fixture::with_token();
    // As GitHub does with an expired token.
    let refused = Trouble::status(401).times(1);
    fixture.server.fault("owner/bad", refused);
    assert!(fixture.make("bad").await.is_ok());
    let stats = fixture.server.repo_stats("owner/bad");
    assert_eq!((stats.authorizations.len(), stats.info_refs), (1, 2));

    fixture.server.clear_faults();
    fixture.server.fault("owner/bad", Trouble::status(401));
    let fault = fixture.fault().await;
    assert_eq!(fault.kind, Gone);
    assert!(!fault.message.contains(TOKEN), "{fault}");
}

#[tokio::test]
async fn a_token_that_is_refused_is_not_sent_again() {
    let mut fixture = Fixture::with_token();
    fixture.config.concurrency = Some(1);
    let (code, headers) = (401, Vec::new());
    fixture
        .server
        .fault_all(Trouble::RefuseToken { code, headers });
    let slots = fixture.slots();
    for _ in 0..2 {
        let made = work(&slots, &fixture.url("bad")).await.unwrap();
        assert!(made.content.contains(TEXT));
    }
    let sent = fixture.server.repo_stats("owner/bad").authorizations;
    assert_eq!(sent.len(), 1);
}

/// It opens other organizations' repositories.
#[tokio::test]
async fn a_token_without_single_sign_on_is_not_needed_for_what_is_public() {
    let fixture = Fixture::with_token();
    let headers = vec![("x-github-sso".to_owned(), "required; url=…".to_owned())];
    let code = 403;
    fixture
        .server
        .fault("owner/bad", Trouble::RefuseToken { code, headers });
    let slots = fixture.slots();
    for name in ["bad", "good", "bad"] {
        let made = work(&slots, &fixture.url(name)).await.unwrap();
        assert!(made.content.contains(TEXT));
    }
    let sent = |repo| fixture.server.repo_stats(repo).authorizations.len();
    assert_eq!((sent("owner/bad"), sent("owner/good")), (2, 3));
}

/// With a token it is not about those who don't say who they are.
#[tokio::test]
async fn a_limit_on_a_token_is_not_its_refusal() {
    let fixture = Fixture::with_token();
    fixture
        .server
        .fault("owner/bad", Trouble::github_limit(Some(7)));
    let slots = fixture.slots();
    let fault = work(&slots, &fixture.url("bad")).await.unwrap_err();
    assert_eq!(fault.kind, Throttled, "{fault}");
    assert!(!fault.message.contains("anonymous"), "{fault}");
    let sent = fixture.server.repo_stats("owner/bad").authorizations;
    assert_eq!(sent.len(), 2, "one for each request: {sent:?}");
}

#[tokio::test]
async fn a_host_that_repeats_the_token_does_not_get_it_logged() {
    let fixture = Fixture::with_token();
    let words = format!("{TOKEN} is not allowed");
    for trouble in [
        Trouble::with_body(404, &words),
        Trouble::with_body(403, &words),
        Trouble::says(Place::Err, &words),
    ] {
        fixture.server.clear_faults();
        fixture.server.fault("owner/bad", trouble.clone());
        let fault = fixture.fault().await;
        assert!(fault.message.contains("is not allowed"), "{fault}");
        assert!(!fault.message.contains(TOKEN), "{fault}");
    }
}

/// The tokens that came with requests for `repo`, one after another.
fn sent(fixture: &Fixture, repo: &str) -> Vec<String> {
    let sent = fixture.server.repo_stats(repo).authorizations;
    let tokens = ["first-token", "second-token"];
    let shown = |header: &String| {
        let mut tokens = tokens.into_iter();
        tokens.find(|token| *header == authorization(token))
    };
    let mut tokens: Vec<_> = sent
        .iter()
        .map(|h| shown(h).unwrap_or(h).to_owned())
        .collect();
    tokens.dedup();
    tokens
}

fn with_two_tokens() -> Fixture {
    let mut fixture = Fixture::new();
    fixture.add_token("first-token");
    fixture.add_token("second-token");
    fixture
}

fn shows(fixture: &Fixture, metrics: &Metrics, state: &str, count: u32) {
    let text = String::from_utf8(metrics.render()).unwrap();
    let host = fixture.server.authority();
    let line = format!("repofleet_tokens{{host=\"{host}\",state=\"{state}\"}} {count}");
    assert!(text.lines().any(|shown| shown == line), "{line} in {text}");
}

#[tokio::test]
async fn a_limited_token_rests_while_the_other_is_sent() {
    let fixture = with_two_tokens();
    let metrics = Metrics::new();
    let slots = fixture.slots_counted(&metrics);
    let limited = Trouble::RefuseToken {
        code: 429,
        headers: vec![("retry-after".to_owned(), "500".to_owned())],
    };
    fixture.server.fault("owner/bad", limited.clone().times(1));
    work(&slots, &fixture.url("bad")).await.unwrap();
    assert_eq!(sent(&fixture, "owner/bad"), ["first-token", "second-token"]);
    work(&slots, &fixture.url("good")).await.unwrap();
    assert_eq!(sent(&fixture, "owner/good"), ["second-token"]);
    shows(&fixture, &metrics, "resting", 1);
    shows(&fixture, &metrics, "usable", 1);

    fixture.server.clear_faults();
    fixture.server.fault("owner/bad", limited);
    let fault = work(&slots, &fixture.url("bad")).await.unwrap_err();
    assert_eq!(fault.kind, Throttled);
    shows(&fixture, &metrics, "resting", 2);
    let before = fixture.server.repo_stats("owner/good").info_refs;
    let fault = work(&slots, &fixture.url("good")).await.unwrap_err();
    let pause = fault.retry_after.unwrap();
    assert!(
        (Duration::from_secs(400)..Duration::from_secs(500)).contains(&pause),
        "{pause:?}"
    );
    assert_eq!(
        fixture.server.repo_stats("owner/good").info_refs,
        before,
        "nobody asks"
    );
}

#[tokio::test]
async fn a_token_whose_limit_is_used_up_rests_until_it_begins_anew() {
    let fixture = with_two_tokens();
    let metrics = Metrics::new();
    let slots = fixture.slots_counted(&metrics);
    let reset = OffsetDateTime::now_utc().unix_timestamp() + 1000;
    let headers = [
        ("x-ratelimit-remaining", "0"),
        ("x-ratelimit-reset", &reset.to_string()),
    ];
    let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let last = Trouble::Headers(headers.to_vec());
    fixture
        .server
        .fault("owner/bad", last.on(Kind::UploadPack).times(2));
    for _ in 0..2 {
        work(&slots, &fixture.url("bad")).await.unwrap();
    }
    assert_eq!(sent(&fixture, "owner/bad"), ["first-token", "second-token"]);
    work(&slots, &fixture.url("good")).await.unwrap();
    assert_eq!(sent(&fixture, "owner/good"), ["second-token"]);
    shows(&fixture, &metrics, "resting", 1);
}

/// Without a token it is not there, which the token says nothing about.
#[tokio::test]
async fn a_private_repository_is_opened_by_the_token_that_is_not_refused() {
    let fixture = with_two_tokens();
    let metrics = Metrics::new();
    let slots = fixture.slots_counted(&metrics);
    let private = Trouble::RequireToken("second-token".to_owned());
    fixture.server.fault("owner/bad", private);
    for _ in 0..2 {
        let made = work(&slots, &fixture.url("bad")).await.unwrap();
        assert!(made.content.contains(TEXT));
    }
    assert_eq!(sent(&fixture, "owner/bad"), ["first-token", "second-token"]);
    shows(&fixture, &metrics, "refused", 1);
    shows(&fixture, &metrics, "usable", 1);
    shows(&fixture, &metrics, "resting", 0);
}

/// Names are for the proxy to resolve, and addresses for it to judge.
#[tokio::test]
async fn a_proxy_fetches_what_it_alone_can_find() {
    let mut fixture = Fixture::new();
    let host = "git.invalid";
    fixture.policy.hosts.push(host.parse().unwrap());
    let url = format!("http://{host}/owner/bad");
    assert_eq!(fixture.make_url(&url).await.unwrap_err().kind, Transient);
    // The server takes a proxy's requests too.
    fixture.policy.proxy = Some(fixture.server.url().parse().unwrap());
    let made = fixture.make_url(&url).await.unwrap();
    assert!(made.content.contains(TEXT));
    // What may be fetched is still decided here.
    let fault = fixture.make_url("http://other.invalid/owner/bad").await;
    assert_eq!(fault.unwrap_err().kind, Refused);
}

#[tokio::test]
async fn the_token_goes_to_no_other_host() {
    let mut fixture = Fixture::with_token();
    let elsewhere = tempfile::tempdir().unwrap();
    good(elsewhere.path(), "there");
    let other = GitServer::start(elsewhere.path());
    fixture
        .policy
        .hosts
        .push(other.authority().parse().unwrap());
    let to = other.repo_url("owner", "there");
    let moved = Trouble::Moved { to: to.clone() };
    fixture.server.fault("owner/bad", moved);
    assert!(fixture.make("bad").await.is_ok());
    assert!(fixture.make_url(&to).await.is_ok());
    assert_eq!(
        fixture.server.repo_stats("owner/bad").authorizations.len(),
        1
    );
    assert_eq!(other.fetches("owner/there"), 2);
    assert_eq!(other.repo_stats("owner/there").authorizations, [""; 0]);
}

#[tokio::test]
async fn servers_without_progress_are_given_up() {
    let troubles = [
        Rule::from(Trouble::Hang),
        Trouble::Hang.on(Kind::UploadPack),
        Rule::from(Trouble::Drip {
            bytes_per_second: 1,
        }),
        Trouble::Drip {
            bytes_per_second: 1,
        }
        .on(Kind::UploadPack),
        Trouble::Stall { after_bytes: 100 }.on(Kind::InfoRefs),
        Trouble::Stall { after_bytes: 100 }.on(Kind::UploadPack),
    ];
    // Concurrently: each only waits.
    let check = async |trouble: Rule| {
        let mut fixture = Fixture::new();
        fixture.config.stall = 2;
        fixture.server.fault("owner/bad", trouble.clone());
        let fault = fixture.fault().await;
        assert_eq!(fault.kind, Transient, "{trouble:?}: {fault}");
        assert!(fault.message.contains("no progress for 2 s"), "{fault}");
        assert!(fault.message.contains("--stall"), "{fault}");
    };
    join_all(troubles.map(check)).await;
}

#[tokio::test]
async fn a_fetch_that_goes_on_for_too_long_is_too_large() {
    let mut fixture = Fixture::new();
    fixture.config.timeout = 2;
    // Fast enough to count as progress.
    let noise = noise(400_000);
    Builder::new()
        .file("noise", noise)
        .build(fixture.root.path(), "owner", "slow");
    let slow = Trouble::Drip {
        bytes_per_second: 20_000,
    };
    fixture
        .server
        .fault("owner/slow", slow.on(Kind::UploadPack));
    let fault = fixture.make("slow").await.unwrap_err();
    assert_eq!(fault.kind, TooLarge, "{fault}");
    for part in [
        "not done after 2 s",
        "fetching",
        "bytes fetched",
        "--timeout",
    ] {
        assert!(fault.message.contains(part), "{fault}");
    }
}

#[tokio::test]
async fn what_is_cut_or_damaged_on_its_way_is_transient() {
    let fixture = Fixture::new();
    for trouble in [
        Rule::from(Trouble::Reset),
        Trouble::Reset.on(Kind::UploadPack),
        Trouble::Truncate { after_bytes: 0 }.on(Kind::InfoRefs),
        Trouble::Truncate { after_bytes: 50 }.on(Kind::InfoRefs),
        Trouble::Truncate { after_bytes: 10 }.on(Kind::UploadPack),
        Trouble::Truncate { after_bytes: 150 }.on(Kind::UploadPack),
        // The magic, the version, the count of objects, an object's header, data, the checksum.
        Rule::from(Trouble::Corrupt { at: 0 }),
        Rule::from(Trouble::Corrupt { at: 7 }),
        Rule::from(Trouble::Corrupt { at: 11 }),
        Rule::from(Trouble::Corrupt { at: 12 }),
        Rule::from(Trouble::Corrupt { at: 40 }),
        Rule::from(Trouble::Corrupt { at: 200 }),
    ] {
        fixture.fault_of(trouble, Transient).await;
    }
}

#[tokio::test]
async fn a_pack_that_claims_four_billion_objects_takes_no_memory() {
    let mut fixture = Fixture::new();
    let corrupt = Trouble::Corrupt { at: 8 };
    for mode in MODES {
        fixture.policy.mode = mode;
        let fault = fixture.fault_of(corrupt.clone(), TooLarge).await;
        assert!(fault.message.contains("objects, more than"), "{fault}");
    }
}

#[tokio::test]
async fn an_answer_that_is_not_gits_is_no_harm() {
    let mut fixture = Fixture::new();
    for body in [
        "",
        "0000",
        "not git at all",
        "001e# service=git-upload-pack\n0000",
        "001e# service=git-upload-pack\n0000fffe",
        "001e# service=git-upload-pack\n00000009ERR \u{1b}[31mno\0\n",
        "001e# service=git-upload-pack\n0000003f1111111111111111111111111111111111111111 refs/heads/main",
    ] {
        let server = HttpServer::start(move |_| {
            Response::new(200, body).header(
                "content-type",
                "application/x-git-upload-pack-advertisement",
            )
        });
        let host = server.authority().parse().unwrap();
        fixture.policy.hosts.push(host);
        let url = format!("{}/owner/bad", server.url());
        let fault = fixture.make_url(&url).await.unwrap_err();
        assert_eq!(fault.kind, Transient, "{body:?}: {fault}");
        assert!(!fault.message.contains(char::is_control), "{fault:?}");
    }
}

#[tokio::test]
async fn refs_have_a_budget_of_their_own_since_they_are_kept_in_memory() {
    let mut fixture = Fixture::new();
    fixture.policy.max_bytes = 1 << 30;
    fixture.server.fault("owner/bad", Trouble::Flood);
    let fault = fixture.fault().await;
    assert_eq!(fault.kind, TooLarge, "{fault}");
    assert!(fault.message.contains("67108864 bytes of refs"), "{fault}");
}

#[tokio::test]
async fn the_byte_budget_covers_all_that_comes() {
    for trouble in [
        Some(Trouble::Flood.on(Kind::InfoRefs)),
        Some(Trouble::Flood.on(Kind::UploadPack)),
        Some(Rule::from(Trouble::HugeAdvertisement { bytes: 3 << 20 })),
        None,
    ] {
        let mut fixture = Fixture::new();
        fixture.policy.max_bytes = 1 << 20;
        match trouble.clone() {
            Some(trouble) => fixture.server.fault("owner/bad", trouble),
            // A large file.
            None => {
                std::fs::remove_dir_all(fixture.root.path().join("owner/bad.git")).unwrap();
                Builder::new().file("noise", noise(2 << 20)).build(
                    fixture.root.path(),
                    "owner",
                    "bad",
                );
            }
        }
        let fault = fixture.fault().await;
        assert_eq!(fault.kind, TooLarge, "{trouble:?}: {fault}");
        for part in ["1048576 bytes", "--max-fetch-bytes"] {
            assert!(fault.message.contains(part), "{trouble:?}: {fault}");
        }
    }
}
