//! Brings the catalogue up to date when a run closes.

use std::collections::{BTreeMap, HashSet};

use common::fault::Fault;
use common::ids::RepoRef;
use common::outcome::Outcome;
use common::run::documents::{HistoricRun, RunHistory, RunSummary};
use common::run::view::RunView;
use common::store::{DigestMeta, DigestStore, DocumentKey, Expected, Found, Put};
use futures::stream::{self, StreamExt, TryStreamExt};
use time::OffsetDateTime;
use tracing::warn;

use super::{Catalog, Line, State, changes, page};
use crate::cache::Checked;
use crate::cache::index::Learned;
use crate::cache::listing;
use crate::withdrawals::{Withdrawal, Withdrawals};

/// Digests of which nothing is known that are read at the same time.
const WIDTH: usize = 64;
/// How often the catalogue is written again if others write it meanwhile.
const TRIES: u32 = 5;

/// What a run knows of its repositories.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// What the cache check said.
    pub checked: &'a [Checked],
    /// How the jobs ended.
    pub view: &'a RunView,
    /// What was stored.
    pub learned: &'a Learned,
    /// The repositories of the feed, if it is known as a whole; what is not among them has left.
    pub feed: Option<&'a HashSet<RepoRef>>,
    /// Those of which the store has a digest, in the spelling of its key, if that is known.
    pub stored: Option<&'a HashSet<RepoRef>>,
    /// Digests that were withdrawn, or will be.
    pub withdrawals: &'a Withdrawals,
}

/// Brings catalogue, changes and page up to date. Returns how many lines there are.
///
/// # Errors
/// If the store does not take them, or others write them all the time.
pub async fn update(store: &dyn DigestStore, known: Known<'_>) -> Result<usize, Fault> {
    for _ in 0..TRIES {
        let (old, expected) = load(store).await?;
        let metas = metas(store, known, &old).await?;
        let new = merged(&old, known, &metas);
        if old == new && expected != Expected::Absent {
            return Ok(new.lines.len());
        }
        if write(store, &old, &new, &expected).await? {
            return Ok(new.lines.len());
        }
    }
    Err(others_write())
}

/// Changes the line of one repository, if there is a catalogue.
///
/// # Errors
/// As [`update`].
pub async fn update_one(
    store: &dyn DigestStore,
    repo: &RepoRef,
    change: impl Fn(&Line) -> Line,
) -> Result<(), Fault> {
    for _ in 0..TRIES {
        let (old, expected) = load(store).await?;
        let Some(line) = old.lines.get(repo) else {
            return Ok(());
        };
        let mut new = old.clone();
        new.insert(change(line));
        if write(store, &old, &new, &expected).await? {
            return Ok(());
        }
    }
    Err(others_write())
}

/// Holds every line against the store, without a run: reads each digest's record. Returns how many
/// lines there are.
///
/// # Errors
/// As [`update`].
pub async fn rewrite(store: &dyn DigestStore) -> Result<usize, Fault> {
    for _ in 0..TRIES {
        let (old, expected) = load(store).await?;
        let listed = listing::everything(store).await?;
        let stored = listed.into_iter().map(|listed| listed.repo);
        let new = held_against(&old, &heads(store, stored).await?);
        let is_there = old == new && expected != Expected::Absent;
        if is_there || write(store, &old, &new, &expected).await? {
            return Ok(new.lines.len());
        }
    }
    Err(others_write())
}

fn others_write() -> Fault {
    Fault::transient(format!(
        "others wrote the catalogue {TRIES} times meanwhile"
    ))
}

/// The catalogue with the digests that there are. What only the feed knows stays as it was.
fn held_against(old: &Catalog, metas: &BTreeMap<RepoRef, DigestMeta>) -> Catalog {
    let mut new = Catalog::default();
    for line in old.lines.values() {
        let stored = metas.get_key_value(&line.id);
        let stored = stored.filter(|_| line.state != State::Withdrawn);
        let state = match (line.state, stored) {
            (State::Left, None) => continue,
            (State::Failed(_) | State::Left | State::Withdrawn, _) => line.state,
            (_, None) => State::Missing,
            (_, Some((_, meta))) => match &line.feed_pushed_at {
                Some(pushed_at) if meta.pushed_at < *pushed_at => State::Stale,
                _ => State::Current,
            },
        };
        let id = stored.map_or(&line.id, |(repo, _)| repo).clone();
        let line = Line {
            id,
            state,
            ..line.clone()
        };
        new.insert(line.with_digest(stored.map(|(_, meta)| meta)));
    }
    for (repo, meta) in metas {
        if !old.lines.contains_key(repo) {
            let line = Line::new(repo.clone(), &meta.url, State::Current);
            new.insert(line.with_digest(Some(meta)));
        }
    }
    new
}

