//! How long a feed of 24,500 entries takes to read: `cargo run --release --example feed_speed`,
//! or with the path of a feed to read that.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::time::Instant;

const ENTRIES: usize = 24_500;
const ROUNDS: usize = 9;

fn main() -> anyhow::Result<()> {
    let bytes = match std::env::args_os().nth(1) {
        Some(path) => std::fs::read(path)?,
        None => made_up().into_bytes(),
    };
    let mut seconds = Vec::new();
    for round in 0..ROUNDS {
        let started = Instant::now();
        let feed = producer::feed::parse("feed".to_owned(), &bytes, None)?;
        seconds.push(started.elapsed().as_secs_f64());
        if round == 0 {
            println!(
                "{} bytes, {} repositories, {} invalid, {} repeated",
                bytes.len(),
                feed.repositories.len(),
                feed.invalid.len(),
                feed.repeated.len()
            );
        }
    }
    seconds.sort_by(f64::total_cmp);
    println!(
        "parse, SHA-256 included: median {:.1} ms, fastest {:.1} ms of {ROUNDS}",
        seconds[ROUNDS / 2] * 1e3,
        seconds[0] * 1e3
    );
    Ok(())
}

/// Entries with the fields of the real feed, and descriptions of its usual length.
fn made_up() -> String {
    let entries: Vec<_> = (0..ENTRIES)
        .map(|i| {
            format!(
                r#"{{"owner":"example-org-{}","name":"service-{i}","description":"A service that does one of the {i} things a department does — with caf\u00e9","url":"https://github.com/example-org-{}/service-{i}","archived":{},"license":{{"key":"mit","name":"MIT License","spdxId":"MIT"}},"stargazersCount":{},"language":"Ruby","forksCount":4,"openIssuesCount":2,"createdAt":"2019-03-04T10:00:00Z","updatedAt":"2026-10-01T08:00:00Z","pushedAt":"2026-10-01T08:00:{:02}Z"}}"#,
                i % 300,
                i % 300,
                i % 5 == 0,
                i % 1000,
                i % 60
            )
        })
        .collect();
    format!("[{}]", entries.join(",\n"))
}
