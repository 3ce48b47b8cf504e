//! Traces for OpenTelemetry: a job from its enqueueing to its outcome, as spans that a collector takes
//! by OTLP over HTTP. Off unless a variable says where that is.
//!
//! OpenTelemetry's own crates are not used. They would add 0.45 MB to each program, 15 crates, and
//! other types with every release. What they would save is a struct, its encoding, and the reading of
//! variables; the queue has to be this program's own, since it counts what it drops.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::IntCounter;
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{info, warn};
use url::Url;

use self::export::{Collector, Outbox};
use self::otlp::{Kind, SpanRecord, Value};
use self::settings::{Sampler, Settings};
use crate::broker::Delivery;
use crate::exit::{self, ExitError};
use crate::fault::Fault;
use crate::job::Job;

mod export;

mod otlp;

mod settings;

/// How long the last spans may take.
const LAST_SPANS: Duration = Duration::from_secs(3);
/// Attributes of a job's span.
const ATTRIBUTES: usize = 16;
/// Longest reason of a failure, in bytes.
const MAX_REASON: usize = 1000;

/// Begins traces and takes part in them; by default, it does nothing. Clones share it.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Tracer>>);

struct Tracer {
    outbox: Arc<Outbox>,
    sampler: Sampler,
    /// Sends what is in the outbox.
    sending: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.0.is_some() { "on" } else { "off" };
        write!(f, "Traces({state})")
    }
}

impl Traces {
    /// Does what the environment says, as `service`. Spans that no collector took are counted in
    /// `dropped`.
    ///
    /// # Errors
    /// [`exit::USAGE`] if a variable is wrong, unless OpenTelemetry's specification has it ignored.
    pub fn start(service: &str, dropped: &IntCounter) -> Result<Self, ExitError> {
        let mut warnings = Vec::new();
        let configured = configured(service, &mut warnings);
        for warning in warnings {
            warn!(operation = "traces", "{warning}");
        }
        let Some((collector, sampler)) = configured? else {
            return Ok(Self::default());
        };
        info!(operation = "traces", "Traces: to {collector}");
        let outbox = Arc::new(Outbox::new(dropped.clone()));
        let sending = tokio::spawn(collector.serve(Arc::clone(&outbox)));
        Ok(Self(Some(Arc::new(Tracer {
            outbox,
            sampler,
            sending: Mutex::new(Some(sending)),
        }))))
    }

