//! What a run says, line by line: for programs, for people, and on a terminal.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::Stdio;
use std::time::Duration;

use common::exit::TOO_MANY_FAILED;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Map, Value};
use strum::VariantArray;
use testing::git_server::Fault;
use testing::kernel;
use worker::slot::confine::Wall;

use crate::fleet::{Fleet, PUSHED, in_clean_environment};

/// `count` repositories that are all the same one.
fn many(count: usize) -> Fleet {
    let fleet = Fleet::new();
    fleet.small_repository("many/r000");
    let repos: Vec<_> = (0..count).map(|i| format!("many/r{i:03}")).collect();
    for repo in &repos[1..] {
        symlink("r000.git", fleet.repositories().join(format!("{repo}.git"))).unwrap();
    }
    let entries: Vec<_> = repos.iter().map(|r| fleet.entry(r, PUSHED)).collect();
    fleet.write_feed(&entries);
    fleet
}

/// The members of an object, in the order in which they stand there.
fn members(line: &str) -> Vec<String> {
    let mut members = Vec::new();
    let (mut depth, mut quoted, mut escaped) = (0, false, false);
    let mut text = String::new();
    for c in line.chars() {
        if quoted {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => quoted = false,
                _ => text.push(c),
            }
            continue;
        }
        match c {
            '"' => {
                quoted = true;
                text.clear();
            }
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            // Down to the context's members; the metadata's have no order.
            ':' if depth <= 2 => members.push(text.clone()),
            _ => {}
        }
    }
    members
}

/// `Processed 100/201 (49.8%), cache hit: 0.0%, elapsed: 3s, ETA: 4s` with the times taken out.
fn without_times(sentence: &str) -> String {
    let (start, times) = sentence.split_once(", elapsed: ").unwrap();
    let (elapsed, eta) = times.split_once(", ETA: ").unwrap();
    let duration = |text: &str| {
        text.split(' ')
            .all(|part| part.len() > 1 && part.ends_with(['h', 'm', 's']))
    };
    assert!(duration(elapsed), "{sentence}");
    assert!(duration(eta) || eta == "unknown", "{sentence}");
    start.to_owned()
}

/// For programs: every line has the prescribed shape, progress comes with every hundred, and the
/// last line is the summary.
#[test]
fn every_line_is_json_of_the_prescribed_shape() {
    let fleet = many(201);
    fs::remove_file(fleet.repositories().join("many/r150.git")).unwrap();
    let run = fleet.run(&["--concurrency", "4"]).with(0);
    assert_eq!(run.stderr, "");
    for line in run.stdout.lines() {
        assert_eq!(
            members(line),
            [
                "timestamp",
                "level",
                "message",
                "context",
                "operation",
                "metadata"
            ],
            "{line}"
        );
        let value: Value = serde_json::from_str(line).unwrap();
        let timestamp = value["timestamp"].as_str().unwrap();
        let shape: String = timestamp
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
        assert!(["info", "warn", "error"].contains(&value["level"].as_str().unwrap()));
        assert!(value["context"]["metadata"].is_object(), "{line}");
    }
    let progress: Vec<_> = run
        .messages("progress")
        .iter()
        .map(|s| without_times(s))
        .collect();
    assert_eq!(
        progress,
        [
            "Processed 100/201 (49.8%), cache hit: 0.0%",
            "Processed 200/201 (99.5%), cache hit: 0.0%"
        ]
    );
    assert_eq!(
        run.sentence(),
        "Pipeline complete: 201 total, 0 cached (0.0%), 200 processed, 1 failed"
    );
    let summary = run.summary();
    let has: &Map<String, Value> = summary.as_object().unwrap();
    for key in [
        "total_repos",
        "cached",
        "processed",
        "failed",
        "cache_hit_rate",
        "elapsed_seconds",
        "elapsed_formatted",
        "run_id",
        "failures_by_class",
        "bytes_stored",
    ] {
        assert!(has.contains_key(key), "{key}");
    }
    assert_eq!(summary["failures_by_class"]["gone"], 1);
    assert!(summary["elapsed_seconds"].is_number());
    // Nothing is said twice.
    let mut messages: Vec<_> = run
        .log()
        .iter()
        .map(|line| line["message"].to_string())
        .collect();
    let count = messages.len();
    messages.sort();
    messages.dedup();
    assert_eq!(messages.len(), count, "{}", run.stdout);

    // What is cached counts towards the hundreds too, but nothing is left to report on.
    let again = fleet.run(&["--exclude", "many/r150"]).with(0);
    assert_eq!(again.messages("progress"), [""; 0]);
    assert_eq!(
        again.messages("cache-check")[1],
        "Cache hit rate: 100.0% (200/200)"
    );
}

