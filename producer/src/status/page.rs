//! A run's status as a page for people.

use std::time::Duration;

use common::run::documents::by_class;
use common::text::printable;
use common::text::{format_duration, thousands};

use super::observed::{RunState, Source, Status};

/// How a line looks on a terminal that can show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// As everything else.
    Plain,
    /// To be seen first.
    Title,
    /// All is well.
    Good,
    /// Something is not.
    Bad,
}

/// A line of the page, without control characters, and no wider than asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What it says.
    pub text: String,
    /// How it looks.
    pub look: Look,
}

/// The widest bar that is still taken in at a glance.
const LONGEST_BAR: usize = 60;

/// The page, in lines of at most `width` characters.
pub fn page(status: &Status, width: usize) -> Vec<Line> {
    let mut page = Page {
        lines: Vec::new(),
        width,
    };
    page.head(status);
    page.counts(status);
    page.queue(status);
    page.fleet(status);
    for note in &status.notes {
        page.sentence(Look::Bad, &format!("Note: {note}"));
    }
    page.lines
}

/// The page as text, a line each.
pub fn text(lines: &[Line]) -> String {
    lines.iter().map(|line| line.text.clone() + "\n").collect()
}

struct Page {
    lines: Vec<Line>,
    width: usize,
}

impl Page {
    fn add(&mut self, look: Look, text: &str) {
        let text = cut(&printable(text), self.width);
        self.lines.push(Line { text, look });
    }

    /// On as many lines as it takes: what to do comes at the end of a sentence.
    fn sentence(&mut self, look: Look, text: &str) {
        const INDENT: &str = "      ";
        let text = printable(text);
        let mut line = String::new();
        for word in text.split(' ') {
            let longer = line.chars().count() + 1 + word.chars().count();
            if longer > self.width && line.trim() != "" {
                self.add(look, &line);
                line = INDENT.to_owned() + word;
            } else {
                line += if line.is_empty() { "" } else { " " };
                line += word;
            }
        }
        self.add(look, &line);
    }

    fn row(&mut self, name: &str, value: &str) {
        self.add(Look::Plain, format!("  {name:<22}{value}").trim_end());
    }

    fn count(&mut self, name: &str, count: u64, remark: &str) {
        self.row(name, &format!("{:>9}  {remark}", thousands(count)));
    }

    fn head(&mut self, status: &Status) {
        let elapsed = status.run.elapsed_seconds.map(duration);
        let elapsed = elapsed.as_deref().unwrap_or("a time unknown");
        let (state, look) = match status.state {
            RunState::Running => (format!("running for {elapsed}"), Look::Title),
            RunState::Closed => (format!("closed after {elapsed}"), Look::Good),
            RunState::Stopped => (format!("stopped; began {elapsed} ago"), Look::Bad),
        };
        let state = match (status.state, status.source) {
            (RunState::Stopped, Source::Summary) => format!("stopped after {elapsed}"),
            _ => state,
        };
        self.add(look, &format!("Run {}: {state}", status.run.run_id));
        if let Some(feed) = &status.feed {
            self.add(Look::Plain, &format!("Feed {feed}"));
        }
        self.add(Look::Plain, "");
        // Rounded down, so that 100% is all of it.
        let done = status.run.done();
        let tenths = done
            .saturating_mul(1000)
            .checked_div(status.run.total_repos);
        let share = tenths.unwrap_or(1000) as f64 / 10.0;
        let length = LONGEST_BAR.min(self.width.saturating_sub(30));
        let numbers = format!(
            "{}/{} ({share:.1}%)",
            thousands(done),
            thousands(status.run.total_repos)
        );
        let look = if status.run.open == 0 {
            Look::Good
        } else {
            Look::Title
        };
        self.add(
            look,
            format!("{}  {numbers}", bar(share, length)).trim_start(),
        );
        if let Some(rate) = status.run.outcomes_per_minute {
            let eta = status.run.eta_seconds.map(duration);
            let eta = eta.as_deref().unwrap_or("unknown");
            self.add(
                Look::Plain,
                &format!("{rate:.1} a minute over the last 5 minutes, ETA: {eta}"),
            );
        }
        self.add(Look::Plain, "");
    }

