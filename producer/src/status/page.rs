//! A run's status as a page for people.

use std::time::Duration;

use common::run::documents::by_class;
use common::text::{counted, format_duration, thousands};

use super::observed::{RunState, Source, Status};
use crate::terminal::page::{Line, Page, Tone};

/// The bar's length where there is no screen to fill.
const BAR_WITHOUT_SCREEN: usize = 60;

/// Lays out the page in lines of at most `width` characters.
pub fn page(status: &Status, width: usize) -> Vec<Line> {
    let mut page = Page::new(width);
    head(&mut page, status);
    counts(&mut page, status);
    queue(&mut page, status);
    fleet(&mut page, status);
    for note in &status.notes {
        page.sentence(Tone::Bad, &format!("Note: {note}"));
    }
    page.into_lines()
}

fn count(page: &mut Page, name: &str, count: u64, remark: &str) {
    page.row(name, &format!("{:>9}  {remark}", thousands(count)));
}

fn head(page: &mut Page, status: &Status) {
    let elapsed = status.run.elapsed_seconds.map(duration);
    let elapsed = elapsed.as_deref().unwrap_or("a time unknown");
    let (state, tone) = match status.state {
        RunState::Running => (format!("running for {elapsed}"), Tone::Title),
        RunState::Closed => (format!("closed after {elapsed}"), Tone::Good),
        RunState::Stopped => (format!("stopped; began {elapsed} ago"), Tone::Bad),
    };
    let state = match (status.state, status.source) {
        (RunState::Stopped, Source::Summary | Source::Progress) => {
            format!("stopped after {elapsed}")
        }
        _ => state,
    };
    page.add(tone, &format!("Run {}: {state}", status.run.run_id));
    if let Some(feed) = &status.feed {
        page.add(Tone::Plain, &format!("Feed {feed}"));
    }
    page.add(Tone::Plain, "");
    // Rounded down, so that 100% is all of it.
    let done = status.run.done();
    let tenths = done
        .saturating_mul(1000)
        .checked_div(status.run.total_repos);
    let share = tenths.unwrap_or(1000) as f64 / 10.0;
    let numbers = format!(
        "{}/{} ({share:.1}%)",
        thousands(done),
        thousands(status.run.total_repos)
    );
    let length = match page.width() {
        usize::MAX => BAR_WITHOUT_SCREEN,
        width => width.saturating_sub(numbers.chars().count() + 2),
    };
    let tone = if status.run.open == 0 {
        Tone::Good
    } else {
        Tone::Title
    };
    page.add(
        tone,
        format!("{}  {numbers}", bar(share, length)).trim_start(),
    );
    if let Some(rate) = status.run.outcomes_per_minute {
        let eta = status.run.eta_seconds.map(duration);
        let eta = eta.as_deref().unwrap_or("unknown");
        page.add(
            Tone::Plain,
            &format!("{rate:.1} a minute over the last 5 minutes, ETA: {eta}"),
        );
    }
    page.add(Tone::Plain, "");
}

fn counts(page: &mut Page, status: &Status) {
    let rate = format!("hit rate {:.1}%", status.run.cache_hit_rate);
    count(page, "cached", status.run.cached, &rate);
    let unchanged = [
        (status.run.unmoved, "unmoved"),
        (status.run.unchanged, "unchanged"),
        (status.run.superseded, "superseded"),
    ];
    let unchanged: Vec<_> = unchanged
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, name)| format!("{} {name}", thousands(count)))
        .collect();
    count(
        page,
        "processed",
        status.run.processed,
        &unchanged.join(", "),
    );
    let mut classes = by_class(&status.run.failures_by_class);
    if status.run.failed_before > 0 {
        let known = thousands(status.run.failed_before);
        classes.push_str(&format!("; {known} failed before, not tried again"));
    }
    count(page, "failed", status.run.failed, &classes);
    let adopted = match status.run.adopted {
        0 => String::new(),
        adopted => format!("{} of earlier runs", counted(adopted, "job is", "jobs are")),
    };
    count(page, "open", status.run.open, &adopted);
}

