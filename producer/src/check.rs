//! `producer check`: what a run needs, tried one by one before a run is started. Each line says what was
//! found, or what is wrong and what to do. It uses what a run uses, and leaves nothing behind.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use common::exit::{self, ExitError};
use common::fault::{Fault, FaultKind};
use common::shutdown::Shutdown;
use common::store::SharedStore;
use common::telemetry::http::always_ready;
use common::telemetry::logs::{red, yellow};
use common::telemetry::traces::{Span, Traces};
use common::text::{counted, format_duration, thousands};
use futures::stream::{self, StreamExt};
use serde::Serialize;
use strum::Display;
use time::OffsetDateTime;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use url::Url;
use worker::digest::{DigestLimits, Subject};
use worker::fetch::host::authority;
use worker::fetch::token::GITHUB;
use worker::metrics::Metrics;
use worker::slot::slots::{INDEX_BYTES, Slots};
use worker::slot::token::TokenState;
use worker::slot::{SlotError, SlotResult};

use crate::feed::entry::FeedRepo;
use crate::feed::fetch::FeedSource;
use crate::feed::filter::none_of;
use crate::feed::health::FeedRecord;
use crate::run::{RunConfig, SERVICE};
use crate::terminal::print;

/// How long one check may take; the store's has several steps.
const LIMIT: Duration = Duration::from_secs(60);
/// How long the broker may take to answer. A run would wait longer than a person does.
const BROKER_PATIENCE: Duration = Duration::from_secs(10);
/// A feed whose newest push is older has probably not been written since.
const OLD_FEED: time::Duration = time::Duration::hours(36);
/// Repositories of a host that are tried, since one may be gone.
const TRIED: usize = 3;
/// Hosts that are tried.
const HOSTS: usize = 20;
/// Of a repository, no more than this is fetched: that it is too large shows as much.
const MAX_BYTES: u64 = 1 << 20;

/// What to check: everything that a run with these options needs.
#[derive(Args, Debug)]
pub struct CheckCommand {
    /// Check what a worker needs on this machine as well, also with a broker
    #[arg(long, help_heading = "Check")]
    worker: bool,
    /// Print one JSON object a line: check, state, message, exit_code
    #[arg(long, help_heading = "Check")]
    json: bool,
    #[command(flatten)]
    run: Box<RunConfig>,
}

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Display)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
enum State {
    Ok,
    /// A run would work, but perhaps not as it is meant to.
    Warning,
    Failed,
}

/// One line of the answer.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    message: String,
    /// The exit code that this failure stands for; 0 otherwise.
    exit_code: u8,
}

/// What was found, so far.
struct Findings {
    json: bool,
    colored: bool,
    exit_code: u8,
    counts: [u64; 3],
}

impl Findings {
    fn add(&mut self, check: &'static str, state: State, message: impl Into<String>) {
        self.put(&Finding {
            check,
            state,
            message: message.into(),
            exit_code: exit::OK,
        });
    }

    fn failed(&mut self, check: &'static str, error: &ExitError) {
        self.put(&Finding {
            check,
            state: State::Failed,
            message: error.message.clone(),
            exit_code: error.code,
        });
    }

    fn put(&mut self, finding: &Finding) {
        self.exit_code = self.exit_code.max(finding.exit_code);
        self.counts[finding.state as usize] += 1;
        let line = match self.json {
            true => serde_json::to_string(finding).unwrap_or_default(),
            false => {
                let Finding {
                    check,
                    state,
                    message,
                    ..
                } = finding;
                let shown = format!("{:<8}", state.to_string());
                let shown = match state {
                    State::Failed if self.colored => red(shown),
                    State::Warning if self.colored => yellow(shown),
                    _ => shown,
                };
                format!("{shown} {check}: {message}")
            }
        };
        // Its reader may have left.
        print(&(line + "\n")).ok();
    }

    /// Does a check that is about one thing, and returns what came of it.
    async fn about<T>(
        &mut self,
        check: &'static str,
        step: impl Future<Output = Result<(T, String), ExitError>>,
    ) -> Option<T> {
        self.within(LIMIT, check, step).await
    }

    /// As [`about`](Self::about), for a check that may take longer.
    async fn within<T>(
        &mut self,
        limit: Duration,
        check: &'static str,
        step: impl Future<Output = Result<(T, String), ExitError>>,
    ) -> Option<T> {
        let overdue = || {
            let limit = format_duration(limit);
            let message = format!("it took more than {limit}; is a network or disk in the way?");
            ExitError::new(exit::UNAVAILABLE, message)
        };
        match timeout(limit, step)
            .await
            .unwrap_or_else(|_| Err(overdue()))
        {
            Ok((found, message)) => {
                self.add(check, State::Ok, message);
                Some(found)
            }
            Err(error) => {
                self.failed(check, &error);
                None
            }
        }
    }
}

