//! `producer dead`: lists, shows, replays and removes dead letters.
//!
//! [`filter`] says which ones are meant; the view of a letter's run says why it is here.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io;
use std::pin::pin;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use common::broker::config::BrokerConfig;
use common::broker::{DeadLetter, Position, SharedBroker};
use common::exit::{self, ExitError};
use common::fault::{Fault, FaultKind};
use common::ids::RunId;
use common::job::{Job, WIRE_VERSION};
use common::outcome::Outcome;
use common::run::documents::{ExpectedJob, JobList};
use common::run::view::RunView;
use common::shutdown::Shutdown;
use common::text::printable;
use common::text::{counted, format_duration, thousands};
use futures::StreamExt;
use futures::stream;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use self::filter::{LetterFilter, said};
use crate::status::{history, unanswered, unless_closed};
use crate::terminal::table::table;
use crate::terminal::{print, width};

pub mod filter;

/// How long to wait for the broker: a person waits too.
const PATIENCE: Duration = Duration::from_secs(10);

/// What to do with dead letters.
#[derive(Args, Clone, Debug)]
pub struct DeadConfig {
    #[command(subcommand)]
    command: DeadCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum DeadCommand {
    /// List them, the oldest first.
    List(ListConfig),
    /// Show one with its message.
    Show(ShowConfig),
    /// Queue their jobs again, as new ones.
    #[command(after_long_help = "\
Each job becomes a fresh message of attempt 0, of a new run that the command names first; `producer
status RUN` shows its progress. The message names the letter that it replays. The worker looks at the
store first, so a repository that was digested meanwhile is not digested again, unless its run had
--force. A letter is removed after the broker has confirmed its job: after a crash in between, a job
comes twice rather than never.")]
    Replay(ReplayConfig),
    /// Remove them for good.
    Purge(PurgeConfig),
}

#[derive(Args, Clone, Debug)]
struct ListConfig {
    /// Print one JSON object a line: id, repo, pushed_at, run, age_seconds, class, message,
    /// attempt, url, replay_of, and payload of a message that holds no job.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: LetterFilter,
    #[command(flatten)]
    broker: BrokerConfig,
}

#[derive(Args, Clone, Debug)]
struct ShowConfig {
    /// A letter's id as `producer dead list` shows it, or owner/name.
    id: String,
    #[command(flatten)]
    broker: BrokerConfig,
}

#[derive(Args, Clone, Debug)]
struct ReplayConfig {
    /// Print what would be replayed, without doing it.
    #[arg(long)]
    dry_run: bool,
    /// At most this many a second, evenly spaced. RabbitMQ takes letters back after half an hour;
    /// replay the rest with another call.
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<f64>,
    #[command(flatten)]
    filter: LetterFilter,
    #[command(flatten)]
    broker: BrokerConfig,
}

#[derive(Args, Clone, Debug)]
struct PurgeConfig {
    /// Print what would be removed, without doing it.
    #[arg(long)]
    dry_run: bool,
    /// Confirm that they are removed for good.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    filter: LetterFilter,
    #[command(flatten)]
    broker: BrokerConfig,
}

fn parse_rate(text: &str) -> Result<f64, &'static str> {
    let rate = text
        .parse()
        .ok()
        .filter(|rate| (0.001..=100_000.0).contains(rate));
    rate.ok_or("expected letters a second, 0.001 to 100000")
}

impl DeadConfig {
    /// Runs the command; returns the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] if no broker is named, or there is no such letter to show;
    /// [`exit::UNAVAILABLE`] if the broker cannot be reached.
    pub async fn run(&self, shutdown: &Shutdown) -> Result<u8> {
        if let DeadCommand::Purge(config) = &self.command
            && !config.yes
            && !config.dry_run
        {
            let why = "purge removes dead letters for good: say --yes, or --dry-run to see which";
            return Err(ExitError::new(exit::USAGE, why).into());
        }
        let connected = tokio::select! {
            connected = self.connect() => connected?,
            () = shutdown.soft.cancelled() => return Ok(unanswered(shutdown)),
        };
        let done = match &self.command {
            DeadCommand::List(config) => list(config, &connected, shutdown).await,
            DeadCommand::Show(config) => show(config, &connected, shutdown).await,
            DeadCommand::Replay(config) => replay(config, &connected, shutdown).await,
            DeadCommand::Purge(config) => purge(config, &connected, shutdown).await,
        };
        // Letters that were not removed go back to the queue.
        connected.close().await;
        unless_closed(done)
    }

