//! What a run reports: cache check, progress, summary.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use common::broker::{Event, LedgerEntry};
use common::fault::FaultKind;
use common::outcome::{Outcome, OutcomeRecord};
use common::run::documents::{Failure, RunSummary, pauses};
use common::run::view::RunView;
use common::text::{counted, format_duration, percent, thousands};
use time::OffsetDateTime;
use tracing::{error, info, warn};

use crate::cache::{Checked, counts};
use crate::terminal::bar::Bar;
use crate::withdrawals::{Decision, WithdrawConfig};

/// Settled repositories from one progress sentence to the next.
const EVERY_REPOS: u64 = 100;
/// Longest silence while anything is open.
const EVERY: Duration = Duration::from_secs(30);
/// The bar moves at least this often, so that its elapsed time goes on.
const BAR_TICK: Duration = Duration::from_secs(1);
/// The bar moves no more often than this.
const BAR_PAUSE: Duration = Duration::from_millis(100);
/// How many failed repositories are logged one by one; the run's summary.json has them all.
const FAILURES_LISTED: usize = 1000;
/// A class with fewer failures needs no list of its commonest reasons.
const MANY: u64 = 4;
/// How many of the commonest reasons are logged.
const REASONS: usize = 3;
/// How many open ones.
const OPEN_LISTED: usize = 20;

/// Logs what the cache said: `Cache hit rate: 92.3% (18,450/20,000)`, and the count of each reason.
pub fn cache_checked(checked: &[Checked]) {
    let counts = counts(checked);
    let words: Vec<_> = counts
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(reason, count)| format!("{} {reason}", thousands(*count)))
        .collect();
    let words = match words.is_empty() {
        true => "nothing to look up".to_owned(),
        false => words.join(", "),
    };
    info!(
        operation = "cache-check",
        reasons_json = json(&counts),
        "Cache check: {words}"
    );
    let cached = checked.iter().filter(|checked| checked.is_cached()).count() as u64;
    let hit_rate = percent(cached, checked.len() as u64);
    info!(
        operation = "cache-check",
        cache_hit_rate = hit_rate,
        cached,
        checked = checked.len(),
        "Cache hit rate: {hit_rate:.1}% ({}/{})",
        thousands(cached),
        thousands(checked.len() as u64)
    );
}

/// Logs for each repository why it will be digested or not (`--explain`).
pub fn explain(checked: &[Checked]) {
    for checked in checked {
        info!(
            operation = "explain",
            repo = checked.entry.repo.to_string(),
            reason = checked.reason.as_ref(),
            "{checked}"
        );
    }
}

/// Logs what a run would do, and the summary that it would end with if every job went well.
pub fn dry_run(view: &mut RunView, checked: &[Checked], now: OffsetDateTime) {
    for checked in checked.iter().filter(|checked| checked.has_job()) {
        let (entry, reason) = (&checked.entry, checked.reason);
        info!(
            operation = "dry-run",
            repo = entry.repo.to_string(),
            reason = reason.as_ref(),
            "[DRY RUN] Would process {}: {reason}",
            entry.repo
        );
        let (key, run) = (checked.key(), view.run().clone());
        let record = OutcomeRecord::without_work(key, run, Outcome::Processed, "");
        view.apply(&LedgerEntry {
            at: now,
            event: Event::Outcome(record),
        });
    }
    let summary = view.summary(now);
    list_failures(&summary.failures.iter().collect::<Vec<_>>(), "");
    info!(
        operation = "dry-run",
        summary_json = json(&summary),
        "[DRY RUN] {}",
        summary.sentence()
    );
}

