//! Logs, metrics, and the small HTTP server that shows them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::core::Collector;
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TEXT_FORMAT, TextEncoder,
};
use serde::Serialize;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::fault::FaultKind;
use crate::outcome::Outcome;
use crate::run::documents::CacheReason;

pub mod fleet;

mod process;

/// Most connections that are served at a time: nobody who looks may use up what work needs.
const MAX_CONNECTIONS: usize = 32;
/// For a request to come, also the next one of a connection.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How to log.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs and metrics")]
pub struct LogConfig {
    /// Form of the log: one JSON object a line, lines for people, or people's on a terminal only.
    #[arg(
        long,
        global = true,
        env = "LOG_FORMAT",
        value_name = "FORM",
        default_value = "auto"
    )]
    pub log: LogFormat,
    /// What to log: a level, or directives such as `info,worker=debug`.
    #[arg(
        long,
        global = true,
        env = "LOG_LEVEL",
        value_name = "LEVEL",
        default_value = "info"
    )]
    pub log_level: String,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// Lines for people.
    Human,
    /// `human` on a terminal, else `json`.
    Auto,
}

impl LogConfig {
    /// Whether lines are for people.
    pub fn is_human(&self) -> bool {
        match self.log {
            LogFormat::Json => false,
            LogFormat::Human => true,
            LogFormat::Auto => std::io::stdout().is_terminal(),
        }
    }

    /// Sends every log line of this process to `writer` from now on.
    ///
    /// # Errors
    /// For a `log_level` that does not parse, or when called twice.
    pub fn init<W>(&self, writer: W) -> anyhow::Result<()>
    where
        W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
    {
        let wrong = |why: &dyn fmt::Display| {
            let message = format!(
                "--log-level {:?}: {why}; give error, warn, info, debug or trace, or directives such as info,worker=debug",
                self.log_level
            );
            crate::exit::ExitError::new(crate::exit::USAGE, message)
        };
        // A single word that is no level would be taken for a target, of which all is logged, and of others nothing.
        if !self.log_level.contains(['=', ',', '[']) {
            self.log_level
                .parse::<LevelFilter>()
                .map_err(|_| wrong(&"no such level"))?;
        }
        // lapin logs as errors what we ask for (is this queue there? is the lock free?), and the
        // password at its most talkative. Who wants it all the same can name it.
        let filter = EnvFilter::try_new(format!("lapin=off,{}", self.log_level))
            .map_err(|error| wrong(&error))?;
        let format = Lines {
            human: self.is_human(),
        };
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .event_format(format)
            .with_writer(writer)
            .try_init()
            .map_err(|e| anyhow::anyhow!("logs are set up already: {e}"))
    }
}

/// Writes an event as a line: `{"timestamp","level","message","context":{"operation","metadata"}}`,
/// or for people.
///
/// The field `operation` becomes the context's operation (default: where in the code the event
/// stands), every other field a member of its metadata. The text of a field whose name ends with
/// `_json` is taken as JSON, and its name loses that end.
struct Lines {
    human: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let now = OffsetDateTime::now_utc();
        if self.human {
            let time = now
                .format(format_description!("[hour]:[minute]:[second]"))
                .map_err(|_| fmt::Error)?;
            // An information needs no label; what is above or below does.
            let level = match *event.metadata().level() {
                Level::INFO => String::new(),
                level => format!("{level} "),
            };
            return writeln!(writer, "{time} {level}{}", printable(&fields.message));
        }
        let time = now
            .format(format_description!(
                "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"
            ))
            .map_err(|_| fmt::Error)?;
        let operation = &fields.operation;
        let line = Line {
            timestamp: &time,
            level: &event.metadata().level().as_str().to_ascii_lowercase(),
            message: &fields.message,
            context: Context {
                operation: operation.as_deref().unwrap_or(event.metadata().target()),
                metadata: &fields.metadata,
            },
        };
        let line = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
        writeln!(writer, "{line}")
    }
}

/// A text that is one line and tells a terminal nothing: parts of messages come from strangers.
pub fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            printable.extend(c.escape_default());
        } else {
            printable.push(c);
        }
    }
    printable
}

/// A line, its members in the prescribed order.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: &'a str,
    level: &'a str,
    message: &'a str,
    context: Context<'a>,
}

#[derive(Serialize)]
struct Context<'a> {
    operation: &'a str,
    metadata: &'a Map<String, Value>,
}

