//! libgit2's smart transport over reqwest: one TLS stack, status codes, time-outs, a byte budget, and
//! only addresses that the policy allows. After cargo's `git2-curl`.
//!
//! libgit2 speaks protocol v0: one GET of `info/refs`, then POSTs to `git-upload-pack`. It writes each
//! request completely before it reads the response. `wire` speaks v2 with the same requests.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use common::fault::Fault;
use common::text::innermost;
use common::tls;
use git2::transport::{Service, SmartSubtransport, SmartSubtransportStream, Transport};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use time::OffsetDateTime;
use tokio::runtime::Runtime;
use url::Url;

use super::answer::{self, Asked, Context, TokenRefusal};
use super::host::{authority, is_public, literal_address};
use super::pack::gauge::PackGauge;
use super::pack::limits::{Failure, PackLimits};
use super::packets::{Chunks, Packet, Packets};
use super::policy::{FetchPolicy, FetchSource, FetchWay};
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

/// Names of branches, and of other refs, that are kept to be shown.
const KEPT_REFS: usize = 4;

/// Receives a fetch's progress.
pub trait ProgressSink: Send + Sync {
    /// A repository is fetched this way. If it is a [`FetchWay::Fallback`], `why` says from what.
    fn way(&self, way: FetchWay, why: &str);
    /// `total` bytes have come in so far.
    fn received(&self, total: u64);
    /// Something else went on: a response began, deltas were resolved.
    fn alive(&self);
    /// The host refused the token, so it is asked without.
    fn token_refused(&self, why: TokenRefusal);
    /// The host answered, and said that it will refuse the token for this long.
    fn token_used_up(&self, rest: Duration);
}

/// What the requests of one fetch share.
pub(super) struct HttpSession {
    runtime: Runtime,
    client: Client,
    policy: FetchPolicy,
    sink: Arc<dyn ProgressSink>,
    /// The repository's path, before redirects.
    path: String,
    state: Mutex<SessionState>,
}

struct SessionState {
    /// The repository's URL, after redirects.
    base: Url,
    received: u64,
    /// Of these, those of refs.
    received_refs: u64,
    /// The first fault: libgit2 would pass on only its text.
    fault: Option<Fault>,
    /// Some branches, and some other refs, that the host has.
    refs: [Vec<String>; 2],
    /// Whether the host refused the token, which is not sent again.
    token_refused: bool,
    /// Whether the last response was the status 500.
    broke: bool,
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
    /// `None` only while it is dropped.
    reply: Option<Reply>,
}

impl Chunks for ResponseBody {
    fn chunk(&mut self) -> Result<Bytes, Fault> {
        match &mut self.reply {
            Some(reply) => self.session.chunk(self.service, &mut reply.response),
            None => Ok(Bytes::new()),
        }
    }

