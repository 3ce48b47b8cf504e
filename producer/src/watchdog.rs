//! The watchdog of a run that is followed: are broker and store there, are the open jobs anywhere,
//! and why does nothing happen?

use std::collections::HashSet;
use std::time::{Duration, Instant};

use clap::Args;
use common::broker::{SharedBroker, Waiting};
use common::fault::Fault;
use common::ids::{JobKey, RunId};
use common::run::documents::pauses;
use common::run::view::RunView;
use common::store::SharedStore;
use common::text::{counted, duration_within, format_duration, parse_duration, thousands};
use futures::FutureExt;
use futures::future::BoxFuture;
use time::OffsetDateTime;
use tracing::{info, warn};

use crate::publish::Adopted;
use crate::roll_call::{bounded, in_hand, roll_call};

/// How often the watchdog looks.
const LOOK_EVERY: Duration = Duration::from_secs(20);
/// How long broker and store may take to answer a look.
const LOOK_LIMIT: Duration = Duration::from_secs(15);
/// How long nothing happens before that is worth a line, and how often it is.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// How long to wait for what.
#[derive(Args, Clone, Debug)]
pub struct WatchdogConfig {
    /// How long to wait for a store, a broker or a full disk, at the start and at any later time,
    /// before the run ends with exit code 69.
    #[arg(
        long,
        env = "PATIENCE",
        value_name = "DURATION",
        default_value = "5m",
        value_parser = parse_duration,
        help_heading = "Stopping"
    )]
    pub patience: Duration,
    /// With a broker: time without any outcome after which jobs that neither wait nor have a digest
    /// are published again, if not every worker says which jobs it holds. (If all do, it takes a
    /// minute.) Longer than any job takes.
    #[arg(
        long,
        env = "REPUBLISH_AFTER",
        value_name = "DURATION",
        default_value = "30m",
        value_parser = duration_within("1s", "1d"),
        help_heading = "Broker"
    )]
    republish_after: Duration,
}

/// What one look saw.
#[derive(Debug)]
pub struct Sight {
    waiting: Result<Waiting, Fault>,
    store: Result<(), Fault>,
    /// The jobs in workers' hands; `None` if jobs wait, or not every worker answered.
    held: Option<HashSet<(RunId, JobKey)>>,
}

/// What follows from a look.
#[derive(Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nothing has to be done.
    Well,
    /// These jobs are lost: they have to be published again unless they have a digest.
    Lost(HashSet<JobKey>),
    /// Broker or store were away for too long.
    GaveUp(Fault),
}

/// What the watchdog remembers from look to look.
#[derive(Debug)]
pub struct Watchdog {
    config: WatchdogConfig,
    broker_away: Option<Instant>,
    store_away: Option<Instant>,
    /// Since when no job waits, though some are open.
    nothing_waits: Option<Instant>,
    /// Open jobs that were nowhere at the last look.
    nowhere: HashSet<JobKey>,
    /// When a job of the run last got its outcome.
    heard: Instant,
    /// What was said last about why nothing happens, and when.
    said: (Vec<String>, Instant),
}

impl Watchdog {
    /// A watchdog that begins to watch `now`.
    pub fn new(config: WatchdogConfig, now: Instant) -> Self {
        Self {
            config,
            broker_away: None,
            store_away: None,
            nothing_waits: None,
            nowhere: HashSet::new(),
            heard: now,
            said: (Vec::new(), now),
        }
    }

    /// Notes that a job of the run got its outcome.
    pub fn hear(&mut self, now: Instant) {
        self.heard = now;
    }

