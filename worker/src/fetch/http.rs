//! libgit2's smart transport over reqwest: one TLS stack, status codes, time-outs, a byte budget, and
//! only addresses that the policy allows. After cargo's `git2-curl`.
//!
//! libgit2 speaks protocol v0: one GET of `info/refs`, then POSTs to `git-upload-pack`. It writes each
//! request completely before it reads the response. `wire` speaks v2 with the same requests.

use std::error::Error;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use common::fault::Fault;
use common::tls;
use git2::transport::{Service, SmartSubtransport, SmartSubtransportStream, Transport};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::runtime::Runtime;
use url::Url;

use super::policy::{FetchPolicy, FetchSource, FetchWay, authority, is_public, literal_address};
use crate::host_throttle::THROTTLE_PAUSE;
use crate::resolver::lookup;

/// For connecting, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Redirects of the first request that are followed. Those of later ones are not, as in git.
const MAX_REDIRECTS: usize = 5;
/// Most bytes of refs, about 900,000 of them. libgit2 keeps them in memory, where they take more room
/// than on the wire.
const MAX_ADVERTISEMENT: u64 = 64 << 20;
/// Bytes of an unwanted rest of a response that are read. Its connection can then be used again;
/// otherwise each of a fetch's three requests makes a TLS connection.
const DRAINED: usize = 16 * 1024;
/// For reading such a rest.
const DRAIN_TIME: Duration = Duration::from_millis(500);

/// Receives a fetch's progress.
pub trait ProgressSink: Send + Sync {
    /// A repository is fetched this way. If it is a [`FetchWay::Fallback`], `why` says from what.
    fn way(&self, way: FetchWay, why: &str);
    /// `total` bytes have come in so far.
    fn received(&self, total: u64);
    /// Something else went on: a response began, deltas were resolved.
    fn alive(&self);
}

/// What the requests of one fetch share.
pub(super) struct HttpSession {
    runtime: Runtime,
    client: Client,
    policy: FetchPolicy,
    sink: Arc<dyn ProgressSink>,
    state: Mutex<SessionState>,
}

struct SessionState {
    /// The repository's URL, after redirects.
    base: Url,
    received: u64,
    /// The first fault: libgit2 would pass on only its text.
    fault: Option<Fault>,
    /// Whether the host refused the token, which is not sent again.
    token_refused: bool,
}

/// The version of git's protocol that a request asks for.
#[derive(Clone, Copy)]
enum Protocol {
    V0,
    V2,
}

impl Protocol {
    fn named_in(self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::V0 => request,
            Self::V2 => request.header("git-protocol", "version=2"),
        }
    }
}

/// A response that is read piece by piece. A short rest is read when it is dropped.
pub(super) struct ResponseBody {
    session: Arc<HttpSession>,
    service: Service,
    response: Option<Response>,
}

impl ResponseBody {
    /// Returns the next piece; empty at the end.
    pub(super) fn chunk(&mut self) -> Result<bytes::Bytes, Fault> {
        match &mut self.response {
            Some(response) => self.session.chunk(self.service, response),
            None => Ok(bytes::Bytes::new()),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some(response) = self.response.take() {
            self.session.drain(response);
        }
    }
}

thread_local! {
    /// The session of this thread's fetch: libgit2's transports are global and know only a URL.
    static CURRENT: std::cell::RefCell<Option<Arc<HttpSession>>> = const { std::cell::RefCell::new(None) };
}

impl HttpSession {
    /// Makes a session for the repository at `base`. `named` says whether the operator named its host.
    pub(super) fn new(
        base: Url,
        named: bool,
        policy: &FetchPolicy,
        sink: Arc<dyn ProgressSink>,
    ) -> Result<Arc<Self>, Fault> {
        check_literal(&base, named)?;
        // One thread suffices for one request at a time; names are looked up on others.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Fault::infra)?;
        let resolver = PublicOnly {
            policy: policy.clone(),
        };
        tls::install_provider();
        let client = Client::builder()
            // Servers recognize git clients by this prefix.
            .user_agent(concat!(
                "git/2.0 (repofleet ",
                env!("CARGO_PKG_VERSION"),
                ")"
            ))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .dns_resolver(Arc::new(resolver))
            // A proxy would bypass the checks of addresses.
            .no_proxy()
            .build()
            .map_err(Fault::infra)?;
        Ok(Arc::new(Self {
            runtime,
            client,
            policy: policy.clone(),
            sink,
            state: Mutex::new(SessionState {
                base,
                received: 0,
                fault: None,
                token_refused: false,
            }),
        }))
    }