/// Logs what a closed run withdrew, and what it held back.
pub fn withdrawn(decision: &Decision, config: &WithdrawConfig) {
    for repo in decision.withdraw.iter().take(FAILURES_LISTED) {
        let why = decision
            .after
            .get(repo)
            .map(|known| known.reason.sentence());
        let why = why.unwrap_or("it left");
        info!(
            operation = "withdraw",
            repo = repo.to_string(),
            "Withdrawn: {repo}: {why}; kept below withdrawn/ for {}",
            format_duration(config.withdrawn_keep)
        );
    }
    if let Some(more) = more_than(decision.withdraw.len(), FAILURES_LISTED) {
        info!(operation = "withdraw", "Withdrawn: {more} more");
    }
    if !decision.delete.is_empty() {
        info!(
            operation = "withdraw",
            deleted = decision.delete.len(),
            "Deleted: {}",
            counted(
                decision.delete.len() as u64,
                "withdrawn digest",
                "withdrawn digests"
            )
        );
    }
    if let Some(too_many) = decision.too_many {
        error!(
            operation = "withdraw",
            too_many,
            "{} digests would be withdrawn at once, more than --withdraw-limit {} % allows, so none was: \
             look whether the feed is whole, or raise the limit",
            thousands(too_many as u64),
            config.withdraw_limit
        );
    }
}

/// Logs how a run ended: its failed repositories, their classes, then the prescribed last line.
///
/// `told` are repositories whose failure is in this log already.
pub fn completed(summary: &RunSummary, told: &HashSet<String>) {
    // Those that were cancelled have nothing to tell, each.
    let untold =
        |failure: &&Failure| failure.class != FaultKind::Cancelled && !told.contains(&failure.repo);
    let failures: Vec<_> = summary.failures.iter().filter(untold).collect();
    list_failures(&failures, ", all listed in the run's summary.json");
    if !summary.closed {
        let listed = &summary.open[..summary.open.len().min(OPEN_LISTED)];
        let more = more_than(summary.open.len(), OPEN_LISTED)
            .map_or_else(String::new, |more| format!(" and {more} more"));
        error!(
            operation = "run-not-closed",
            open = summary.open.len(),
            "The run did not close; open: {}{more}",
            listed.join(", ")
        );
        for pause in pauses(&summary.paused, &summary.hosts_paused) {
            warn!(operation = "run-not-closed", "{pause}");
        }
    }
    if let Some(sentence) = summary.renamed_sentence() {
        info!(
            operation = "renamed",
            renamed = summary.renamed.len(),
            "{sentence}"
        );
    }
    if let Some(sentence) = summary.failures_sentence() {
        warn!(
            operation = "failures-by-class",
            failed = summary.failed,
            failures_by_class_json = json(&summary.failures_by_class),
            "{sentence}"
        );
        for (class, sentence) in commonest(&summary.failures) {
            warn!(operation = "failures-by-class", class, "{sentence}");
        }
    }
    info!(
        operation = "orchestrator-completion",
        run_id = summary.run_id.as_str(),
        closed = summary.closed,
        total_repos = summary.total_repos,
        cached = summary.cached,
        processed = summary.processed,
        unmoved = summary.unmoved,
        unchanged = summary.unchanged,
        superseded = summary.superseded,
        adopted = summary.adopted,
        failed = summary.failed,
        failed_before = summary.failed_before,
        open = summary.open.len(),
        cache_hit_rate = summary.cache_hit_rate,
        elapsed_seconds = summary.elapsed_seconds,
        elapsed_formatted = summary.elapsed_formatted,
        failures_by_class_json = json(&summary.failures_by_class),
        bytes_stored = summary.bytes_stored,
        bytes_fetched = summary.bytes_fetched,
        "{}",
        summary.sentence()
    );
}

/// Logs which repositories failed and why, up to a limit; `all` says where the others are.
fn list_failures(failures: &[&Failure], all: &str) {
    for failure in failures.iter().take(FAILURES_LISTED) {
        warn!(
            operation = "failed-repository",
            repo = failure.repo,
            class = failure.class.as_ref(),
            "Failed: {} ({}): {}",
            failure.repo,
            failure.class,
            failure.message
        );
    }
    if let Some(more) = more_than(failures.len(), FAILURES_LISTED) {
        warn!(operation = "failed-repository", "Failed: {more} more{all}");
    }
}