    async fn connect(&self) -> Result<SharedBroker, ExitError> {
        let config = match &self.command {
            DeadCommand::List(config) => &config.broker,
            DeadCommand::Show(config) => &config.broker,
            DeadCommand::Replay(config) => &config.broker,
            DeadCommand::Purge(config) => &config.broker,
        };
        config.connect(PATIENCE).await?.ok_or_else(|| {
            let why = "dead letters are with the broker: set BROKER_URL or --broker-url";
            ExitError::new(exit::USAGE, why)
        })
    }
}

/// A letter and why it is here.
#[derive(Debug)]
struct Known {
    letter: DeadLetter,
    cause: Cause,
}

/// The letters that were asked for.
#[derive(Debug, Default)]
struct Taken {
    letters: Vec<Known>,
    /// How many were looked at.
    all: usize,
    /// How many fit but were left out, as they hold no job.
    no_jobs: usize,
}

/// Which of the letters that fit are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    All,
    /// Only those that can be replayed.
    Jobs,
}

/// Whether to look up in the ledger why letters are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Ask,
    /// Only if the filter needs it.
    IfNeeded,
}

/// Takes the letters that fit; `None` if a signal came first.
async fn take(
    broker: &SharedBroker,
    filter: &LetterFilter,
    what: What,
    why: Why,
    shutdown: &Shutdown,
) -> Result<Option<Taken>, ExitError> {
    tokio::select! {
        taken = take_now(broker, filter, what, why) => taken.map(Some),
        () = shutdown.soft.cancelled() => Ok(None),
    }
}

async fn take_now(
    broker: &SharedBroker,
    filter: &LetterFilter,
    what: What,
    why: Why,
) -> Result<Taken, ExitError> {
    let now = OffsetDateTime::now_utc();
    let mut no_jobs = 0;
    let mut is_wanted = |letter: &DeadLetter| {
        let wanted = what == What::All || letter.job.is_ok();
        no_jobs += usize::from(!wanted);
        wanted
    };
    // Each letter is asked for, so none beyond the limit is taken. If the class decides, the ledger
    // is read first, once for all.
    let (by_class, limit) = (filter.asks_for_class(), filter.limit());
    let (mut letters, mut all) = (Vec::new(), 0);
    let mut stream = broker.dead_letters().await.map_err(unavailable)?;
    while (by_class || letters.len() < limit)
        && let Some(letter) = stream.next().await
    {
        let letter = letter.map_err(unavailable)?;
        all += 1;
        if filter.fits(&letter, now) && (by_class || is_wanted(&letter)) {
            letters.push(letter);
        }
    }
    letters.sort_by(|a, b| (a.at, &a.id).cmp(&(b.at, &b.id)));
    let mut known = HashMap::new();
    if why == Why::Ask || by_class {
        match views(broker, &letters).await {
            Ok(views) => known = views,
            Err(fault) if by_class => return Err(unavailable(fault)),
            Err(fault) => warn!(
                operation = "dead",
                "why they are here is not known: {fault}"
            ),
        }
    }
    let letters = letters.into_iter().map(|letter| Known {
        cause: Cause::of(&letter, &known),
        letter,
    });
    let mut letters: Vec<_> = letters
        .filter(|known| filter.takes_class(known.cause.class))
        .filter(|known| !by_class || is_wanted(&known.letter))
        .collect();
    letters.truncate(limit);
    Ok(Taken {
        letters,
        all,
        no_jobs,
    })
}