impl CheckCommand {
    /// Checks, prints, `colored` or not, and returns the exit code of the worst that was found.
    ///
    /// # Errors
    /// None but a panic of this program.
    pub async fn run(self, colored: bool, shutdown: &Shutdown) -> Result<u8> {
        let mut findings = Findings {
            json: self.json,
            colored,
            exit_code: exit::OK,
            counts: [0; 3],
        };
        let checking = self.check(&mut findings, shutdown);
        let checked = shutdown.soft.run_until_cancelled(checking).await;
        if checked.is_none() {
            return Ok(shutdown.unfinished());
        }
        if !self.json {
            let [well, warnings, failed] = findings.counts;
            let mut said = format!("{} ok", thousands(well));
            if warnings > 0 {
                said += &format!(", {}", counted(warnings, "warning", "warnings"));
            }
            if failed > 0 {
                said += &format!(", {} failed", thousands(failed));
            }
            print(&(said + "\n")).ok();
        }
        Ok(findings.exit_code)
    }

    async fn check(&self, findings: &mut Findings, shutdown: &Shutdown) {
        let run = &self.run;
        self.options(findings);
        let selected = self.feed(findings).await;
        self.store(findings).await;
        let serving = async {
            let served = run.metrics.serve(&Metrics::new(), &always_ready()).await;
            let served = served.map_err(|error| match error.downcast() {
                Ok(exit) => exit,
                Err(error) => ExitError::new(exit::INTERNAL, error),
            })?;
            let address = served.map(|(address, server)| {
                server.abort();
                address
            });
            let message = match address {
                Some(address) => format!("{address} is free"),
                None => "not served (see --metrics-addr)".to_owned(),
            };
            Ok(((), message))
        };
        findings.about("metrics", serving).await;
        let mut warnings = Vec::new();
        let traces = Traces::probe(SERVICE, &mut warnings).await;
        for warning in warnings {
            findings.add("traces", State::Warning, warning);
        }
        match traces {
            Ok(None) => {}
            Ok(Some(Ok(well))) => findings.add("traces", State::Ok, well),
            Ok(Some(Err(why))) => findings.add("traces", State::Warning, why),
            Err(error) => findings.failed("traces", &error),
        }
        if run.engine.broker.broker_url.is_some() {
            findings.about("broker", self.broker()).await;
        }
        if self.worker || run.engine.broker.broker_url.is_none() {
            self.slots(findings, &selected, &shutdown.soft).await;
        }
    }

    /// Options that are allowed together, and make no sense.
    fn options(&self, findings: &mut Findings) {
        let run = &self.run;
        let (engine, slot) = (&run.engine, &run.engine.slot);
        let in_fleet = engine.broker.broker_url.is_some();
        let mut odd = Vec::new();
        if slot.stall >= slot.timeout {
            odd.push(format!(
                "--stall {} can never apply: --timeout {} ends the attempt first; lower --stall",
                format_duration(Duration::from_secs(slot.stall)),
                format_duration(Duration::from_secs(slot.timeout))
            ));
        }
        if in_fleet && !self.worker && slot.concurrency.is_some() {
            odd.push(
                "--concurrency is for the worker of one process; with a broker, give it to the workers"
                    .to_owned(),
            );
        }
        if in_fleet && let Some(folder) = run.store.folder() {
            odd.push(format!(
                "the store is the folder {}: workers on other machines, or in containers, need the same folder there; else use s3://BUCKET",
                folder.display()
            ));
        }
        if engine.fetch.fetch_proxy.is_none() {
            odd.extend(crate::engine::unused_proxy());
        }
        if odd.is_empty() {
            findings.add("options", State::Ok, "they go together");
        }
        for message in odd {
            findings.add("options", State::Warning, message);
        }
    }

