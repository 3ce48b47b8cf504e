//! libgit2's smart transport over reqwest: one TLS stack, real status codes, real time-outs, a
//! byte budget, and no address that the policy does not allow. After cargo's `git2-curl`.
//!
//! libgit2 speaks protocol v0: one GET of `info/refs`, then POSTs to `git-upload-pack`, each of
//! which it writes completely before it reads the answer.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use common::fault::Fault;
use common::outcome::THROTTLE_PAUSE;
use git2::transport::{Service, SmartSubtransport, SmartSubtransportStream, Transport};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::runtime::Runtime;
use url::Url;

use super::ProgressSink;
use super::policy::{FetchPolicy, FetchSource, authority, is_public, literal_address};

/// For a connection to be made, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Redirects of the first request that are followed; none is after it, as git has it.
const MAX_REDIRECTS: usize = 5;
/// Most bytes of refs, some 900,000 of them. libgit2 keeps them in memory, in which they take more
/// room than on the wire.
const MAX_ADVERTISEMENT: u64 = 64 << 20;
/// What is read of an answer that nobody wants to the end, so that its connection can be used
/// again: without it each of a fetch's three requests makes a TLS connection of its own.
const DRAINED: usize = 16 * 1024;
/// How long that may take.
const DRAIN_TIME: Duration = Duration::from_millis(500);

/// One fetch: what its requests share.
pub(super) struct HttpSession {
    runtime: Runtime,
    client: Client,
    policy: FetchPolicy,
    watch: Arc<dyn ProgressSink>,
    state: Mutex<SessionState>,
}

#[derive(Default)]
struct SessionState {
    /// Where the repository is, after redirects.
    base: Option<Url>,
    received: u64,
    /// The first thing that went wrong. libgit2 only passes texts on.
    fault: Option<Fault>,
    /// The host refused the token: go on without.
    token_refused: bool,
}

thread_local! {
    /// The session of the fetch that runs on this thread: libgit2's transports are global and
    /// know nothing but a URL.
    static CURRENT: std::cell::RefCell<Option<Arc<HttpSession>>> = const { std::cell::RefCell::new(None) };
}

impl HttpSession {
    /// A session for the repository at `base`, whose host was `named` by the operator or not.
    pub(super) fn new(
        base: Url,
        named: bool,
        policy: &FetchPolicy,
        watch: Arc<dyn ProgressSink>,
    ) -> Result<Arc<Self>, Fault> {
        register();
        check_literal(&base, named)?;
        // One thread does it all, name look-ups aside: there is only ever one request at a time.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Fault::infra)?;
        let resolver = PublicOnly {
            policy: policy.clone(),
        };
        let client = Client::builder()
            // Servers know git clients by this beginning.
            .user_agent(concat!(
                "git/2.0 (repofleet ",
                env!("CARGO_PKG_VERSION"),
                ")"
            ))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .dns_resolver(Arc::new(resolver))
            // A proxy would make the checks of addresses meaningless.
            .no_proxy()
            .build()
            .map_err(Fault::infra)?;
        Ok(Arc::new(Self {
            runtime,
            client,
            policy: policy.clone(),
            watch,
            state: Mutex::new(SessionState {
                base: Some(base),
                ..SessionState::default()
            }),
        }))
    }

    /// Makes `fetch` go through this session.
    pub(super) fn run<T>(self: &Arc<Self>, fetch: impl FnOnce() -> T) -> T {
        CURRENT.set(Some(Arc::clone(self)));
        let result = fetch();
        CURRENT.set(None);
        result
    }

    /// Bytes that came in.
    pub(super) fn received(&self) -> u64 {
        self.state().received
    }

    /// The first thing that went wrong, if this session saw it.
    pub(super) fn take_fault(&self) -> Option<Fault> {
        self.state().fault.take()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the first fault and makes of it what libgit2 can pass on.
    fn failed(&self, fault: Fault) -> io::Error {
        // git2 makes a C string of this, and aborts at a NUL.
        let text = fault.message.replace('\0', "\u{fffd}");
        self.state().fault.get_or_insert(fault);
        io::Error::other(text)
    }

    fn url(&self, path: &str) -> Result<Url, Fault> {
        let base = self.state().base.clone();
        let base = base.ok_or_else(|| Fault::infra("a session always has a base"))?;
        let joined = format!("{}/{path}", base.as_str().trim_end_matches('/'));
        Url::parse(&joined).map_err(Fault::refused)
    }

    /// The ref advertisement.
    fn get(&self) -> Result<Response, Fault> {
        for _ in 0..=MAX_REDIRECTS {
            let mut url = self.url("info/refs")?;
            url.set_query(Some("service=git-upload-pack"));
            let request = self
                .client
                .request(Method::GET, url.clone())
                .header(ACCEPT, "application/x-git-upload-pack-advertisement")
                .header("pragma", "no-cache");
            let response = self.send(request, &url)?;
            if response.status().is_redirection() {
                self.redirect(&url, response.headers())?;
                self.drain(response);
                continue;
            }
            return expect(response, "application/x-git-upload-pack-advertisement");
        }
        Err(Fault::gone(format!("more than {MAX_REDIRECTS} redirects")))
    }

    fn post(&self, body: Vec<u8>) -> Result<Response, Fault> {
        let url = self.url("git-upload-pack")?;
        let request = self
            .client
            .request(Method::POST, url.clone())
            .header(CONTENT_TYPE, "application/x-git-upload-pack-request")
            .header(ACCEPT, "application/x-git-upload-pack-result")
            .body(body);
        let response = self.send(request, &url)?;
        if response.status().is_redirection() {
            return Err(Fault::refused("a redirect of a POST is not followed"));
        }
        expect(response, "application/x-git-upload-pack-result")
    }

    /// Sends with the token if the host is its; again without where the host refuses it.
    fn send(&self, request: RequestBuilder, url: &Url) -> Result<Response, Fault> {
        let token = self
            .policy
            .token_for(url)
            .filter(|_| !self.state().token_refused);
        let (Some(token), Some(with_token)) = (token, request.try_clone()) else {
            return self.exchange(request);
        };
        let response = self.exchange(with_token.basic_auth("x-access-token", Some(&token.0)))?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.state().token_refused = true;
            self.drain(response);
            return self.exchange(request);
        }
        Ok(response)
    }