/// Reads what the ledger says of the letters' runs.
///
/// # Errors
/// If it cannot be read.
async fn views(
    broker: &SharedBroker,
    letters: &[DeadLetter],
) -> Result<HashMap<RunId, RunView>, Fault> {
    let mut lists: HashMap<_, Vec<_>> = HashMap::new();
    for (run, key) in letters.iter().filter_map(said) {
        let adopted_from = Vec::new();
        let job = ExpectedJob { key, adopted_from };
        lists.entry(run).or_default().push(job);
    }
    let views = lists.into_iter().map(|(run, jobs)| {
        let list = JobList {
            version: JobList::VERSION,
            invalid: Vec::new(),
            jobs,
        };
        (run.clone(), RunView::new(run, None, Some(list)))
    });
    let mut views: HashMap<_, _> = views.collect();
    if views.is_empty() {
        return Ok(views);
    }
    // What happened to a job comes after it was queued. A letter that does not say when is less
    // than any that does.
    let named = letters.iter().filter(|letter| said(letter).is_some());
    let oldest = named.map(|letter| letter.at).min().flatten();
    let oldest = oldest.map_or(Position::Start, Position::Since);
    let mut history = pin!(history(broker, oldest).await?);
    while let Some(entry) = history.next().await {
        let entry = entry?;
        if let Some(view) = entry.event.run().and_then(|run| views.get_mut(run)) {
            view.apply(&entry);
        }
    }
    Ok(views)
}

/// Why a letter is here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cause {
    /// The class of the job's failure; `None` if it did not fail, or nobody knows.
    class: Option<FaultKind>,
    /// Why, for a person.
    message: String,
}

impl Cause {
    fn of(letter: &DeadLetter, views: &HashMap<RunId, RunView>) -> Self {
        let settled = said(letter).and_then(|(run, key)| views.get(&run)?.settled(&key));
        let (class, message) = match settled {
            Some(settled) => match settled.outcome {
                Outcome::Failed(class) => (Some(class), settled.message.clone()),
                done => {
                    let done =
                        format!("it has its outcome, {done}: only its end was not acknowledged");
                    (None, done)
                }
            },
            None if letter.job.is_ok() => (None, "the ledger does not say why".to_owned()),
            None => {
                let why = "the message holds no job that this version can read";
                (Some(FaultKind::Poison), why.to_owned())
            }
        };
        Self { class, message }
    }
}

/// Returns how long ago `at` was, in whole seconds.
fn age(at: Option<OffsetDateTime>, now: OffsetDateTime) -> Option<u64> {
    (now - at?).whole_seconds().try_into().ok()
}

/// A letter as `producer dead list --json` prints it.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    id: &'a str,
    repo: Option<String>,
    pushed_at: Option<String>,
    run: Option<String>,
    age_seconds: Option<u64>,
    class: Option<FaultKind>,
    message: &'a str,
    attempt: u32,
    url: Option<&'a str>,
    replay_of: Option<&'a str>,
    /// The message as it was sent, if it holds no job.
    payload: Option<Cow<'a, str>>,
}

impl Known {
    fn shown(&self, now: OffsetDateTime) -> Shown<'_> {
        let Self { letter, cause } = self;
        let (run, key) = said(letter).unzip();
        let job = letter.job.as_ref().ok();
        Shown {
            id: &letter.id,
            repo: key.as_ref().map(|key| key.repo.to_string()),
            pushed_at: key.as_ref().map(|key| key.pushed_at.to_string()),
            run: run.map(|run| run.to_string()),
            age_seconds: age(letter.at, now),
            class: cause.class,
            message: &cause.message,
            attempt: letter.attempt,
            url: job.map(|job| job.url.as_str()),
            replay_of: job.and_then(|job| job.replay_of.as_deref()),
            payload: job
                .is_none()
                .then(|| String::from_utf8_lossy(&letter.payload)),
        }
    }

    fn class(&self) -> &str {
        self.cause
            .class
            .as_ref()
            .map_or("-", |class| class.as_ref())
    }

    fn age(&self, now: OffsetDateTime) -> String {
        age(self.letter.at, now).map_or_else(
            || "-".to_owned(),
            |age| format_duration(Duration::from_secs(age)),
        )
    }
}