    /// Returns the repositories of the feed that a run would be about.
    async fn feed(&self, findings: &mut Findings) -> Vec<FeedRepo> {
        let run = &self.run;
        let loading = async {
            let (feed, _) = run.load_feed().await?;
            let message = format!(
                "{}: {}",
                feed.origin,
                counted(feed.repositories.len() as u64, "repository", "repositories")
            );
            Ok((feed, message))
        };
        // Three attempts, with pauses between them.
        let limit = run.feed.feed_timeout * 3 + LIMIT;
        let Some(feed) = findings.within(limit, "feed", loading).await else {
            return Vec::new();
        };
        if let Some(first) = feed.invalid.first() {
            let count = counted(
                feed.invalid.len() as u64,
                "unusable entry",
                "unusable entries",
            );
            let message = format!(
                "{count}, which would count as failed; entry {}: {}",
                first.index, first.reason
            );
            findings.add("feed", State::Warning, message);
        }
        let newest = FeedRecord::of(&feed).newest_push;
        let now = OffsetDateTime::now_utc();
        let is_fetched = matches!(run.feed.feed, FeedSource::Url(_));
        if let Some(newest) = newest.filter(|newest| is_fetched && now - newest.time() > OLD_FEED) {
            let message =
                format!("the newest push is from {newest}; the feed may no longer be updated");
            findings.add("feed", State::Warning, message);
        }
        let all = feed.repositories.len();
        let selected = run.filter.select(feed.repositories);
        if selected.is_empty() && all > 0 {
            findings.add("feed", State::Warning, none_of(all));
        }
        selected
    }

    async fn store(&self, findings: &mut Findings) {
        let opened = self.run.open_store();
        let probing = async {
            let store: SharedStore = opened?;
            store.reachable().await?;
            store.probe().await?;
            let location = store.location();
            Ok(((), format!("{location}: read, written and removed")))
        };
        findings.about("store", probing).await;
    }

    async fn broker(&self) -> Result<((), String), ExitError> {
        let config = &self.run.engine.broker;
        let broker = config.connect(BROKER_PATIENCE).await?;
        let broker = broker.ok_or_else(|| ExitError::new(exit::USAGE, "no broker is named"))?;
        let looked = async {
            broker.probe().await?;
            broker.backlog().await
        };
        let looked: Result<_, Fault> = looked.await;
        broker.close().await;
        let backlog = looked?;
        let message = format!(
            "queues \"{}\": {} connected, {} waiting",
            config.queue_prefix,
            counted(backlog.workers, "worker", "workers"),
            counted(backlog.ready, "job", "jobs")
        );
        Ok(((), message))
    }

    /// What a worker needs: scratch, walls, hosts and tokens.
    async fn slots(
        &self,
        findings: &mut Findings,
        selected: &[FeedRepo],
        stop: &CancellationToken,
    ) {
        let engine = &self.run.engine;
        let mut fetch = engine.fetch.clone();
        fetch.allow_local |= matches!(self.run.feed.feed, FeedSource::File(_));
        let policy = match fetch.policy(|name| std::env::var_os(name)) {
            Ok(policy) => policy,
            Err(error) => return findings.failed("tokens", &error),
        };
        let of_one = policy.max_bytes.saturating_add(INDEX_BYTES);
        let needed = of_one.saturating_mul(engine.slot.slots().into());
        let mut policy = policy;
        policy.max_bytes = policy.max_bytes.min(MAX_BYTES);
        let mut config = engine.slot.clone();
        config.timeout = config.timeout.min(LIMIT.as_secs());
        let folder = config.scratch.clone().unwrap_or_else(std::env::temp_dir);
        let starting = async {
            let limits = DigestLimits::default();
            let slots = Slots::new(config, policy, limits, Metrics::new())?;
            slots.probe().await?;
            Ok((
                slots,
                format!("{}: can be written, and a slot started", folder.display()),
            ))
        };
        let Some(slots) = findings.about("scratch", starting).await else {
            return;
        };
        room(findings, &folder, needed, engine.slot.slots());
        match slots.missing_walls() {
            None => findings.add("walls", State::Ok, "all stand around slots"),
            Some((true, said)) => findings.add("walls", State::Ok, said),
            Some((false, said)) => findings.add("walls", State::Warning, said),
        }
        let width = engine.slot.slots().into();
        let fetched = hosts(findings, &slots, selected, width, stop).await;
        tokens(findings, &slots, &fetched);
    }
}

/// Compares the room in the scratch folder with what all slots may need.
fn room(findings: &mut Findings, folder: &Path, needed: u64, slots: u16) {
    if let Ok(free) = rustix::fs::statvfs(folder).map(|fs| fs.f_bavail * fs.f_frsize)
        && free < needed
    {
        let message = format!(
            "{} has {} MiB free; {} slots with --max-fetch-bytes may need {} MiB at worst: lower either, or use another --scratch",
            folder.display(),
            thousands(free >> 20),
            slots,
            thousands(needed >> 20)
        );
        findings.add("scratch", State::Warning, message);
    }
}

