//! A run as seen from outside: the store's documents, and the view of its records.

use common::broker::{Position, Waiting};
use common::exit::{self, ExitError};
use common::ids::RunId;
use common::run::documents::{Manifest, RunSummary};
use common::run::view::{RunProgress, RunSnapshot, RunView};
use common::store::{Document, DocumentKey, SharedStore};
use serde::Serialize;
use serde::de::DeserializeOwned;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::progress;
use crate::publish::BELIEVED;

/// A process that did not store its progress so many times in a row has ended.
const MISSED: u32 = 6;

/// A run that this process did not begin. The ledger alone knows some, such as replays of dead
/// letters; they have no documents.
#[derive(Debug)]
pub struct ObservedRun {
    /// What it set out to do.
    pub manifest: Option<Manifest>,
    /// How its producer ended.
    pub summary: Option<RunSummary>,
    /// Its records as far as they were applied.
    pub view: RunView,
}

impl ObservedRun {
    /// Reads a run's documents.
    ///
    /// # Errors
    /// If the store cannot be reached, or a document is not what it should be.
    pub async fn read(store: &SharedStore, run: &RunId) -> Result<Self, ExitError> {
        let manifest = of_run(store, run, Document::Manifest).await?;
        let jobs = of_run(store, run, Document::Jobs).await?;
        Ok(Self {
            view: RunView::new(run.clone(), manifest.as_ref(), jobs),
            summary: of_run(store, run, Document::Summary).await?,
            manifest,
        })
    }

    /// Whether store or ledger hold anything of it.
    pub fn exists(&self) -> bool {
        self.manifest.is_some() || self.view.is_known()
    }

    /// The summary, if nothing can come after it.
    pub fn closed(&self) -> Option<&RunSummary> {
        self.summary.as_ref().filter(|summary| summary.closed)
    }

    /// The producer's summary, if it knows of more outcomes than the ledger.
    pub fn better_summary(&self) -> Option<&RunSummary> {
        let summary = self.summary.as_ref();
        summary.filter(|summary| (summary.open.len() as u64) < self.view.open())
    }

    /// Where in the ledger its records begin.
    pub fn position(&self, now: OffsetDateTime) -> Position {
        let adopted = self.manifest.as_ref().is_some_and(|m| m.adopted > 0);
        match self.view.started() {
            // By a clock that is ahead: nobody knows by how much.
            Some(started) if started > now => Position::Start,
            // No longer ago than that was an adopted job published.
            Some(started) if adopted => Position::Since(started - BELIEVED),
            Some(started) => Position::Since(started),
            None => Position::Start,
        }
    }

    /// The numbers at `now`, from the ledger.
    pub fn status(&self, now: OffsetDateTime) -> Status {
        let state = match (self.view.closes(), &self.summary) {
            (true, _) => RunState::Closed,
            (false, None) => RunState::Running,
            (false, Some(_)) => RunState::Stopped,
        };
        let mut status = self.of(self.view.snapshot(now), state, Source::Ledger);
        status.notes = self.view.notes(now);
        status
    }

    /// The numbers that its producer left.
    pub fn of_summary(&self, summary: &RunSummary) -> Status {
        let state = match summary.closed {
            true => RunState::Closed,
            false => RunState::Stopped,
        };
        let mut run = RunSnapshot::from(summary);
        run.started_at = self.view.started();
        self.of(run, state, Source::Summary)
    }

    /// The numbers that a run in one process stored last. Unless that was long ago, it goes on.
    pub fn of_progress(&self, progress: RunProgress, now: OffsetDateTime) -> Status {
        let is_recent = now - progress.at < MISSED * progress::EVERY;
        let state = match is_recent {
            true => RunState::Running,
            false => RunState::Stopped,
        };
        let mut status = self.of(progress.run, state, Source::Progress);
        if !is_recent {
            let at = progress.at.format(&Rfc3339).expect("a time");
            status.notes.push(format!(
                "its process has stored nothing since {at}, so it was probably killed; run it again and it continues"
            ));
        }
        status
    }