    /// Runs `fetch`, which uses libgit2, through this session.
    pub(super) fn run<T>(self: &Arc<Self>, fetch: impl FnOnce() -> T) -> T {
        register();
        CURRENT.set(Some(Arc::clone(self)));
        let result = fetch();
        CURRENT.set(None);
        result
    }

    /// Returns the bytes received so far.
    pub(super) fn received(&self) -> u64 {
        self.state().received
    }

    /// Takes the first fault that this session met.
    pub(super) fn take_fault(&self) -> Option<Fault> {
        self.state().fault.take()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the first fault, and returns an error that libgit2 can pass on.
    fn failed(&self, fault: Fault) -> io::Error {
        // git2 makes a C string of this, and aborts at a NUL.
        let text = fault.message.replace('\0', "\u{fffd}");
        self.state().fault.get_or_insert(fault);
        io::Error::other(text)
    }

    fn url(&self, path: &str) -> Result<Url, Fault> {
        let state = self.state();
        let base = state.base.as_str().trim_end_matches('/');
        Url::parse(&format!("{base}/{path}")).map_err(Fault::refused)
    }

    /// Requests the capabilities of protocol v2. A server that does not speak it answers as in v0.
    pub(super) fn capabilities(self: &Arc<Self>) -> Result<ResponseBody, Fault> {
        let response = self.get(Protocol::V2)?;
        Ok(self.body(response, Service::UploadPackLs))
    }

    /// Requests the refs by a command of protocol v2.
    pub(super) fn refs(self: &Arc<Self>, command: Vec<u8>) -> Result<ResponseBody, Fault> {
        let response = self.post(Protocol::V2, command)?;
        Ok(self.body(response, Service::UploadPackLs))
    }

    /// Sends any other command of protocol v2.
    pub(super) fn command(self: &Arc<Self>, command: Vec<u8>) -> Result<ResponseBody, Fault> {
        let response = self.post(Protocol::V2, command)?;
        Ok(self.body(response, Service::UploadPack))
    }

    fn body(self: &Arc<Self>, response: Response, service: Service) -> ResponseBody {
        ResponseBody {
            session: Arc::clone(self),
            service,
            response: Some(response),
        }
    }

    /// Requests the ref advertisement.
    fn get(&self, protocol: Protocol) -> Result<Response, Fault> {
        for _ in 0..=MAX_REDIRECTS {
            let mut url = self.url("info/refs")?;
            url.set_query(Some("service=git-upload-pack"));
            let request = self
                .client
                .request(Method::GET, url.clone())
                .header(ACCEPT, "application/x-git-upload-pack-advertisement")
                .header("pragma", "no-cache");
            let response = self.send(protocol.named_in(request), &url)?;
            if response.status().is_redirection() {
                self.redirect(&url, response.headers())?;
                self.drain(response);
                continue;
            }
            return expect(response, "application/x-git-upload-pack-advertisement");
        }
        Err(Fault::gone(format!("more than {MAX_REDIRECTS} redirects")))
    }

    fn post(&self, protocol: Protocol, body: Vec<u8>) -> Result<Response, Fault> {
        let url = self.url("git-upload-pack")?;
        let request = self
            .client
            .request(Method::POST, url.clone())
            .header(CONTENT_TYPE, "application/x-git-upload-pack-request")
            .header(ACCEPT, "application/x-git-upload-pack-result")
            .body(body);
        let response = self.send(protocol.named_in(request), &url)?;
        if response.status().is_redirection() {
            return Err(Fault::refused("a redirect of a POST is not followed"));
        }
        expect(response, "application/x-git-upload-pack-result")
    }

    /// Sends a request with the token if it belongs to the host, and again without if that is refused.
    fn send(&self, request: RequestBuilder, url: &Url) -> Result<Response, Fault> {
        let token = self
            .policy
            .token_for(url)
            .filter(|_| !self.state().token_refused);
        let (Some(token), Some(with_token)) = (token, request.try_clone()) else {
            return self.exchange(request);
        };
        let response = self.exchange(with_token.basic_auth("x-access-token", Some(token)))?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.state().token_refused = true;
            self.drain(response);
            return self.exchange(request);
        }
        Ok(response)
    }