#[derive(Default)]
struct Fields {
    message: String,
    operation: Option<String>,
    metadata: Map<String, Value>,
}

impl Fields {
    fn insert(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("operation", Value::String(text)) => self.operation = Some(text),
            (name, value) => {
                let (name, value) = match (name.strip_suffix("_json"), &value) {
                    (Some(stem), Value::String(text)) => {
                        (stem, serde_json::from_str(text).unwrap_or(value))
                    }
                    _ => (name, value),
                };
                self.metadata.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, value.into());
    }
}

/// Where to show metrics.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs and metrics")]
pub struct MetricsConfig {
    /// Serve Prometheus metrics at http://ADDRESS/metrics, liveness at /health, readiness at /ready;
    /// IP:PORT, such as 0.0.0.0:9100 for every address of this machine.
    #[arg(long, env = "METRICS_ADDR", value_name = "ADDRESS", value_parser = parse_address)]
    pub metrics_addr: Option<SocketAddr>,
}

/// An address to listen on.
///
/// # Errors
/// A sentence that says how one is written.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let wrong = |_| "an address is IP:PORT, such as 127.0.0.1:9100 or 0.0.0.0:9100".to_owned();
    text.parse().map_err(wrong)
}

/// Everything that this process counts. Clones count together.
///
/// Never a label per repository: there are tens of thousands.
#[derive(Clone, Debug)]
pub struct Metrics {
    ours: Registry,
    common: Registry,
    jobs: IntCounterVec,
    retries: IntCounterVec,
    handed_back: IntCounterVec,
    cache_checks: IntCounterVec,
    slots_killed: IntCounterVec,
    /// Slots that this process has.
    pub slots: IntGauge,
    /// Slots at work.
    pub slots_busy: IntGauge,
    /// Bytes that came over the network.
    pub fetched_bytes: IntCounter,
    /// Bytes of stored digests.
    pub stored_bytes: IntCounter,
    fetch_seconds: Histogram,
    digest_seconds: Histogram,
    store_seconds: Histogram,
    queue_to_stored_seconds: Histogram,
    throttled_hosts: IntGauge,
    infra_paused: IntGauge,
    /// Until when each host is left alone.
    paused_hosts: Arc<Mutex<HashMap<String, Instant>>>,
    scratch: Arc<OnceLock<PathBuf>>,
}

/// Why a slot is ended before its time: the values of a metric's label.
const KILLED_FOR: [&str; 4] = ["crash", "stall", "stopped", "timeout"];

/// Why a job goes back to the broker with nothing said against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandedBack {
    /// Its worker stops.
    Stopping,
    /// Its host wants to be left alone.
    Host,
    /// Machine or store were not well for as long as a job may be held.
    Infra,
}

impl HandedBack {
    const ALL: [Self; 3] = [Self::Stopping, Self::Host, Self::Infra];

    fn as_str(self) -> &'static str {
        match self {
            Self::Stopping => "stopping",
            Self::Host => "host",
            Self::Infra => "infra",
        }
    }
}

