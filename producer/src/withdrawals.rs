//! Leaving: digests of repositories that were taken out of the feed, or are gone from their host, are
//! withdrawn from readers after a while, kept for another, and deleted.
//!
//! A digest is withdrawn on evidence of two closed runs that are far enough apart: in both the
//! repository was not in the whole feed, or its host answered that it is gone. One run alone may have
//! seen a feed cut short, or a host in trouble. What is decided is written down before it is done, so a
//! run that dies in the middle is finished by the next. By hand, one repository is withdrawn at once
//! and stays so, whatever the feed says, until it is restored.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use common::fault::Fault;
use common::ids::{RepoRef, RunId};
use common::store::{DigestStore, DocumentKey, Expected, Found, Put};
use common::text::{counted, duration_within, percent};
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tracing::info;

use crate::feed::entry::FeedRepo;

/// Digests that are moved at the same time.
const WIDTH: usize = 32;
/// How often the document is written again if others write it meanwhile.
const TRIES: u32 = 5;
/// The version of the document that this program reads and writes.
const VERSION: u32 = 1;

/// When digests are withdrawn, and deleted.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Withdrawals")]
pub struct WithdrawConfig {
    /// Withdraw the digest of a repository that two closed runs so far apart did not find
    ///
    /// It must have left the feed, or be gone from its host, in both.
    #[arg(
        long,
        env = "WITHDRAW_AFTER",
        value_name = "DURATION",
        default_value = "48h",
        value_parser = duration_within("0s", "36500d")
    )]
    pub withdraw_after: Duration,

    /// Delete withdrawn digests after this time; until then they are below withdrawn/
    #[arg(
        long,
        env = "WITHDRAWN_KEEP",
        value_name = "DURATION",
        default_value = "30d",
        value_parser = duration_within("0s", "36500d")
    )]
    pub withdrawn_keep: Duration,

    /// Withdraw nothing, and end with 65, if more than this percentage of the digests would go at once
    #[arg(
        long,
        env = "WITHDRAW_LIMIT",
        value_name = "PERCENT",
        default_value = "10",
        value_parser = clap::value_parser!(u8).range(0..=100)
    )]
    pub withdraw_limit: u8,
}

/// Why a digest is, or will be, withdrawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Its repository is not in the feed.
    Left,
    /// Its repository is gone from its host.
    Gone,
    /// Somebody asked for it.
    ByHand,
}

impl Reason {
    /// A clause for a person.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Left => "it is not in the feed any more",
            Self::Gone => "its host says that it is gone",
            Self::ByHand => "it was withdrawn by hand",
        }
    }
}

/// A repository whose digest was withdrawn, or will be if the next run agrees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Withdrawal {
    /// The repository, as in the digest's key.
    pub repo: RepoRef,
    /// Why.
    pub reason: Reason,
    /// When that was first seen …
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// … and by which run; `None` by hand.
    pub run: Option<RunId>,
    /// When it was withdrawn; `None` if it was not yet.
    #[serde(default, with = "time::serde::rfc3339::option")]
    pub withdrawn_at: Option<OffsetDateTime>,
}

/// The document `runs/withdrawals.json`, by repository.
pub type Withdrawals = BTreeMap<RepoRef, Withdrawal>;

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    withdrawals: Vec<Withdrawal>,
}

/// What a closed run over the whole feed saw.
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    /// When it closed.
    pub now: OffsetDateTime,
    /// The run.
    pub run: &'a RunId,
    /// The repositories in the feed, whether or not the run was about them.
    pub feed: &'a HashSet<RepoRef>,
    /// Those of which the host said that they are gone when this run asked.
    pub gone: &'a HashSet<RepoRef>,
    /// Those of which the run stored or renewed the digest.
    pub made: &'a HashSet<RepoRef>,
    /// Those of which readers have a digest, in the spelling of its key.
    pub stored: &'a HashSet<RepoRef>,
}

/// What is to be done, in this order: note `after`, withdraw, delete, and forget what is in neither.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The document once all is done.
    pub after: Withdrawals,
    /// Whose digests are withdrawn.
    pub withdraw: Vec<RepoRef>,
    /// Whose withdrawn digests are deleted.
    pub delete: Vec<RepoRef>,
    /// How many would be withdrawn if they were not too many.
    pub too_many: Option<usize>,
}