    /// Finds out whether the collector that the environment names takes traces, and says so, or why not;
    /// `None` if it names none. What [`Traces::start`] would warn about is added to `warnings`.
    ///
    /// # Errors
    /// As [`Traces::start`].
    pub async fn probe(
        service: &str,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Result<String, String>>, ExitError> {
        let Some((collector, _)) = configured(service, warnings)? else {
            return Ok(None);
        };
        let answer = collector.probe().await;
        Ok(Some(match answer {
            Ok(()) => Ok(format!("the collector {collector} takes them")),
            Err(why) => Err(format!(
                "none would be seen, {collector}: {why}; give its HTTP port, usually 4318, in \
                 OTEL_EXPORTER_OTLP_ENDPOINT"
            )),
        }))
    }

    /// Begins the trace of a job that is about to go to a broker of the kind `system`, and tells the
    /// job.
    pub fn enqueue(&self, job: &mut Job, system: &'static str) {
        let Some(tracer) = &self.0 else {
            return;
        };
        let trace_id = trace_id(job);
        let is_kept = tracer.sampler.keeps(trace_id, None);
        let record = new_record("enqueue", Kind::Producer, trace_id, None);
        // Workers are to know as well that it is not kept.
        let parent = Parent {
            trace_id,
            span_id: record.span_id,
            is_kept,
        };
        job.traceparent = Some(parent.to_string());
        if is_kept {
            tracer.begin(record).describe(job, system, "create");
        }
    }

    /// Begins the span of a delivery, from a broker of the kind `system`.
    pub fn job(&self, delivery: &Delivery, system: &'static str) -> Span {
        let Some(tracer) = &self.0 else {
            return Span::default();
        };
        let job = &delivery.job;
        let parent = job.traceparent.as_deref().and_then(Parent::parse);
        let trace_id = parent.map_or_else(|| trace_id(job), |parent| parent.trace_id);
        let is_kept = parent.map(|parent| parent.is_kept);
        if !tracer.sampler.keeps(trace_id, is_kept) {
            return Span::default();
        }
        let parent = parent.map(|parent| parent.span_id);
        let mut span = tracer.begin(new_record("job", Kind::Consumer, trace_id, parent));
        span.describe(job, system, "process");
        span.set("repofleet.attempt", u64::from(delivery.attempt));
        span.set("repofleet.returns", u64::from(delivery.returns));
        span
    }

    /// Sends what is left, for a few seconds.
    pub async fn close(&self) {
        let Some(tracer) = &self.0 else {
            return;
        };
        tracer.outbox.stop.cancel();
        let sending = tracer
            .sending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(mut sending) = sending else {
            return;
        };
        if timeout(LAST_SPANS, &mut sending).await.is_err() {
            sending.abort();
            tracer.outbox.drop_rest("the collector does not answer");
        }
    }
}

/// Returns where the environment has traces of `service` sent to, and which.
fn configured(
    service: &str,
    warnings: &mut Vec<String>,
) -> Result<Option<(Collector, Sampler)>, ExitError> {
    let wrong = |why| ExitError::new(exit::USAGE, why);
    // What is not Unicode is found out where it matters.
    let variable = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
    let settings = Settings::read(service, variable, warnings);
    let Some(settings) = settings.map_err(wrong)? else {
        return Ok(None);
    };
    let sampler = settings.sampler;
    let collector = Collector::new(settings).map_err(wrong)?;
    Ok(Some((collector, sampler)))
}

impl Tracer {
    fn begin(&self, record: SpanRecord) -> Span {
        let outbox = Arc::clone(&self.outbox);
        Span(Some(Box::new(Live { outbox, record })))
    }
}

/// A span; it ends when it is dropped. By default it is none, and all that is done to it does nothing.
#[derive(Default)]
pub struct Span(Option<Box<Live>>);

struct Live {
    outbox: Arc<Outbox>,
    record: SpanRecord,
}

impl Span {
    /// Begins a part of it that this process does.
    pub fn child(&self, name: &'static str) -> Self {
        self.begin(name, Kind::Internal)
    }

    /// Begins a part of it in which this process waits for another.
    pub fn call(&self, name: &'static str) -> Self {
        self.begin(name, Kind::Client)
    }

    fn begin(&self, name: &'static str, kind: Kind) -> Self {
        Self(self.0.as_ref().map(|live| {
            let (trace_id, parent) = (live.record.trace_id, live.record.span_id);
            let record = new_record(name, kind, trace_id, Some(parent));
            let outbox = Arc::clone(&live.outbox);
            Box::new(Live { outbox, record })
        }))
    }

    /// Says that it began only so long ago.
    pub fn lasted(&mut self, duration: Duration) {
        if let Some(live) = &mut self.0 {
            let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
            let begin = now().saturating_sub(nanos);
            live.record.begin = begin.max(live.record.begin);
        }
    }

