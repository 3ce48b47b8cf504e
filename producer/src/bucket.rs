//! The commands for those who read digests, and those who answer for them: `get`, `catalog`,
//! `failures`, `withdraw` and `restore`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use common::exit::{self, ExitError};
use common::fault::FaultKind;
use common::ids::{RepoRef, RunId};
use common::run::documents::{Failure, LatestRun, RunSummary};
use common::store::config::StoreConfig;
use common::store::{DigestStore, Document, DocumentKey, Expected, Found};
use common::text::{sha256, thousands};
use serde_json::json;
use tracing::info;

use crate::catalog::update;
use crate::catalog::{Line, State};
use crate::status::observed::{document, of_run};
use crate::status::parse_run;
use crate::terminal;
use crate::terminal::table::table;
use crate::withdrawals;

/// Which digest to print.
#[derive(Args, Clone, Debug)]
pub struct GetConfig {
    /// The repository.
    #[arg(value_name = "OWNER/NAME")]
    repo: RepoRef,
    /// Write it to this file instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    store: StoreConfig,
}

impl GetConfig {
    /// Prints the digest; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if there is none, [`exit::UNAVAILABLE`] if the store does not answer.
    pub async fn run(&self) -> Result<u8> {
        let store = self.store.open()?;
        let store = store.as_ref();
        let (catalog, _) = update::load(store).await.map_err(ExitError::from)?;
        let line = catalog.lines.get(&self.repo);
        // Readers write names as they like; keys have one spelling.
        let repo = line.map_or(&self.repo, |line| &line.id);
        let digest = store.get(repo).await.map_err(ExitError::from)?;
        let Some(digest) = digest else {
            let why = match line {
                Some(line) => match &line.message {
                    Some(message) => format!("{}: {message}", line.state),
                    None => line.state.to_string(),
                },
                None => "the catalogue does not have it".to_owned(),
            };
            let location = store.location();
            let message = format!("there is no digest of {} in {location}: {why}", self.repo);
            return Err(ExitError::new(exit::USAGE, message).into());
        };
        match &self.output {
            Some(path) => std::fs::write(path, &digest.text).with_context(|| {
                format!(
                    "cannot write {}; choose another with --output",
                    path.display()
                )
            })?,
            None => print_unless_closed(&digest.text)?,
        }
        Ok(exit::OK)
    }
}

/// Which failures to list.
#[derive(Args, Clone, Debug)]
pub struct FailuresConfig {
    /// The run's id, as in its log and the store's folder runs/ [default: the latest run].
    #[arg(value_parser = parse_run)]
    run: Option<RunId>,
    /// List only failures of this class, such as gone or too_large.
    #[arg(long)]
    class: Option<FaultKind>,
    /// Print one JSON object a line: repo, class, message.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreConfig,
}

impl FailuresConfig {
    /// Lists the failures; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if there is no such run or it has not ended; [`exit::UNAVAILABLE`] if the store
    /// does not answer.
    pub async fn run(&self) -> Result<u8> {
        let store = self.store.open()?;
        let latest = async || {
            let latest: Option<LatestRun> = document(&store, &DocumentKey::Latest).await?;
            let location = store.location();
            let none = || ExitError::new(exit::USAGE, format!("there is no run in {location}"));
            latest.map(|latest| latest.run).ok_or_else(none)
        };
        let run = match &self.run {
            Some(run) => run.clone(),
            None => latest().await?,
        };
        let summary: Option<RunSummary> = of_run(&store, &run, Document::Summary).await?;
        let Some(summary) = summary else {
            let message = format!(
                "run {run} has no summary in {}: it has not ended, or is of another store; see `producer status`",
                store.location()
            );
            return Err(ExitError::new(exit::USAGE, message).into());
        };
        let is_asked_for =
            |failure: &&Failure| self.class.is_none_or(|class| failure.class == class);
        let failures: Vec<_> = summary.failures.iter().filter(is_asked_for).collect();
        let text = match self.json {
            true => {
                let lines = failures.iter().map(serde_json::to_string);
                let lines = lines.map(|line| Ok(line? + "\n"));
                lines.collect::<Result<String, serde_json::Error>>()?
            }
            false => {
                let rows = failures.iter().map(|failure| {
                    let class = failure.class.to_string();
                    [failure.repo.clone(), class, failure.message.clone()]
                });
                let heads = ["REPOSITORY", "CLASS", "MESSAGE"];
                table(heads, rows.collect(), terminal::width())
            }
        };
        print_unless_closed(&text)?;
        info!(
            operation = "failures",
            run_id = run.as_str(),
            "Run {run}: {} of {} failures",
            thousands(failures.len() as u64),
            thousands(summary.failures.len() as u64)
        );
        Ok(exit::OK)
    }
}

/// How to print the catalogue.
#[derive(Args, Clone, Debug)]
pub struct CatalogConfig {
    /// The form of its lines.
    #[arg(long, value_name = "FORM", default_value = "jsonl")]
    form: Form,
    /// Where the digests are, for --form vertex: gs://BUCKET[/PREFIX].
    #[arg(long, value_name = "URL", required_if_eq("form", "vertex"))]
    base: Option<String>,
    /// Write the catalogue instead of printing it, from the records of all digests; what only the feed knows
    /// stays as it was.
    #[arg(long, conflicts_with_all = ["form", "base"])]
    write: bool,
    #[command(flatten)]
    store: StoreConfig,
}

