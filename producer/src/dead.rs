//! Dead letters: what was given up, looked at, tried again, or removed.
//!
//! [`filter`] says which ones are meant; the view of a letter's run says why it is here.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use common::broker::{BrokerConfig, DeadLetter, Position, SharedBroker};
use common::exit::{self, ExitError};
use common::fault::{Fault, FaultKind};
use common::ids::RunId;
use common::job::{Job, WIRE_VERSION};
use common::outcome::Outcome;
use common::run::documents::{ExpectedJob, JobList};
use common::run::view::RunView;
use common::shutdown::Shutdown;
use common::text::printable;
use common::text::{format_duration, thousands};
use futures::StreamExt;
use futures::stream;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use self::filter::{LetterFilter, said};
use crate::status::page::cut;
use crate::status::{print, screen, unanswered, unless_closed};

pub mod filter;

/// How long to wait for a broker that is away: a person waits too.
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
    /// Show all that is known about one.
    Show(ShowConfig),
    /// Enqueue their jobs again, as new ones.
    #[command(after_long_help = "\
Each job becomes a fresh message of attempt 0, of a new run that the command names first; `producer
status RUN` shows what of it has been replayed so far. It says which letter it is a replay of. Its
worker looks at the store first, as ever, so what was digested meanwhile is not digested again,
unless its run had --force. A letter is removed once its job is safely enqueued: whatever dies in
between, a job comes twice rather than never.")]
    Replay(ReplayConfig),
    /// Remove them for good.
    Purge(PurgeConfig),
}

#[derive(Args, Clone, Debug)]
struct ListConfig {
    /// Print one JSON object a line: id, repo, pushed_at, run, age_seconds, class, message,
    /// attempt, url, replay_of.
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
    /// Say what would be replayed, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// At most so many a second, evenly. RabbitMQ takes letters back after half an hour: what is
    /// left then stays for the next call.
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<f64>,
    #[command(flatten)]
    filter: LetterFilter,
    #[command(flatten)]
    broker: BrokerConfig,
}

#[derive(Args, Clone, Debug)]
struct PurgeConfig {
    /// Say what would be removed, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Yes, remove them for good.
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
    /// Does it, and gives the exit code.
    ///
    /// # Errors
    /// [`exit::USAGE`] where no broker is named, or no letter is the one that is to be shown;
    /// [`exit::UNAVAILABLE`] where the broker cannot be reached.
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
        // What was not removed goes back.
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

/// A letter, and why it is one.
#[derive(Debug)]
struct Known {
    letter: DeadLetter,
    cause: Cause,
}

/// The letters that were asked for.
#[derive(Debug, Default)]
struct Taken {
    letters: Vec<Known>,
    /// Those that were asked for or not.
    all: usize,
    /// Those that were asked for and left out, since they are no jobs.
    no_jobs: usize,
}

/// What is taken of the letters that fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    All,
    /// Only what can be replayed.
    Jobs,
}

/// Whether the ledger is to be asked why letters are what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Ask,
    /// Only where the filter needs it.
    IfNeeded,
}