    /// Sets an attribute.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(live) = &mut self.0 {
            let attributes = &mut live.record.attributes;
            // Once only, however often a child says it.
            attributes.retain(|(known, _)| *known != key);
            attributes.push((key, value.into()));
        }
    }

    /// Says that it failed, and why.
    pub fn fail(&mut self, fault: &Fault) {
        if let Some(live) = &mut self.0 {
            let class = fault.kind.as_ref().to_owned();
            live.record.attributes.push(("error.type", class.into()));
            let (reason, _) = fault
                .message
                .split_at(fault.message.floor_char_boundary(MAX_REASON));
            live.record.error = Some(reason.to_owned());
        }
    }

    /// Returns the id of its trace, as log lines are to show it.
    pub fn trace_id(&self) -> Option<String> {
        let live = self.0.as_ref()?;
        Some(format!("{:032x}", live.record.trace_id))
    }

    /// Says which job it is about, in the words of OpenTelemetry's semantic conventions where they have
    /// some.
    fn describe(&mut self, job: &Job, system: &'static str, operation: &'static str) {
        if let Some(live) = &mut self.0 {
            live.record.attributes.reserve(ATTRIBUTES);
        }
        self.set("messaging.system", system);
        self.set("messaging.operation.type", operation);
        self.set("messaging.message.id", job.id());
        self.set("repofleet.run", job.run.to_string());
        self.set("repofleet.repository", job.repo.to_string());
        // A path is nobody's address.
        let Some(mut url) = Url::parse(&job.url).ok().filter(Url::has_host) else {
            return;
        };
        self.set(
            "server.address",
            url.host_str().unwrap_or_default().to_owned(),
        );
        if let Some(port) = url.port_or_known_default() {
            self.set("server.port", u64::from(port));
        }
        // Feeds and workers refuse credentials in a URL, but anybody who may publish can send any URL.
        if job.url.contains(['@', '?', '#']) {
            _ = url.set_username("");
            _ = url.set_password(None);
            url.set_query(None);
            url.set_fragment(None);
        }
        self.set("url.full", String::from(url));
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(mut live) = self.0.take() {
            live.record.end = now().max(live.record.begin);
            live.outbox.put(live.record);
        }
    }
}

fn new_record(name: &'static str, kind: Kind, trace_id: u128, parent: Option<u64>) -> SpanRecord {
    let begin = now();
    SpanRecord {
        trace_id,
        // Zero is none.
        span_id: fastrand::u64(1..),
        parent,
        name,
        kind,
        begin,
        end: begin,
        attributes: Vec::new(),
        error: None,
    }
}

/// Nanoseconds of Unix time.
fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The trace of a job whose message names none. Whoever makes it up makes up the same, so that a job that
/// is published twice, or by a producer without traces, has one.
fn trace_id(job: &Job) -> u128 {
    let hash: [u8; 32] = Sha256::digest(job.id()).into();
    hash.iter()
        .take(16)
        .fold(0, |id, byte| id << 8 | u128::from(*byte))
        .max(1)
}

/// Where a job's trace began, see <https://www.w3.org/TR/trace-context/>.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parent {
    trace_id: u128,
    span_id: u64,
    is_kept: bool,
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trace_id,
            span_id,
            is_kept,
        } = self;
        write!(
            f,
            "00-{trace_id:032x}-{span_id:016x}-{:02x}",
            u8::from(*is_kept)
        )
    }
}

impl Parent {
    /// Parses a `traceparent`, also one of a later version. What is none counts as absent.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let mut next = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits)?;
            let is_hex = part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            is_hex.then(|| u128::from_str_radix(part, 16).ok())?
        };
        let version = next(2)?;
        let (trace_id, span_id, flags) = (next(32)?, next(16)?, next(2)?);
        let is_valid = version != 0xff && trace_id != 0 && span_id != 0;
        let ends = version > 0 || parts.next().is_none();
        (is_valid && ends).then_some(Self {
            trace_id,
            span_id: span_id as u64,
            is_kept: flags & 1 == 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_as_w3c_has_it() {
        const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        let parent = Parent {
            trace_id: 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736,
            span_id: 0x00f0_67aa_0ba9_02b7,
            is_kept: true,
        };
        assert_eq!(parent.to_string(), format!("00-{ID}-01"));
        let not_kept = Parent {
            is_kept: false,
            ..parent
        };
        for (text, expected) in [
            (format!("00-{ID}-01"), Some(parent)),
            (format!("00-{ID}-02"), Some(not_kept)),
            (format!("cc-{ID}-03-later"), Some(parent)),
            (format!("00-{ID}-01-more"), None),
            (format!("ff-{ID}-01"), None),
            (format!("00-{}-01", ID.to_uppercase()), None),
            (format!("00-{:032}-00f067aa0ba902b7-01", 0), None),
            (
                format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{:016}-01", 0),
                None,
            ),
            (format!("00-{ID}"), None),
            ("+0-é".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(Parent::parse(&text), expected, "{text}");
        }
    }
}
