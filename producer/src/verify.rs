//! `producer verify`: an audit of the store that believes nobody. It lists what is there, reads the
//! record of each digest (with `--deep`, its text), and holds that against the feed, the catalogue and
//! the index.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::Result;
use clap::Args;
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::RepoRef;
use common::shutdown::Shutdown;
use common::store::freshness::{Freshness, Wanted};
use common::store::{DigestMeta, DigestStore, Expected, Found, Listed, Version};
use common::text::thousands;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use strum::{AsRefStr, Display, VariantArray};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};
use tracing::info;

use crate::cache::answer::Answer;
use crate::cache::failures::Failures;
use crate::cache::index::Index;
use crate::cache::listing;
use crate::catalog::update;
use crate::catalog::{Catalog, LineDigest, State};
use crate::feed::entry::FeedRepo;
use crate::run::RunConfig;
use crate::terminal;
use crate::terminal::bar::Bar;
use crate::terminal::table::table;
use crate::withdrawals;

/// Records that are read at the same time, …
const WIDTH: usize = 256;
/// … and texts, of half a megabyte each.
const DEEP_WIDTH: usize = 32;
/// How far a time may lie ahead: clocks differ.
const AHEAD: Duration = Duration::days(1);

/// What to look at, and what to do about what is found.
#[derive(Args, Clone, Debug)]
pub struct VerifyConfig {
    /// Read every text, and check its length and SHA-256.
    #[arg(long, help_heading = "Audit")]
    deep: bool,
    /// Remove what is broken, and digest exactly what needs it, as `producer run` does.
    #[arg(long, help_heading = "Audit")]
    repair: bool,
    /// Remove what belongs to no repository of the feed, and copies in another letter case.
    #[arg(long, help_heading = "Audit")]
    prune: bool,
    /// Print one JSON object a line: key, repo, finding, detail.
    #[arg(long, help_heading = "Audit")]
    json: bool,
    #[command(flatten)]
    run: RunConfig,
}

/// What can be wrong with an object, or with the want of one.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    AsRefStr,
    Display,
    VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum Finding {
    /// The feed has the repository, the store has no digest, and nothing says why.
    Missing,
    /// The digest is of an earlier push, another URL or another format.
    Stale,
    /// The text has another length than its record says, or is empty.
    Torn,
    /// The text has another SHA-256 than its record says (`--deep`).
    WrongHash,
    /// Something without a digest's record.
    Foreign,
    /// The digest says that it is of the future.
    FutureDated,
    /// A second copy, whose key has other letter case.
    WrongCase,
    /// The feed does not have its repository, and it is not about to be withdrawn.
    Orphaned,
    /// The catalogue says something else than the digest's record.
    Catalog,
    /// The index says something else than the digest's record.
    Index,
}

impl Finding {
    /// Whether a digest has to be made.
    fn needs_digest(self) -> bool {
        self == Self::Missing || self == Self::Stale || self.is_broken()
    }

    /// Whether the object is worth nothing.
    fn is_broken(self) -> bool {
        let broken = [
            Self::Torn,
            Self::WrongHash,
            Self::Foreign,
            Self::FutureDated,
        ];
        broken.contains(&self)
    }