    fn counts(&mut self, status: &Status) {
        let rate = format!("hit rate {:.1}%", status.run.cache_hit_rate);
        self.count("cached", status.run.cached, &rate);
        let unchanged = [
            (status.run.unchanged, "unchanged"),
            (status.run.superseded, "superseded"),
        ];
        let unchanged: Vec<_> = unchanged
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, name)| format!("{} {name}", thousands(count)))
            .collect();
        self.count("processed", status.run.processed, &unchanged.join(", "));
        let classes = by_class(&status.run.failures_by_class);
        self.count("failed", status.run.failed, &classes);
        let adopted = match status.run.adopted {
            0 => String::new(),
            adopted => format!("{} jobs are of earlier runs", thousands(adopted)),
        };
        self.count("open", status.run.open, &adopted);
    }

    fn queue(&mut self, status: &Status) {
        if status.run.open == 0 {
            return;
        }
        for (name, count) in [
            ("  wait for a worker", status.waiting),
            ("  wait for a retry", status.waiting_retry),
            ("  in work or lost", status.in_work_or_lost),
        ] {
            if let Some(count) = count {
                self.count(name, count, "");
            }
        }
        if let (Some(repo), Some(age)) =
            (&status.run.oldest_open_repo, status.run.oldest_open_seconds)
        {
            self.row("oldest open job", &format!("{repo}, {}", duration(age)));
        }
    }

    fn fleet(&mut self, status: &Status) {
        let seen = status
            .run
            .workers_seen
            .map(|seen| format!("{} seen in the last minute", thousands(seen)));
        let connected = status
            .workers_connected
            .map(|connected| format!("{} connected", thousands(connected)));
        let workers: Vec<_> = connected.into_iter().chain(seen).collect();
        if !workers.is_empty() {
            self.add(Look::Plain, "");
            self.row("workers", &workers.join(", "));
        }
        match status.dead_letters {
            None => {}
            Some(0) => self.row("dead letters", "none"),
            Some(dead) => {
                let dead = thousands(dead);
                self.row("dead letters", &format!("{dead}, see `producer dead list`"));
            }
        }
        for pause in status.run.pauses() {
            self.sentence(Look::Bad, &pause);
        }
        let idle = status.run.open > 0 && status.workers_connected == Some(0);
        if idle {
            self.add(
                Look::Bad,
                "No worker is connected: start some with `worker run`.",
            );
        }
    }
}

fn duration(seconds: u64) -> String {
    format_duration(Duration::from_secs(seconds))
}

/// `length` characters of which `share` percent are full. Full only when all is done.
fn bar(share: f64, length: usize) -> String {
    // A share is 0 to 100, so this is 0 to `length`.
    let full = (share * length as f64 / 100.0).floor() as usize;
    let full = full.min(length);
    "█".repeat(full) + &"░".repeat(length - full)
}

/// The text, or as much of it as fits with a sign that there is more.
pub fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(width.saturating_sub(1)).collect();
    if width > 0 {
        cut.push('…');
    }
    cut
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;
    use common::ids::RunId;
    use common::run::documents::{PausedHost, PausedWorkers, RunSummary};
    use common::run::view::RunSnapshot;
    use time::macros::datetime;

    use super::*;

    fn status() -> Status {
        let summary = RunSummary {
            run_id: RunId::try_from("run-1".to_owned()).unwrap(),
            closed: false,
            total_repos: 21_000,
            cached: 18_000,
            processed: 1_500,
            unchanged: 3,
            superseded: 0,
            adopted: 12,
            failed: 40,
            cache_hit_rate: 85.7,
            elapsed_seconds: 3720.0,
            elapsed_formatted: String::new(),
            failures_by_class: [(FaultKind::Transient, 10), (FaultKind::Gone, 30)].into(),
            bytes_stored: 0,
            bytes_fetched: 0,
            failures: Vec::new(),
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

██████████████████████████████████████████████░░░░  19,540/21,000 (93.0%)
24.3 a minute over the last 5 minutes, ETA: 1h

  cached                   18,000  hit rate 85.7%
  processed                 1,500  3 unchanged
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
        let looks = [page[0].look, page[3].look];
        assert_eq!(looks, [Look::Good, Look::Good]);
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
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "ab…");
    }
}