    /// Waits without a time limit: the parent ends a slot that makes no progress.
    fn exchange(&self, request: RequestBuilder) -> Result<Response, Fault> {
        let response = self.runtime.block_on(request.send());
        let response = response.map_err(transport_fault)?;
        self.sink.alive();
        Ok(response)
    }

    /// Moves the session to a redirect's target if the policy allows it.
    fn redirect(&self, from: &Url, headers: &HeaderMap) -> Result<(), Fault> {
        let location = headers
            .get(LOCATION)
            .and_then(|l| l.to_str().ok())
            .and_then(|l| from.join(l).ok())
            .ok_or_else(|| Fault::gone("a redirect without a usable Location"))?;
        // Without credentials and query: it goes to logs.
        let (scheme, path) = (location.scheme(), location.path());
        let target = format!("{scheme}://{}{path}", authority(&location));
        let refused = |fault: Fault| Fault::refused(format!("redirected to {target}: {fault}"));
        let FetchSource::Remote { mut url, named } =
            self.policy.remote(location).map_err(refused)?
        else {
            return Err(Fault::refused("redirected to a path"));
        };
        check_literal(&url, named).map_err(refused)?;
        // As in git, the target must be the same file of another repository.
        let Some(base) = url.path().strip_suffix("/info/refs").map(str::to_owned) else {
            return Err(Fault::gone(format!(
                "redirected to {url}, which is no repository"
            )));
        };
        url.set_path(&base);
        self.state().base = url;
        Ok(())
    }

    /// Reads a short rest of a response.
    fn drain(&self, mut response: Response) {
        let rest = async {
            let mut drained = 0;
            while drained < DRAINED {
                match response.chunk().await {
                    Ok(Some(chunk)) => drained += chunk.len(),
                    _ => break,
                }
            }
        };
        // If this fails the next request makes a new connection.
        self.runtime
            .block_on(async { tokio::time::timeout(DRAIN_TIME, rest).await })
            .ok();
    }

    /// Reads and counts the next piece of a response's body; empty at its end.
    fn chunk(&self, service: Service, response: &mut Response) -> Result<bytes::Bytes, Fault> {
        let chunk = self
            .runtime
            .block_on(response.chunk())
            .map_err(transport_fault)?
            .unwrap_or_default();
        let received = {
            let mut state = self.state();
            state.received += chunk.len() as u64;
            state.received
        };
        if received > self.policy.max_bytes {
            return Err(Fault::too_large(format!(
                "more than {} bytes to download (--max-fetch-bytes)",
                self.policy.max_bytes
            )));
        }
        if service == Service::UploadPackLs && received > MAX_ADVERTISEMENT {
            return Err(Fault::too_large(format!(
                "more than {MAX_ADVERTISEMENT} bytes of refs"
            )));
        }
        self.sink.received(received);
        Ok(chunk)
    }
}

/// Makes libgit2 use sessions for http and https, before its own transports.
#[expect(
    unsafe_code,
    reason = "libgit2's list of transports is global; written once, by one thread"
)]
fn register() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for scheme in ["http", "https"] {
            let factory = |remote: &git2::Remote<'_>| {
                let session = CURRENT.with_borrow(Clone::clone);
                let session =
                    session.ok_or_else(|| git2::Error::from_str("a fetch outside of a session"))?;
                Transport::smart(remote, true, Subtransport { session })
            };
            // SAFETY: `Once` lets one thread in, before any transport is made by `HttpSession::run`.
            unsafe { git2::transport::register(scheme, factory) }
                .expect("the scheme is a C string, and memory is there");
        }
    });
}