/// What is shown at `/metrics`.
pub trait Expose: Clone + Send + Sync + 'static {
    /// Everything in Prometheus' text format.
    fn render(&self) -> Vec<u8>;
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let registry = Registry::new_custom(Some("repofleet".to_owned()), None)
            .expect("the prefix is a valid name");
        let common = Registry::new();
        process::add_process(&common);
        add_build(&registry);
        let scratch = Arc::default();
        process::add_slots(&registry, &scratch);
        let seconds = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            register(&registry, Histogram::with_opts(opts))
        };
        let fetch_seconds = seconds("fetch_seconds", "Time to fetch a repository", &OF_WORK);
        let digest_seconds = seconds(
            "digest_seconds",
            "Time to make a digest of what was fetched",
            &OF_WORK,
        );
        let store_seconds = seconds("store_seconds", "Time to store a digest", &OF_WORK);
        let queue_to_stored_seconds = seconds(
            "queue_to_stored_seconds",
            "Time from when a job was put on the queue until its digest was stored, retries and pauses included",
            &OF_WAITING,
        );
        let family = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let metrics = Self {
            jobs: family(
                "jobs_total",
                "Jobs that ended, by outcome",
                &["outcome", "class"],
            ),
            retries: family(
                "retries_total",
                "Attempts that will be repeated",
                &["class"],
            ),
            handed_back: family(
                "handed_back_total",
                "Jobs that went back to the queue with nothing said against them: their worker stops (`stopping`), their host wants to be left alone (`host`), machine or store were not well for long (`infra`)",
                &["reason"],
            ),
            throttled_hosts: register(
                &registry,
                IntGauge::new("throttled_hosts", "Hosts that are left alone now"),
            ),
            infra_paused: register(
                &registry,
                IntGauge::new(
                    "infra_paused",
                    "1 while no job is started, since machine or store are not well",
                ),
            ),
            paused_hosts: Arc::default(),
            cache_checks: family(
                "cache_checks_total",
                "Repositories by what the cache said",
                &["reason"],
            ),
            slots_killed: family(
                "slots_killed_total",
                "Slots that were ended before their time: `crash`, `stall`, `stopped`, `timeout`",
                &["reason"],
            ),
            slots: register(&registry, IntGauge::new("slots", "Slots of this process")),
            slots_busy: register(&registry, IntGauge::new("slots_busy", "Slots at work")),
            fetched_bytes: register(
                &registry,
                IntCounter::new("fetched_bytes_total", "Bytes that came over the network"),
            ),
            stored_bytes: register(
                &registry,
                IntCounter::new("stored_bytes_total", "Bytes of stored digests"),
            ),
            fetch_seconds,
            digest_seconds,
            store_seconds,
            queue_to_stored_seconds,
            scratch,
            ours: registry,
            common,
        };
        // An absent series reads as "no data" in an alert; a zero reads as zero.
        for outcome in [Outcome::Processed, Outcome::Unchanged, Outcome::Superseded] {
            metrics.job_counter(outcome);
        }
        for class in FaultKind::ALL {
            metrics.job_counter(Outcome::Failed(class));
        }
        for class in [
            FaultKind::Transient,
            FaultKind::Throttled,
            FaultKind::Killed,
        ] {
            metrics.retries.with_label_values(&[class.as_str()]);
        }
        for reason in CacheReason::ALL {
            metrics.cache_checks.with_label_values(&[reason.as_str()]);
        }
        for reason in KILLED_FOR {
            metrics.slots_killed.with_label_values(&[reason]);
        }
        for reason in HandedBack::ALL {
            metrics.handed_back.with_label_values(&[reason.as_str()]);
        }
        metrics
    }

    /// Counts a job that ended.
    pub fn job_ended(&self, outcome: Outcome) {
        self.job_counter(outcome).inc();
    }

    fn job_counter(&self, outcome: Outcome) -> IntCounter {
        let class = match outcome {
            Outcome::Failed(class) => class.as_str(),
            _ => "",
        };
        self.jobs.with_label_values(&[outcome.as_str(), class])
    }

    /// Counts an attempt that will be repeated.
    pub fn retried(&self, class: FaultKind) {
        self.retries.with_label_values(&[class.as_str()]).inc();
    }

    /// Counts `count` repositories of which the cache said `reason`.
    pub fn cache_checked(&self, reason: CacheReason, count: u64) {
        self.cache_checks
            .with_label_values(&[reason.as_str()])
            .inc_by(count);
    }

    /// Counts a slot that was ended; `reason` is one of a few fixed words.
    pub fn slot_killed(&self, reason: &'static str) {
        self.slots_killed.with_label_values(&[reason]).inc();
    }

    /// Notes how long a fetch took.
    pub fn fetched_in(&self, duration: Duration) {
        self.fetch_seconds.observe(duration.as_secs_f64());
    }

    /// Notes how long a digest took.
    pub fn digested_in(&self, duration: Duration) {
        self.digest_seconds.observe(duration.as_secs_f64());
    }

    /// Notes how long storing took.
    pub fn stored_in(&self, duration: Duration) {
        self.store_seconds.observe(duration.as_secs_f64());
    }

    /// Notes how long ago the job of a digest that is stored now was put on the queue.
    pub fn stored_after(&self, enqueued: OffsetDateTime) {
        // By two machines' clocks.
        let waited = (OffsetDateTime::now_utc() - enqueued).as_seconds_f64();
        self.queue_to_stored_seconds.observe(waited.max(0.0));
    }

    /// Counts a job that goes back.
    pub fn handed_back(&self, why: HandedBack) {
        self.handed_back.with_label_values(&[why.as_str()]).inc();
    }

    /// Takes note that `host` is left alone for `pause`, at least.
    pub fn host_paused(&self, host: &str, pause: Duration) {
        let until = Instant::now() + pause;
        let mut hosts = self.paused_hosts();
        let known = hosts.entry(host.to_owned()).or_insert(until);
        *known = until.max(*known);
    }

    fn paused_hosts(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.paused_hosts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows that no job is started, until what this gives is dropped.
    pub fn infra_pause(&self) -> InfraPause {
        self.infra_paused.set(1);
        InfraPause(self.infra_paused.clone())
    }

    /// Says which disk work is done on.
    pub fn set_scratch(&self, folder: &Path) {
        // The first one counts: the programs have no other.
        _ = self.scratch.set(folder.to_owned());
    }
}