/// Decides what leaves.
pub fn decide(before: &Withdrawals, seen: &Seen<'_>, config: &WithdrawConfig) -> Decision {
    let mut decision = Decision::default();
    let mut due = Vec::new();
    let repos: HashSet<_> = before.keys().chain(seen.stored).collect();
    for repo in repos {
        let known = before.get(repo);
        let is_stored = seen.stored.contains(repo);
        let sight = sight(known, repo, seen);
        let withdrawn = known.and_then(|known| Some((known, known.withdrawn_at?)));
        match (withdrawn, sight) {
            // Back in the feed, or at its host: as if it were new.
            (Some(_), Sight::Present) => decision.delete.push(repo.clone()),
            (Some((known, at)), _) => {
                let expired = seen.now - at >= config.withdrawn_keep;
                if expired {
                    decision.delete.push(repo.clone());
                }
                // By a run that died before it did so, or by a job that was under way.
                if is_stored {
                    decision.withdraw.push(repo.clone());
                }
                if is_stored || !expired || known.reason == Reason::ByHand {
                    decision.after.insert(repo.clone(), known.clone());
                }
            }
            (None, Sight::Leaves(reason)) if is_stored => {
                let known = known.filter(|known| known.reason == reason);
                let withdrawal = known.cloned().unwrap_or_else(|| Withdrawal {
                    repo: repo.clone(),
                    reason,
                    since: seen.now,
                    run: Some(seen.run.clone()),
                    withdrawn_at: None,
                });
                let of_two_runs = withdrawal.run.as_ref() != Some(seen.run);
                if of_two_runs && seen.now - withdrawal.since >= config.withdraw_after {
                    due.push(repo.clone());
                }
                decision.after.insert(repo.clone(), withdrawal);
            }
            (None, Sight::Unknown) if is_stored => {
                decision
                    .after
                    .extend(known.map(|known| (repo.clone(), known.clone())));
            }
            (None, _) => {}
        }
    }
    let percent = percent(due.len() as u64, seen.stored.len() as u64);
    // One is not too many, however few there are.
    if due.len() > 1 && percent > f64::from(config.withdraw_limit) {
        decision.too_many = Some(due.len());
        due.clear();
    }
    for repo in due {
        if let Some(withdrawal) = decision.after.get_mut(&repo) {
            withdrawal.withdrawn_at = Some(seen.now);
        }
        if config.withdrawn_keep.is_zero() {
            decision.delete.push(repo.clone());
        }
        decision.withdraw.push(repo);
    }
    decision.withdraw.sort();
    decision.delete.sort();
    decision
}

/// What a run saw of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sight {
    /// It is where it was.
    Present,
    /// It leaves.
    Leaves(Reason),
    /// It was gone, and this run did not ask its host, or got no answer.
    Unknown,
}

fn sight(known: Option<&Withdrawal>, repo: &RepoRef, seen: &Seen<'_>) -> Sight {
    match known.map(|known| known.reason) {
        Some(Reason::ByHand) => Sight::Leaves(Reason::ByHand),
        _ if !seen.feed.contains(repo) => Sight::Leaves(Reason::Left),
        _ if seen.gone.contains(repo) => Sight::Leaves(Reason::Gone),
        Some(Reason::Gone) if !seen.made.contains(repo) => Sight::Unknown,
        _ => Sight::Present,
    }
}

/// Reads the store's document; an empty one if there is none.
///
/// # Errors
/// If the store does not answer, or the document cannot be read: what was withdrawn by hand must not
/// come back because of that.
pub async fn load(store: &dyn DigestStore) -> Result<(Withdrawals, Expected), Fault> {
    let key = DocumentKey::Withdrawals;
    let Some((document, version)) = store.read_document(&key).await? else {
        return Ok((Withdrawals::new(), Expected::Absent));
    };
    let document: Document = serde_json::from_slice(&document).map_err(|error| {
        Fault::infra(format!(
            "{}/{key} cannot be read: {error}",
            store.location()
        ))
    })?;
    if document.version != VERSION {
        return Err(Fault::infra(format!(
            "{}/{key} is of version {}, which is not known here; use the program that wrote it",
            store.location(),
            document.version
        )));
    }
    let withdrawals = document.withdrawals.into_iter();
    let withdrawals = withdrawals.map(|withdrawal| (withdrawal.repo.clone(), withdrawal));
    Ok((withdrawals.collect(), Expected::Version(version)))
}

/// Leaves out of a run what was withdrawn by hand.
///
/// # Errors
/// As [`load`], as the fault of a store that cannot be read.
pub async fn leave_out(store: &dyn DigestStore, selected: &mut Vec<FeedRepo>) -> Result<(), Fault> {
    let (withdrawals, _) = load(store).await?;
    let before = selected.len();
    selected.retain(|entry| {
        let known = withdrawals.get(&entry.repo);
        known.is_none_or(|known| known.reason != Reason::ByHand)
    });
    let count = (before - selected.len()) as u64;
    if count > 0 {
        let repositories = counted(count, "repository is", "repositories are");
        info!(
            operation = "withdraw",
            count, "{repositories} left out, as withdrawn by hand; see `producer restore`"
        );
    }
    Ok(())
}

