//! One attempt at one job: look, make, store.

use std::time::Instant;

use crate::metrics::Metrics;
use common::failpoint;
use common::fault::Fault;
use common::job::{DIGEST_FORMAT, Job};
use common::outcome::{Outcome, StoredDigest};
use common::store::freshness::{Freshness, freshness};
use common::store::{Digest, DigestMeta, Found, Put, SharedStore};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use crate::digest::Subject;
use crate::digest::assemble::assemble;
use crate::slot::slots::Slots;
use crate::slot::{SlotError, SlotResult};

/// How often a digest is offered to the store before the worker gives in to others who write the
/// same one: each time, somebody else was quicker.
const OFFERS: u32 = 5;

/// What an attempt came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The outcome.
    pub outcome: Outcome,
    /// Bytes that came over the network.
    pub fetched_bytes: u64,
    /// Bytes of the digest, if one was stored.
    pub stored_bytes: u64,
    /// The digest, if one was stored.
    pub digest: Option<StoredDigest>,
    /// Where the host said that the repository is now, if that is another path.
    pub renamed_to: Option<String>,
}

impl From<Outcome> for Attempt {
    fn from(outcome: Outcome) -> Self {
        Self {
            outcome,
            fetched_bytes: 0,
            stored_bytes: 0,
            digest: None,
            renamed_to: None,
        }
    }
}

/// Returns a job's outcome if the store's digest leaves nothing to do.
///
/// A forced job accepts only a digest made for its own run: then a second delivery of it is as cheap
/// as of any other. A newer digest stays even so.
pub fn settled_by(job: &Job, found: &Found) -> Option<Outcome> {
    let own_run = matches!(found, Found::Stored { meta, .. } if meta.run == job.run);
    match freshness(found, &job.into()) {
        Freshness::Newer => Some(Outcome::Superseded),
        Freshness::Current if !job.force || own_run => Some(Outcome::Unchanged),
        _ => None,
    }
}