async fn list(config: &ListConfig, broker: &SharedBroker, shutdown: &Shutdown) -> Result<u8> {
    let Some(taken) = take(broker, &config.filter, What::All, Why::Ask, shutdown).await? else {
        return Ok(unanswered(shutdown));
    };
    let now = OffsetDateTime::now_utc();
    if config.json {
        let mut lines = String::new();
        for known in &taken.letters {
            lines += &(serde_json::to_string(&known.shown(now))? + "\n");
        }
        print(&lines)?;
        return Ok(exit::OK);
    }
    print_table(&taken.letters, now)?;
    let count = thousands(taken.letters.len() as u64);
    match (taken.letters.len(), taken.all) {
        (_, 0) => say("no dead letters")?,
        (0, all) => say(&format!("no dead letter of {all} fits"))?,
        (1, _) => say("1 dead letter")?,
        _ => say(&format!("{count} dead letters"))?,
    }
    Ok(exit::OK)
}

fn say(sentence: &str) -> io::Result<()> {
    print(&(printable(sentence) + "\n"))
}

fn print_table(letters: &[Known], now: OffsetDateTime) -> io::Result<()> {
    let rows = letters.iter().map(|known| {
        let message = printable(&known.cause.message);
        [
            known.age(now),
            known.class().to_owned(),
            printable(&known.letter.id),
            message,
        ]
    });
    let heads = ["AGE", "CLASS", "ID", "MESSAGE"];
    print(&table(heads, rows.collect(), width()))
}

async fn show(config: &ShowConfig, broker: &SharedBroker, shutdown: &Shutdown) -> Result<u8> {
    let all = LetterFilter::default();
    let Some(taken) = take(broker, &all, What::All, Why::Ask, shutdown).await? else {
        return Ok(unanswered(shutdown));
    };
    let now = OffsetDateTime::now_utc();
    let is_meant = |known: &&Known| {
        let repo = said(&known.letter).map(|(_, key)| key.repo.to_string());
        known.letter.id == config.id || repo.is_some_and(|repo| repo == config.id)
    };
    let meant: Vec<_> = taken.letters.iter().filter(is_meant).collect();
    if meant.is_empty() {
        let (id, all) = (printable(&config.id), taken.all);
        let why = match all {
            0 => format!("{id}: there are no dead letters"),
            _ => format!(
                "none of the {all} dead letters is {id}: `producer dead list` shows their ids"
            ),
        };
        return Err(ExitError::new(exit::USAGE, why).into());
    }
    for (n, known) in meant.into_iter().enumerate() {
        if n > 0 {
            print("\n")?;
        }
        print(&details(known, now))?;
    }
    Ok(exit::OK)
}

fn details(known: &Known, now: OffsetDateTime) -> String {
    let shown = known.shown(now);
    let content = match &known.letter.job {
        Ok(job) => String::from_utf8_lossy(&job.encode()).into_owned(),
        Err(why) => format!(
            "no job that this version can read, so it cannot be replayed: {} bytes, {:?}: {why}",
            known.letter.payload.len(),
            String::from_utf8_lossy(&known.letter.payload)
        ),
    };
    let facts = [
        ("id", Some(known.letter.id.clone())),
        ("repository", shown.repo),
        ("pushed at", shown.pushed_at),
        ("run", shown.run),
        ("replay of", shown.replay_of.map(str::to_owned)),
        ("url", shown.url.map(str::to_owned)),
        (
            "enqueued",
            shown
                .age_seconds
                .map(|age| format!("{} ago", format_duration(Duration::from_secs(age)))),
        ),
        ("attempt", Some(shown.attempt.to_string())),
        ("class", Some(known.class().to_owned())),
        ("message", Some(shown.message.to_owned())),
        ("content", Some(content)),
    ];
    let facts = facts
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    facts
        .map(|(name, value)| format!("{name:<12}{}\n", printable(&value)))
        .collect()
}