/// The form of a catalogue's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// As in catalog.jsonl.gz.
    Jsonl,
    /// As Vertex AI Search imports documents: id, structData, content.uri; digests alone.
    Vertex,
}

impl CatalogConfig {
    /// Prints or writes the catalogue; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if there is none, [`exit::UNAVAILABLE`] if the store does not answer.
    pub async fn run(&self) -> Result<u8> {
        let store = self.store.open()?;
        if self.write {
            let lines = update::rewrite(store.as_ref()).await;
            let lines = thousands(lines.map_err(ExitError::from)? as u64);
            let place = store.location();
            print_unless_closed(&format!(
                "{place}/{}: {lines} lines\n",
                DocumentKey::Catalog
            ))?;
            return Ok(exit::OK);
        }
        let (catalog, expected) = update::load(store.as_ref())
            .await
            .map_err(ExitError::from)?;
        if expected == Expected::Absent {
            let message = format!(
                "there is no catalogue in {}: a run that closes writes it",
                store.location()
            );
            return Err(ExitError::new(exit::USAGE, message).into());
        }
        let base = self
            .base
            .as_deref()
            .unwrap_or_default()
            .trim_end_matches('/');
        let mut text = String::new();
        for line in catalog.lines.values() {
            let line = match (self.form, &line.key) {
                (Form::Jsonl, _) => serde_json::to_string(line)?,
                (Form::Vertex, Some(key)) => vertex(line, &format!("{base}/{key}"))?,
                (Form::Vertex, None) => continue,
            };
            text += &line;
            text.push('\n');
        }
        print_unless_closed(&text)?;
        Ok(exit::OK)
    }
}

/// Returns a document as Vertex AI Search imports it. Its ids have letters, digits, `-` and `_` only,
/// so a repository's name is not one, but its hash is.
fn vertex(line: &Line, uri: &str) -> serde_json::Result<String> {
    let id = sha256(line.id.to_string().to_ascii_lowercase());
    let document = json!({
        "id": &id[..32],
        "structData": line,
        "content": { "mimeType": "text/plain", "uri": uri },
    });
    serde_json::to_string(&document)
}

/// Which digest to take down.
#[derive(Args, Clone, Debug)]
pub struct WithdrawOneConfig {
    /// The repository.
    #[arg(value_name = "OWNER/NAME")]
    repo: RepoRef,
    /// Delete it at once, instead of keeping it below withdrawn/ for --withdrawn-keep of the runs.
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    store: StoreConfig,
}

impl WithdrawOneConfig {
    /// Takes it down; returns the exit code.
    ///
    /// # Errors
    /// [`exit::UNAVAILABLE`] if the store does not do it.
    pub async fn run(&self) -> Result<u8> {
        let store = self.store.open()?;
        let store = store.as_ref();
        let repo = spelled(store, &self.repo).await?;
        let withdrawn = withdrawals::by_hand(store, &repo, self.now).await;
        let (withdrawal, was_there) = withdrawn.map_err(ExitError::from)?;
        let tombstone = |line: &Line| update::withdrawn(&withdrawal, &line.url);
        let updated = update::update_one(store, &repo, tombstone).await;
        updated.map_err(ExitError::from)?;
        let what = match was_there {
            true => "withdrawn",
            false => "there was no digest of it, and none will be made",
        };
        print_unless_closed(&format!(
            "{repo}: {what}; `producer restore {repo}` undoes that\n"
        ))?;
        Ok(exit::OK)
    }
}

/// Which digest to put back.
#[derive(Args, Clone, Debug)]
pub struct RestoreConfig {
    /// The repository.
    #[arg(value_name = "OWNER/NAME")]
    repo: RepoRef,
    #[command(flatten)]
    store: StoreConfig,
}

impl RestoreConfig {
    /// Puts it back; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if it was not withdrawn, [`exit::UNAVAILABLE`] if the store does not do it.
    pub async fn run(&self) -> Result<u8> {
        let store = self.store.open()?;
        let store = store.as_ref();
        let repo = spelled(store, &self.repo).await?;
        let restored = withdrawals::restore(store, &repo).await;
        let what = match restored.map_err(ExitError::from)? {
            None => {
                let message = format!("{repo} is not withdrawn in {}", store.location());
                return Err(ExitError::new(exit::USAGE, message).into());
            }
            Some(true) => "its digest is back",
            Some(false) => "the next run makes its digest anew",
        };
        let found = store.head(&repo).await.map_err(ExitError::from)?;
        let line = |line: &Line| match &found {
            Found::Stored { meta, .. } => {
                Line::new(repo.clone(), &meta.url, State::Stale).with_digest(Some(meta))
            }
            _ => Line::new(repo.clone(), &line.url, State::Missing),
        };
        let updated = update::update_one(store, &repo, line).await;
        updated.map_err(ExitError::from)?;
        print_unless_closed(&format!("{repo}: {what}\n"))?;
        Ok(exit::OK)
    }
}

fn print_unless_closed(text: &str) -> std::io::Result<()> {
    terminal::ignore_closed(terminal::print(text))
}

/// Returns the repository in the spelling of the catalogue, which is that of its key.
async fn spelled(store: &dyn DigestStore, repo: &RepoRef) -> Result<RepoRef, ExitError> {
    let (catalog, _) = update::load(store).await?;
    Ok(catalog
        .lines
        .get(repo)
        .map_or_else(|| repo.clone(), |line| line.id.clone()))
}