    fn is_surplus(self) -> bool {
        [Self::WrongCase, Self::Orphaned].contains(&self)
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Defect {
    /// The key in the store.
    pub key: String,
    /// The repository, where the key is that of a digest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repo: Option<RepoRef>,
    /// What is wrong.
    pub finding: Finding,
    /// What that rests on, for a person.
    pub detail: String,
    /// Which copy it is about.
    #[serde(skip)]
    version: Option<Version>,
}

/// What the store is held against.
#[derive(Clone, Copy, Debug)]
pub struct Wants<'a> {
    /// The feed's repositories, in its spelling.
    pub feed: &'a HashMap<RepoRef, FeedRepo>,
    /// Whether the feed is known as a whole, so that what is not in it is surplus.
    pub whole: bool,
    /// Whether texts are read.
    pub deep: bool,
    /// The time.
    pub now: OffsetDateTime,
}

/// What the audit has besides the store's digests.
struct Documents {
    catalog: Option<Catalog>,
    index: Index,
    failures: Failures,
    withdrawals: withdrawals::Withdrawals,
}

/// Looks at all that the store holds. The defects are sorted by key.
///
/// # Errors
/// If something in the store cannot be read for the store's sake.
pub async fn audit(store: &dyn DigestStore, wants: Wants<'_>) -> Result<Vec<Defect>, Fault> {
    let (listed, strays) = tokio::try_join!(listing::everything(store), store.strays())?;
    let (catalog, expected) = update::load(store).await?;
    let documents = Documents {
        catalog: (expected != Expected::Absent).then_some(catalog),
        index: Index::load(store).await.unwrap_or_default(),
        failures: Failures::load(store).await,
        withdrawals: withdrawals::load(store).await?.0,
    };
    let (first, others) = without_copies(listed, &documents);
    let mut defects: Vec<_> = strays.into_iter().map(stray).collect();
    defects.extend(others.iter().map(|copy| {
        let first = &first[&copy.repo].repo;
        let detail = format!("{} is another copy of it", first.digest_key());
        Defect::of(&copy.repo, Finding::WrongCase, detail)
    }));
    let width = if wants.deep { DEEP_WIDTH } else { WIDTH };
    let looks = stream::iter(first.values()).map(|listed| look(store, listed, wants, &documents));
    let looks: Vec<Vec<Defect>> = looks.buffer_unordered(width).try_collect().await?;
    defects.extend(looks.into_iter().flatten());
    let absent = wants
        .feed
        .values()
        .filter(|entry| !first.contains_key(&entry.repo));
    defects.extend(absent.filter_map(|entry| missing(entry, wants, &documents)));
    let lines = documents
        .catalog
        .iter()
        .flat_map(|catalog| catalog.lines.values());
    let without = lines.filter(|line| line.digest.is_some() && !first.contains_key(&line.id));
    defects.extend(without.map(|line| {
        let detail = "the catalogue has a digest that the store does not have".to_owned();
        Defect::of(&line.id, Finding::Catalog, detail)
    }));
    let withdrawn = listing::everything(&*store.withdrawn()).await?;
    let forgotten = withdrawn
        .into_iter()
        .filter(|l| !documents.withdrawals.contains_key(&l.repo));
    defects.extend(forgotten.map(|listed| Defect {
        key: format!("withdrawn/{}/summary.txt", listed.repo),
        ..Defect::of(
            &listed.repo,
            Finding::Orphaned,
            "no list of withdrawals has it".to_owned(),
        )
    }));
    defects.sort_by(|a, b| (&a.key, a.finding).cmp(&(&b.key, b.finding)));
    Ok(defects)
}

impl Defect {
    fn of(repo: &RepoRef, finding: Finding, detail: String) -> Self {
        Self {
            key: repo.digest_key(),
            repo: Some(repo.clone()),
            finding,
            detail,
            version: None,
        }
    }
}

fn stray(key: String) -> Defect {
    Defect {
        key,
        repo: None,
        finding: Finding::Foreign,
        detail: "its key is not that of a digest".to_owned(),
        version: None,
    }
}

/// Takes one copy of each repository: the one that the catalogue has, else the one stored last.
fn without_copies(
    listed: Vec<Listed>,
    documents: &Documents,
) -> (HashMap<RepoRef, Listed>, Vec<Listed>) {
    let lines = documents.catalog.as_ref().map(|catalog| &catalog.lines);
    let rank = |listed: &Listed| {
        let line = lines.and_then(|lines| lines.get(&listed.repo));
        let in_catalog = line.is_some_and(|line| line.id.to_string() == listed.repo.to_string());
        (in_catalog, listed.modified_millis)
    };
    let mut first: HashMap<RepoRef, Listed> = HashMap::new();
    let mut others = Vec::new();
    for listed in listed {
        match first.remove(&listed.repo) {
            Some(known) if rank(&known) >= rank(&listed) => {
                others.push(listed);
                first.insert(known.repo.clone(), known);
            }
            known => {
                others.extend(known);
                first.insert(listed.repo.clone(), listed);
            }
        }
    }
    (first, others)
}

/// Returns what is wrong with one digest.
async fn look(
    store: &dyn DigestStore,
    listed: &Listed,
    wants: Wants<'_>,
    documents: &Documents,
) -> Result<Vec<Defect>, Fault> {
    let found = store.head(&listed.repo).await?;
    let (meta, version) = match found {
        // Removed since it was listed.
        Found::Absent => return Ok(Vec::new()),
        Found::Unreadable { version, why, torn } => {
            let finding = if torn {
                Finding::Torn
            } else {
                Finding::Foreign
            };
            let defect = Defect::of(&listed.repo, finding, why);
            let version = Some(version);
            return Ok(vec![Defect { version, ..defect }]);
        }
        Found::Stored { meta, version } => (meta, version),
    };
    let mut findings = of_record(&meta, listed, wants, documents);
    if wants.deep && meta.bytes > 0 {
        let digest = store.get(&listed.repo).await?;
        if !digest.is_some_and(|digest| meta.describes(digest.text.as_bytes())) {
            let detail = "its text has another SHA-256 than its record says".to_owned();
            findings.push((Finding::WrongHash, detail));
        }
    }
    let defects = findings.into_iter().map(|(finding, detail)| Defect {
        version: Some(version.clone()),
        ..Defect::of(&listed.repo, finding, detail)
    });
    Ok(defects.collect())
}

/// Returns what is wrong with a digest by its record.
fn of_record(
    meta: &DigestMeta,
    listed: &Listed,
    wants: Wants<'_>,
    documents: &Documents,
) -> Vec<(Finding, String)> {
    let repo = &listed.repo;
    let mut findings = Vec::new();
    let processed = OffsetDateTime::parse(&meta.processed_at, &Rfc3339).ok();
    let latest = processed.into_iter().chain([meta.pushed_at.time()]).max();
    if let Some(latest) = latest.filter(|latest| *latest > wants.now + AHEAD) {
        findings.push((Finding::FutureDated, format!("its record says {latest}")));
    }
    match wants.feed.get(repo) {
        Some(entry) => {
            let wanted = Wanted::new(&entry.pushed_at, &entry.url);
            match meta.freshness(&wanted) {
                Freshness::Unreadable => findings.push((Finding::Torn, "it is empty".to_owned())),
                Freshness::Older | Freshness::OtherUrl | Freshness::OtherFormat
                    if documents.failures.of(entry, wants.now).is_none() =>
                {
                    let answer = Answer::of_digest(meta, &wanted);
                    findings.push((Finding::Stale, answer.detail));
                }
                _ => {}
            }
        }
        None if wants.whole && !documents.withdrawals.contains_key(repo) => {
            findings.push((Finding::Orphaned, "the feed does not have it".to_owned()));
        }
        None => {}
    }
    if let Some(catalog) = &documents.catalog {
        let line = catalog.lines.get(repo);
        let said = line.and_then(|line| line.digest.as_ref());
        if said != Some(&LineDigest::from(meta)) {
            let detail = match said {
                Some(said) => format!("the catalogue has the push of {}", said.pushed_at),
                None => "the catalogue does not have it".to_owned(),
            };
            findings.push((Finding::Catalog, detail));
        }
    }
    if let Some(indexed) = documents.index.of_text(listed)
        && indexed.pushed_at > meta.pushed_at
    {
        let detail = format!("the index has the push of {}", indexed.pushed_at);
        findings.push((Finding::Index, detail));
    }
    findings
}

/// Returns the want of a digest, unless something explains it.
fn missing(entry: &FeedRepo, wants: Wants<'_>, documents: &Documents) -> Option<Defect> {
    let withdrawn = documents.withdrawals.contains_key(&entry.repo);
    let line = documents
        .catalog
        .as_ref()
        .and_then(|catalog| catalog.lines.get(&entry.repo));
    let failed = line.is_some_and(|line| {
        let same_push = line.feed_pushed_at.as_ref() == Some(&entry.pushed_at);
        same_push && matches!(line.state, State::Failed(_))
    });
    let failed = failed || documents.failures.of(entry, wants.now).is_some();
    let detail = "there is no digest, and no failure is known".to_owned();
    (!withdrawn && !failed).then(|| Defect::of(&entry.repo, Finding::Missing, detail))
}

impl VerifyConfig {
    /// Does the audit, and what is asked for about it; returns the exit code.
    ///
    /// # Errors
    /// As those of a run, and [`exit::UNAVAILABLE`] if something cannot be read.
    pub async fn run(&self, bar: Bar, shutdown: &Shutdown) -> Result<u8> {
        let store = self.run.open_store()?;
        let (feed, whole) = self.run.load_feed().await?;
        let entries = feed.repositories.into_iter();
        let entries: HashMap<_, _> = entries.map(|entry| (entry.repo.clone(), entry)).collect();
        let wants = Wants {
            feed: &entries,
            whole,
            deep: self.deep,
            now: OffsetDateTime::now_utc(),
        };
        let defects = tokio::select! {
            defects = audit(store.as_ref(), wants) => defects.map_err(ExitError::from)?,
            () = shutdown.soft.cancelled() => return Ok(shutdown.unfinished()),
        };
        self.print(&defects)?;
        if defects.is_empty() {
            return Ok(exit::OK);
        }
        for defect in &defects {
            let remove = (self.prune && defect.finding.is_surplus())
                || (self.repair && defect.finding.is_broken());
            if remove && let Err(fault) = remove_one(store.as_ref(), defect).await {
                return Err(ExitError::from(fault).into());
            }
        }
        let broken = defects
            .iter()
            .filter(|defect| defect.finding.needs_digest());
        let repos: HashSet<_> = broken.filter_map(|defect| defect.repo.clone()).collect();
        match self.repair && !repos.is_empty() {
            true => self.run.clone().over(repos).run(bar, shutdown).await,
            false => Ok(exit::FOUND),
        }
    }

