//! A feed that has not changed since a run that left nothing to do: then the next one has nothing to do
//! either, and closes without looking at each repository.

use std::collections::BTreeMap;

use common::fault::Fault;
use common::ids::RunId;
use common::job::DIGEST_FORMAT;
use common::run::documents::{CacheReason, JobList, Manifest, RunSummary};
use common::store::{DigestStore, Document, DocumentKey, readable};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};

use crate::feed::health::{FeedRecord, Settled};
use crate::withdrawals;

/// How long a run may stand for those after it: what somebody removes from the store is not missed before.
const AT_MOST: Duration = Duration::days(3);

/// A run that left nothing to do.
#[derive(Debug)]
pub struct Before {
    /// The feed that it read.
    pub record: FeedRecord,
    manifest: Manifest,
    jobs: JobList,
}

impl Before {
    /// Reads which run left nothing to do, if the last one did and the feed was that of `origin`.
    ///
    /// # Errors
    /// If the store does not answer.
    pub async fn load(store: &dyn DigestStore, origin: &str) -> Result<Option<Self>, Fault> {
        let record = readable::<FeedRecord>(store, &DocumentKey::Feed).await?;
        let record = record.filter(|record| record.origin == origin && record.seen.is_some());
        let Some(record) = record else {
            return Ok(None);
        };
        let Some(settled) = &record.settled else {
            return Ok(None);
        };
        let of_run = |document| DocumentKey::OfRun {
            run: settled.run.clone(),
            document,
        };
        let manifest = readable::<Manifest>(store, &of_run(Document::Manifest)).await?;
        let jobs = readable::<JobList>(store, &of_run(Document::Jobs)).await?;
        let (Some(manifest), Some(jobs)) = (manifest, jobs) else {
            return Ok(None);
        };
        let begun = OffsetDateTime::parse(&manifest.started_at, &Rfc3339);
        let age = begun.map(|begun| OffsetDateTime::now_utc() - begun);
        let holds = settled.format == DIGEST_FORMAT
            && age.is_ok_and(|age| age >= Duration::ZERO && age < AT_MOST)
            && withdrawals::load(store).await?.0.is_empty();
        Ok(holds.then_some(Self {
            record,
            manifest,
            jobs,
        }))
    }

    /// The run that left nothing to do.
    pub fn run(&self) -> &RunId {
        &self.manifest.run
    }

    /// What the cache check would say.
    pub fn reasons(&self) -> BTreeMap<CacheReason, u64> {
        let failed = self.manifest.failed_before();
        let others = self.manifest.invalid + failed;
        BTreeMap::from([
            (CacheReason::Hit, self.manifest.total.saturating_sub(others)),
            (CacheReason::FailedBefore, failed),
        ])
    }

    /// What a run sets out to do that has nothing to do.
    pub fn documents(&self, run: &RunId, started_at: String) -> (Manifest, JobList) {
        let manifest = Manifest {
            run: run.clone(),
            started_at,
            reasons: self.reasons(),
            adopted: 0,
            ..self.manifest.clone()
        };
        let jobs = JobList {
            jobs: Vec::new(),
            ..self.jobs.clone()
        };
        (manifest, jobs)
    }
}

/// Remembers that a run over the whole feed left nothing to do, if it did.
///
/// # Errors
/// If the store does not answer.
pub async fn settle(store: &dyn DigestStore, summary: &RunSummary) -> Result<(), Fault> {
    // Nor was any entry unusable, which may be usable to a later version, or with other options.
    if !summary.closed || summary.failed != summary.failed_before {
        return Ok(());
    }
    let record = readable::<FeedRecord>(store, &DocumentKey::Feed).await?;
    let Some(mut record) = record.filter(|record| record.seen.is_some()) else {
        return Ok(());
    };
    record.settled = Some(Settled {
        run: summary.run_id.clone(),
        format: DIGEST_FORMAT.to_owned(),
    });
    record.save(store).await
}
