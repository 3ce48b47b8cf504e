//! `producer check` on real parts: all well, and each thing that can be wrong planted once.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use common::exit::{BAD_FEED, OK, UNAVAILABLE, USAGE};
use serde_json::{Value, json};
use testing::git_server::{Fault, Kind};
use testing::http_server::{HttpServer, Response};
use testing::rabbitmq::{fresh_prefix, shared_url};
use testing::s3_server::{ACCESS_KEY, Fate, S3Server, SECRET_KEY};

use crate::fleet::{Ended, Fleet, Running, bare_producer};

fn check(fleet: &Fleet, arguments: &[&str]) -> Command {
    let mut command = bare_producer();
    command.arg("check").args(fleet.arguments(arguments));
    command
}

fn run(command: &mut Command) -> Ended {
    let ended = Running::start(command).wait();
    for text in [&ended.stdout, &ended.stderr] {
        assert!(!text.contains("s3cret"), "{text}");
    }
    ended
}

fn lines(ended: &Ended) -> Vec<Value> {
    let lines = ended.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The feed of `fleet`, of a push just now.
fn fresh_feed(fleet: &Fleet, repos: &[&str]) {
    let now = time::OffsetDateTime::now_utc();
    let now = now.format(&time::format_description::well_known::Rfc3339);
    let now = now.unwrap();
    let entries: Vec<_> = repos.iter().map(|repo| fleet.entry(repo, &now)).collect();
    fleet.write_feed(&entries);
}

#[test]
fn where_all_is_well_each_line_says_so_and_nothing_is_left() {
    let fleet = Fleet::of(&["a/b"]);
    fresh_feed(&fleet, &["a/b"]);
    let authority = fleet.server.authority();
    let token = format!("{authority}=TOKEN");
    let arguments = [
        "--json",
        "--token-for",
        &token,
        "--metrics-addr",
        "127.0.0.1:0",
        "--max-fetch-bytes",
        "1KiB",
    ];
    let ended = run(check(&fleet, &arguments).env("TOKEN", "s3cret")).with(OK);
    let mut found = Vec::new();
    for line in lines(&ended) {
        // What this kernel lacks is its own affair.
        if line["check"] != "walls" {
            assert_eq!(line["state"], "ok", "{line}");
        }
        found.push(line["check"].as_str().unwrap().to_owned());
    }
    let expected = [
        "options", "feed", "store", "metrics", "scratch", "walls", "hosts", "tokens",
    ];
    assert_eq!(found, expected, "{}", ended.stdout);
    fleet.assert_nothing_left();
    assert_eq!(fleet.stored(), [""; 0]);

    let said = run(check(&fleet, &["--max-fetch-bytes", "1KiB"]).env("GITHUB_TOKEN", "s3cret"));
    let said = said.with(OK).stdout;
    assert!(said.contains("ok       hosts: http://"), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.contains(" ok") && !last.contains("failed"), "{last}");

    // With a broker, the producer's own part; --worker adds the rest.
    let prefix = fresh_prefix();
    let url = shared_url();
    let fleet_of = ["--json", "--broker-url", &url, "--queue-prefix", &prefix];
    let ended = run(&mut check(&fleet, &fleet_of)).with(OK);
    let found: Vec<_> = lines(&ended);
    let broker = found.iter().find(|line| line["check"] == "broker").unwrap();
    let message = broker["message"].as_str().unwrap();
    assert!(
        message.contains("0 workers connected, 0 jobs waiting"),
        "{message}"
    );
    assert!(found.iter().all(|line| line["check"] != "hosts"));
    let ended = run(&mut check(&fleet, &[&fleet_of[..], &["--worker"]].concat())).with(OK);
    assert!(lines(&ended).iter().any(|line| line["check"] == "hosts"));
}

/// A misconfiguration, and the line that names it.
struct Plant<'a> {
    arguments: Vec<&'a str>,
    variables: Vec<(&'a str, &'a str)>,
    check: &'a str,
    state: &'a str,
    code: u8,
    words: &'a str,
}

fn plant<'a>(arguments: &[&'a str], check: &'a str, code: u8, words: &'a str) -> Plant<'a> {
    Plant {
        arguments: arguments.to_vec(),
        variables: Vec::new(),
        check,
        state: if code == OK { "warning" } else { "failed" },
        code,
        words,
    }
}

impl<'a> Plant<'a> {
    fn with(mut self, variables: &[(&'a str, &'a str)]) -> Self {
        self.variables.extend(variables);
        self
    }
}

