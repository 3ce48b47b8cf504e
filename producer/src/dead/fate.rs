//! Why messages became dead letters, as far as the ledger tells.

use std::collections::HashMap;

use common::broker::{DeadLetter, Event, Position, SharedBroker};
use common::fault::{Fault, FaultKind};
use common::outcome::Outcome;
use futures::StreamExt;
use time::OffsetDateTime;

use super::filter::said;

/// What became of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fate {
    /// The class of its failure; `None` where it did not fail or the ledger does not know.
    pub(super) class: Option<FaultKind>,
    /// Why, for a person.
    pub(super) message: String,
}

impl Fate {
    fn of_outcome(outcome: Outcome, message: String) -> Self {
        match outcome {
            Outcome::Failed(class) => Self {
                class: Some(class),
                message,
            },
            done => Self {
                class: None,
                message: format!("it has its outcome, {done}: only its end was not acknowledged"),
            },
        }
    }

    /// Of a letter about which nobody asked, or could ask, the ledger.
    pub(super) fn unknown(letter: &DeadLetter) -> Self {
        match letter.job {
            Ok(_) => Self {
                class: None,
                message: "the ledger does not say why".to_owned(),
            },
            Err(_) => Self {
                class: Some(FaultKind::Poison),
                message: "the message holds no job that this version can read".to_owned(),
            },
        }
    }
}

/// What the ledger says of the letters' jobs, by their ids.
///
/// # Errors
/// Where it cannot be read.
pub(super) async fn fates(
    broker: &SharedBroker,
    letters: &[DeadLetter],
) -> Result<HashMap<String, Fate>, Fault> {
    // Of a message whose id names no job nothing is recorded.
    let named = letters.iter().filter(|letter| said(letter).is_some());
    let mut wanted: HashMap<_, _> = named.clone().map(|l| (l.id.as_str(), None)).collect();
    if wanted.is_empty() {
        return Ok(HashMap::new());
    }
    // What happened to a job comes after it was enqueued. One that does not say when is less than
    // any that does.
    let oldest = named.map(|letter| letter.at).min().flatten();
    let oldest = oldest.map_or(Position::Start, Position::Since);
    let mut history = broker.history(oldest).await?;
    while let Some(entry) = history.next().await {
        let event = entry?.event;
        let gave_up = matches!(event, Event::Dead(_));
        let Some(record) = event.into_outcome() else {
            continue;
        };
        let id = format!("{}/{}@{}", record.run, record.repo, record.pushed_at);
        if let Some(fate) = wanted.get_mut(id.as_str()) {
            // What a worker recorded wins over what the broker did.
            if !gave_up || fate.is_none() {
                *fate = Some(Fate::of_outcome(record.outcome, record.message));
            }
        }
    }
    let known = wanted.into_iter();
    Ok(known
        .filter_map(|(id, fate)| Some((id.to_owned(), fate?)))
        .collect())
}

/// The age of what was enqueued at `at`, in whole seconds.
pub(super) fn age(at: Option<OffsetDateTime>, now: OffsetDateTime) -> Option<u64> {
    (now - at?).whole_seconds().try_into().ok()
}
