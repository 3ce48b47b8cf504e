//! What a run that has closed does for the readers of the digests: it withdraws what has left, and
//! brings catalogue and pages up to date.

use std::collections::HashSet;
use std::time::Duration;

use common::exit;
use common::fault::Fault;
use common::run::documents::RunSummary;
use common::store::DocumentKey;
use common::text::counted;
use time::OffsetDateTime;
use tracing::{error, info};

use crate::cache::listing;
use crate::catalog::update::{self, Known};
use crate::follow::Following;
use crate::report;
use crate::withdrawals::{self, Seen, WithdrawConfig};

/// How long all of it may take. Of 24,500 digests a tenth is moved in half a minute.
const LIMIT: Duration = Duration::from_secs(300);

/// What came of it.
struct Published {
    lines: usize,
    too_many: bool,
}

/// Does it, and returns the exit code of a run in which all else went well:
/// [`exit::BAD_FEED`] if too many digests would have been withdrawn, [`exit::UNAVAILABLE`] if the store
/// did not do it.
pub async fn publish(begun: &Following, summary: &RunSummary, config: &WithdrawConfig) -> u8 {
    let publishing = tokio::time::timeout(LIMIT, publish_all(begun, summary, config));
    let published = publishing.await;
    let location = begun.store.location();
    match published.unwrap_or_else(|_| Err(Fault::infra(format!("{location} is too slow")))) {
        Ok(Published { lines, too_many }) => {
            info!(
                operation = "catalog",
                lines,
                "Catalogue: {location}/{}: {}",
                DocumentKey::Catalog,
                counted(lines as u64, "repository", "repositories")
            );
            if too_many { exit::BAD_FEED } else { exit::OK }
        }
        Err(fault) => {
            error!(
                operation = "catalog",
                "the digests are stored, but their catalogue is not up to date; the next run that closes repairs that: {fault}"
            );
            exit::UNAVAILABLE
        }
    }
}

async fn publish_all(
    begun: &Following,
    summary: &RunSummary,
    config: &WithdrawConfig,
) -> Result<Published, Fault> {
    let store = begun.store.as_ref();
    let now = OffsetDateTime::now_utc();
    let (mut stored, mut too_many) = (None, false);
    // An empty feed is no evidence of anything, nor is one that a run was cancelled over.
    let is_evidence = |feed: &&HashSet<_>| !feed.is_empty() && summary.cancelled() == 0;
    let whole = begun.whole.as_ref().filter(is_evidence);
    if let Some(feed) = whole {
        let listed = listing::everything(store).await?;
        let mut there = listed.into_iter().map(|listed| listed.repo).collect();
        let (gone, made) = begun.gone_and_made();
        let seen = Seen {
            now,
            run: begun.view.run(),
            feed,
            gone: &gone,
            made: &made,
            stored: &there,
        };
        let decision = withdrawals::leave(store, &seen, config).await?;
        report::withdrawn(&decision, config);
        there = &there - &decision.withdraw.into_iter().collect();
        too_many = decision.too_many.is_some();
        stored = Some(there);
    }
    let (withdrawals, _) = withdrawals::load(store).await?;
    let known = Known {
        checked: &begun.checked,
        view: &begun.view,
        learned: &begun.learned,
        feed: whole,
        stored: stored.as_ref(),
        withdrawals: &withdrawals,
    };
    let lines = update::update(store, known).await?;
    update::record_run(store, summary, now).await?;
    Ok(Published { lines, too_many })
}