    fn said(&self, words: &[u8]) -> Fault {
        match &self.reply {
            Some(reply) => self.session.said(words, reply),
            None => Fault::transient("the response has ended"),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            self.session.drain(reply.response);
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
        let mut client = Client::builder()
            // Servers recognize git clients by this prefix.
            .user_agent(concat!(
                "git/2.0 (repofleet ",
                env!("CARGO_PKG_VERSION"),
                ")"
            ))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .dns_resolver(Arc::new(resolver))
            // One of the environment would bypass the checks of addresses.
            .no_proxy();
        if let Some(proxy) = &policy.proxy {
            let proxy = reqwest::Proxy::all(proxy.url().clone());
            client = client.proxy(proxy.map_err(Fault::infra)?);
        }
        let client = client.build().map_err(|error| {
            let why = innermost(&error);
            Fault::infra(format!(
                "cannot set up HTTPS: {why}; are CA certificates installed? SSL_CERT_FILE may name a file of them"
            ))
        })?;
        Ok(Arc::new(Self {
            runtime,
            client,
            policy: policy.clone(),
            sink,
            path: plain_path(&base).to_owned(),
            state: Mutex::new(SessionState {
                base,
                received: 0,
                received_refs: 0,
                fault: None,
                refs: Default::default(),
                token_refused: false,
                broke: false,
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

    /// Returns some of the branches that the host named; some of its other refs if it named none.
    pub(super) fn some_refs(&self) -> Vec<String> {
        let mut state = self.state();
        let [branches, others] = &mut state.refs;
        std::mem::take(if branches.is_empty() {
            others
        } else {
            branches
        })
    }

    /// Keeps the name of a ref to be shown; returns whether more are wanted.
    pub(super) fn keep_ref(&self, name: String) -> bool {
        let refs = &mut self.state().refs;
        let kind = &mut refs[usize::from(!name.starts_with("refs/heads/"))];
        if kind.len() < KEPT_REFS && !kind.contains(&name) {
            kind.push(name);
        }
        refs[0].len() < KEPT_REFS
    }

    /// Returns the bytes received so far.
    pub(super) fn received(&self) -> u64 {
        self.state().received
    }

    /// Returns the repository's URL if redirects led to another path.
    pub(super) fn renamed_to(&self) -> Option<String> {
        let state = self.state();
        let renamed = !plain_path(&state.base).eq_ignore_ascii_case(&self.path);
        renamed.then(|| state.base.to_string())
    }

    /// Whether the last request made the server fail on its own account: not one that is overloaded or away,
    /// which another request would not help.
    pub(super) fn broke_server(&self) -> bool {
        self.state().broke
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
        self.note(fault);
        io::Error::other(text)
    }

    /// Keeps the first fault.
    pub(super) fn note(&self, fault: Fault) {
        self.state().fault.get_or_insert(fault);
    }

    fn url(&self, path: &str) -> Result<Url, Fault> {
        let state = self.state();
        let base = state.base.as_str().trim_end_matches('/');
        Url::parse(&format!("{base}/{path}")).map_err(Fault::refused)
    }

    /// Requests the capabilities of protocol v2. A server that does not speak it answers as in v0.
    pub(super) fn capabilities(self: &Arc<Self>) -> Result<ResponseBody, Fault> {
        let reply = self.get(Protocol::V2)?;
        Ok(self.body(reply, Service::UploadPackLs))
    }

    /// Requests the refs by a command of protocol v2.
    pub(super) fn refs(self: &Arc<Self>, command: Vec<u8>) -> Result<ResponseBody, Fault> {
        let reply = self.post(Protocol::V2, command)?;
        Ok(self.body(reply, Service::UploadPackLs))
    }

    /// Sends any other command of protocol v2.
    pub(super) fn command(self: &Arc<Self>, command: Vec<u8>) -> Result<ResponseBody, Fault> {
        let reply = self.post(Protocol::V2, command)?;
        Ok(self.body(reply, Service::UploadPack))
    }

    fn body(self: &Arc<Self>, reply: Reply, service: Service) -> ResponseBody {
        ResponseBody {
            session: Arc::clone(self),
            service,
            reply: Some(reply),
        }
    }

    /// Requests the ref advertisement.
    fn get(&self, protocol: Protocol) -> Result<Reply, Fault> {
        for _ in 0..=MAX_REDIRECTS {
            let mut url = self.url("info/refs")?;
            url.set_query(Some("service=git-upload-pack"));
            let request = self
                .client
                .request(Method::GET, url.clone())
                .header(ACCEPT, "application/x-git-upload-pack-advertisement")
                .header("pragma", "no-cache");
            let reply = self.send(protocol.named_in(request), &url, Asked::Refs)?;
            if reply.response.status().is_redirection() {
                self.redirect(&url, reply.response.headers())?;
                self.drain(reply.response);
                continue;
            }
            return self.expect(reply, "application/x-git-upload-pack-advertisement");
        }
        Err(Fault::gone(format!("more than {MAX_REDIRECTS} redirects")))
    }

    fn post(&self, protocol: Protocol, body: Vec<u8>) -> Result<Reply, Fault> {
        let url = self.url("git-upload-pack")?;
        let request = self
            .client
            .request(Method::POST, url.clone())
            .header(CONTENT_TYPE, "application/x-git-upload-pack-request")
            .header(ACCEPT, "application/x-git-upload-pack-result")
            .body(body);
        let reply = self.send(protocol.named_in(request), &url, Asked::Pack)?;
        if reply.response.status().is_redirection() {
            return Err(Fault::refused("a redirect of a POST is not followed"));
        }
        self.expect(reply, "application/x-git-upload-pack-result")
    }

    /// Sends a request with the token if it belongs to the host, and again without if that is refused.
    fn send(&self, request: RequestBuilder, url: &Url, asked: Asked) -> Result<Reply, Fault> {
        let token = self
            .policy
            .token_for(url)
            .filter(|_| !self.state().token_refused);
        let anonymous = |response| Reply {
            response,
            asked,
            anonymous: Some(authority(url)),
        };
        let (Some(token), Some(with_token)) = (token, request.try_clone()) else {
            return Ok(anonymous(self.exchange(request)?));
        };
        let with_token = with_token.basic_auth(token.user(), Some(token.secret.as_str()));
        let response = self.exchange(with_token)?;
        if let Some(rest) = answer::used_up(response.headers(), OffsetDateTime::now_utc()) {
            self.sink.token_used_up(rest);
        }
        let Some(why) = TokenRefusal::of(response.status(), response.headers()) else {
            return Ok(Reply {
                response,
                asked,
                anonymous: None,
            });
        };
        self.state().token_refused = true;
        self.sink.token_refused(why);
        self.drain(response);
        Ok(anonymous(self.exchange(request)?))
    }

    /// Waits without a time limit: the parent ends a slot that makes no progress.
    fn exchange(&self, request: RequestBuilder) -> Result<Response, Fault> {
        let response = self.runtime.block_on(request.send());
        let response = response.map_err(transport_fault)?;
        self.state().broke = response.status() == StatusCode::INTERNAL_SERVER_ERROR;
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

    /// Passes on a successful response of the expected type, and classifies all others.
    fn expect(&self, mut reply: Reply, expected: &str) -> Result<Reply, Fault> {
        let status = reply.response.status();
        let content_type = reply.response.headers().get(CONTENT_TYPE);
        let seen = content_type.and_then(|value| value.to_str().ok());
        let seen = seen.map(str::to_owned);
        let essence = seen.as_deref().and_then(|seen| seen.split(';').next());
        if status.is_success() && essence.is_some_and(|essence| essence.trim() == expected) {
            return Ok(reply);
        }
        // The host's words, as far as this is not git's.
        let body = self.beginning(&mut reply.response, answer::WORDS_READ);
        let body = self.without_token(&body);
        Err(match status.is_success() {
            true => answer::not_git(seen.as_deref(), &body),
            false => answer::refusal(status, &body, reply.context()),
        })
    }

    /// Reads up to `limit` bytes of a response's body; what of it comes soon.
    fn beginning(&self, response: &mut Response, limit: usize) -> Vec<u8> {
        let mut body = Vec::new();
        let reading = async {
            while body.len() < limit {
                match response.chunk().await {
                    Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                    _ => break,
                }
            }
        };
        self.runtime
            .block_on(async { tokio::time::timeout(DRAIN_TIME, reading).await })
            .ok();
        body.truncate(limit);
        body
    }

    /// Classifies what the host says in an answer to git instead of going on.
    fn said(&self, words: &[u8], reply: &Reply) -> Fault {
        answer::said(&self.without_token(words), reply.context())
    }

    /// Removes the token from a host's words: a host may repeat what it was sent.
    fn without_token(&self, words: &[u8]) -> Vec<u8> {
        match self.policy.tokens.first() {
            Some(token) => String::from_utf8_lossy(words)
                .replace(token.secret.as_str(), "…")
                .into_bytes(),
            None => words.to_vec(),
        }
    }

    /// Reads a short rest of a response. If that fails the next request makes a new connection.
    fn drain(&self, mut response: Response) {
        self.beginning(&mut response, DRAINED);
    }

    /// Reads and counts the next piece of a response's body; empty at its end.
    fn chunk(&self, service: Service, response: &mut Response) -> Result<Bytes, Fault> {
        let chunk = self
            .runtime
            .block_on(response.chunk())
            .map_err(transport_fault)?
            .unwrap_or_default();
        let (received, received_refs) = {
            let mut state = self.state();
            state.received += chunk.len() as u64;
            if service == Service::UploadPackLs {
                state.received_refs += chunk.len() as u64;
            }
            (state.received, state.received_refs)
        };
        if received > self.policy.max_bytes {
            return Err(Fault::too_large(format!(
                "more than {} bytes to download (--max-fetch-bytes)",
                self.policy.max_bytes
            )));
        }
        if received_refs > MAX_ADVERTISEMENT {
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
                packets: None,
                gauge: PackGauge::new(PackLimits::unfiltered()),
                chunk: Bytes::new(),
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

/// A response, and what is known of its request.
struct Reply {
    response: Response,
    asked: Asked,
    /// The host, if the request was sent without a token.
    anonymous: Option<String>,
}

impl Reply {
    fn context(&self) -> Context<'_> {
        Context {
            asked: self.asked,
            anonymous: self.anonymous.as_deref(),
            headers: self.response.headers(),
            now: OffsetDateTime::now_utc(),
        }
    }
}

/// One request and its response.
struct Exchange {
    session: Arc<HttpSession>,
    service: Service,
    request: Vec<u8>,
    packets: Option<Packets<ResponseBody>>,
    gauge: PackGauge,
    /// What libgit2 has not read yet of the last packet.
    chunk: Bytes,
}

impl Exchange {
    fn next(&mut self) -> Result<(), Fault> {
        let packets = match &mut self.packets {
            Some(packets) => packets,
            none => {
                let reply = match self.service {
                    Service::UploadPackLs => self.session.get(Protocol::V0)?,
                    _ => {
                        let request = std::mem::take(&mut self.request);
                        self.session.post(Protocol::V0, request)?
                    }
                };
                none.insert(Packets::of(self.session.body(reply, self.service)))
            }
        };
        // libgit2 passes on neither the host's last word, nor why it cannot read a repository.
        self.chunk = match packets.next().map_err(Failure::into_fault)? {
            None => Bytes::new(),
            Some(Packet::Flush) => Bytes::from_static(b"0000"),
            Some(Packet::Delimiter) => Bytes::from_static(b"0001"),
            Some(Packet::Data(data)) => {
                match (self.service, data.split_first()) {
                    (Service::UploadPackLs, _) => {
                        if let Some(name) = answer::advertised(&data) {
                            self.session.keep_ref(name);
                        }
                        answer::unreadable(&data).map_or(Ok(()), Err)?;
                    }
                    (_, Some((1, pack))) => self.gauge.push(pack)?,
                    _ => {}
                }
                [format!("{:04x}", data.len() + 4).as_bytes(), &data]
                    .concat()
                    .into()
            }
        };
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

/// Refuses hosts with an address that is not public, unless the operator named them.
struct PublicOnly {
    policy: FetchPolicy,
}

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_ascii_lowercase();
        // Whatever the port: the URL's authority was checked before.
        let named = self.policy.hosts.iter().any(|allowed| allowed.host == host)
            // A proxy, whose own name this is, resolves those of hosts.
            || self.policy.proxy.is_some();
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

/// Returns a repository's path without what does not distinguish repositories.
fn plain_path(url: &Url) -> &str {
    let path = url.path().trim_end_matches('/');
    path.strip_suffix(".git").unwrap_or(path)
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

/// Classifies a failed exchange. The connector wraps a fault of the resolver, which is passed on; of
/// other errors the last cause is the message, since reqwest's own only says what it was doing.
fn transport_fault(error: reqwest::Error) -> Fault {
    let fault = Fault::transient(innermost(&error)).because(error);
    fault.cause::<Fault>().cloned().unwrap_or(fault)
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;

    use super::*;
    use crate::fetch::policy::FetchMode;

    #[tokio::test]
    async fn a_host_that_resolves_to_this_machine_is_refused_unless_it_was_named() {
        let resolve = async |hosts: &[&str]| {
            let policy = FetchPolicy {
                hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
                http: false,
                local: false,
                max_bytes: 0,
                tokens: Vec::new(),
                proxy: None,
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
}