/// A pause that shows while this is there.
#[derive(Debug)]
pub struct InfraPause(IntGauge);

impl Drop for InfraPause {
    fn drop(&mut self) {
        self.0.set(0);
    }
}

impl Expose for Metrics {
    fn render(&self) -> Vec<u8> {
        {
            let now = Instant::now();
            let mut hosts = self.paused_hosts();
            hosts.retain(|_, until| *until > now);
            let paused = i64::try_from(hosts.len()).unwrap_or(i64::MAX);
            self.throttled_hosts.set(paused);
        }
        text_of(&[&self.ours, &self.common])
    }
}

/// Seconds of what a worker does itself.
const OF_WORK: [f64; 14] = [
    0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];
/// Seconds of what may wait for others, a whole run long: closest where most runs are, minutes to some hours, since
/// a quantile is guessed between two bounds.
const OF_WAITING: [f64; 20] = [
    1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 180.0, 300.0, 450.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0,
    3600.0, 5400.0, 7200.0, 10_800.0, 21_600.0, 43_200.0,
];

fn add_build(registry: &Registry) {
    let opts = Opts::new("build_info", "1, with the program's version");
    let build = register(registry, IntGaugeVec::new(opts, &["version"]));
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
}

fn text_of(registries: &[&Registry]) -> Vec<u8> {
    let mut text = Vec::new();
    for registry in registries {
        TextEncoder::new()
            .encode(&registry.gather(), &mut text)
            .expect("writing to memory does not fail");
    }
    text
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("names and labels are valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("names are distinct");
    collector
}

/// Whether a process can do its work, or why not; as last found out.
pub type Readiness = watch::Receiver<Result<(), String>>;

/// The readiness of a process that is ready as long as it lives.
pub fn always_ready() -> Readiness {
    watch::channel(Ok(())).1
}

impl MetricsConfig {
    /// Serves `metrics` in the background if an address was given, and gives the address it
    /// listens on.
    ///
    /// # Errors
    /// Where the address cannot be listened on.
    pub async fn serve(
        &self,
        metrics: &impl Expose,
        readiness: &Readiness,
    ) -> anyhow::Result<Option<(SocketAddr, JoinHandle<()>)>> {
        let Some(address) = self.metrics_addr else {
            return Ok(None);
        };
        let listener = TcpListener::bind(address).await.map_err(|e| {
            let message = format!(
                "--metrics-addr {address}: {e}; choose another address or port, port 0 for any"
            );
            crate::exit::ExitError::new(crate::exit::UNAVAILABLE, message)
        })?;
        let address = listener.local_addr()?;
        tracing::info!(
            operation = "metrics",
            address = address.to_string(),
            "Metrics: http://{address}/metrics; also /health (alive) and /ready"
        );
        let (metrics, readiness) = (metrics.clone(), readiness.clone());
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let server = tokio::spawn(async move {
            loop {
                // Those beyond wait in the listener's queue, and cost no file descriptor.
                let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                    return;
                };
                let Ok((stream, _)) = listener.accept().await else {
                    // Out of file descriptors, most likely: let others close some.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let (metrics, readiness) = (metrics.clone(), readiness.clone());
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let response = answer(&request, &metrics, &readiness);
                        async { Ok::<_, Infallible>(response) }
                    });
                    // A client that goes away is its own business.
                    hyper::server::conn::http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(REQUEST_TIMEOUT)
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                        .ok();
                    drop(place);
                });
            }
        });
        Ok(Some((address, server)))
    }
}

