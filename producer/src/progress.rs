//! How far a run in one process has got, stored for `producer status`: its ledger is in its memory.

use std::time::Duration;

use common::fault::Fault;
use common::run::view::{RunProgress, RunView};
use common::store::{Document, DocumentKey, SharedStore};
use time::OffsetDateTime;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

/// From one to the next; a run that is over before the first needs none.
pub const EVERY: Duration = Duration::from_secs(10);

/// Stores a run's progress while the run goes on.
#[derive(Debug)]
pub struct Progress {
    store: SharedStore,
    last: OffsetDateTime,
    writing: Option<AbortOnDropHandle<()>>,
}

impl Progress {
    /// Of a run that begins now, into this store.
    pub fn new(store: SharedStore, now: OffsetDateTime) -> Self {
        Self {
            store,
            last: now,
            writing: None,
        }
    }

    /// How long until the next is due.
    pub fn next_due(&self, now: OffsetDateTime) -> Duration {
        Duration::try_from(self.last + EVERY - now).unwrap_or_default()
    }

    /// Stores the progress if that is due, unless the last one is still being stored. Does not wait for the store.
    pub fn update(&mut self, now: OffsetDateTime, view: &RunView) {
        if now - self.last < EVERY {
            return;
        }
        self.last = now;
        if self.writing.as_ref().is_some_and(|w| !w.is_finished()) {
            return;
        }
        let progress = RunProgress {
            at: now,
            run: view.snapshot(now),
        };
        let store = SharedStore::clone(&self.store);
        let writing = async move {
            // Nothing depends on it, and whatever is wrong with the store is said by what does.
            if let Err(fault) = write(&store, &progress).await {
                debug!("the run's progress could not be stored: {fault}");
            }
        };
        self.writing = Some(AbortOnDropHandle::new(tokio::spawn(writing)));
    }
}

async fn write(store: &SharedStore, progress: &RunProgress) -> Result<(), Fault> {
    let content = serde_json::to_vec(progress).expect("numbers, names and times");
    let key = DocumentKey::OfRun {
        run: progress.run.run_id.clone(),
        document: Document::Progress,
    };
    store.put_document(&key, &content).await
}