/// Says the commonest reasons of each class of which many failed: `gone: 12 × HTTP 404; 3 × HTTP 451;
/// 2 others`.
fn commonest(failures: &[Failure]) -> Vec<(&str, String)> {
    let mut classes: BTreeMap<&str, BTreeMap<&str, u64>> = BTreeMap::new();
    for failure in failures {
        let reasons = classes.entry(failure.class.as_ref()).or_default();
        // Each entry of the feed begins with its own place in it.
        let reason = match failure.class {
            FaultKind::InvalidEntry => failure
                .message
                .split_once(": ")
                .filter(|(place, _)| place.starts_with("entry "))
                .map_or(failure.message.as_str(), |(_, reason)| reason),
            _ => &failure.message,
        };
        *reasons.entry(reason).or_default() += 1;
    }
    let sentence = |reasons: BTreeMap<&str, u64>| {
        let total: u64 = reasons.values().sum();
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        reasons.truncate(REASONS);
        let shown: u64 = reasons.iter().map(|(_, count)| count).sum();
        let mut parts: Vec<_> = reasons
            .iter()
            .map(|(reason, count)| format!("{} × {reason}", thousands(*count)))
            .collect();
        if shown < total {
            parts.push(counted(total - shown, "other", "others"));
        }
        let is_common = reasons.first().is_some_and(|(_, count)| *count > 1);
        (total >= MANY && is_common).then(|| parts.join("; "))
    };
    let sentences = classes.into_iter().filter_map(|(class, reasons)| {
        let sentence = sentence(reasons)?;
        Some((class, format!("{class}: {sentence}")))
    });
    sentences.collect()
}

/// Reports a run's progress: log lines, and a bar on a terminal. Call [`Reporter::update`] after
/// every outcome, and when [`Reporter::next_due`] has passed without one.
#[derive(Debug)]
pub struct Reporter {
    cadence: Cadence,
    bar: Bar,
    drawn: OffsetDateTime,
}

impl Reporter {
    /// Takes the bar off the terminal.
    pub fn clear(&self) {
        self.bar.clear();
    }

    /// Begins to report on a run, and shows the bar.
    pub fn start(view: &RunView, now: OffsetDateTime, bar: Bar) -> Self {
        bar.show();
        let mut reporter = Self {
            cadence: Cadence::new(now, view.done()),
            bar,
            drawn: now - BAR_TICK,
        };
        reporter.update(now, view);
        reporter
    }

    /// Logs a progress sentence if one is due, and moves the bar.
    pub fn update(&mut self, now: OffsetDateTime, view: &RunView) {
        let due = self.cadence.is_due(now, view.done(), view.open());
        let draw = self.bar.is_drawn() && (view.open() == 0 || now - self.drawn >= BAR_PAUSE);
        if !due && !draw {
            return;
        }
        let snapshot = view.snapshot(now);
        let sentence = snapshot.progress_sentence();
        if due {
            info!(
                operation = "progress",
                run_id = snapshot.run_id.as_str(),
                done = snapshot.done(),
                total_repos = snapshot.total_repos,
                cached = snapshot.cached,
                processed = snapshot.processed,
                failed = snapshot.failed,
                open = snapshot.open,
                "{sentence}"
            );
        }
        if draw {
            self.drawn = now;
            let failed = match snapshot.failed {
                0 => String::new(),
                failed => format!(", failed: {}", thousands(failed)),
            };
            // The bar replaces that word, so that the ETA fits into 80 columns.
            let sentence = sentence.trim_start_matches("Processed ");
            let message = format!("{sentence}{failed}");
            self.bar.set(snapshot.done(), snapshot.total_repos, message);
        }
    }