    /// Looks at broker and store when the next look is due.
    pub fn look(&self, broker: &SharedBroker, store: &SharedStore) -> BoxFuture<'static, Sight> {
        let pause = LOOK_EVERY.min(self.config.republish_after);
        let limit = LOOK_LIMIT.min(self.config.patience);
        let (broker, store) = (SharedBroker::clone(broker), SharedStore::clone(store));
        let look = async move {
            tokio::time::sleep(pause).await;
            let (waiting, store) = tokio::join!(
                bounded(limit, "broker", broker.waiting()),
                bounded(limit, "store", store.reachable())
            );
            let held = match &waiting {
                Ok(waiting) if waits(waiting) == 0 => {
                    let answers = roll_call(&broker, waiting.workers).await;
                    // `None` if not every worker has answered.
                    let answers = answers.ok();
                    let answers = answers.filter(|answers| answers.len() as u64 >= waiting.workers);
                    answers.map(|answers| in_hand(&answers))
                }
                _ => None,
            };
            Sight {
                waiting,
                store,
                held,
            }
        };
        look.boxed()
    }

    /// Judges what was seen, and says what a person should know of it.
    pub fn judge(
        &mut self,
        sight: Sight,
        view: &RunView,
        adopted: &Adopted,
        now: Instant,
    ) -> Finding {
        if self.store_away.is_some() && sight.store.is_ok() {
            info!(operation = "store", "the store can be used again");
        }
        let broker = sight.waiting.as_ref().err();
        let gone = away(&mut self.broker_away, broker, now);
        let store_gone = away(&mut self.store_away, sight.store.as_ref().err(), now);
        let patience = self.config.patience;
        for (gone, fault) in [(gone, broker), (store_gone, sight.store.as_ref().err())] {
            if let (Some(gone), Some(fault)) = (gone, fault)
                && gone >= patience
            {
                let gone = format_duration(gone);
                let message = format!("{fault} (for {gone}, longer than --patience)");
                return Finding::GaveUp(Fault::infra(message));
            }
        }
        let waiting = sight.waiting.ok();
        let silence = match sight.held {
            // Every job is accounted for.
            Some(_) => Duration::ZERO,
            None => now - self.heard,
        };
        self.say_why(silence, waiting, sight.store.err(), view, now);
        match waiting {
            Some(waiting) if waits(&waiting) == 0 => self.lost(sight.held, view, adopted, now),
            _ => {
                self.nothing_waits = None;
                self.nowhere.clear();
                Finding::Well
            }
        }
    }

    /// No job waits: the open ones are in somebody's hands, or lost.
    fn lost(
        &mut self,
        held: Option<HashSet<(RunId, JobKey)>>,
        view: &RunView,
        adopted: &Adopted,
        now: Instant,
    ) -> Finding {
        let since = *self.nothing_waits.get_or_insert(now);
        let Some(held) = held else {
            self.nowhere.clear();
            let quiet = now - since.max(self.heard);
            if quiet < self.config.republish_after {
                return Finding::Well;
            }
            self.nothing_waits = None;
            return Finding::Lost(view.open_jobs().cloned().collect());
        };
        let is_held = |key: &JobKey| {
            let runs = adopted.get(key).into_iter().flatten().chain([view.run()]);
            runs.into_iter()
                .any(|run| held.contains(&(run.clone(), key.clone())))
        };
        let nowhere: HashSet<_> = view
            .open_jobs()
            .filter(|key| !is_held(key))
            .cloned()
            .collect();
        // One look may come while a job is on its way.
        let lost: HashSet<_> = nowhere.intersection(&self.nowhere).cloned().collect();
        if lost.is_empty() && !nowhere.is_empty() {
            let jobs = nowhere.len() as u64;
            warn!(
                operation = "lost-jobs",
                jobs,
                "{} neither waiting nor in a worker's hands; what is still nowhere at the next look is published again",
                counted(jobs, "open job is", "open jobs are")
            );
        }
        self.nowhere = &nowhere - &lost;
        match lost.is_empty() {
            true => Finding::Well,
            false => Finding::Lost(lost),
        }
    }

    /// Says why nothing happens, or why workers wait: when that changes, and each minute.
    fn say_why(
        &mut self,
        silence: Duration,
        waiting: Option<Waiting>,
        store: Option<Fault>,
        view: &RunView,
        now: Instant,
    ) {
        let snapshot = view.snapshot(OffsetDateTime::now_utc());
        let mut reasons = pauses(&snapshot.paused, &snapshot.hosts_paused);
        reasons.extend(store.map(|fault| fault.message));
        let (known, said) = &self.said;
        let repeat = now - *said >= SAY_EVERY && (silence >= SAY_EVERY || !reasons.is_empty());
        if *known == reasons && !repeat {
            return;
        }
        let mut parts = Vec::new();
        if silence >= SAY_EVERY {
            parts.push(format!("no outcome for {}", format_duration(silence)));
        }
        if let Some(waiting) = waiting {
            parts.push(format!("jobs waiting: {}", thousands(waits(&waiting))));
            parts.push(match waiting.workers {
                0 => "no worker is connected: start some".to_owned(),
                workers => format!("workers connected: {}", thousands(workers)),
            });
        }
        if reasons.is_empty() && silence < SAY_EVERY {
            parts = vec!["no worker waits any more".to_owned()];
        }
        parts.extend(reasons.iter().cloned());
        warn!(
            operation = "silence",
            silent_seconds = silence.as_secs(),
            open = view.open(),
            waiting = waiting.map(|waiting| waits(&waiting)),
            workers = waiting.map(|waiting| waiting.workers),
            "{}",
            parts.join("; ")
        );
        self.said = (reasons, now);
    }
}

