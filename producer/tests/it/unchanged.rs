//! A feed whose server says that it has not changed.

use std::fs;
use std::sync::{Arc, Mutex};

use testing::http_server::{HttpServer, Request, Response};

use crate::fleet::{Ended, Fleet, PUSHED_LATER, Running, bare_producer};

/// A feed's server that knows what it said.
struct FeedServer {
    server: HttpServer,
    body: Arc<Mutex<String>>,
}

impl FeedServer {
    /// Serves the fleet's feed file, as GitHub's pages do.
    fn start(fleet: &Fleet) -> Self {
        let body = Arc::new(Mutex::new(fs::read_to_string(fleet.feed_file()).unwrap()));
        let served = Arc::clone(&body);
        let server = HttpServer::start(move |request: &Request| {
            let body = served.lock().unwrap().clone();
            let etag = format!("\"{}\"", common::text::sha256(&body));
            if request.header("if-none-match") == Some(&etag) {
                return Response::new(304, "");
            }
            Response::new(200, body).header("etag", etag)
        });
        Self { server, body }
    }

    fn serve(&self, fleet: &Fleet) {
        *self.body.lock().unwrap() = fs::read_to_string(fleet.feed_file()).unwrap();
    }

    fn run(&self, fleet: &Fleet, arguments: &[&str]) -> Ended {
        let url = format!("{}/repos.json", self.server.url());
        let mut command = bare_producer();
        command.arg("run").args(fleet.arguments(arguments));
        // The last one counts for neither, so it takes the place of the file.
        let all: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let file = fleet.feed_file();
        let mut command = bare_producer();
        command.args(
            all.iter()
                .map(|argument| match argument.as_os_str() == file.as_os_str() {
                    true => url.as_ref(),
                    false => argument.as_os_str(),
                }),
        );
        Running::start(&mut command).wait().with(0)
    }
}

fn counts(run: &Ended) -> [u64; 4] {
    let summary = run.summary();
    ["total_repos", "cached", "processed", "failed"].map(|name| summary[name].as_u64().unwrap())
}

fn is_short(run: &Ended) -> bool {
    let said = run.messages("feed");
    said.iter().any(|line| line.contains("unchanged since run"))
}

#[test]
fn nothing_is_looked_at_while_there_is_nothing_to_do() {
    let fleet = Fleet::of(&["a/b", "a/c"]);
    let mut entries = fleet.entries(&["a/b", "a/c", "a/gone"]);
    fleet.write_feed(&entries);
    let server = FeedServer::start(&fleet);
    let run = |arguments: &[&str]| {
        let ended = server.run(&fleet, &[&["--max-failures", "100%"], arguments].concat());
        (is_short(&ended), counts(&ended))
    };
    // What failed now, may not fail again; what is remembered, does.
    assert_eq!(run(&[]), (false, [3, 0, 2, 1]));
    assert_eq!(run(&[]), (false, [3, 2, 0, 1]));
    let catalog = fs::read(fleet.store_folder().join("catalog.jsonl.gz")).unwrap();
    let requests = fleet.requests();
    for _ in 0..2 {
        assert_eq!(run(&[]), (true, [3, 2, 0, 1]));
    }
    assert_eq!(fleet.requests(), requests);
    let path = fleet.store_folder().join("catalog.jsonl.gz");
    assert_eq!(fs::read(path).unwrap(), catalog);
    let sent = server.server.requests();
    let asked = sent
        .iter()
        .map(|request| request.header("if-none-match").is_some());
    assert_eq!(asked.collect::<Vec<_>>(), [false, false, true, true]);

    // Whoever wants to look, looks; and so does the first run after one over a part.
    assert_eq!(run(&["--check", "head"]), (false, [3, 2, 0, 1]));
    assert_eq!(run(&["--only", "a/b"]), (false, [1, 1, 0, 0]));
    assert_eq!(run(&[]), (false, [3, 2, 0, 1]));
    assert_eq!(run(&[]), (true, [3, 2, 0, 1]));

    // What changed is done, and what is withdrawn is no longer counted.
    entries[0] = fleet.entry("a/b", PUSHED_LATER);
    fleet.write_feed(&entries);
    server.serve(&fleet);
    assert_eq!(run(&[]), (false, [3, 1, 1, 1]));
    let mut withdraw = bare_producer();
    withdraw
        .args(["withdraw", "a/c", "--store"])
        .arg(fleet.store_folder());
    Running::start(&mut withdraw).wait().with(0);
    assert_eq!(run(&[]), (false, [2, 1, 0, 1]));
}
