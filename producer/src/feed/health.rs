//! Whether a feed is as whole as the one before: a feed that lost a fifth of its entries is a fault of
//! whoever makes it, and must not decide what is kept.

use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::{PushedAt, RunId};
use common::store::{DigestStore, DocumentKey, readable};
use common::text::{percent, thousands};
use serde::{Deserialize, Serialize};

use super::Feed;
use super::fetch::Validators;

/// So many entries may always go: somebody edits a small feed by hand.
const FEW: u64 = 20;

/// What is remembered of the feed of the run begun last: `runs/feed.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FeedRecord {
    /// Where it came from.
    pub origin: String,
    /// How many repositories it named, and unusable entries.
    pub entries: u64,
    /// Its newest push.
    pub newest_push: Option<PushedAt>,
    /// What its server called it, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Validators>,
    /// The run over all of it that left nothing to do, if the last one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled: Option<Settled>,
}

/// A run that left nothing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settled {
    /// The run.
    pub run: RunId,
    /// Of the digests.
    pub format: String,
}

impl FeedRecord {
    /// What is to be remembered of `feed`.
    pub fn of(feed: &Feed) -> Self {
        let pushes = feed.repositories.iter().map(|entry| &entry.pushed_at);
        Self {
            origin: feed.origin.clone(),
            entries: (feed.repositories.len() + feed.invalid.len()) as u64,
            newest_push: pushes.max().cloned(),
            seen: feed.seen.clone(),
            settled: None,
        }
    }

    /// Checks that the feed has not lost more than `limit` percent of its entries since the run before.
    ///
    /// # Errors
    /// [`exit::BAD_FEED`] if it has, [`exit::UNAVAILABLE`] if the store does not answer.
    pub async fn check(&self, store: &dyn DigestStore, limit: u8) -> Result<(), ExitError> {
        let before = readable::<Self>(store, &DocumentKey::Feed).await?;
        let Some(before) = before.filter(|before| before.origin == self.origin) else {
            return Ok(());
        };
        let lost = before.entries.saturating_sub(self.entries);
        if lost <= FEW || percent(lost, before.entries) <= f64::from(limit) {
            return Ok(());
        }
        let message = format!(
            "the feed {} has {} entries, and had {} at the run before: a fall of {:.0} %, more than \
             --feed-drop-limit {limit} % allows; look at the feed, or raise the limit for this run",
            self.origin,
            thousands(self.entries),
            thousands(before.entries),
            percent(lost, before.entries)
        );
        Err(ExitError::new(exit::BAD_FEED, message))
    }

    /// Remembers it for the next run.
    ///
    /// # Errors
    /// If the store does not take it.
    pub async fn save(&self, store: &dyn DigestStore) -> Result<(), Fault> {
        let document = serde_json::to_vec_pretty(self).map_err(Fault::infra)?;
        store.put_document(&DocumentKey::Feed, &document).await
    }
}