fn queue(page: &mut Page, status: &Status) {
    if status.run.open == 0 {
        return;
    }
    for (name, jobs) in [
        ("  wait for a worker", status.waiting),
        ("  wait for a retry", status.waiting_retry),
        ("  in work or lost", status.in_work_or_lost),
    ] {
        if let Some(jobs) = jobs {
            count(page, name, jobs, "");
        }
    }
    if let (Some(repo), Some(age)) = (&status.run.oldest_open_repo, status.run.oldest_open_seconds)
    {
        page.row("oldest open job", &format!("{repo}, {}", duration(age)));
    }
}

fn fleet(page: &mut Page, status: &Status) {
    let seen = status
        .run
        .workers_seen
        .map(|seen| format!("{} seen in the last minute", thousands(seen)));
    let connected = status
        .workers_connected
        .map(|connected| format!("{} connected", thousands(connected)));
    let workers: Vec<_> = connected.into_iter().chain(seen).collect();
    if !workers.is_empty() {
        page.add(Tone::Plain, "");
        page.row("workers", &workers.join(", "));
    }
    match status.dead_letters {
        None => {}
        Some(0) => page.row("dead letters", "none"),
        Some(dead) => {
            let dead = thousands(dead);
            page.row("dead letters", &format!("{dead}, see `producer dead list`"));
        }
    }
    for pause in status.run.pauses() {
        page.sentence(Tone::Bad, &pause);
    }
    let idle = status.run.open > 0 && status.workers_connected == Some(0);
    if idle {
        page.add(
            Tone::Bad,
            "No worker is connected: start some with `worker run`.",
        );
    }
}

fn duration(seconds: u64) -> String {
    format_duration(Duration::from_secs(seconds))
}