    fn of(&self, run: RunSnapshot, state: RunState, source: Source) -> Status {
        Status {
            state,
            source,
            feed: self.manifest.as_ref().map(|m| m.feed.clone()),
            run,
            waiting: None,
            waiting_retry: None,
            in_work_or_lost: None,
            dead_letters: None,
            workers_connected: None,
            notes: Vec::new(),
        }
    }
}

/// How far a run has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Jobs are open. Whether a producer follows them cannot be told from here.
    Running,
    /// Every job has its outcome.
    Closed,
    /// Jobs are open, and the producer has ended. Workers may go on all the same.
    Stopped,
}

/// What the numbers were taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The broker's ledger, as it is now.
    Ledger,
    /// The `progress.json` of a run in one process, which stores it every 10 s.
    Progress,
    /// The run's `summary.json`, as it was when the producer ended.
    Summary,
}

/// What `producer status --json` prints. `None` is not known, or does not apply any more.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// How far the run has got.
    pub state: RunState,
    /// What the numbers were taken from.
    pub source: Source,
    /// Where its feed came from.
    pub feed: Option<String>,
    /// Its numbers.
    #[serde(flatten)]
    pub run: RunSnapshot,
    /// Jobs of any run that wait for a worker.
    pub waiting: Option<u64>,
    /// Jobs of any run that wait for their next attempt.
    pub waiting_retry: Option<u64>,
    /// Open jobs of this run beyond those that wait: on loan to a worker, or lost.
    pub in_work_or_lost: Option<u64>,
    /// Jobs of any run that were given up.
    pub dead_letters: Option<u64>,
    /// Workers that take jobs now.
    pub workers_connected: Option<u64>,
    /// What a person should know about these numbers.
    pub notes: Vec<String>,
}

impl Status {
    /// Adds what the broker says of its queues.
    pub fn set_waiting(&mut self, waiting: Waiting) {
        self.dead_letters = Some(waiting.dead);
        self.workers_connected = Some(waiting.workers);
        self.waiting = Some(waiting.ready);
        self.waiting_retry = Some(waiting.retry);
        let waits = waiting.ready + waiting.retry;
        self.in_work_or_lost = Some(self.run.open.saturating_sub(waits));
    }
}

/// Reads a document of `run`, if the store has it.
pub(crate) async fn of_run<T: DeserializeOwned>(
    store: &SharedStore,
    run: &RunId,
    document: Document,
) -> Result<Option<T>, ExitError> {
    let run = run.clone();
    self::document(store, &DocumentKey::OfRun { run, document }).await
}

/// Reads a document, if the store has it.
pub(crate) async fn document<T: DeserializeOwned>(
    store: &SharedStore,
    key: &DocumentKey,
) -> Result<Option<T>, ExitError> {
    let bytes = store.document(key).await;
    let bytes = bytes.map_err(|fault| ExitError::new(exit::UNAVAILABLE, fault))?;
    let Some(bytes) = bytes else {
        return Ok(None);
    };
    let document = serde_json::from_slice(&bytes).map_err(|error| {
        let location = store.location();
        ExitError::new(
            exit::UNAVAILABLE,
            format!("{location}/{key} cannot be read as what it should be: {error}"),
        )
    })?;
    Ok(Some(document))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_wait_is_in_work_or_lost() {
        let run = RunId::new();
        let observed = ObservedRun {
            manifest: None,
            summary: None,
            view: RunView::new(run, None, None),
        };
        let mut now = observed.status(OffsetDateTime::UNIX_EPOCH);
        now.run.open = 3;
        let mut waiting = Waiting {
            ready: 1,
            retry: 1,
            dead: 4,
            workers: 5,
        };
        now.set_waiting(waiting);
        assert_eq!(now.in_work_or_lost, Some(1));
        assert_eq!(
            (now.dead_letters, now.workers_connected),
            (Some(4), Some(5))
        );
        // Those of other runs wait there too.
        waiting.ready = 100;
        now.set_waiting(waiting);
        assert_eq!(now.in_work_or_lost, Some(0));
    }
}