async fn replay(config: &ReplayConfig, broker: &SharedBroker, shutdown: &Shutdown) -> Result<u8> {
    let why = if config.dry_run {
        Why::Ask
    } else {
        Why::IfNeeded
    };
    let Some(taken) = take(broker, &config.filter, What::Jobs, why, shutdown).await? else {
        return Ok(unanswered(shutdown));
    };
    if config.dry_run {
        let now = OffsetDateTime::now_utc();
        print_table(&taken.letters, now)?;
        let left = not_jobs(taken.no_jobs);
        say(&format!(
            "{} would be replayed{left}",
            letters(taken.letters.len())
        ))?;
        return Ok(exit::OK);
    }
    let (run, planned) = (RunId::new(), taken.letters.len());
    if planned > 0 {
        // Beforehand: if this process is killed, the log still names the run.
        info!(
            operation = "replay",
            run_id = run.as_str(),
            "replaying {} as run {run}",
            letters(planned)
        );
    }
    let replay = async |letter| replay_one(broker, letter, &run).await;
    let (done, ended) = each(taken.letters, config.rate, shutdown, replay).await;
    let mut sentence = format!("{} replayed", letters(done));
    // After an error the last job may have been queued.
    if done > 0 || ended.is_err() {
        sentence += &format!(" as run {run}");
    }
    sentence += &not_done(planned - done);
    let said = say(&(sentence + &not_jobs(taken.no_jobs)));
    ended.map_err(unavailable)?;
    said?;
    Ok(ended_with(done < planned, shutdown))
}

fn ended_with(stopped: bool, shutdown: &Shutdown) -> u8 {
    if stopped { shutdown.code() } else { exit::OK }
}

/// Does something with one letter after the other, until a signal or an error; returns with how
/// many it succeeded.
async fn each(
    letters: Vec<Known>,
    rate: Option<f64>,
    shutdown: &Shutdown,
    mut act: impl AsyncFnMut(DeadLetter) -> Result<(), Fault>,
) -> (usize, Result<(), Fault>) {
    let mut pace = rate.map(|rate| {
        let mut pace = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
        // No bursts after a delay.
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pace
    });
    let mut done = 0;
    for known in letters {
        if let Some(pace) = &mut pace {
            tokio::select! {
                _ = pace.tick() => {}
                () = shutdown.soft.cancelled() => {}
            }
        }
        if shutdown.soft.is_cancelled() {
            break;
        }
        if let Err(fault) = act(known.letter).await {
            return (done, Err(fault));
        }
        done += 1;
    }
    (done, Ok(()))
}

async fn replay_one(broker: &SharedBroker, letter: DeadLetter, run: &RunId) -> Result<(), Fault> {
    let Ok(job) = &letter.job else {
        return Ok(());
    };
    let job = Job {
        version: WIRE_VERSION,
        run: run.clone(),
        replay_of: Some(letter.id.clone()),
        ..job.clone()
    };
    broker.enqueue(stream::iter([job]).boxed()).await?;
    letter.remove().await.map_err(|fault| {
        Fault::infra(format!(
            "a job was queued, but its letter could not be removed: replaying it again would queue the job twice, which does no harm: {fault}"
        ))
    })
}

async fn purge(config: &PurgeConfig, broker: &SharedBroker, shutdown: &Shutdown) -> Result<u8> {
    let why = if config.dry_run {
        Why::Ask
    } else {
        Why::IfNeeded
    };
    let Some(taken) = take(broker, &config.filter, What::All, why, shutdown).await? else {
        return Ok(unanswered(shutdown));
    };
    let planned = taken.letters.len();
    if config.dry_run {
        let now = OffsetDateTime::now_utc();
        print_table(&taken.letters, now)?;
        say(&format!("{} would be removed", letters(planned)))?;
        return Ok(exit::OK);
    }
    let (done, ended) = each(taken.letters, None, shutdown, DeadLetter::remove).await;
    let left = not_done(planned - done);
    let said = say(&format!("{} removed{left}", letters(done)));
    ended.map_err(unavailable)?;
    said?;
    Ok(ended_with(done < planned, shutdown))
}

fn not_done(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!(", {count} left (stopped before)"),
    }
}

/// `3 dead letters`.
fn letters(count: usize) -> String {
    counted(count as u64, "dead letter", "dead letters")
}

fn not_jobs(count: usize) -> String {
    match count {
        0 => String::new(),
        1 => ", 1 left (not a job)".to_owned(),
        count => format!(", {} left (not jobs)", thousands(count as u64)),
    }
}

fn unavailable(fault: Fault) -> ExitError {
    ExitError::new(exit::UNAVAILABLE, fault)
}
