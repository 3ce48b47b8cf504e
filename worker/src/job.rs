//! One attempt at one job: look, fetch unless HEAD has not moved, store.

use std::time::Instant;

use crate::metrics::Metrics;
use common::failpoint;
use common::fault::{Fault, FaultKind};
use common::job::{DIGEST_FORMAT, Job};
use common::outcome::{Outcome, StoredDigest};
use common::store::freshness::{Freshness, freshness, renewable};
use common::store::{Digest, DigestMeta, Found, Put, Renewal, SharedStore, Version};
use common::telemetry::traces::Span;
use common::text::sha256;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::digest::Subject;
use crate::digest::assemble::assemble;
use crate::slot::slots::Slots;
use crate::slot::{SlotError, SlotOutput, SlotResult};
use crate::source::ObjectId;

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
    /// The digest, if one was stored or renewed.
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

/// A finished digest that the store did not take for reasons of its own.
#[derive(Clone, Debug)]
pub struct Kept {
    digest: Digest,
    fetched_bytes: u64,
    renamed_to: Option<String>,
}

/// Returns the commit whose digest the store has, if an earlier push is all that is wrong with it.
fn known_commit(job: &Job, found: &Found) -> Option<ObjectId> {
    let (meta, _) = renewable(found, &job.into()).filter(|_| !job.force)?;
    ObjectId::parse(meta.commit.as_ref()?)
}

/// An attempt at a job.
pub struct Work<'a> {
    /// The job.
    pub job: &'a Job,
    /// Where its digest goes to.
    pub store: &'a SharedStore,
    /// Where it is made.
    pub slots: &'a Slots,
    /// What is counted.
    pub metrics: &'a Metrics,
    /// The span of the job.
    pub span: &'a Span,
    /// Ends it when cancelled.
    pub stop: &'a CancellationToken,
}