/// For people: time and sentence.
#[test]
fn lines_for_people_are_sentences() {
    let fleet = Fleet::of(&["p/a", "p/b"]);
    fleet.server.fault("p/b", Fault::status(404));
    // Half of it failed.
    let run = fleet.run(&["--log", "human"]).with(TOO_MANY_FAILED);
    let sentences: Vec<_> = run
        .stdout
        .lines()
        .map(|line| {
            let (time, sentence) = line.split_once(' ').unwrap();
            assert_eq!(time.len(), "12:34:56".len(), "{line}");
            sentence
        })
        .collect();
    assert!(
        sentences.contains(&"Cache hit rate: 0.0% (0/2)"),
        "{sentences:?}"
    );
    let at_end = |back: usize| sentences[sentences.len() - back];
    assert!(at_end(4).contains("Digests: "), "{sentences:?}");
    assert!(at_end(3).contains("--max-failures"), "{sentences:?}");
    let failed = sentences.iter().filter(|line| line.contains("p/b"));
    let failed: Vec<_> = failed.collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(
        failed[0].starts_with("WARN p/b failed: gone: "),
        "{failed:?}"
    );
    assert_eq!(at_end(2), "WARN 1 failed: 1 gone");
    assert!(
        at_end(1)
            .starts_with("Pipeline complete: 2 total, 0 cached (0.0%), 1 processed, 1 failed,"),
        "{sentences:?}"
    );
}

/// A terminal as far as the bar needs one: what is on it in the end, and every picture of the
/// bottom line on the way.
#[derive(Default)]
struct Screen {
    rows: Vec<Vec<char>>,
    row: usize,
    column: usize,
    seen: Vec<String>,
}

impl Screen {
    fn show(output: &str) -> Self {
        let mut screen = Self::default();
        let mut chars = output.chars();
        while let Some(c) = chars.next() {
            match c {
                '\r' => screen.column = 0,
                '\n' => screen.row += 1,
                '\u{1b}' => {
                    assert_eq!(chars.next(), Some('['), "{output:?}");
                    let mut number = String::new();
                    let command = loop {
                        match chars.next().unwrap() {
                            c if c.is_ascii_digit() || ";?".contains(c) => number.push(c),
                            c => break c,
                        }
                    };
                    let count = number.parse().unwrap_or(1);
                    match command {
                        'A' => screen.row = screen.row.saturating_sub(count),
                        'B' => screen.row += count,
                        'K' | 'J' => {
                            let column = if number == "2" { 0 } else { screen.column };
                            screen.note();
                            screen.line().truncate(column);
                        }
                        // Colours, the cursor's looks.
                        'm' | 'h' | 'l' => {}
                        'G' => screen.column = count - 1,
                        other => panic!("what is {other:?} in {output:?}"),
                    }
                }
                c => {
                    let column = screen.column;
                    let line = screen.line();
                    line.resize(line.len().max(column + 1), ' ');
                    line[column] = c;
                    screen.column += 1;
                }
            }
        }
        screen.note();
        screen
    }

    fn line(&mut self) -> &mut Vec<char> {
        let length = self.rows.len().max(self.row + 1);
        self.rows.resize(length, Vec::new());
        &mut self.rows[self.row]
    }

    fn note(&mut self) {
        let line = self.line().iter().collect();
        self.seen.push(line);
    }