struct Subtransport {
    session: Arc<HttpSession>,
}

impl SmartSubtransport for Subtransport {
    fn action(
        &self,
        _url: &str,
        service: Service,
    ) -> Result<Box<dyn SmartSubtransportStream>, git2::Error> {
        match service {
            Service::UploadPackLs | Service::UploadPack => Ok(Box::new(Exchange {
                session: Arc::clone(&self.session),
                service,
                request: Vec::new(),
                response: None,
                chunk: bytes::Bytes::new(),
            })),
            Service::ReceivePackLs | Service::ReceivePack => {
                Err(git2::Error::from_str("nothing is ever pushed"))
            }
        }
    }

    fn close(&self) -> Result<(), git2::Error> {
        Ok(())
    }
}

/// One request and its response.
struct Exchange {
    session: Arc<HttpSession>,
    service: Service,
    request: Vec<u8>,
    response: Option<Response>,
    chunk: bytes::Bytes,
}

impl Exchange {
    fn next(&mut self) -> Result<(), Fault> {
        let response = match &mut self.response {
            Some(response) => response,
            none => none.insert(match self.service {
                Service::UploadPackLs => self.session.get(Protocol::V0)?,
                _ => {
                    let request = std::mem::take(&mut self.request);
                    self.session.post(Protocol::V0, request)?
                }
            }),
        };
        self.chunk = self.session.chunk(self.service, response)?;
        Ok(())
    }
}

impl Read for Exchange {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunk.is_empty() {
            self.next().map_err(|fault| self.session.failed(fault))?;
        }
        let n = self.chunk.len().min(buffer.len());
        buffer[..n].copy_from_slice(&self.chunk.split_to(n));
        Ok(n)
    }
}

impl Write for Exchange {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.request.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(response) = self.response.take() {
            // libgit2 stops reading at the end of git's data, just before that of the body.
            self.session.drain(response);
        }
    }
}