/// Fetches from each host, several at a time; returns those from which that succeeded.
async fn hosts(
    findings: &mut Findings,
    slots: &Slots,
    selected: &[FeedRepo],
    width: usize,
    stop: &CancellationToken,
) -> Vec<String> {
    let hosts = by_host(selected);
    let more = hosts.len().saturating_sub(HOSTS);
    let tries: Vec<_> = hosts
        .iter()
        .take(HOSTS)
        .map(|(host, repositories)| try_host(slots, host, repositories, stop))
        .collect();
    let mut tries = stream::iter(tries).buffered(width);
    let mut fetched = Vec::new();
    while let Some((host, finding)) = tries.next().await {
        if finding.state == State::Ok {
            fetched.push(host);
        }
        findings.put(&finding);
    }
    if more > 0 {
        let message = format!(
            "{} not tried",
            counted(more as u64, "more host", "more hosts")
        );
        findings.add("hosts", State::Ok, message);
    }
    fetched
}

/// Says what hosts said of the tokens that were sent to them.
fn tokens(findings: &mut Findings, slots: &Slots, fetched: &[String]) {
    let states = slots.token_states();
    for ((host, state), count) in &states {
        let tokens = counted(count.unsigned_abs(), "token", "tokens");
        match state {
                TokenState::Usable if fetched.contains(host) => {
                    findings.add("tokens", State::Ok, format!("{host}: {tokens} taken"));
                }
                TokenState::Usable => {
                    let message = format!("{host}: {tokens}, not tried: no repository was fetched from there");
                    findings.add("tokens", State::Ok, message);
                }
                TokenState::Resting => findings.add(
                    "tokens",
                    State::Warning,
                    format!("{host}: {tokens} used up for now"),
                ),
                TokenState::Refused => findings.failed(
                    "tokens",
                    &ExitError::new(
                        exit::USAGE,
                        format!("{host} does not know {tokens} that it was sent; make a new one, see --token-for"),
                    ),
                ),
            }
    }
    if states.is_empty() && fetched.iter().any(|host| host == GITHUB) {
        let message = "none for github.com, which limits anonymous downloads: set GITHUB_TOKEN";
        findings.add("tokens", State::Warning, message);
    }
}

/// Some repositories of each host, those on this machine under the empty name.
fn by_host(selected: &[FeedRepo]) -> BTreeMap<String, Vec<&FeedRepo>> {
    let mut hosts: BTreeMap<String, Vec<&FeedRepo>> = BTreeMap::new();
    for repository in selected {
        let url = Url::parse(&repository.url).ok();
        let host = url.map(|url| authority(&url)).unwrap_or_default();
        let some = hosts.entry(host).or_default();
        if some.len() < TRIED {
            some.push(repository);
        }
    }
    hosts
}

/// Fetches a repository of a host, or the next one if it is gone; as often as there are tokens for the
/// host, which take turns.
async fn try_host(
    slots: &Slots,
    host: &str,
    repositories: &[&FeedRepo],
    stop: &CancellationToken,
) -> (String, Finding) {
    let shown = match host {
        "" => "this machine",
        host => host,
    };
    let finding = |state, exit_code, message: String| Finding {
        check: "hosts",
        state,
        message: format!("{shown}: {message}"),
        exit_code,
    };
    let mut found = finding(State::Warning, exit::OK, "not tried".to_owned());
    for repository in repositories {
        found = match fetch(slots, host, repository, stop).await {
            Ok(()) => {
                let message = format!("{} can be fetched", repository.repo);
                return (host.to_owned(), finding(State::Ok, exit::OK, message));
            }
            Err(fault) if fault.kind == FaultKind::Gone => {
                let message = format!("{}: {fault}", repository.repo);
                finding(State::Warning, exit::OK, message)
            }
            Err(fault) => {
                let code = match fault.kind {
                    FaultKind::Refused => exit::USAGE,
                    _ => exit::UNAVAILABLE,
                };
                let message = format!("{}: {fault}", repository.repo);
                return (host.to_owned(), finding(State::Failed, code, message));
            }
        };
    }
    (host.to_owned(), found)
}

/// Fetches a repository once with each token for its host, or once without any.
async fn fetch(
    slots: &Slots,
    host: &str,
    repository: &FeedRepo,
    stop: &CancellationToken,
) -> Result<(), Fault> {
    let tokens = slots.token_states();
    let tokens = tokens.iter().filter(|((of, _), _)| of == host);
    let tokens: i64 = tokens.map(|(_, count)| count).sum();
    for _ in 0..tokens.max(1) {
        let subject = Subject::Repository {
            owner: repository.repo.owner().to_owned(),
            name: repository.repo.name().to_owned(),
        };
        match slots
            .work(&repository.url, subject, None, stop, &Span::default())
            .await
        {
            Ok(SlotResult::Digest(_) | SlotResult::Unmoved { .. }) | Err(SlotError::Stopped) => {}
            Err(SlotError::Fault(fault)) if fault.kind == FaultKind::TooLarge => {}
            Err(SlotError::Fault(fault)) => return Err(fault),
        }
    }
    Ok(())
}