    fn print(&self, defects: &[Defect]) -> Result<()> {
        let text = match self.json {
            true => {
                let lines = defects.iter().map(serde_json::to_string);
                let lines = lines.map(|line| Ok(line? + "\n"));
                lines.collect::<Result<String, serde_json::Error>>()?
            }
            false => {
                let rows = defects.iter().map(|defect| {
                    let finding = defect.finding.to_string();
                    [finding, defect.key.clone(), defect.detail.clone()]
                });
                table(
                    ["FINDING", "KEY", "DETAIL"],
                    rows.collect(),
                    terminal::width(),
                )
            }
        };
        terminal::ignore_closed(terminal::print(&text))?;
        let mut counts = BTreeMap::<Finding, u64>::new();
        for defect in defects {
            *counts.entry(defect.finding).or_default() += 1;
        }
        let counts = counts.iter();
        let counts: Vec<_> = counts
            .map(|(finding, n)| format!("{} {finding}", thousands(*n)))
            .collect();
        let found = match counts.is_empty() {
            true => "nothing".to_owned(),
            false => counts.join(", "),
        };
        info!(
            operation = "verify",
            defects = defects.len(),
            "Found: {found}"
        );
        Ok(())
    }
}

/// Removes the object that a defect is about, if it is still that.
async fn remove_one(store: &dyn DigestStore, defect: &Defect) -> Result<(), Fault> {
    let Some(repo) = &defect.repo else {
        return Ok(());
    };
    let withdrawn = store.withdrawn();
    let place: &dyn DigestStore = match defect.key.starts_with("withdrawn/") {
        true => &*withdrawn,
        false => store,
    };
    let version = match &defect.version {
        Some(version) => version.clone(),
        None => match place.head(repo).await?.expected() {
            Expected::Version(version) => version,
            Expected::Absent => return Ok(()),
        },
    };
    place.remove(repo, &version).await?;
    Ok(())
}