    /// How long to wait for an outcome before the next [`Reporter::update`].
    pub fn next_due(&self, now: OffsetDateTime) -> Duration {
        let silence = self.cadence.last + EVERY - now;
        let silence = Duration::try_from(silence).unwrap_or_default();
        match self.bar.is_drawn() {
            true => silence.min(BAR_TICK),
            false => silence,
        }
    }
}

impl Drop for Reporter {
    /// Whatever ends the run, the terminal is left tidy.
    fn drop(&mut self) {
        self.clear();
    }
}

/// When a progress sentence is due: at every full hundred, and after half a minute of silence.
#[derive(Debug)]
struct Cadence {
    last: OffsetDateTime,
    hundreds: u64,
}

impl Cadence {
    fn new(now: OffsetDateTime, done: u64) -> Self {
        Self {
            last: now,
            hundreds: done / EVERY_REPOS,
        }
    }

    /// Whether a sentence is due; if so, the next one is counted from here.
    fn is_due(&mut self, now: OffsetDateTime, done: u64, open: u64) -> bool {
        let hundreds = done / EVERY_REPOS;
        let silent = open > 0 && now - self.last >= EVERY;
        if hundreds == self.hundreds && !silent {
            return false;
        }
        *self = Self {
            last: now,
            hundreds,
        };
        true
    }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("maps with names as keys")
}