/// Reads the catalogue. One that cannot be read counts as empty, and is made anew.
///
/// # Errors
/// If the store does not answer.
pub async fn load(store: &dyn DigestStore) -> Result<(Catalog, Expected), Fault> {
    let key = DocumentKey::Catalog;
    let Some((file, version)) = store.read_document(&key).await? else {
        return Ok((Catalog::default(), Expected::Absent));
    };
    let decoded = tokio::task::spawn_blocking(move || Catalog::decode(&file)).await;
    let catalog = decoded.map_err(Fault::infra)?.unwrap_or_else(|error| {
        let location = store.location();
        warn!(
            operation = "catalog",
            "{location}/{key} cannot be read, so it is made anew: {error}"
        );
        Catalog::default()
    });
    Ok((catalog, Expected::Version(version)))
}

/// Writes what changed, then the catalogue, then its page: a crash in between repeats changes, and
/// loses none. Returns false if somebody else has written the catalogue meanwhile.
async fn write(
    store: &dyn DigestStore,
    old: &Catalog,
    new: &Catalog,
    expected: &Expected,
) -> Result<bool, Fault> {
    let now = OffsetDateTime::now_utc();
    let changes = changes::between(old, new);
    let file = store.document(&DocumentKey::Changes).await?;
    let file = changes::add(&file.unwrap_or_default(), &changes, now);
    store
        .put_document(&DocumentKey::Changes, file.as_bytes())
        .await?;
    let encoded = new.encode();
    let put = store.write_document(&DocumentKey::Catalog, &encoded, Some(expected));
    if put.await? == Put::Conflict {
        return Ok(false);
    }
    let page = page::of_catalog(new, now);
    store
        .put_document(&DocumentKey::CatalogPage, page.as_bytes())
        .await?;
    Ok(true)
}

/// Returns the records that lines are made from, as far as this run, or the store if nobody else,
/// knows them.
async fn metas(
    store: &dyn DigestStore,
    known: Known<'_>,
    old: &Catalog,
) -> Result<BTreeMap<RepoRef, DigestMeta>, Fault> {
    let mut metas = BTreeMap::new();
    let mut unknown = Vec::new();
    for checked in known.checked {
        let repo = &checked.entry.repo;
        let settled = known
            .view
            .settled(&checked.key())
            .map(|settled| settled.outcome);
        // Somebody else has stored another one since the cache check.
        let outdated = matches!(settled, Some(Outcome::Unchanged | Outcome::Superseded));
        let meta = known.learned.meta(repo).or(checked.stored.as_ref());
        match meta.filter(|_| !outdated || known.learned.meta(repo).is_some()) {
            Some(meta) => _ = metas.insert(repo.clone(), meta.clone()),
            None if outdated || checked.is_cached() => unknown.push(repo.clone()),
            None => {}
        }
    }
    for repo in known.stored.into_iter().flatten() {
        if !metas.contains_key(repo) && !old.lines.contains_key(repo) {
            unknown.push(repo.clone());
        }
    }
    metas.extend(heads(store, unknown.into_iter()).await?);
    Ok(metas)
}

/// Reads the records of these repositories' digests.
async fn heads(
    store: &dyn DigestStore,
    repos: impl Iterator<Item = RepoRef>,
) -> Result<BTreeMap<RepoRef, DigestMeta>, Fault> {
    let heads = stream::iter(repos)
        .map(|repo| async {
            let found = store.head(&repo).await?;
            Ok::<_, Fault>((repo, found))
        })
        .buffer_unordered(WIDTH);
    let heads: Vec<_> = heads.try_collect().await?;
    let stored = heads.into_iter().filter_map(|(repo, found)| match found {
        Found::Stored { meta, .. } => Some((repo, meta)),
        _ => None,
    });
    Ok(stored.collect())
}