/// Starts `check` for each plant, and looks for its line.
fn assert_found(fleet: &Fleet, plants: Vec<Plant<'_>>) {
    for plant in plants {
        let mut command = check(fleet, &[&["--json"], &plant.arguments[..]].concat());
        let ended = run(command.envs(plant.variables.iter().copied()));
        let arguments = plant.arguments.join(" ");
        let found = lines(&ended);
        let matching = found.iter().find(|line| {
            line["check"] == plant.check
                && line["state"] == plant.state
                && line["message"].as_str().unwrap().contains(plant.words)
        });
        let line = matching.unwrap_or_else(|| {
            panic!(
                "{arguments}: {:?} in\n{}{}",
                plant.words, ended.stdout, ended.stderr
            )
        });
        assert_eq!(line["exit_code"], plant.code, "{arguments}");
        let worst = found
            .iter()
            .filter_map(|line| line["exit_code"].as_u64())
            .max();
        assert_eq!(
            Some(u64::from(plant.code)),
            worst,
            "{arguments}\n{}",
            ended.stdout
        );
        assert_eq!(
            ended.code(),
            i32::from(plant.code),
            "{arguments}\n{}",
            ended.stdout
        );
    }
}

#[test]
fn a_misconfigured_feed_or_selection_is_found() {
    let fleet = Fleet::of(&["a/b"]);
    let file = |name: &str, content: &str| {
        let path = fleet.path().join(name);
        fs::write(&path, content).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let page = file("page.html", "<html>Sign in</html>");
    let empty = file("empty.json", "[]");
    let object = file("error.json", r#"{"message":"Bad credentials"}"#);
    let mut partly = fleet.entries(&["a/b"]);
    partly.push(json!({"owner": "a"}));
    let partly = file("partly.json", &json!(partly).to_string());
    let absent = fleet.path().join("absent.json");
    let server = HttpServer::start(|_| Response::new(404, ""));
    let gone = format!("{}/repos.json", server.url());
    let text = fs::read_to_string(fleet.feed_file()).unwrap();
    let stopped = HttpServer::start(move |_| Response::new(200, text.clone()));
    let old = stopped.url();
    assert_found(
        &fleet,
        vec![
            plant(
                &["--feed", absent.to_str().unwrap()],
                "feed",
                UNAVAILABLE,
                "check --feed",
            ),
            plant(
                &["--feed", &gone],
                "feed",
                UNAVAILABLE,
                "404 Not Found; check --feed",
            ),
            plant(&["--feed", &page], "feed", BAD_FEED, "found something else"),
            plant(
                &["--feed", &object],
                "feed",
                BAD_FEED,
                "found a JSON object",
            ),
            plant(&["--feed", &empty], "feed", BAD_FEED, "--allow-empty-feed"),
            plant(
                &["--feed", "http://feed.example/x"],
                "feed",
                USAGE,
                "--allow-http-feed",
            ),
            plant(&["--feed", &partly], "feed", OK, "1 unusable entry"),
            plant(&["--feed", &old], "feed", OK, "may no longer be updated"),
            plant(&["--only", "b/*"], "feed", OK, "see --only"),
        ],
    );
}

#[test]
fn a_misconfigured_store_is_found() {
    let fleet = Fleet::of(&["a/b"]);
    let server = S3Server::start();
    let url = server.url();
    let endpoint = ("AWS_ENDPOINT_URL", url.as_str());
    let keys = [
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
    ];
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let file = fleet.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("digests");
    assert_found(
        &fleet,
        vec![
            plant(
                &["--store", below.to_str().unwrap()],
                "store",
                UNAVAILABLE,
                "Not a directory",
            ),
            plant(
                &["--store", "s3://digests"],
                "store",
                USAGE,
                "AWS_ENDPOINT_URL",
            )
            .with(&keys),
            plant(
                &["--store", "s3://digests"],
                "store",
                UNAVAILABLE,
                "nobody listens there",
            )
            .with(&keys)
            .with(&[("AWS_ENDPOINT_URL", &nobody)]),
            plant(
                &["--store", "s3://no-such-bucket"],
                "store",
                UNAVAILABLE,
                "bucket",
            )
            .with(&keys)
            .with(&[endpoint]),
            plant(
                &["--store", "s3://digests"],
                "store",
                UNAVAILABLE,
                "AWS_SECRET_ACCESS_KEY",
            )
            .with(&[
                endpoint,
                ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
                ("AWS_SECRET_ACCESS_KEY", "s3cret"),
            ]),
        ],
    );
    server.decide(|call| match call.method.as_str() {
        "PUT" => Fate::Denied(403, "AccessDenied"),
        _ => Fate::Answered,
    });
    assert_found(
        &fleet,
        vec![
            plant(&["--store", "s3://digests"], "store", UNAVAILABLE, "403")
                .with(&keys)
                .with(&[endpoint]),
        ],
    );
}

#[test]
fn a_misconfigured_broker_is_found() {
    let fleet = Fleet::of(&["a/b"]);
    let url = shared_url();
    let wrong_password = url.replace("guest:guest", "guest:s3cret");
    let wrong_host = format!("{url}/no-such-vhost");
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("amqp://{}", listener.local_addr().unwrap())
    };
    let prefix = fresh_prefix();
    assert_found(
        &fleet,
        vec![
            plant(
                &["--broker-url", &wrong_password],
                "broker",
                UNAVAILABLE,
                "password",
            ),
            plant(
                &["--broker-url", &wrong_host],
                "broker",
                UNAVAILABLE,
                "no-such-vhost",
            ),
            plant(
                &["--broker-url", &nobody],
                "broker",
                UNAVAILABLE,
                "nobody listens there",
            ),
            plant(&["--broker-url", "http://rabbit"], "broker", USAGE, "amqp"),
            plant(
                &["--broker-url", &url, "--queue-prefix", &prefix],
                "options",
                OK,
                "else use s3://BUCKET",
            ),
            plant(
                &[
                    "--broker-url",
                    &url,
                    "--queue-prefix",
                    &prefix,
                    "--concurrency",
                    "3",
                ],
                "options",
                OK,
                "--concurrency is for",
            ),
        ],
    );
}

#[test]
fn a_misconfigured_machine_host_or_token_is_found() {
    let fleet = Fleet::of(&["a/b", "a/c"]);
    let authority = fleet.server.authority();
    let token = format!("{authority}=TOKEN");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let file = fleet.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("scratch");
    let elsewhere = fleet.path().join("elsewhere.json");
    let entry = |url: &str| {
        json!([{"owner": "a", "name": "b", "url": url, "pushedAt": "2026-01-01T00:00:00Z"}])
            .to_string()
    };
    fs::write(&elsewhere, entry("https://git.invalid/a/b")).unwrap();
    let elsewhere: &str = path(&elsewhere);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Kept open: it takes connections, and says nothing.
    let silent = listener.local_addr().unwrap().to_string();
    let mute = fleet.path().join("mute.json");
    fs::write(&mute, entry(&format!("http://{silent}/a/b"))).unwrap();
    assert_found(
        &fleet,
        vec![
            plant(
                &["--metrics-addr", &taken],
                "metrics",
                UNAVAILABLE,
                "choose another address or port",
            ),
            plant(
                &["--scratch", path(&below)],
                "scratch",
                UNAVAILABLE,
                "--scratch",
            ),
            plant(
                &["--max-fetch-bytes", "1TiB"],
                "scratch",
                OK,
                "lower either",
            ),
            plant(&["--stall", "10m"], "options", OK, "lower --stall"),
            plant(&[], "options", OK, "--fetch-proxy")
                .with(&[("HTTPS_PROXY", "http://u:s3cret@p")]),
            plant(
                &["--feed", elsewhere],
                "hosts",
                USAGE,
                "--allow-host git.invalid",
            ),
            plant(
                &["--feed", elsewhere, "--allow-host", "git.invalid"],
                "hosts",
                UNAVAILABLE,
                "cannot resolve git.invalid",
            ),
            plant(
                &[
                    "--feed",
                    path(&mute),
                    "--allow-host",
                    &silent,
                    "--stall",
                    "1s",
                ],
                "hosts",
                UNAVAILABLE,
                "no progress for 1 s",
            ),
            plant(&["--token-for", &token], "tokens", USAGE, "TOKEN"),
            plant(
                &["--token-for", "git.example=TOKEN"],
                "tokens",
                USAGE,
                "add --allow-host git.example",
            )
            .with(&[("TOKEN", "s3cret")]),
            plant(&[], "tokens", USAGE, "GITHUB_TOKEN is not a token")
                .with(&[("GITHUB_TOKEN", "s3cret and more")]),
        ],
    );
    fleet
        .server
        .fault_all(Fault::status(401).on(Kind::InfoRefs));
    assert_found(
        &fleet,
        vec![
            plant(
                &["--token-for", &token],
                "tokens",
                USAGE,
                "does not know 1 token",
            )
            .with(&[("TOKEN", "s3cret")]),
        ],
    );
    fleet.server.clear_faults();
    fleet.server.fault_all(Fault::status(503));
    assert_found(&fleet, vec![plant(&[], "hosts", UNAVAILABLE, "503")]);
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