/// Returns `length` characters, `share` percent of them full. Rounds down, so that a full bar is done.
fn bar(share: f64, length: usize) -> String {
    // A share is 0 to 100, so this is 0 to `length`.
    let full = (share * length as f64 / 100.0).floor() as usize;
    let full = full.min(length);
    "█".repeat(full) + &"░".repeat(length - full)
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;
    use common::ids::RunId;
    use common::run::documents::{PausedHost, PausedWorkers, RunSummary};
    use common::run::view::RunSnapshot;
    use time::macros::datetime;

    use super::*;
    use crate::terminal::page::text;

    fn status() -> Status {
        let summary = RunSummary {
            run_id: RunId::try_from("run-1".to_owned()).unwrap(),
            closed: false,
            total_repos: 21_000,
            cached: 18_000,
            processed: 1_500,
            unmoved: 1_200,
            unchanged: 3,
            superseded: 0,
            adopted: 12,
            failed: 40,
            failed_before: 0,
            cache_hit_rate: 85.7,
            elapsed_seconds: 3720.0,
            elapsed_formatted: String::new(),
            failures_by_class: [(FaultKind::Transient, 10), (FaultKind::Gone, 30)].into(),
            bytes_stored: 0,
            bytes_fetched: 0,
            failures: Vec::new(),
            renamed: Vec::new(),
            open: vec![String::new(); 1460],
            paused: Vec::new(),
            hosts_paused: Vec::new(),
        };
        let run = RunSnapshot {
            outcomes_per_minute: Some(24.3),
            eta_seconds: Some(3600),
            oldest_open_repo: Some("alphagov/whitehall".to_owned()),
            oldest_open_seconds: Some(750),
            workers_seen: Some(39),
            ..RunSnapshot::from(&summary)
        };
        Status {
            state: RunState::Running,
            source: Source::Ledger,
            feed: Some("https://example.org/repos.json".to_owned()),
            run,
            waiting: Some(1400),
            waiting_retry: Some(20),
            in_work_or_lost: Some(40),
            dead_letters: Some(3),
            workers_connected: Some(40),
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_page_says_it_all() {
        let expected = "\
Run run-1: running for 1h 2m
Feed https://example.org/repos.json

█████████████████████████████████████████████████████░░░░  19,540/21,000 (93.0%)
24.3 a minute over the last 5 minutes, ETA: 1h

  cached                   18,000  hit rate 85.7%
  processed                 1,500  1,200 unmoved, 3 unchanged
  failed                       40  10 transient, 30 gone
  open                      1,460  12 jobs are of earlier runs
    wait for a worker       1,400
    wait for a retry           20
    in work or lost            40
  oldest open job       alphagov/whitehall, 12m 30s

  workers               40 connected, 39 seen in the last minute
  dead letters          3, see `producer dead list`
";
        assert_eq!(text(&page(&status(), 80)), expected);
    }

    #[test]
    fn a_closed_run_is_short_and_green() {
        let mut closed = Status {
            state: RunState::Closed,
            source: Source::Summary,
            workers_connected: None,
            dead_letters: None,
            ..status()
        };
        closed.run.open = 0;
        closed.run.outcomes_per_minute = None;
        closed.run.workers_seen = None;
        let page = page(&closed, 80);
        assert_eq!(page[0].text, "Run run-1: closed after 1h 2m");
        let tones = [page[0].tone, page[3].tone];
        assert_eq!(tones, [Tone::Good, Tone::Good]);
        assert!(
            page[3].text.ends_with("█  21,000/21,000 (100.0%)"),
            "{page:#?}"
        );
        assert_eq!(page.len(), 9, "{page:#?}");
    }

    #[test]
    fn a_hundred_percent_is_all_of_it() {
        let numbers = |open| {
            let mut status = status();
            status.run.open = open;
            page(&status, 80)[3].text.clone()
        };
        assert!(numbers(1).ends_with(" 20,999/21,000 (99.9%)"));
        assert!(numbers(0).ends_with(" 21,000/21,000 (100.0%)"));
    }

    #[test]
    fn nobody_at_work_is_said() {
        let idle = Status {
            workers_connected: Some(0),
            ..status()
        };
        let said = |status| text(&page(status, 80)).contains("start some");
        assert!(said(&idle));
        assert!(!said(&status()));
    }

    #[test]
    fn pauses_are_shown() {
        let mut status = status();
        status.run.paused = vec![PausedWorkers {
            reason: "access denied to bucket x".to_owned(),
            workers: 3,
        }];
        status.run.hosts_paused = vec![PausedHost {
            host: "github.com".to_owned(),
            until: datetime!(2026-11-23 15:05 +1),
        }];
        let page = text(&page(&status, 80));
        let ending = "3 workers paused: access denied to bucket x\ngithub.com rate-limited until 14:05 UTC\n";
        assert!(page.ends_with(ending), "{page}");
    }

    #[test]
    fn no_line_is_too_wide_or_tells_the_terminal_anything() {
        let mut status = status();
        status.feed = Some(format!("\u{1b}]0;owned\u{7}{}", "x".repeat(300)));
        status.notes = vec!["first\r\nsecond".to_owned()];
        for width in [0, 1, 5, 29, 31, 40, 80, 200] {
            for line in page(&status, width) {
                assert!(line.text.chars().count() <= width, "{width}: {line:?}");
                assert!(!line.text.contains(char::is_control), "{line:?}");
            }
        }
        assert!(text(&page(&status, 80)).contains("first\\r\\nsecond"));
    }

    #[test]
    fn a_note_is_told_to_its_end() {
        let mut status = status();
        let note = "nothing is known of the queues: start the broker";
        status.notes = vec![note.to_owned()];
        let page = text(&page(&status, 30));
        let lines: Vec<_> = page.lines().rev().take(2).collect();
        assert_eq!(
            lines,
            [
                "      queues: start the broker",
                "Note: nothing is known of the"
            ]
        );
    }

    #[test]
    fn a_bar_is_full_only_when_all_is_done() {
        assert_eq!(bar(0.0, 4), "░░░░");
        assert_eq!(bar(99.9, 4), "███░");
        assert_eq!(bar(100.0, 4), "████");
        assert_eq!(bar(50.0, 0), "");
    }
}