/// The old catalogue with the lines that are known better now.
fn merged(old: &Catalog, known: Known<'_>, metas: &BTreeMap<RepoRef, DigestMeta>) -> Catalog {
    let mut new = old.clone();
    for checked in known.checked {
        let before = old.lines.get(&checked.entry.repo);
        new.insert(line(
            checked,
            known.view,
            metas.get(&checked.entry.repo),
            before,
        ));
    }
    for repo in known.stored.into_iter().flatten() {
        if let (None, Some(meta)) = (new.lines.get(repo), metas.get(repo)) {
            let left = Line::new(repo.clone(), &meta.url, State::Left);
            new.insert(left.with_digest(Some(meta)));
        }
    }
    if let Some(feed) = known.feed {
        new.lines.retain(|repo, line| {
            if feed.contains(repo) {
                return true;
            }
            line.state = State::Left;
            line.message = None;
            // Without a digest, there is nothing to say of it.
            let is_stored = known.stored.is_none_or(|stored| stored.contains(repo));
            line.digest.is_some() && is_stored
        });
    }
    for (repo, withdrawal) in known.withdrawals {
        if withdrawal.withdrawn_at.is_some() {
            let url = old.lines.get(repo).map_or("", |line| &line.url);
            new.insert(withdrawn(withdrawal, url));
        }
    }
    new
}

/// Returns the line of a repository whose digest was withdrawn.
pub fn withdrawn(withdrawal: &Withdrawal, url: &str) -> Line {
    Line {
        message: Some(withdrawal.reason.sentence().to_owned()),
        ..Line::new(withdrawal.repo.clone(), url, State::Withdrawn)
    }
}

fn line(
    checked: &Checked,
    view: &RunView,
    meta: Option<&DigestMeta>,
    before: Option<&Line>,
) -> Line {
    let entry = &checked.entry;
    let settled = view.settled(&checked.key());
    // Of one that was cancelled, no more is known than before.
    let settled = settled.filter(|settled| settled.outcome != Outcome::CANCELLED);
    let (state, message) = match (settled, &checked.failure) {
        (Some(settled), _) => match settled.outcome {
            Outcome::Failed(class) => (State::Failed(class), Some(&settled.message)),
            _ => (State::Current, None),
        },
        // As it was said when it happened.
        (None, Some(failure)) => {
            let state = State::Failed(failure.class);
            let before = before.filter(|line| line.state == state);
            let message = before.and_then(|line| line.message.as_ref());
            (state, message.or(Some(&failure.message)))
        }
        (None, None) if checked.is_cached() => (State::Current, None),
        // Its job is open, or was: what failed last time may succeed yet.
        (None, None) => match before.map(|line| (line.state, &line.message)) {
            Some((State::Failed(class), message)) => (State::Failed(class), message.as_ref()),
            _ if meta.is_some() => (State::Stale, None),
            _ => (State::Missing, None),
        },
    };
    let renamed_to = settled.and_then(|settled| settled.renamed_to());
    let renamed_before = before.and_then(|line| line.renamed_to.as_deref());
    let asked = matches!(settled, Some(settled) if settled.outcome.is_processed());
    let renamed_to = renamed_to.or(renamed_before.filter(|_| !asked));
    Line {
        message: message.cloned(),
        feed_pushed_at: Some(entry.pushed_at.clone()),
        renamed_to: renamed_to.map(str::to_owned),
        details: entry.details.clone(),
        ..Line::new(entry.repo.clone(), &entry.url, state).with_digest(meta)
    }
}

/// Adds a run to the history, and to its page.
///
/// # Errors
/// If the store does not take it.
pub async fn record_run(
    store: &dyn DigestStore,
    summary: &RunSummary,
    closed_at: OffsetDateTime,
) -> Result<(), Fault> {
    let history = store.document(&DocumentKey::History).await?;
    // One that cannot be read is none.
    let history = history.and_then(|history| serde_json::from_slice::<RunHistory>(&history).ok());
    let mut history = history.unwrap_or_default();
    let run = HistoricRun {
        run: summary.run_id.clone(),
        closed_at,
        elapsed: summary.elapsed_formatted.clone(),
        total: summary.total_repos,
        cached: summary.cached,
        processed: summary.processed,
        failed: summary.failed,
    };
    history.runs.retain(|known| known.run != run.run);
    history.runs.insert(0, run);
    history.runs.truncate(RunHistory::MOST);
    let document = serde_json::to_vec(&history).map_err(Fault::infra)?;
    store.put_document(&DocumentKey::History, &document).await?;
    let page = page::of_runs(&history);
    store
        .put_document(&DocumentKey::HistoryPage, page.as_bytes())
        .await
}