/// Refuses hosts with an address that is not public, unless the operator named them.
struct PublicOnly {
    policy: FetchPolicy,
}

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_ascii_lowercase();
        // Whatever the port: the URL's authority was checked before.
        let named = self.policy.hosts.iter().any(|allowed| allowed.host == host);
        Box::pin(async move {
            let addresses = lookup(&host).await?;
            if let Some(address) = addresses.iter().find(|a| !named && !is_public(a.ip())) {
                return Err(Fault::refused(format!(
                    "{host} resolves to {}, which is not a public address (--allow-host {host})",
                    address.ip()
                ))
                .into());
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// Checks a URL's literal address, which no resolver sees.
fn check_literal(url: &Url, named: bool) -> Result<(), Fault> {
    match literal_address(url) {
        Some(address) if !named && !is_public(address) => {
            Err(Fault::refused(format!("{address} is not a public address")))
        }
        _ => Ok(()),
    }
}

/// Passes on a successful response of the expected type, and classifies all others.
fn expect(response: Response, content_type: &str) -> Result<Response, Fault> {
    let status = response.status();
    if status.is_success() {
        let seen = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|t| t.to_str().ok());
        if seen.is_some_and(|t| t.split(';').next().unwrap_or_default().trim() == content_type) {
            return Ok(response);
        }
        let seen = seen.unwrap_or("missing");
        return Err(Fault::transient(format!(
            "not a git response: content type {seen}"
        )));
    }
    let headers = response.headers();
    // GitHub's sign of an exhausted quota.
    let quota = headers
        .get("x-ratelimit-remaining")
        .is_some_and(|left| left == "0");
    let retry_after =
        retry_after(headers, OffsetDateTime::now_utc()).or_else(|| quota.then_some(THROTTLE_PAUSE));
    Err(status_fault(status, retry_after))
}

/// Classifies a status. A bare 403 has no `retry_after`: it may concern this repository alone.
fn status_fault(status: StatusCode, retry_after: Option<Duration>) -> Fault {
    let message = format!("HTTP status {status}");
    match status.as_u16() {
        429 => Fault::throttled(message, retry_after.or(Some(THROTTLE_PAUSE))),
        403 => Fault::throttled(message, retry_after),
        503 if retry_after.is_some() => Fault::throttled(message, retry_after),
        408 | 425 | 500..=599 => Fault::transient(message),
        _ => Fault::gone(message),
    }
}

/// Parses Retry-After: seconds, or a date.
fn retry_after(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = OffsetDateTime::parse(value, &Rfc2822).ok()?;
    Some(Duration::try_from(date - now).unwrap_or_default())
}

/// Classifies a failed exchange. The connector wraps a fault of the resolver, which is passed on; of
/// other errors the last cause is the message, since reqwest's own only says what it was doing.
fn transport_fault(error: reqwest::Error) -> Fault {
    let mut last: &(dyn Error + 'static) = &error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    let fault = Fault::transient(last.to_string()).because(error);
    fault.cause::<Fault>().cloned().unwrap_or(fault)
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;

    use super::*;
    use crate::fetch::policy::FetchMode;

    #[test]
    fn statuses_have_their_class() {
        use FaultKind::{Gone, Throttled, Transient};
        for (status, retry_after, kind) in [
            (401, None, Gone),
            (403, None, Throttled),
            (404, None, Gone),
            (410, None, Gone),
            (451, None, Gone),
            (418, None, Gone),
            (429, Some(5), Throttled),
            (408, None, Transient),
            (500, None, Transient),
            (502, None, Transient),
            (503, None, Transient),
            (503, Some(5), Throttled),
        ] {
            let retry_after = retry_after.map(Duration::from_secs);
            let fault = status_fault(StatusCode::from_u16(status).unwrap(), retry_after);
            assert_eq!(
                (fault.kind, fault.retry_after),
                (kind, retry_after),
                "{status}"
            );
        }
    }

    #[tokio::test]
    async fn a_host_that_resolves_to_this_machine_is_refused_unless_it_was_named() {
        let resolve = async |hosts: &[&str]| {
            let policy = FetchPolicy {
                hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
                http: false,
                local: false,
                max_bytes: 0,
                token: None,
                mode: FetchMode::Auto,
            };
            PublicOnly { policy }
                .resolve("localhost".parse().unwrap())
                .await
                .map(|addresses| addresses.count())
        };
        let error = resolve(&["127.0.0.1"]).await.unwrap_err();
        let fault = error.downcast_ref::<Fault>().unwrap();
        assert_eq!(fault.kind, FaultKind::Refused);
        assert!(fault.message.contains("--allow-host localhost"), "{fault}");
        assert!(resolve(&["localhost"]).await.unwrap() > 0);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = OffsetDateTime::parse("Wed, 21 Oct 2026 07:28:00 GMT", &Rfc2822).unwrap();
        for (value, expected) in [
            ("7", Some(7)),
            (" 7 ", Some(7)),
            ("99999999", Some(99_999_999)),
            ("Wed, 21 Oct 2026 07:28:30 GMT", Some(30)),
            ("Wed, 21 Oct 2026 07:00:00 GMT", Some(0)),
            ("soon", None),
            ("-3", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]);
            assert_eq!(
                retry_after(&headers, now),
                expected.map(Duration::from_secs),
                "{value}"
            );
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