/// Takes the letters that fit; `None` where a signal came first.
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
    let (mut letters, mut all) = (Vec::new(), 0);
    let mut stream = broker.dead_letters().await.map_err(unavailable)?;
    while let Some(letter) = stream.next().await {
        let letter = letter.map_err(unavailable)?;
        all += 1;
        if filter.fits(&letter, now) {
            letters.push(letter);
        }
    }
    // Looking at letters changes their order in the queue.
    letters.sort_by(|a, b| (a.at, &a.id).cmp(&(b.at, &b.id)));
    let mut no_jobs = 0;
    let mut is_wanted = |letter: &DeadLetter| {
        let wanted = what == What::All || letter.job.is_ok();
        no_jobs += usize::from(!wanted);
        wanted
    };
    // The class is looked up first where it decides.
    if !filter.asks_for_class() {
        letters.retain(&mut is_wanted);
        letters.truncate(filter.limit());
    }
    let mut known = HashMap::new();
    if why == Why::Ask || filter.asks_for_class() {
        match views(broker, &letters).await {
            Ok(views) => known = views,
            Err(fault) if filter.asks_for_class() => return Err(unavailable(fault)),
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
    let letters = letters.filter(|known| filter.takes_class(known.cause.class));
    let mut letters: Vec<_> = letters.filter(|known| is_wanted(&known.letter)).collect();
    letters.truncate(filter.limit());
    Ok(Taken {
        letters,
        all,
        no_jobs,
    })
}

/// What the ledger says of the letters' runs.
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
    let mut history = broker.history(oldest).await?;
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

/// The age of what was queued at `at`, in whole seconds.
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
        }
    }

    /// The id, for a person.
    fn id(&self) -> String {
        match self.letter.id.as_str() {
            "" => "(no id)".to_owned(),
            id => printable(id),
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
    print(&table(&taken.letters, now, screen::width()))?;
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

fn table(letters: &[Known], now: OffsetDateTime, width: usize) -> String {
    if letters.is_empty() {
        return String::new();
    }
    let head = ["AGE", "CLASS", "ID", "MESSAGE"].map(str::to_owned);
    let rows = letters.iter().map(|known| {
        let message = printable(&known.cause.message);
        [
            known.age(now),
            known.class().to_owned(),
            known.id(),
            message,
        ]
    });
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    let widest = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let [ages, classes, ids] = [0, 1, 2].map(widest);
    let lines = rows.iter().map(|[age, class, id, message]| {
        let line = format!("{age:<ages$}  {class:<classes$}  {id:<ids$}  {message}");
        cut(line.trim_end(), width) + "\n"
    });
    lines.collect()
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
        ("id", Some(known.id())),
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
        print(&table(&taken.letters, now, screen::width()))?;
        let left = not_jobs(taken.no_jobs);
        say(&format!(
            "{} would be replayed{left}",
            letters(taken.letters.len())
        ))?;
        return Ok(exit::OK);
    }
    let (run, planned) = (RunId::new(), taken.letters.len());
    if planned > 0 {
        // Beforehand: it may take long, and nobody else knows the run of a replay that is killed.
        info!(
            operation = "replay",
            run_id = run.as_str(),
            "replaying {} as run {run}",
            letters(planned)
        );
    }
    let (done, ended) = replay_each(config.rate, broker, taken.letters, &run, shutdown).await;
    let mut sentence = format!("{} replayed", letters(done));
    // The job of the one that failed may have been enqueued.
    if done > 0 || ended.is_err() {
        sentence += &format!(" as run {run}");
    }
    if done < planned {
        sentence += &format!(", {} left (stopped before)", planned - done);
    }
    let said = say(&(sentence + &not_jobs(taken.no_jobs)));
    // Also where nobody reads what was said.
    ended.map_err(unavailable)?;
    said?;
    Ok(ended_with(done < planned, shutdown))
}

/// `shutdown`'s code where it was `stopped` by a signal.
fn ended_with(stopped: bool, shutdown: &Shutdown) -> u8 {
    if stopped { shutdown.code() } else { exit::OK }
}

/// How many were replayed, and whether that ended with an error.
async fn replay_each(
    rate: Option<f64>,
    broker: &SharedBroker,
    jobs: Vec<Known>,
    run: &RunId,
    shutdown: &Shutdown,
) -> (usize, Result<(), Fault>) {
    let mut pace = rate.map(|rate| {
        let mut pace = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
        // What was late does not come in a burst.
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pace
    });
    let mut done = 0;
    for known in jobs {
        if let Some(pace) = &mut pace {
            tokio::select! {
                _ = pace.tick() => {}
                () = shutdown.soft.cancelled() => {}
            }
        }
        if shutdown.soft.is_cancelled() {
            return (done, Ok(()));
        }
        if let Err(fault) = replay_one(broker, known.letter, run).await {
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
            "one job was enqueued whose letter could not be removed, so a second replay would enqueue it again, which does no harm: {fault}"
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
        print(&table(&taken.letters, now, screen::width()))?;
        say(&format!("{} would be removed", letters(planned)))?;
        return Ok(exit::OK);
    }
    let (mut done, mut ended) = (0, Ok(()));
    for known in taken.letters {
        if shutdown.soft.is_cancelled() {
            break;
        }
        ended = known.letter.remove().await;
        if ended.is_err() {
            break;
        }
        done += 1;
    }
    let left = match planned - done {
        0 => String::new(),
        left => format!(", {left} left (stopped before)"),
    };
    let said = say(&format!("{} removed{left}", letters(done)));
    ended.map_err(unavailable)?;
    said?;
    Ok(ended_with(done < planned, shutdown))
}

/// `3 dead letters`.
fn letters(count: usize) -> String {
    match count {
        1 => "1 dead letter".to_owned(),
        count => format!("{} dead letters", thousands(count as u64)),
    }
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