    /// Waits as long as it takes: the parent ends a slot that makes no progress.
    fn exchange(&self, request: RequestBuilder) -> Result<Response, Fault> {
        let response = self.runtime.block_on(request.send()).map_err(|e| {
            // A refusal by the resolver comes wrapped in the connector's errors.
            let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&e);
            while let Some(error) = cause {
                if let Some(fault) = error.downcast_ref::<Fault>() {
                    return fault.clone();
                }
                cause = error.source();
            }
            Fault::transient(chain(&e))
        })?;
        self.watch.alive();
        Ok(response)
    }

    /// Moves the session to where the redirect leads, if the policy allows that.
    fn redirect(&self, from: &Url, headers: &HeaderMap) -> Result<(), Fault> {
        let location = headers
            .get(LOCATION)
            .and_then(|l| l.to_str().ok())
            .and_then(|l| from.join(l).ok())
            .ok_or_else(|| Fault::gone("a redirect without a usable Location"))?;
        // Neither credentials nor a signed query are for a log.
        let (scheme, path) = (location.scheme(), location.path());
        let target = format!("{scheme}://{}{path}", authority(&location));
        let refused = |fault: Fault| Fault::refused(format!("redirected to {target}: {fault}"));
        let FetchSource::Remote { mut url, named } =
            self.policy.remote(location).map_err(refused)?
        else {
            return Err(Fault::refused("redirected to a path"));
        };
        check_literal(&url, named).map_err(refused)?;
        // As git does: what was asked of the new place must be what we asked of the old one.
        let Some(base) = url.path().strip_suffix("/info/refs").map(str::to_owned) else {
            return Err(Fault::gone(format!(
                "redirected to {url}, which is no repository"
            )));
        };
        url.set_path(&base);
        self.state().base = Some(url);
        Ok(())
    }

    /// Reads what little is left of an answer.
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
        // In vain is no harm: the next request makes a connection of its own.
        self.runtime
            .block_on(async { tokio::time::timeout(DRAIN_TIME, rest).await })
            .ok();
    }

    /// The next piece of an answer's body, counted; empty at its end.
    fn chunk(&self, service: Service, response: &mut Response) -> Result<bytes::Bytes, Fault> {
        let chunk = self
            .runtime
            .block_on(response.chunk())
            .map_err(|e| Fault::transient(chain(&e)))?
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
        self.watch.received(received);
        Ok(chunk)
    }
}

/// Makes libgit2 use sessions for http and https. It asks its registered transports before its
/// own, of which it has only a plain http one here.
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

/// One request and its answer.
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
                Service::UploadPackLs => self.session.get()?,
                _ => self.session.post(std::mem::take(&mut self.request))?,
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
            // libgit2 stops reading where git's answer ends, which is just before HTTP's does.
            self.session.drain(response);
        }
    }
}

/// Refuses hosts that resolve to addresses that are not public, unless the operator named them.
struct PublicOnly {
    policy: FetchPolicy,
}

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_ascii_lowercase();
        // Whatever the port: a name that is not allowed at this port was refused before.
        let named = self.policy.hosts.iter().any(|allowed| allowed.host == host);
        Box::pin(async move {
            let addresses: Vec<SocketAddr> =
                tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
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

/// The same for a URL that names an address, which no resolver sees.
fn check_literal(url: &Url, named: bool) -> Result<(), Fault> {
    match literal_address(url) {
        Some(address) if !named && !is_public(address) => {
            Err(Fault::refused(format!("{address} is not a public address")))
        }
        _ => Ok(()),
    }
}

/// Passes on an answer that is what was asked for, and sorts all others.
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
        return Err(Fault::transient(format!(
            "the answer is {}, not git's",
            seen.unwrap_or("of no type")
        )));
    }
    let headers = response.headers();
    // GitHub's way to say that a quota is used up; when it ends is another header's matter.
    let quota = headers
        .get("x-ratelimit-remaining")
        .is_some_and(|left| left == "0");
    let retry_after =
        retry_after(headers, OffsetDateTime::now_utc()).or_else(|| quota.then_some(THROTTLE_PAUSE));
    Err(status_fault(status, retry_after))
}

/// `retry_after` of a throttled answer is `None` only where the host did not say that it wants to
/// be left alone: a bare 403 may be about this repository alone.
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

/// Seconds or a date.
fn retry_after(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = OffsetDateTime::parse(value, &Rfc2822).ok()?;
    Some(Duration::try_from(date - now).unwrap_or_default())
}

/// An error with its causes; reqwest's own text leaves out the one that matters.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;

    use super::*;

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