async fn save(
    store: &dyn DigestStore,
    withdrawals: &Withdrawals,
    expected: &Expected,
) -> Result<Put, Fault> {
    let document = Document {
        version: VERSION,
        withdrawals: withdrawals.values().cloned().collect(),
    };
    let document = serde_json::to_vec_pretty(&document).map_err(Fault::infra)?;
    store
        .write_document(&DocumentKey::Withdrawals, &document, Some(expected))
        .await
}

/// Decides what leaves after a closed run over the whole feed, and does it.
///
/// # Errors
/// If the store does not do it, or others change the document all the time.
pub async fn leave(
    store: &dyn DigestStore,
    seen: &Seen<'_>,
    config: &WithdrawConfig,
) -> Result<Decision, Fault> {
    for _ in 0..TRIES {
        let (before, mut expected) = load(store).await?;
        let decision = decide(&before, seen, config);
        let mut noted = decision.after.clone();
        for repo in &decision.delete {
            if let Some(known) = before.get(repo) {
                noted.entry(repo.clone()).or_insert_with(|| known.clone());
            }
        }
        if noted != before {
            match save(store, &noted, &expected).await? {
                Put::Stored(version) => expected = version.into(),
                Put::Conflict => continue,
            }
        }
        all(&decision.withdraw, |repo| take_down(store, repo)).await?;
        let withdrawn = store.withdrawn();
        all(&decision.delete, |repo| delete(&*withdrawn, repo)).await?;
        if noted != decision.after && !save(store, &decision.after, &expected).await?.is_stored() {
            // Somebody else has changed it: what is left to forget, the next run forgets.
            info!(
                operation = "withdraw",
                "the list of withdrawals changed meanwhile"
            );
        }
        return Ok(decision);
    }
    Err(others_write())
}

/// Takes the digest of `repo` down, and keeps it down until it is [restored](restore). Returns what was
/// noted, and whether there was a digest.
///
/// # Errors
/// If the store does not do it.
pub async fn by_hand(
    store: &dyn DigestStore,
    repo: &RepoRef,
    delete_now: bool,
) -> Result<(Withdrawal, bool), Fault> {
    let now = OffsetDateTime::now_utc();
    let withdrawal = Withdrawal {
        repo: repo.clone(),
        reason: Reason::ByHand,
        since: now,
        run: None,
        withdrawn_at: Some(now),
    };
    let note = |withdrawals: &mut Withdrawals| {
        withdrawals.insert(repo.clone(), withdrawal.clone());
    };
    change(store, note).await?;
    let was_there = store.head(repo).await? != Found::Absent;
    take_down(store, repo).await?;
    if delete_now {
        delete(&*store.withdrawn(), repo).await?;
    }
    Ok((withdrawal, was_there))
}

/// Lets the digest of `repo` be stored again, and puts back what was withdrawn of it. Returns `None` if
/// it was not withdrawn, else whether a digest was put back.
///
/// # Errors
/// If the store does not do it.
pub async fn restore(store: &dyn DigestStore, repo: &RepoRef) -> Result<Option<bool>, Fault> {
    let mut known = None;
    change(store, |withdrawals| known = withdrawals.remove(repo)).await?;
    if known.is_none() {
        return Ok(None);
    }
    let withdrawn = store.withdrawn();
    let Some(digest) = withdrawn.get(repo).await? else {
        return Ok(Some(false));
    };
    // Whatever is there is newer.
    let put = store.put(repo, &digest, &Expected::Absent).await?;
    delete(&*withdrawn, repo).await?;
    Ok(Some(put.is_stored()))
}

async fn change(
    store: &dyn DigestStore,
    mut change: impl FnMut(&mut Withdrawals),
) -> Result<(), Fault> {
    for _ in 0..TRIES {
        let (mut withdrawals, expected) = load(store).await?;
        change(&mut withdrawals);
        if save(store, &withdrawals, &expected).await?.is_stored() {
            return Ok(());
        }
    }
    Err(others_write())
}

fn others_write() -> Fault {
    Fault::transient(format!(
        "others changed the list of withdrawals {TRIES} times meanwhile; try again"
    ))
}