/// Works on `job` until it is done, fails, or `stop` is cancelled.
pub async fn attempt(
    job: &Job,
    store: &SharedStore,
    slots: &Slots,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> Result<Attempt, SlotError> {
    let mut found = unless_stopped(stop, store.head(&job.repo)).await?;
    if let Some(outcome) = settled_by(job, &found) {
        return Ok(outcome.into());
    }

    failpoint::hit("before-fetch");
    let subject = Subject::Repository {
        owner: job.repo.owner().to_owned(),
        name: job.repo.name().to_owned(),
    };
    let made = match slots.work(&job.url, subject, None, stop).await? {
        SlotResult::Digest(made) => made,
        SlotResult::Unmoved { .. } => unreachable!("no commit is known"),
    };
    metrics.fetched_bytes.inc_by(made.fetched_bytes);
    metrics.fetched_in(made.fetch);
    metrics.digested_in(made.digest);
    let (fetched_bytes, renamed_to) = (made.fetched_bytes, made.renamed_to);

    let max_text_bytes = slots.limits().max_text_bytes;
    let commit = made.facts.commit.clone();
    // Counting tokens is the parent's only heavy work.
    let text = tokio::task::spawn_blocking(move || {
        assemble(&made.facts, &made.tree, &made.content, max_text_bytes)
    })
    .await
    .map_err(|panic| Fault::killed(format!("counting tokens: {panic}")))?;
    let digest = Digest {
        meta: DigestMeta {
            pushed_at: job.pushed_at.clone(),
            url: job.url.clone(),
            processed_at: OffsetDateTime::now_utc()
                .format(&Rfc3339)
                .map_err(Fault::infra)?,
            commit,
            format: DIGEST_FORMAT.to_owned(),
            bytes: text.text.len() as u64,
            truncated: text.truncated,
            run: job.run.clone(),
        },
        text: text.text,
    };

    failpoint::hit("before-put");
    let start = Instant::now();
    for _ in 0..OFFERS {
        let expected = found.expected();
        let put = store.put(&job.repo, &digest, &expected);
        if let Put::Stored(version) = unless_stopped(stop, put).await? {
            failpoint::hit("after-put");
            metrics.stored_in(start.elapsed());
            metrics.stored_bytes.inc_by(digest.meta.bytes);
            return Ok(Attempt {
                outcome: Outcome::Processed,
                fetched_bytes,
                stored_bytes: digest.meta.bytes,
                digest: Some(StoredDigest {
                    etag: version.etag().to_owned(),
                    format: digest.meta.format,
                }),
                renamed_to,
            });
        }
        found = unless_stopped(stop, store.head(&job.repo)).await?;
        if let Some(outcome) = settled_by(job, &found) {
            return Ok(Attempt {
                fetched_bytes,
                renamed_to,
                ..outcome.into()
            });
        }
    }
    Err(Fault::transient(format!(
        "somebody else stored this digest {OFFERS} times meanwhile"
    ))
    .into())
}

/// The answer of the store, which may hang, unless `stop` is cancelled first.
async fn unless_stopped<T>(
    stop: &CancellationToken,
    call: impl Future<Output = Result<T, Fault>>,
) -> Result<T, SlotError> {
    match stop.run_until_cancelled(call).await {
        Some(answer) => Ok(answer?),
        None => Err(SlotError::Stopped),
    }
}

#[cfg(test)]
mod tests {
    use common::ids::PushedAt;
    use common::ids::RunId;
    use common::store::Version;

    use super::*;

    fn job(pushed_at: &str, force: bool) -> Job {
        Job {
            version: common::job::WIRE_VERSION,
            run: RunId::try_from("this".to_owned()).unwrap(),
            repo: "a/b".parse().unwrap(),
            url: "https://github.com/a/b".to_owned(),
            pushed_at: PushedAt::new(pushed_at).unwrap(),
            force,
            replay_of: None,
        }
    }

    fn stored(pushed_at: &str, run: &str, format: &str) -> Found {
        stored_from("https://github.com/a/b", 1, pushed_at, run, format)
    }

    fn stored_from(url: &str, bytes: u64, pushed_at: &str, run: &str, format: &str) -> Found {
        Found::Stored {
            meta: DigestMeta {
                pushed_at: PushedAt::new(pushed_at).unwrap(),
                url: url.to_owned(),
                processed_at: String::new(),
                commit: None,
                format: format.to_owned(),
                bytes,
                truncated: false,
                run: RunId::try_from(run.to_owned()).unwrap(),
            },
            version: Version("v".to_owned()),
        }
    }

    #[test]
    fn what_the_store_holds_settles_a_job_or_does_not() {
        const OLD: &str = "2026-01-01T00:00:00Z";
        const NEW: &str = "2026-01-02T00:00:00Z";
        const NEW_ELSEWHERE: &str = "2026-01-02T01:00:00+01:00";
        let unchanged = Some(Outcome::Unchanged);
        let superseded = Some(Outcome::Superseded);
        for (job, found, expected) in [
            (job(NEW, false), Found::Absent, None),
            (job(NEW, false), stored(OLD, "other", DIGEST_FORMAT), None),
            (
                job(NEW, false),
                stored(NEW, "other", DIGEST_FORMAT),
                unchanged,
            ),
            (
                job(OLD, false),
                stored(NEW, "other", DIGEST_FORMAT),
                superseded,
            ),
            (job(NEW, false), stored(NEW, "other", "older"), None),
            (
                job(NEW, false),
                stored(NEW_ELSEWHERE, "other", DIGEST_FORMAT),
                unchanged,
            ),
            // An empty digest, and one of another repository, are replaced.
            (
                job(NEW, false),
                stored_from("https://github.com/a/b", 0, NEW, "other", DIGEST_FORMAT),
                None,
            ),
            (
                job(NEW, false),
                stored_from("https://github.com/a/c", 1, NEW, "other", DIGEST_FORMAT),
                None,
            ),
            (job(NEW, true), stored(NEW, "other", DIGEST_FORMAT), None),
            (
                job(NEW, true),
                stored(NEW, "this", DIGEST_FORMAT),
                unchanged,
            ),
            (
                job(OLD, true),
                stored(NEW, "other", DIGEST_FORMAT),
                superseded,
            ),
        ] {
            assert_eq!(settled_by(&job, &found), expected, "{job:?} {found:?}");
        }
    }
}
