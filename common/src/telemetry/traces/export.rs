//! Brings spans to a collector. One that is away or slow costs spans, and nothing else.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::IntCounter;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use reqwest::{Client, StatusCode};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use url::Url;

use super::otlp::{SpanRecord, request};
use super::settings::Settings;
use crate::text::innermost;
use crate::tls;

/// Most spans that wait: a producer begins thousands of traces within a second. About 20 MB.
const MOST_WAITING: usize = 16_384;
/// Most spans in one request, and how many do not wait for others.
const BATCH: usize = 512;
/// Longest time that a span waits for others.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// Pauses before spans are offered again.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(2)];

/// Finished spans that wait for the collector.
pub(super) struct Outbox {
    waiting: Mutex<VecDeque<SpanRecord>>,
    /// How many were taken and have no answer yet.
    under_way: AtomicUsize,
    /// There are enough for a request.
    enough: Notify,
    /// Cancelled when no more spans come: send what waits, then stop.
    pub(super) stop: CancellationToken,
    dropped: IntCounter,
    said: AtomicBool,
}

impl Outbox {
    /// Counts in `dropped` the spans that no collector took.
    pub(super) fn new(dropped: IntCounter) -> Self {
        Self {
            waiting: Mutex::default(),
            under_way: AtomicUsize::new(0),
            enough: Notify::new(),
            stop: CancellationToken::new(),
            dropped,
            said: AtomicBool::new(false),
        }
    }

    /// Takes a span, or drops it: nobody waits for a collector.
    pub(super) fn put(&self, span: SpanRecord) {
        let mut waiting = self.waiting();
        if waiting.len() == MOST_WAITING {
            drop(waiting);
            self.drop_spans(1, "they come faster than the collector takes them");
            return;
        }
        waiting.push_back(span);
        if waiting.len() == BATCH {
            self.enough.notify_one();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<SpanRecord>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the spans of one request.
    fn take(&self) -> Vec<SpanRecord> {
        let mut waiting = self.waiting();
        let count = waiting.len().min(BATCH);
        self.under_way.store(count, Ordering::Relaxed);
        waiting.drain(..count).collect()
    }

    /// Drops what still waits or has no answer, once nobody sends any more.
    pub(super) fn drop_rest(&self, why: &str) {
        let rest = std::mem::take(&mut *self.waiting());
        self.drop_spans(rest.len() + self.under_way.swap(0, Ordering::Relaxed), why);
    }

    /// Counts dropped spans; says so the first time.
    fn drop_spans(&self, count: usize, why: &str) {
        self.dropped.inc_by(count as u64);
        if !self.said.swap(true, Ordering::Relaxed) {
            warn!(
                operation = "traces",
                "spans are dropped: {why}; further ones are counted (repofleet_trace_spans_dropped_total)"
            );
        }
    }
}

/// Where spans go to.
pub(super) struct Collector {
    client: Client,
    endpoint: Url,
    resource: Vec<(String, String)>,
}

/// Why a collector did not take spans.
struct Refusal {
    why: String,
    /// It may later.
    again: bool,
}

impl fmt::Display for Collector {
    /// Without what may be secret: credentials and query.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = self.endpoint.origin().ascii_serialization();
        write!(f, "{origin}{}", self.endpoint.path())
    }
}

impl Collector {
    /// Prepares a client.
    ///
    /// # Errors
    /// With what is wrong with the settings.
    pub(super) fn new(settings: Settings) -> Result<Self, String> {
        tls::install_provider();
        let mut headers = HeaderMap::new();
        for (name, value) in &settings.headers {
            let name = HeaderName::try_from(name.as_str());
            let value = HeaderValue::try_from(value.as_str());
            let (Ok(name), Ok(mut value)) = (name, value) else {
                return Err(format!(
                    "{} contains an invalid header name or value",
                    settings.headers_from
                ));
            };
            value.set_sensitive(true);
            headers.append(name, value);
        }
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/x-protobuf"),
        );
        let program = concat!("repofleet/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(program));
        let client = Client::builder()
            .default_headers(headers)
            .timeout(settings.timeout)
            // The headers are for this place only.
            .redirect(reqwest::redirect::Policy::none())
            .build();
        Ok(Self {
            client: client.map_err(|error| format!("no client for a collector: {error}"))?,
            endpoint: settings.endpoint,
            resource: settings.resource,
        })
    }

    /// Sends a request without spans.
    ///
    /// # Errors
    /// With why it is not taken.
    pub(super) async fn probe(&self) -> Result<(), String> {
        self.send(Vec::new()).await.map_err(|refusal| refusal.why)
    }

    /// Sends what comes into `outbox` until that is stopped, and then the rest.
    pub(super) async fn serve(self, outbox: Arc<Outbox>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LONGEST_WAIT) => {}
                () = outbox.enough.notified() => {}
                () = outbox.stop.cancelled() => {}
            }
            // Before the rest is taken, which then is all of it.
            let is_last = outbox.stop.is_cancelled();
            loop {
                let batch = outbox.take();
                if batch.is_empty() {
                    break;
                }
                let offered = self.offer(&batch, &outbox.stop).await;
                outbox.under_way.store(0, Ordering::Relaxed);
                if let Err(why) = offered {
                    outbox.drop_spans(batch.len(), &why);
                }
            }
            if is_last {
                return;
            }
        }
    }

    /// Offers spans, again if that may help and there is time.
    async fn offer(&self, spans: &[SpanRecord], stop: &CancellationToken) -> Result<(), String> {
        let body = request(&self.resource, spans);
        let mut pauses = PAUSES.iter();
        loop {
            let Err(refusal) = self.send(body.clone()).await else {
                return Ok(());
            };
            match pauses
                .next()
                .filter(|_| refusal.again && !stop.is_cancelled())
            {
                Some(pause) => _ = stop.run_until_cancelled(tokio::time::sleep(*pause)).await,
                None => return Err(refusal.why),
            }
        }
    }

    async fn send(&self, body: Vec<u8>) -> Result<(), Refusal> {
        let sending = self.client.post(self.endpoint.clone()).body(body).send();
        // Without the URL, which may hold credentials; only the last cause says what happened.
        let answer = sending.await.map_err(|error| {
            let cause = innermost(&error.without_url());
            Refusal {
                why: format!("the collector cannot be reached: {cause}"),
                again: true,
            }
        })?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        Err(Refusal {
            why: format!("the collector answered {status}"),
            again: matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::otlp::Kind;
    use super::*;

    #[test]
    fn spans_that_nobody_takes_are_bounded_and_counted() {
        let dropped = IntCounter::new("dropped", "d").unwrap();
        let outbox = Outbox::new(dropped.clone());
        let span = SpanRecord {
            trace_id: 1,
            span_id: 2,
            parent: None,
            name: "n",
            kind: Kind::Internal,
            begin: 3,
            end: 4,
            attributes: Vec::new(),
            error: None,
        };
        for _ in 0..MOST_WAITING + 7 {
            outbox.put(span.clone());
        }
        assert_eq!((outbox.waiting().len(), dropped.get()), (MOST_WAITING, 7));
        // Taken, and without an answer yet.
        assert_eq!(outbox.take().len(), BATCH);
        outbox.drop_rest("it is over");
        assert_eq!(
            (outbox.waiting().len(), dropped.get()),
            (0, MOST_WAITING as u64 + 7)
        );
    }
}