impl Work<'_> {
    /// Works on the job until it is done, fails, or is stopped.
    ///
    /// A digest that the store does not take is left in `kept`, and the next attempt at the same job
    /// offers it again instead of fetching.
    ///
    /// # Errors
    /// If it fails or is stopped.
    pub async fn attempt(&self, kept: &mut Option<Kept>) -> Result<Attempt, SlotError> {
        let found = self.look().await?;
        if let Some(outcome) = settled_by(self.job, &found) {
            return Ok(outcome.into());
        }
        if let Some(made) = kept.take() {
            return self.offer(made, found, kept).await;
        }
        failpoint::hit("before-fetch");
        let (mut made, found, fetched_bytes) =
            match self.fetch(known_commit(self.job, &found)).await? {
                SlotResult::Digest(made) => (made, found, 0),
                SlotResult::Unmoved {
                    fetched_bytes,
                    renamed_to,
                } => {
                    if let Some(digest) = self.renew(&found).await? {
                        return Ok(Attempt {
                            outcome: Outcome::Unmoved,
                            fetched_bytes,
                            stored_bytes: 0,
                            digest: Some(digest),
                            renamed_to,
                        });
                    }
                    let found = self.look().await?;
                    if let Some(outcome) = settled_by(self.job, &found) {
                        return Ok(Attempt {
                            fetched_bytes,
                            ..outcome.into()
                        });
                    }
                    match self.fetch(None).await? {
                        SlotResult::Digest(made) => (made, found, fetched_bytes),
                        SlotResult::Unmoved { .. } => unreachable!("no commit is known"),
                    }
                }
            };
        let fetched_bytes = fetched_bytes + made.fetched_bytes;
        let renamed_to = made.renamed_to.take();
        let made = Kept {
            digest: self.assemble(*made).await?,
            fetched_bytes,
            renamed_to,
        };
        self.offer(made, found, kept).await
    }

    async fn look(&self) -> Result<Found, SlotError> {
        let span = self.span.call("lookup");
        told(
            span,
            unless_stopped(self.stop, self.store.head(&self.job.repo)),
        )
        .await
    }

    /// Has a slot make the parts of a digest, unless HEAD is `known`.
    async fn fetch(&self, known: Option<ObjectId>) -> Result<SlotResult, SlotError> {
        let subject = Subject::Repository {
            owner: self.job.repo.owner().to_owned(),
            name: self.job.repo.name().to_owned(),
        };
        let span = self.span.child("slot");
        let work = self
            .slots
            .work(&self.job.url, subject, known, self.stop, &span);
        let result = work.await?;
        drop(span);
        let fetched_bytes = match &result {
            SlotResult::Digest(made) => {
                self.metrics.fetched_in(made.fetch);
                self.metrics.digested_in(made.digest);
                made.fetched_bytes
            }
            SlotResult::Unmoved { fetched_bytes, .. } => *fetched_bytes,
        };
        self.metrics.fetched_bytes.inc_by(fetched_bytes);
        Ok(result)
    }

    /// Renews the record of what was found. `None` if that is not there any more, or its text is not
    /// what its record says.
    async fn renew(&self, found: &Found) -> Result<Option<StoredDigest>, SlotError> {
        let Some((meta, version)) = renewable(found, &self.job.into()) else {
            return Ok(None);
        };
        let meta = DigestMeta {
            pushed_at: self.job.pushed_at.clone(),
            processed_at: now()?,
            run: self.job.run.clone(),
            ..meta.clone()
        };
        failpoint::hit("before-put");
        let repo = &self.job.repo;
        let renewal = unless_stopped(self.stop, self.store.renew(repo, &meta, version));
        match told(self.span.call("renew"), renewal).await? {
            Renewal::Renewed(version) => {
                failpoint::hit("after-put");
                Ok(Some(stored(&version, &meta)))
            }
            Renewal::Conflict => Ok(None),
            Renewal::Torn => {
                warn!(
                    operation = "renew",
                    "the stored digest of {repo} is not the text that its record describes; making it anew"
                );
                Ok(None)
            }
        }
    }

    /// Counting tokens is the parent's only heavy work.
    async fn assemble(&self, made: SlotOutput) -> Result<Digest, SlotError> {
        let max_text_bytes = self.slots.limits().max_text_bytes;
        let (commit, files) = (made.facts.commit.clone(), made.facts.files);
        let _span = self.span.child("tokens");
        let text = tokio::task::spawn_blocking(move || {
            assemble(&made.facts, &made.tree, &made.content, max_text_bytes)
        })
        .await
        .map_err(|panic| Fault::killed(format!("counting tokens: {panic}")))?;
        Ok(Digest {
            meta: DigestMeta {
                pushed_at: self.job.pushed_at.clone(),
                url: self.job.url.clone(),
                processed_at: now()?,
                commit,
                format: DIGEST_FORMAT.to_owned(),
                bytes: text.text.len() as u64,
                truncated: text.truncated,
                run: self.job.run.clone(),
                sha256: Some(sha256(&text.text)),
                tokens: Some(text.tokens),
                files: Some(files),
            },
            text: text.text,
        })
    }

    /// Stores what was made, or keeps it if the store does not take it.
    async fn offer(
        &self,
        made: Kept,
        found: Found,
        kept: &mut Option<Kept>,
    ) -> Result<Attempt, SlotError> {
        match self.put(&made.digest, found).await {
            Ok(attempt) => Ok(Attempt {
                fetched_bytes: made.fetched_bytes,
                renamed_to: made.renamed_to,
                ..attempt
            }),
            Err(error) => {
                let of_store = matches!(&error, SlotError::Fault(f) if f.kind == FaultKind::Infra);
                *kept = of_store.then_some(made);
                Err(error)
            }
        }
    }

    /// Stores a digest, unless somebody else stores one meanwhile that leaves nothing to do.
    async fn put(&self, digest: &Digest, mut found: Found) -> Result<Attempt, SlotError> {
        failpoint::hit("before-put");
        let start = Instant::now();
        for _ in 0..OFFERS {
            let expected = found.expected();
            let put = unless_stopped(self.stop, self.store.put(&self.job.repo, digest, &expected));
            let mut span = self.span.call("put");
            span.set("repofleet.stored_bytes", digest.meta.bytes);
            if let Put::Stored(version) = told(span, put).await? {
                failpoint::hit("after-put");
                self.metrics.stored_in(start.elapsed());
                self.metrics.stored_bytes.inc_by(digest.meta.bytes);
                return Ok(Attempt {
                    outcome: Outcome::Processed,
                    fetched_bytes: 0,
                    stored_bytes: digest.meta.bytes,
                    digest: Some(stored(&version, &digest.meta)),
                    renamed_to: None,
                });
            }
            found = self.look().await?;
            if let Some(outcome) = settled_by(self.job, &found) {
                return Ok(outcome.into());
            }
        }
        Err(Fault::transient(format!(
            "somebody else stored this digest {OFFERS} times meanwhile"
        ))
        .into())
    }
}