    fn lines(&self) -> Vec<String> {
        let lines = self.rows.iter().map(|row| row.iter().collect::<String>());
        let lines = lines.map(|line| line.trim_end().to_owned());
        lines.filter(|line| !line.is_empty()).collect()
    }
}

/// On a terminal: a bar while it runs, sentences above it that it does not tear, and in the end
/// the sentences alone.
#[test]
fn a_terminal_shows_a_bar_that_does_not_tear_the_lines() {
    let fleet = many(120);
    fleet.server.fault("many/r003", Fault::status(404));
    fleet
        .server
        .fault("many/r004", Fault::Latency(Duration::from_millis(1500)));

    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let terminal = ioctl_tiocgptpeer(&controller, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let size = Winsize {
        ws_row: 40,
        ws_col: 180,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&terminal, size).unwrap();
    let mut command = in_clean_environment(fleet.producer(&["--concurrency", "3"]));
    command
        .env("TERM", "xterm")
        .stdout(Stdio::from(terminal.try_clone().unwrap()))
        .stderr(Stdio::from(terminal));
    let mut child = command.spawn().unwrap();
    // It holds the terminal's other end, and reading would never end.
    drop(command);
    let mut output = Vec::new();
    // Ends with an error when the last writer is gone.
    File::from(controller).read_to_end(&mut output).ok();
    let status = child.wait().unwrap();
    let output = String::from_utf8(output).unwrap();
    assert!(status.success(), "{output}");

    let screen = Screen::show(&output);
    let lines = screen.lines();
    for line in &lines {
        let (time, sentence) = line.split_once(' ').unwrap_or_default();
        let shape = time.replace(|c: char| c.is_ascii_digit(), "0");
        assert_eq!(shape, "00:00:00", "torn: {line:?} in {lines:#?}");
        assert!(!sentence.contains(['█', '░']), "torn: {line:?}");
    }
    let with = |part: &str| lines.iter().filter(|line| line.contains(part)).count();
    assert_eq!(
        with("Processed 100/120 (83.3%), cache hit: 0.0%, "),
        1,
        "{lines:#?}"
    );
    assert_eq!(with("many/r003 failed: gone: "), 1, "{lines:#?}");
    assert_eq!(
        with("Failed: many/r003 "),
        0,
        "it has been said: {lines:#?}"
    );
    assert!(
        lines
            .last()
            .unwrap()
            .contains("Pipeline complete: 120 total, "),
        "{lines:#?}"
    );
    // The bar was there, and with it how many failed.
    let bars: Vec<_> = screen
        .seen
        .iter()
        .filter(|line| line.contains('█'))
        .collect();
    assert!(
        bars.iter().any(|bar| bar.contains(", failed: 1")),
        "{bars:#?}"
    );
    assert!(
        bars.iter()
            .any(|bar| bar.contains("/120 (") && bar.contains(", ETA: ")),
        "{bars:#?}"
    );
}

/// `producer run | head -1`: whoever read the log has seen enough; the run has not.
#[test]
fn a_log_that_nobody_reads_any_more_is_no_matter() {
    let fleet = Fleet::of(&["log/a", "log/b"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = fleet.producer(&[]);
    let output = command.stdout(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(fleet.stored(), ["log/a", "log/b"]);
}

/// What the kernel cannot do is said once, and the work is done without.
#[test]
fn missing_walls_are_told_once() {
    let lacks = [kernel::LANDLOCK, kernel::SECCOMP];
    let (fleet, run) = kernel::without(&lacks, || {
        let fleet = Fleet::of(&["some/one", "some/two"]);
        let run = fleet.run(&["--log", "json"]).with(0);
        (fleet, run)
    });
    assert_eq!(fleet.stored().len(), 2);
    let told: Vec<_> = run
        .log()
        .into_iter()
        .filter(|line| line.to_string().contains("not confined"))
        .collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["level"], "warn");
    let said = told[0].to_string();
    for wall in Wall::VARIANTS {
        assert!(
            said.contains(wall.as_ref()) && said.contains(wall.without()),
            "{said}"
        );
    }
}