/// Returns `1,234` if `count` exceeds `limit` by that much.
fn more_than(count: usize, limit: usize) -> Option<String> {
    let more = count.checked_sub(limit).filter(|more| *more > 0)?;
    Some(thousands(more as u64))
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use common::fault::FaultKind;
    use common::ids::PushedAt;
    use common::ids::RunId;
    use common::run::documents::{CacheReason, ExpectedJob, Failure, JobList, Manifest};
    use indicatif::TermLike;
    use time::format_description::well_known::Rfc3339;
    use time::macros::datetime;

    use super::*;
    use crate::feed::entry::{FeedRepo, InvalidEntry};

    const START: OffsetDateTime = datetime!(2026-11-23 13:00 UTC);
    const SECOND: Duration = Duration::from_secs(1);

    fn checked(repo: &str, reason: CacheReason) -> Checked {
        Checked {
            entry: FeedRepo {
                index: 0,
                repo: repo.parse().unwrap(),
                url: format!("https://github.com/{repo}"),
                pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
                details: Default::default(),
            },
            reason,
            detail: String::new(),
            force: false,
            failure: None,
            stored: None,
        }
    }

    /// The run `run-1` of these.
    fn view(invalid: &[InvalidEntry], checked: &[Checked]) -> RunView {
        let run = RunId::try_from("run-1".to_owned()).unwrap();
        let manifest = Manifest {
            run: run.clone(),
            started_at: START.format(&Rfc3339).unwrap(),
            feed: String::new(),
            feed_sha256: String::new(),
            feed_entries: 0,
            feed_newest_push: None,
            version: String::new(),
            total: 0,
            repeated: 0,
            invalid: 0,
            reasons: counts(checked),
            adopted: 0,
        };
        let jobs = checked.iter().filter(|checked| !checked.is_cached());
        let jobs = jobs.map(|checked| ExpectedJob {
            key: checked.key(),
            adopted_from: Vec::new(),
        });
        let list = JobList {
            version: JobList::VERSION,
            invalid: invalid.iter().map(InvalidEntry::failure).collect(),
            jobs: jobs.collect(),
        };
        RunView::new(run, Some(&manifest), Some(list))
    }

    fn outcome(at: OffsetDateTime, repo: &str, outcome: Outcome) -> LedgerEntry {
        let event = Event::Outcome(OutcomeRecord {
            run: RunId::try_from("run-1".to_owned()).unwrap(),
            repo: repo.parse().unwrap(),
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
            outcome,
            message: "HTTP 404".to_owned(),
            attempt: 0,
            millis: 0,
            fetched_bytes: 10,
            stored_bytes: 20,
            digest: None,
            renamed_to: None,
            worker: String::new(),
        });
        LedgerEntry { at, event }
    }

    fn invalid() -> InvalidEntry {
        InvalidEntry {
            index: 3,
            repo: None,
            reason: "name is missing".to_owned(),
        }
    }

    /// A terminal of 100 columns: the log and the bar write to it alike.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<(Vec<String>, usize, usize)>>);

    impl Screen {
        fn put(&self, text: &str) {
            let (lines, row, column) = &mut *self.0.lock().unwrap();
            for c in text.chars() {
                if c == '\n' || *column == 100 {
                    (*row, *column) = (*row + 1, 0);
                }
                if c != '\n' && c != '\r' {
                    lines.resize(lines.len().max(*row + 1), String::new());
                    let mut cells: Vec<char> = lines[*row].chars().collect();
                    cells.resize(cells.len().max(*column + 1), ' ');
                    cells[*column] = c;
                    lines[*row] = cells.into_iter().collect();
                    *column += 1;
                }
                if c == '\r' {
                    *column = 0;
                }
            }
        }

        fn lines(&self) -> Vec<String> {
            let lines = self.0.lock().unwrap().0.clone();
            let lines = lines.iter().map(|line| line.trim_end().to_owned());
            lines.filter(|line| !line.is_empty()).collect()
        }
    }

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.put(std::str::from_utf8(bytes).unwrap());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            100
        }

        fn move_cursor_up(&self, n: usize) -> io::Result<()> {
            let row = &mut self.0.lock().unwrap().1;
            *row = row.saturating_sub(n);
            Ok(())
        }

        fn move_cursor_down(&self, n: usize) -> io::Result<()> {
            self.0.lock().unwrap().1 += n;
            Ok(())
        }

        fn move_cursor_right(&self, n: usize) -> io::Result<()> {
            self.0.lock().unwrap().2 += n;
            Ok(())
        }

        fn move_cursor_left(&self, n: usize) -> io::Result<()> {
            let column = &mut self.0.lock().unwrap().2;
            *column = column.saturating_sub(n);
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.put(text);
            self.put("\n");
            Ok(())
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.put(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            let (lines, row, column) = &mut *self.0.lock().unwrap();
            if let Some(line) = lines.get_mut(*row) {
                line.clear();
            }
            *column = 0;
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `log` logs, a line for each event.
    fn logged(log: impl FnOnce()) -> Vec<String> {
        let screen = Arc::new(Mutex::new(Vec::new()));
        let writer = Arc::clone(&screen);
        let subscriber = tracing_subscriber::fmt()
            .without_time()
            .with_ansi(false)
            .with_target(false)
            .with_writer(move || Captured(Arc::clone(&writer)))
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = screen.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(|line| line.trim().to_owned()).collect()
    }

    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_sentence_is_due_at_each_hundred_and_after_half_a_minute() {
        let mut cadence = Cadence::new(START, 19_050);
        for (second, done, open, expected) in [
            (1, 19_099, 9, false),
            (2, 19_100, 9, true),
            (3, 19_101, 9, false),
            (31, 19_102, 9, false),
            (32, 19_102, 9, true),
            (61, 19_102, 9, false),
            (62, 19_102, 9, true),
            (63, 19_450, 9, true),
            (64, 19_499, 9, false),
            (200, 19_499, 0, false),
            (201, 19_500, 0, true),
        ] {
            let due = cadence.is_due(START + SECOND * second, done, open);
            assert_eq!(due, expected, "second {second}");
        }
    }

    #[test]
    fn a_run_is_reported_in_the_prescribed_words() {
        let repos: Vec<String> = (0..200).map(|i| format!("a/r{i}")).collect();
        let all: Vec<_> = repos
            .iter()
            .enumerate()
            .map(|(i, repo)| {
                let reason = if i < 50 {
                    CacheReason::Hit
                } else {
                    CacheReason::Stale
                };
                checked(repo, reason)
            })
            .collect();
        let lines = logged(|| {
            let mut view = view(&[invalid()], &all);
            cache_checked(&all);
            let mut reporter = Reporter::start(&view, START, Bar::hidden());
            assert_eq!(reporter.next_due(START + SECOND), EVERY - SECOND);
            for (i, repo) in repos[50..].iter().enumerate() {
                let kind = match i {
                    0 => Outcome::Failed(FaultKind::Gone),
                    1 => Outcome::Unchanged,
                    _ => Outcome::Processed,
                };
                let now = START + SECOND * (i as u32 + 1) / 10;
                view.apply(&outcome(now, repo, kind));
                reporter.update(now, &view);
            }
            completed(&view.summary(START + SECOND * 75), &HashSet::new());
        });
        let expected = [
            "INFO Cache check: 50 hit, 150 stale operation=\"cache-check\" reasons_json=\"{\\\"hit\\\":50,",
            "INFO Cache hit rate: 25.0% (50/200) operation=\"cache-check\" cache_hit_rate=25.0 cached=50 checked=200",
            "INFO Processed 100/201 (49.8%), cache hit: 25.0%, elapsed: 4s, ETA: 10s operation=\"progress\"",
            "INFO Processed 200/201 (99.5%), cache hit: 25.0%, elapsed: 14s, ETA: 0s operation=\"progress\"",
            "WARN Failed: a/r50 (gone): HTTP 404 operation=\"failed-repository\" repo=\"a/r50\" class=\"gone\"",
            "WARN Failed: entry 3 (invalid_entry): name is missing operation=\"failed-repository\"",
            "WARN 2 failed: 1 gone, 1 invalid_entry operation=\"failures-by-class\" failed=2",
            "INFO Pipeline complete: 201 total, 50 cached (24.9%), 149 processed, 2 failed, completed in 1m 15s operation=\"orchestrator-completion\" run_id=\"run-1\" closed=true total_repos=201 cached=50 processed=149 unmoved=0 unchanged=1 superseded=0 adopted=0 failed=2 failed_before=0 open=0 cache_hit_rate=25.0 elapsed_seconds=75.0 elapsed_formatted=\"1m 15s\" failures_by_class_json=\"{\\\"gone\\\":1,\\\"invalid_entry\\\":1}\" bytes_stored=3000 bytes_fetched=1500",
        ];
        assert_eq!(lines.len(), expected.len(), "{lines:#?}");
        for (line, expected) in lines.iter().zip(expected) {
            assert!(line.starts_with(expected), "{line}\nis not\n{expected}");
        }
    }

    #[test]
    fn a_run_that_did_not_close_says_what_is_open() {
        let all: Vec<_> = (0..25)
            .map(|i| checked(&format!("a/r{i:02}"), CacheReason::Miss))
            .collect();
        let lines = logged(|| completed(&view(&[], &all).summary(START + SECOND), &HashSet::new()));
        assert!(
            lines[0].starts_with("ERROR The run did not close; open: a/r00, a/r01,"),
            "{lines:#?}"
        );
        assert!(lines[0].contains("a/r19 and 5 more"), "{lines:#?}");
        assert!(
            lines[1].starts_with("INFO Pipeline incomplete: 25 total"),
            "{lines:#?}"
        );
    }

    #[test]
    fn the_commonest_reasons_of_each_class_are_said() {
        let failure = |class, message: &str| Failure {
            repo: "a/b".to_owned(),
            class,
            message: message.to_owned(),
        };
        let mut failures = vec![failure(FaultKind::Killed, "once"); 3];
        for (count, message) in [(1, "w"), (5, "x"), (2, "y"), (1, "v"), (3, "z")] {
            failures.extend(vec![failure(FaultKind::Gone, message); count]);
        }
        for i in 0..4 {
            let message = format!("entry {i}: name is missing");
            failures.push(failure(FaultKind::InvalidEntry, &message));
            failures.push(failure(FaultKind::TooLarge, &format!("{i} bytes")));
        }
        let expected = [
            ("gone", "gone: 5 × x; 3 × z; 2 × y; 2 others".to_owned()),
            (
                "invalid_entry",
                "invalid_entry: 4 × name is missing".to_owned(),
            ),
        ];
        assert_eq!(commonest(&failures), expected);
    }

    #[test]
    fn a_flood_of_failures_is_not_all_logged() {
        let list = JobList {
            version: JobList::VERSION,
            invalid: (0..FAILURES_LISTED + 1234)
                .map(|i| Failure {
                    repo: format!("entry {i}"),
                    class: FaultKind::InvalidEntry,
                    message: String::new(),
                })
                .collect(),
            jobs: Vec::new(),
        };
        let view = RunView::new(RunId::new(), None, Some(list));
        let lines = logged(|| completed(&view.summary(START), &HashSet::new()));
        assert_eq!(lines.len(), FAILURES_LISTED + 4);
        assert!(lines[FAILURES_LISTED].contains("Failed: 1,234 more"));
    }

    #[test]
    fn a_dry_run_says_what_would_be() {
        let all = [
            checked("a/hit", CacheReason::Hit),
            checked("a/miss", CacheReason::Miss),
            checked("a/forced", CacheReason::Forced),
        ];
        let lines = logged(|| {
            explain(&all[..1]);
            dry_run(&mut view(&[invalid()], &all), &all, START + 2 * SECOND);
        });
        let expected = [
            "INFO a/hit: hit operation=\"explain\" repo=\"a/hit\" reason=\"hit\"",
            "INFO [DRY RUN] Would process a/miss: miss operation=\"dry-run\"",
            "INFO [DRY RUN] Would process a/forced: forced operation=\"dry-run\"",
            "WARN Failed: entry 3 (invalid_entry): name is missing",
            "INFO [DRY RUN] Pipeline complete: 4 total, 1 cached (25.0%), 2 processed, 1 failed, completed in 2s",
        ];
        assert_eq!(lines.len(), expected.len(), "{lines:#?}");
        for (line, expected) in lines.iter().zip(expected) {
            assert!(line.starts_with(expected), "{line}\nis not\n{expected}");
        }
    }

    #[test]
    fn log_lines_do_not_tear_the_bar() {
        let screen = Screen::default();
        let bar = Bar::on(screen.clone());
        let all: Vec<_> = (0..4)
            .map(|i| checked(&format!("a/r{i}"), CacheReason::Miss))
            .collect();
        let mut view = view(&[], &all);
        let mut log = bar.writer(screen.clone());
        let mut reporter = Reporter::start(&view, START, bar);
        assert_eq!(reporter.next_due(START), BAR_TICK);
        for i in 0..3u32 {
            let now = START + SECOND * (i + 1);
            let gone = Outcome::Failed(FaultKind::Gone);
            view.apply(&outcome(now, &format!("a/r{i}"), gone));
            reporter.update(now, &view);
            writeln!(log, "line {i}").unwrap();
        }
        let lines = screen.lines();
        assert_eq!(lines[..3], ["line 0", "line 1", "line 2"], "{lines:#?}");
        assert_eq!(lines.len(), 4, "one bar below the log: {lines:#?}");
        assert!(
            lines[3].contains("░ 3/4 (75.0%), cache hit: 0.0%, elapsed: 3s, ETA: 1s"),
            "{lines:#?}"
        );
        assert_eq!(lines[3].chars().count(), 100, "as wide as the screen");

        drop(reporter);
        writeln!(log, "the end").unwrap();
        assert_eq!(screen.lines(), ["line 0", "line 1", "line 2", "the end"]);
    }
}