fn stored(version: &Version, meta: &DigestMeta) -> StoredDigest {
    StoredDigest {
        etag: version.etag().to_owned(),
        format: meta.format.clone(),
        bytes: meta.bytes,
        meta: Some(Box::new(meta.clone())),
    }
}

fn now() -> Result<String, Fault> {
    let now = OffsetDateTime::now_utc().format(&Rfc3339);
    now.map_err(Fault::infra)
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

/// Ends `span` with the answer to a call, and tells it of a failure.
async fn told<T>(
    mut span: Span,
    call: impl Future<Output = Result<T, SlotError>>,
) -> Result<T, SlotError> {
    let answer = call.await;
    if let Err(SlotError::Fault(fault)) = &answer {
        span.fail(fault);
    }
    answer
}

#[cfg(test)]
mod tests {
    use common::ids::PushedAt;
    use common::ids::RunId;

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
            traceparent: None,
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
                sha256: None,
                tokens: None,
                files: None,
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

    #[test]
    fn the_commit_is_known_if_only_the_push_is_older() {
        const OLD: &str = "2026-01-01T00:00:00Z";
        const NEW: &str = "2026-01-02T00:00:00Z";
        const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
        let commit = ObjectId::parse(COMMIT);
        let of_commit = |found: Found, commit: Option<&str>| match found {
            Found::Stored { mut meta, version } => {
                meta.commit = commit.map(str::to_owned);
                Found::Stored { meta, version }
            }
            other => other,
        };
        let older = || stored(OLD, "other", DIGEST_FORMAT);
        let from = |url| stored_from(url, 1, OLD, "other", DIGEST_FORMAT);
        for (job, found, expected) in [
            (job(NEW, false), of_commit(older(), Some(COMMIT)), commit),
            (job(NEW, true), of_commit(older(), Some(COMMIT)), None),
            (job(OLD, false), of_commit(older(), Some(COMMIT)), None),
            (job(NEW, false), of_commit(older(), None), None),
            (job(NEW, false), of_commit(older(), Some("main")), None),
            (job(NEW, false), Found::Absent, None),
            (
                job(NEW, false),
                of_commit(stored(OLD, "other", "older"), Some(COMMIT)),
                None,
            ),
            (
                job(NEW, false),
                of_commit(from("https://GitHub.com/a/B.git/"), Some(COMMIT)),
                commit,
            ),
            (
                job(NEW, false),
                of_commit(from("https://github.com/a/c"), Some(COMMIT)),
                None,
            ),
            (
                job(NEW, false),
                of_commit(
                    stored_from("https://github.com/a/b", 0, OLD, "other", DIGEST_FORMAT),
                    Some(COMMIT),
                ),
                None,
            ),
        ] {
            assert_eq!(known_commit(&job, &found), expected, "{job:?} {found:?}");
        }
    }
}