async fn all<'a, F>(repos: &'a [RepoRef], each: impl Fn(&'a RepoRef) -> F) -> Result<(), Fault>
where
    F: Future<Output = Result<(), Fault>>,
{
    let each = stream::iter(repos).map(each).buffer_unordered(WIDTH);
    each.try_collect().await
}

/// Moves a digest out of the readers' sight.
async fn take_down(store: &dyn DigestStore, repo: &RepoRef) -> Result<(), Fault> {
    let Expected::Version(version) = store.head(repo).await?.expected() else {
        return Ok(());
    };
    // What cannot be read is nobody's loss.
    if let Some(digest) = store.get(repo).await? {
        let withdrawn = store.withdrawn();
        let there = withdrawn.head(repo).await?.expected();
        withdrawn.put(repo, &digest, &there).await?;
    }
    // If it is another by now, the next run looks at that.
    store.remove(repo, &version).await?;
    Ok(())
}

async fn delete(withdrawn: &dyn DigestStore, repo: &RepoRef) -> Result<(), Fault> {
    if let Expected::Version(version) = withdrawn.head(repo).await?.expected() {
        withdrawn.remove(repo, &version).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    const START: OffsetDateTime = datetime!(2026-11-01 3:00 UTC);
    const HOUR: Duration = Duration::from_secs(3600);

    fn config(limit: u8) -> WithdrawConfig {
        WithdrawConfig {
            withdraw_after: 48 * HOUR,
            withdrawn_keep: 240 * HOUR,
            withdraw_limit: limit,
        }
    }

    fn repos(names: &[&str]) -> HashSet<RepoRef> {
        names
            .iter()
            .map(|name| format!("a/{name}").parse().unwrap())
            .collect()
    }

    fn run(number: u32) -> RunId {
        RunId::try_from(format!("run-{number}")).unwrap()
    }

    /// Runs at these hours over a feed without `a/x`, which is stored until it is withdrawn.
    fn hours_until_withdrawn(hours: &[u32]) -> Option<u32> {
        let (feed, stored, none) = (repos(&["y"]), repos(&["x", "y"]), HashSet::new());
        let mut known = Withdrawals::new();
        for &hour in hours {
            let seen = Seen {
                now: START + HOUR * hour,
                run: &run(hour),
                feed: &feed,
                gone: &none,
                made: &none,
                stored: &stored,
            };
            let decision = decide(&known, &seen, &config(10));
            if !decision.withdraw.is_empty() {
                return Some(hour);
            }
            known = decision.after;
        }
        None
    }

    #[test]
    fn it_takes_two_runs_that_are_far_enough_apart() {
        assert_eq!(hours_until_withdrawn(&[0]), None);
        assert_eq!(hours_until_withdrawn(&[0, 47]), None);
        assert_eq!(hours_until_withdrawn(&[0, 48]), Some(48));
        assert_eq!(hours_until_withdrawn(&[5, 20, 44, 60]), Some(60));
    }

    #[test]
    fn too_many_at_once_stop_it() {
        let names: Vec<String> = (0..100).map(|i| format!("r{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (stored, none) = (repos(&names), HashSet::new());
        for (leave, limit, too_many) in [
            (10, 10, None),
            (11, 10, Some(11)),
            (100, 99, Some(100)),
            (100, 100, None),
            (1, 0, None),
            (2, 0, Some(2)),
        ] {
            let feed = repos(&names[leave..]);
            let mut known = Withdrawals::new();
            let mut last = Decision::default();
            for number in 0..2 {
                let seen = Seen {
                    now: START + 48 * HOUR * number,
                    run: &run(number),
                    feed: &feed,
                    gone: &none,
                    made: &none,
                    stored: &stored,
                };
                last = decide(&known, &seen, &config(limit));
                known = last.after.clone();
            }
            assert_eq!(last.too_many, too_many, "{leave} at {limit} %");
            let withdrawn = if too_many.is_some() { 0 } else { leave };
            assert_eq!(last.withdraw.len(), withdrawn);
            assert_eq!(known.len(), leave, "the evidence stays");
        }
    }

    /// What the decisions are about.
    #[derive(Default)]
    struct World {
        feed: HashSet<RepoRef>,
        gone: HashSet<RepoRef>,
        document: Withdrawals,
        current: HashSet<RepoRef>,
        withdrawn: HashSet<RepoRef>,
        /// Which reason the closed runs saw last, since when without another, and in how many.
        evidence: BTreeMap<RepoRef, (Reason, OffsetDateTime, u32)>,
        /// When it was decided that they are withdrawn.
        decided: BTreeMap<RepoRef, OffsetDateTime>,
    }

    impl World {
        /// A run that closes, and dies after so many of its last steps.
        fn run(
            &mut self,
            number: u32,
            now: OffsetDateTime,
            steps: usize,
            random: &mut fastrand::Rng,
        ) {
            let is_there = self.feed.difference(&self.gone);
            let asked: HashSet<_> = is_there.filter(|_| random.bool()).cloned().collect();
            let missing = self
                .feed
                .difference(&self.gone)
                .filter(|r| !self.current.contains(*r));
            let made: HashSet<_> = missing.chain(&asked).cloned().collect();
            let gone = self.feed.intersection(&self.gone);
            let gone: HashSet<_> = gone.filter(|_| random.bool()).cloned().collect();
            self.current.extend(made.iter().cloned());
            let stored = self.current.clone();
            let seen = Seen {
                now,
                run: &run(number),
                feed: &self.feed,
                gone: &gone,
                made: &made,
                stored: &stored,
            };
            let decision = decide(&self.document, &seen, &config(100));
            let mut steps = 0..steps;
            let mut alive = || steps.next().is_some();
            if !alive() {
                return;
            }
            for repo in stored.iter().chain(self.document.keys()) {
                let before = self.evidence.get(repo).copied();
                let reason = match () {
                    () if !self.feed.contains(repo) => Reason::Left,
                    () if gone.contains(repo) => Reason::Gone,
                    () if made.contains(repo) || !self.gone.contains(repo) => {
                        if !matches!(before, Some((Reason::Gone, ..))) || made.contains(repo) {
                            self.evidence.remove(repo);
                        }
                        continue;
                    }
                    () => continue,
                };
                let known = before.filter(|(known, ..)| *known == reason);
                let (since, count) = known.map_or((now, 0), |(_, since, count)| (since, count));
                self.evidence
                    .insert(repo.clone(), (reason, since, count + 1));
            }
            let mut noted = decision.after.clone();
            for repo in &decision.delete {
                noted.extend(
                    self.document
                        .get(repo)
                        .map(|known| (repo.clone(), known.clone())),
                );
            }
            for repo in &decision.withdraw {
                if self
                    .document
                    .get(repo)
                    .is_none_or(|known| known.withdrawn_at.is_none())
                {
                    let (_, since, count) = self.evidence[repo];
                    assert!(count > 1 && now - since >= 48 * HOUR, "{repo} {count}");
                    assert!(
                        !self.feed.contains(repo) || self.gone.contains(repo),
                        "{repo}"
                    );
                    self.decided.insert(repo.clone(), now);
                }
            }
            self.document = noted;
            for repo in &decision.withdraw {
                if !alive() {
                    return;
                }
                self.withdrawn.insert(repo.clone());
                self.current.remove(repo);
            }
            for repo in &decision.delete {
                if !alive() {
                    return;
                }
                let back = made.contains(repo) || self.feed.contains(repo);
                assert!(back || now - self.decided[repo] >= 240 * HOUR, "{repo}");
                self.withdrawn.remove(repo);
            }
            if alive() {
                self.document = decision.after;
            }
        }
    }

    /// 10,000 sequences of feeds, failures and crashes: no digest leaves without its evidence, none is
    /// deleted before its time, and none stays beyond it.
    #[test]
    fn nothing_leaves_wrongly_and_nothing_stays() {
        let all: Vec<RepoRef> = (0..5).map(|i| format!("a/r{i}").parse().unwrap()).collect();
        let mut withdrawn = 0;
        for seed in 0..10_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut world = World::default();
            world.feed.extend(all.iter().cloned());
            let mut now = START;
            for number in 0..40 {
                now += HOUR * random.u32(1..60);
                for repo in &all {
                    if random.u8(..8) == 0 && !world.feed.remove(repo) {
                        world.feed.insert(repo.clone());
                    }
                    if random.u8(..12) == 0 && !world.gone.remove(repo) {
                        world.gone.insert(repo.clone());
                    }
                }
                let steps = if random.u8(..4) == 0 {
                    random.usize(..6)
                } else {
                    usize::MAX
                };
                world.run(number, now, steps, &mut random);
            }
            withdrawn += world.decided.len();
            // The rest of them leave, and nothing dies.
            world.feed.retain(|repo| !world.gone.contains(repo));
            for number in 40..44 {
                now += 300 * HOUR;
                world.run(number, now, usize::MAX, &mut random);
            }
            assert_eq!(world.current, world.feed, "seed {seed}: left over");
            assert_eq!(world.withdrawn, HashSet::new(), "seed {seed}: not deleted");
        }
        assert!(
            withdrawn > 10_000,
            "{withdrawn}: the sequences are too quiet"
        );
    }
}