fn answer<B>(
    request: &Request<B>,
    metrics: &impl Expose,
    readiness: &Readiness,
) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, metrics.render()),
        (&Method::GET, "/health") => (StatusCode::OK, b"ok\n".to_vec()),
        (&Method::GET, "/ready") => match &*readiness.borrow() {
            Ok(()) => (StatusCode::OK, b"ok\n".to_vec()),
            Err(why) => (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{why}\n").into_bytes(),
            ),
        },
        _ => (
            StatusCode::NOT_FOUND,
            b"try /metrics, /health or /ready\n".to_vec(),
        ),
    };
    // Prometheus 3 takes nothing without it.
    let text = match status {
        StatusCode::OK if request.uri().path() == "/metrics" => TEXT_FORMAT,
        _ => "text/plain; charset=utf-8",
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(text));
    response
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines_of(human: bool, log: impl FnOnce()) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(Lines { human })
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = captured.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_json_line_has_the_prescribed_shape() {
        let line = lines_of(false, || {
            let classes = r#"{"gone":2}"#;
            tracing::warn!(
                operation = "x",
                repo = "a/b",
                n = 3,
                by_class_json = classes,
                "hi \"you\"\n"
            );
        });
        assert_eq!(line.matches('\n').count(), 1, "one line: {line:?}");
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "warn");
        assert_eq!(value["message"], "hi \"you\"\n");
        assert_eq!(value["context"]["operation"], "x");
        assert_eq!(
            value["context"]["metadata"],
            serde_json::json!({"repo": "a/b", "n": 3, "by_class": {"gone": 2}})
        );
        let timestamp = value["timestamp"].as_str().unwrap();
        assert!(
            timestamp.len() == "2026-11-23T12:47:15.504540Z".len(),
            "{timestamp}"
        );
        assert!(timestamp.ends_with('Z'), "{timestamp}");
    }

    #[test]
    fn a_line_for_people_is_time_and_message() {
        let line = lines_of(true, || tracing::info!(repo = "a/b", "stored a/b"));
        assert_eq!(line.split_once(' ').unwrap().1, "stored a/b\n");
        let line = lines_of(true, || tracing::error!("no"));
        assert!(line.ends_with(" ERROR no\n"), "{line}");
        let line = lines_of(true, || tracing::info!("ä\u{1b}[2J\nb"));
        assert!(line.ends_with(" ä\\u{1b}[2J\\nb\n"), "{line}");
    }

    #[test]
    fn what_was_never_counted_shows_as_zero() {
        let metrics = Metrics::new();
        metrics.job_ended(Outcome::Failed(FaultKind::Gone));
        metrics.cache_checked(CacheReason::Hit, 5);
        let text = String::from_utf8(metrics.render()).unwrap();
        for line in [
            r#"repofleet_jobs_total{class="gone",outcome="failed"} 1"#,
            r#"repofleet_jobs_total{class="",outcome="processed"} 0"#,
            r#"repofleet_cache_checks_total{reason="hit"} 5"#,
            r#"repofleet_cache_checks_total{reason="stale"} 0"#,
            "repofleet_slots_busy 0",
            r#"repofleet_slots_killed_total{reason="stall"} 0"#,
            r#"repofleet_handed_back_total{reason="host"} 0"#,
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[test]
    fn metrics_say_which_format_they_are_in() {
        let format = |path: &str| {
            let request = Request::get(path).body(()).unwrap();
            let response = answer(&request, &Metrics::new(), &always_ready());
            response.headers()[CONTENT_TYPE].clone()
        };
        assert_eq!(format("/metrics"), "text/plain; version=0.0.4");
        assert_eq!(format("/health"), "text/plain; charset=utf-8");
        assert_eq!(format("/metric"), "text/plain; charset=utf-8");
    }

    #[test]
    fn a_pause_shows_until_it_is_over() {
        let metrics = Metrics::new();
        let shows = |line: &str| {
            let text = String::from_utf8(metrics.render()).unwrap();
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        };
        shows("repofleet_throttled_hosts 0");
        metrics.host_paused("a", Duration::from_secs(3600));
        metrics.host_paused("a", Duration::from_millis(1));
        metrics.host_paused("b", Duration::ZERO);
        shows("repofleet_throttled_hosts 1");
        let pause = metrics.infra_pause();
        shows("repofleet_infra_paused 1");
        drop(pause);
        shows("repofleet_infra_paused 0");
    }

    #[test]
    fn a_clock_that_is_behind_makes_no_negative_wait() {
        let metrics = Metrics::new();
        metrics.stored_after(OffsetDateTime::now_utc() + Duration::from_secs(60));
        metrics.stored_after(OffsetDateTime::now_utc() - Duration::from_secs(60));
        let text = String::from_utf8(metrics.render()).unwrap();
        for line in [
            r#"repofleet_queue_to_stored_seconds_bucket{le="1"} 1"#,
            "repofleet_queue_to_stored_seconds_count 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