/// For how long something has been away, if it is.
fn away(since: &mut Option<Instant>, fault: Option<&Fault>, now: Instant) -> Option<Duration> {
    *since = fault.map(|_| since.unwrap_or(now));
    since.map(|since| now - since)
}

fn waits(waiting: &Waiting) -> u64 {
    waiting.ready + waiting.retry
}

#[cfg(test)]
mod tests {
    use common::ids::PushedAt;
    use common::run::documents::{ExpectedJob, JobList};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn key(repo: &str) -> JobKey {
        JobKey {
            repo: repo.parse().unwrap(),
            pushed_at: PushedAt::new("2026-01-01T00:00:00Z").unwrap(),
        }
    }

    /// A run with two open jobs, the second of which was adopted.
    fn run() -> (RunView, Adopted, RunId) {
        let earlier = RunId::new();
        let adopted = Adopted::from([(key("a/two"), vec![earlier.clone()])]);
        let jobs = ["a/one", "a/two"].map(|repo| ExpectedJob {
            key: key(repo),
            adopted_from: adopted.get(&key(repo)).cloned().unwrap_or_default(),
        });
        let list = JobList {
            version: JobList::VERSION,
            invalid: Vec::new(),
            jobs: jobs.into(),
        };
        (
            RunView::new(RunId::new(), None, Some(list)),
            adopted,
            earlier,
        )
    }

    fn watchdog(start: Instant) -> Watchdog {
        let config = WatchdogConfig {
            patience: SECOND * 60,
            republish_after: SECOND * 100,
        };
        Watchdog::new(config, start)
    }

    fn nothing_waits(held: Option<Vec<(RunId, JobKey)>>) -> Sight {
        Sight {
            waiting: Ok(Waiting::default()),
            store: Ok(()),
            held: held.map(HashSet::from_iter),
        }
    }

    #[test]
    fn jobs_that_are_nowhere_twice_in_a_row_are_lost() {
        let (view, adopted, earlier) = run();
        let start = Instant::now();
        let mut watchdog = watchdog(start);
        let mut look = |held: &[(RunId, JobKey)], at: u32| {
            let sight = nothing_waits(Some(held.to_vec()));
            watchdog.judge(sight, &view, &adopted, start + SECOND * at)
        };
        let one = (view.run().clone(), key("a/one"));
        let two = (earlier, key("a/two"));
        let lost = |repos: &[&str]| Finding::Lost(repos.iter().map(|repo| key(repo)).collect());
        for (held, finding) in [
            (vec![one.clone(), two.clone()], Finding::Well),
            // The second is adopted: in its earlier run's name alone it is held.
            (vec![one.clone()], Finding::Well),
            (vec![two.clone()], Finding::Well),
            (vec![], lost(&["a/one"])),
            (vec![], lost(&["a/two"])),
            // Another run's copy is none of ours.
            (vec![(RunId::new(), key("a/one"))], lost(&["a/one"])),
            (vec![one], lost(&["a/two"])),
        ] {
            assert_eq!(look(&held, 1), finding, "{held:?}");
        }
    }

    #[test]
    fn where_workers_do_not_answer_jobs_are_lost_after_a_long_silence() {
        let (view, adopted, _) = run();
        let start = Instant::now();
        let mut watchdog = watchdog(start);
        let all = Finding::Lost([key("a/one"), key("a/two")].into());
        for (at, heard, finding) in [
            (10, false, Finding::Well),
            (50, true, Finding::Well),
            (120, false, Finding::Well),
            (151, false, all),
            (152, false, Finding::Well),
        ] {
            let now = start + SECOND * at;
            if heard {
                watchdog.hear(now);
            }
            let judged = watchdog.judge(nothing_waits(None), &view, &adopted, now);
            assert_eq!(judged, finding, "{at}");
        }
    }

    #[test]
    fn what_is_away_for_longer_than_patience_ends_the_run() {
        let (view, adopted, _) = run();
        let start = Instant::now();
        let away = || Fault::infra("it is away");
        for store in [true, false] {
            let mut watchdog = watchdog(start);
            for (at, is_away, gives_up) in [
                (0, true, false),
                (59, true, false),
                (60, false, false),
                (61, true, false),
                (120, true, false),
                (121, true, true),
            ] {
                let mut sight = nothing_waits(Some(vec![]));
                match (is_away, store) {
                    (true, true) => sight.store = Err(away()),
                    (true, false) => sight.waiting = Err(away()),
                    (false, _) => {}
                }
                let judged = watchdog.judge(sight, &view, &adopted, start + SECOND * at);
                let gave_up = matches!(judged, Finding::GaveUp(_));
                assert_eq!(gave_up, gives_up, "{at}: {judged:?}");
            }
        }
    }
}
