//! A real git server over HTTP, with faults on demand.
//!
//! Responses come from `git http-backend`. This server adds faults ([`Fault`]) and statistics
//! ([`RepoStats`]).

use std::collections::{BTreeMap, HashMap};
use std::future;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt, TryStreamExt};
use hyper::body::Bytes;
use rustix::process::{Pid, Signal, kill_process_group};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::http_server::{Body, Request, Response, Server, Watched, any_port, locked};
use common::ids::RepoRef;

/// The object that made-up advertisements point to. No repository has it.
const NO_SUCH_OBJECT: &str = "1111111111111111111111111111111111111111";
/// Bytes of a pack that are read and sent at a time.
const PIECE: usize = 64 * 1024;

/// Serves the bare repositories `ROOT/{owner}/{name}.git` as `/{owner}/{name}`, with or without
/// `.git`, read-only, on a free port of 127.0.0.1 until it is dropped.
///
/// It runs in a thread with its own runtime, for synchronous and asynchronous tests alike.
/// Repositories may come and go while it runs. Dropping it kills its `git` processes too.
#[derive(Debug)]
pub struct GitServer {
    server: Server,
    shared: Arc<Shared>,
}

impl GitServer {
    /// Serves the repositories under `root`.
    ///
    /// # Panics
    /// If git is missing or no port is free.
    pub fn start(root: impl AsRef<Path>) -> Self {
        Self::start_at(root, any_port()).expect("git with http-backend, and a port on 127.0.0.1")
    }

    /// Serves the repositories under `root` on `address`.
    ///
    /// # Errors
    /// If git's http-backend is missing, or `address` is taken or not a loopback address.
    pub fn start_at(root: impl AsRef<Path>, address: SocketAddr) -> io::Result<Self> {
        let tasks = TaskTracker::new();
        let shared = Arc::new(Shared {
            root: std::path::absolute(root)?,
            backend: http_backend()?,
            faults: Mutex::default(),
            dialect: Mutex::default(),
            held: watch::Sender::new(false),
            stats: Watched::new("requests", BTreeMap::new()),
            tasks: tasks.clone(),
        });
        let server = {
            let shared = Arc::clone(&shared);
            Server::start(address, tasks, move |request| {
                Box::pin(answer(Arc::clone(&shared), request))
            })?
        };
        Ok(Self { server, shared })
    }

    /// Returns `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Returns `127.0.0.1:PORT`.
    pub fn authority(&self) -> String {
        self.server.address().to_string()
    }

    /// Returns `http://127.0.0.1:PORT/{owner}/{name}`.
    pub fn repo_url(&self, owner: &str, name: &str) -> String {
        format!("{}/{owner}/{name}", self.url())
    }

    /// Applies `fault` to requests for `repo` (`owner/name`, which need not exist) from now on.
    ///
    /// A repository may have several. Each request meets them in the order in which they were added,
    /// those for all repositories first, up to the first that is a response. Later ones are neither
    /// applied nor used up: "500 twice, then a cut pack" is two calls.
    ///
    /// # Panics
    /// If `repo` is not `owner/name`.
    pub fn fault(&self, repo: &str, fault: impl Into<Rule>) {
        let mut faults = locked(&self.shared.faults);
        faults
            .repos
            .entry(parse(repo))
            .or_default()
            .push(fault.into());
    }

    /// Applies `fault` to requests for any repository from now on. [`times`](Fault::times) counts
    /// all of them.
    pub fn fault_all(&self, fault: impl Into<Rule>) {
        locked(&self.shared.faults).all.push(fault.into());
    }

    /// Removes all faults, except from responses under way. The general latency stays.
    pub fn clear_faults(&self) {
        let mut faults = locked(&self.shared.faults);
        faults.all.clear();
        faults.repos.clear();
    }

    /// Delays every response from now on, like a distant server.
    pub fn set_latency(&self, latency: Duration) {
        locked(&self.shared.faults).latency = latency;
    }

    /// Holds all new requests until this is set to `false`.
    pub fn set_held(&self, held: bool) {
        self.shared.held.send_replace(held);
    }

    /// Speaks the protocol in another way from now on.
    pub fn set_dialect(&self, dialect: Dialect) {
        *locked(&self.shared.dialect) = dialect;
    }

    /// Spreads the general latency over repositories from now on: log-normal with this `sigma` around
    /// the mean, always the same for a name. At 1, half of them take up to 0.6 of the mean and one in
    /// a hundred more than six times as long, like real repositories; at 0 all are equal.
    pub fn set_latency_spread(&self, sigma: f64) {
        locked(&self.shared.faults).latency_spread = sigma;
    }

    /// Returns the statistics so far, by `owner/name`.
    pub fn stats(&self) -> BTreeMap<String, RepoStats> {
        self.shared.stats.get()
    }

    /// Returns the statistics of `repo` so far.
    pub fn repo_stats(&self, repo: &str) -> RepoStats {
        let stats = self.shared.stats.read(|all| all.get(repo).cloned());
        stats.unwrap_or_default()
    }

    /// Returns the number of packs of `repo` sent whole.
    pub fn fetches(&self, repo: &str) -> u64 {
        self.repo_stats(repo).packs
    }

    /// Returns the number of packs sent whole.
    pub fn total_fetches(&self) -> u64 {
        self.shared
            .stats
            .read(|all| all.values().map(|repo| repo.packs).sum())
    }

    /// Returns when fetches began, of whatever repository.
    pub fn asked_at(&self) -> Vec<Instant> {
        let stats = self.stats().into_values();
        let mut all: Vec<_> = stats.flat_map(|stats| stats.asked_at).collect();
        all.sort();
        all
    }

    /// Asserts that no more than `rate` fetches a second have begun, and `burst` more, at any time.
    ///
    /// # Panics
    /// If there were more.
    pub fn assert_rate(&self, rate: f64, burst: usize) {
        let begun = self.asked_at();
        for (first, start) in begun.iter().enumerate() {
            for (last, end) in begun.iter().enumerate().skip(first) {
                let (count, seconds) = (last + 1 - first, (*end - *start).as_secs_f64());
                let most = rate * seconds + burst as f64;
                assert!(
                    count as f64 <= most,
                    "{count} fetches in {seconds} s of {}",
                    begun.len()
                );
            }
        }
    }

    /// Returns the highest number of concurrent requests, hanging ones included.
    pub fn max_concurrent(&self) -> usize {
        self.server.max_concurrent()
    }

    /// Returns the number of connections made.
    pub fn connections(&self) -> u64 {
        self.server.connections()
    }

    /// Blocks the thread until there were `count` requests for `repo`. In an asynchronous test they must
    /// come from another thread or process.
    ///
    /// # Panics
    /// If they have not come within a minute.
    pub fn wait_for_requests(&self, repo: &str, count: u64) {
        let requests = |all: &BTreeMap<String, RepoStats>| {
            all.get(repo)
                .map_or(0, |stats| stats.info_refs + stats.upload_packs)
        };
        self.shared
            .stats
            .wait(&format!("{count} requests for {repo}"), |all| {
                requests(all) >= count
            });
    }
}

/// Statistics of one repository.
#[derive(Clone, Debug, Default)]
pub struct RepoStats {
    /// Requests for the advertisement, `GET info/refs`.
    pub info_refs: u64,
    /// Requests to `POST git-upload-pack`. A shallow fetch is two of them in protocol v0 (the
    /// second has the pack) and in v2 as well (the first has the refs).
    pub upload_packs: u64,
    /// Packs sent whole, corrupted ones included.
    pub packs: u64,
    /// Bytes of response bodies sent.
    pub bytes_sent: u64,
    /// When each request came that met a fault.
    pub faulted_at: Vec<Instant>,
    /// The `Authorization` of each request that had one.
    pub authorizations: Vec<String>,
    /// The `User-Agent` of each request that had one.
    pub user_agents: Vec<String>,
    /// When each request for the advertisement came. A fetch begins with one.
    pub asked_at: Vec<Instant>,
}

/// How a server differs from GitHub, which speaks protocol v2, and allows filters and any object.
#[derive(Clone, Debug, Default)]
pub struct Dialect {
    /// Whether it does not hear which version of the protocol a client asks for.
    pub only_v0: bool,
    /// git's configuration, such as `("uploadpack.allowFilter", "false")`.
    pub config: Vec<(&'static str, &'static str)>,
    /// The filter that it uses in place of `blob:limit`; empty for none.
    pub filter: Option<&'static str>,
    /// What it says in place of a blob's size.
    pub sizes: Option<&'static str>,
    /// Whether it refuses blobs that a client asks for by name.
    pub refuses_blobs: bool,
}

impl Dialect {
    /// Returns the body of a request as git is to see it.
    fn heard(&self, body: &Bytes) -> Bytes {
        let Some(other) = self.filter else {
            return body.clone();
        };
        let text = String::from_utf8_lossy(body);
        let Some(at) = text.find("filter blob:limit") else {
            return body.clone();
        };
        let end = at + text[at..].find('\n').map_or(0, |end| end + 1);
        let filter = match other {
            "" => String::new(),
            other => line(&format!("filter {other}\n")),
        };
        Bytes::from([&text[..at - 4], &filter, &text[end..]].concat())
    }

    /// Returns what it says in place of git.
    fn says(&self, body: &Bytes) -> Option<Response> {
        let text = String::from_utf8_lossy(body);
        let packets = if let Some(size) = self.sizes
            && text.contains("command=object-info")
        {
            let names = text.split("oid ").skip(1).map(|rest| &rest[..40]);
            let sizes = names.map(|name| line(&format!("{name} {size}")));
            line("size") + &sizes.collect::<String>() + "0000"
        } else if self.refuses_blobs && text.contains("want ") && !text.contains("deepen ") {
            line("ERR upload-pack: not our ref")
        } else {
            return None;
        };
        let response = Response::new(200, packets);
        Some(response.header("content-type", "application/x-git-upload-pack-result"))
    }
}

/// The two kinds of a fetch's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `GET info/refs`: the advertisement.
    InfoRefs,
    /// `POST git-upload-pack`: negotiation and pack.
    UploadPack,
}

/// Where in an answer a host says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a packet that begins with `ERR`.
    Err,
    /// In side band 3, where a pack would be.
    SideBand3,
}

/// GitHub's words for its limit on anonymous downloads.
pub const GITHUB_LIMIT: &str = "GitHub is temporarily limiting some unauthenticated downloads to \
                                protect the stability of the platform. Please retry later or \
                                authenticate.";

/// A fault on the server's side. (The client's view of it is a
/// [`common::fault::Fault`].)
///
/// Applies to every request for ever, unless limited by [`Fault::on`] and [`Fault::times`].
#[derive(Clone, Debug)]
pub enum Fault {
    /// A response with this status.
    Status {
        /// 404, 429, 500 …
        code: u16,
        /// Such as `("retry-after", "7")`.
        headers: Vec<(String, String)>,
        /// Plain text.
        body: String,
    },
    /// A redirect.
    Redirect {
        /// 301, 302, 307 …
        code: u16,
        /// `Location`, as it is.
        location: String,
    },
    /// The repository has another address: 301 to `to`, with the request's `info/refs?…` or
    /// `git-upload-pack` behind it, as GitHub does after a rename.
    Moved {
        /// The repository's new URL, e.g. [`GitServer::repo_url`].
        to: String,
    },
    /// The request is read and never answered.
    Hang,
    /// The connection is reset (RST).
    Reset,
    /// The response is this late.
    Latency(Duration),
    /// The response's body comes this slowly.
    Drip {
        /// 1 is a slow loris.
        bytes_per_second: u64,
    },
    /// The connection is closed after so much of the body, or right before its end.
    Truncate {
        /// Bytes of the body that are sent.
        after_bytes: u64,
    },
    /// Nothing more comes after so much of the body.
    Stall {
        /// Bytes of the body that are sent.
        after_bytes: u64,
    },
    /// All bits of one byte of the pack are flipped; git's framing stays intact. A shorter pack arrives
    /// unchanged.
    Corrupt {
        /// Offset in the pack. The first 12 bytes are its header, the last 20 its checksum.
        at: u64,
    },
    /// A web page with status 200.
    WrongContentType,
    /// A well-formed, made-up advertisement of so many bytes. For `GET info/refs` only.
    HugeAdvertisement {
        /// Approximate size.
        bytes: u64,
    },
    /// Endless well-formed lines: refs as advertisement; shallow commits, or progress in protocol v2, as
    /// pack.
    Flood,
    /// These words inside a well-formed answer, and nothing else.
    Says {
        /// Where in the answer.
        place: Place,
        /// The words.
        words: String,
        /// Such as `("retry-after", "7")`.
        headers: Vec<(String, String)>,
    },
    /// Answers requests that carry a token with this status.
    RefuseToken {
        /// 401, 403.
        code: u16,
        /// Such as `("x-github-sso", "required")`.
        headers: Vec<(String, String)>,
    },
    /// Adds these headers to the response, such as `("x-ratelimit-remaining", "0")`.
    Headers(Vec<(String, String)>),
    /// A private repository: 401 without this token as basic authentication of the user
    /// `x-access-token`.
    RequireToken(String),
}

impl Fault {
    /// Returns a response with this status and no body.
    pub fn status(code: u16) -> Self {
        Self::Status {
            code,
            headers: Vec::new(),
            body: format!("{code} on purpose\n"),
        }
    }

    /// Returns a response with this status and a Retry-After.
    pub fn retry_after(code: u16, seconds: u64) -> Self {
        Self::Status {
            code,
            headers: vec![("retry-after".to_owned(), seconds.to_string())],
            body: "slow down\n".to_owned(),
        }
    }

    /// Returns GitHub's limit on anonymous downloads as a status: 401 in place of a pack, with a
    /// Retry-After if that is given.
    pub fn github_limit(retry_after: Option<u64>) -> Rule {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut headers = vec![
            header("x-github-edge-message", GITHUB_LIMIT),
            header("www-authenticate", "Basic realm=\"GitHub\""),
        ];
        headers.extend(retry_after.map(|seconds| header("retry-after", &seconds.to_string())));
        let (code, body) = (401, String::new());
        Self::Status {
            code,
            headers,
            body,
        }
        .on(Kind::UploadPack)
    }

    /// Returns the same limit in band: words in place of a pack.
    pub fn github_limit_in_band(retry_after: Option<u64>) -> Rule {
        let header = |seconds: u64| ("retry-after".to_owned(), seconds.to_string());
        Self::Says {
            place: Place::Err,
            words: GITHUB_LIMIT.to_owned(),
            headers: retry_after.map(header).into_iter().collect(),
        }
        .on(Kind::UploadPack)
    }

    /// Returns a response with this status and body.
    pub fn with_body(code: u16, body: &str) -> Self {
        Self::Status {
            code,
            headers: Vec::new(),
            body: body.to_owned(),
        }
    }

    /// Returns these words in place of an answer.
    pub fn says(place: Place, words: &str) -> Self {
        Self::Says {
            place,
            words: words.to_owned(),
            headers: Vec::new(),
        }
    }

    /// Limits it to one kind of request.
    pub fn on(self, kind: Kind) -> Rule {
        Rule::from(self).on(kind)
    }

    /// Limits it to the first `count` times.
    pub fn times(self, count: u64) -> Rule {
        Rule::from(self).times(count)
    }

    /// Whether it replaces git's response instead of damaging it.
    fn is_answer(&self) -> bool {
        !matches!(
            self,
            Self::Latency(_)
                | Self::Drip { .. }
                | Self::Truncate { .. }
                | Self::Stall { .. }
                | Self::Corrupt { .. }
                | Self::Headers(_)
        )
    }

    fn befalls(&self, kind: Kind, request: &Request) -> bool {
        match self {
            Self::HugeAdvertisement { .. } => kind == Kind::InfoRefs,
            Self::Says {
                place: Place::SideBand3,
                ..
            } => kind == Kind::UploadPack && asks_for_pack(request),
            Self::RefuseToken { .. } => request.header("authorization").is_some(),
            Self::RequireToken(token) => {
                request.header("authorization") != Some(&authorization(token))
            }
            _ => true,
        }
    }
}

/// Returns the `Authorization` of requests with this token.
pub fn authorization(token: &str) -> String {
    format!("Basic {}", base64(&format!("x-access-token:{token}")))
}

/// A [`Fault`] and the requests that it applies to.
#[derive(Clone, Debug)]
pub struct Rule {
    fault: Fault,
    kind: Option<Kind>,
    body: &'static str,
    left: Option<u64>,
    lasts: Option<Duration>,
    since: Option<Instant>,
}

impl From<Fault> for Rule {
    fn from(fault: Fault) -> Self {
        Self {
            fault,
            kind: None,
            body: "",
            left: None,
            lasts: None,
            since: None,
        }
    }
}

impl Rule {
    /// Limits it to one kind of request.
    pub fn on(mut self, kind: Kind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Limits it to requests with this in their body, such as `command=fetch`.
    pub fn asking(mut self, body: &'static str) -> Self {
        self.body = body;
        self
    }

    /// Limits it to the first `count` times.
    pub fn times(mut self, count: u64) -> Self {
        self.left = Some(count);
        self
    }

    /// Ends it so long after the first time.
    pub fn lasting(mut self, duration: Duration) -> Self {
        self.lasts = Some(duration);
        self
    }

    /// Uses up one of the remaining times, if it applies to this request.
    fn take(&mut self, kind: Kind, request: &Request) -> bool {
        let meant = self.kind.is_none_or(|only| only == kind) && self.left != Some(0);
        let asks = || String::from_utf8_lossy(&request.body).contains(self.body);
        if !meant || !self.fault.befalls(kind, request) || !asks() {
            return false;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if self.lasts.is_some_and(|lasts| since.elapsed() >= lasts) {
            return false;
        }
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        true
    }
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    backend: PathBuf,
    faults: Mutex<Faults>,
    dialect: Mutex<Dialect>,
    held: watch::Sender<bool>,
    stats: Watched<BTreeMap<String, RepoStats>>,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct Faults {
    latency: Duration,
    latency_spread: f64,
    all: Vec<Rule>,
    repos: HashMap<RepoRef, Vec<Rule>>,
}

impl Faults {
    fn take(&mut self, repo: &RepoRef, kind: Kind, request: &Request) -> Vec<Fault> {
        let mut taken = Vec::new();
        let own = self
            .repos
            .get_mut(repo)
            .map_or(&mut [][..], Vec::as_mut_slice);
        for rule in self.all.iter_mut().chain(own) {
            if rule.take(kind, request) {
                taken.push(rule.fault.clone());
                if rule.fault.is_answer() {
                    break;
                }
            }
        }
        taken
    }
}

impl Shared {
    fn update(&self, repo: &RepoRef, change: impl FnOnce(&mut RepoStats)) {
        self.stats
            .update(|all| change(all.entry(repo.to_string()).or_default()));
    }
}

async fn answer(shared: Arc<Shared>, request: Request) -> Response {
    let Some((repo, kind)) = route(&request) else {
        return Response::new(404, "only fetching, by git's smart protocol\n");
    };
    let (latency, faults) = {
        let mut faults = locked(&shared.faults);
        let latency = faults.latency.mul_f64(share(&repo, faults.latency_spread));
        (latency, faults.take(&repo, kind, &request))
    };
    shared.update(&repo, |stats| {
        match kind {
            Kind::InfoRefs => {
                stats.info_refs += 1;
                stats.asked_at.push(Instant::now());
            }
            Kind::UploadPack => stats.upload_packs += 1,
        }
        if !faults.is_empty() {
            stats.faulted_at.push(Instant::now());
        }
        let header = |name| request.header(name).map(str::to_owned);
        stats.authorizations.extend(header("authorization"));
        stats.user_agents.extend(header("user-agent"));
    });
    // Its owner is gone, and so is this server.
    shared.held.subscribe().wait_for(|held| !held).await.ok();
    let mut delay = latency;
    let mut response = None;
    for fault in &faults {
        if let Fault::Latency(more) = fault {
            delay += *more;
        }
        response = response.or_else(|| instead(fault, kind, &request));
    }
    let mut response = match response {
        Some(response) => response,
        None => backend(&shared, &repo, kind, &request)
            .await
            .unwrap_or_else(|error| Response::new(500, format!("git http-backend: {error}\n"))),
    };
    for fault in faults {
        response = match fault {
            Fault::Drip { bytes_per_second } => response.dripped(bytes_per_second),
            Fault::Truncate { after_bytes } => response.cut(after_bytes),
            Fault::Stall { after_bytes } => response.stalled(after_bytes),
            Fault::Corrupt { at } => response.map_body(|body| corrupt(body, at)),
            Fault::Headers(headers) => with_headers(response, &headers),
            _ => response,
        };
    }
    response
        .map_body(|body| count(body, shared, repo, kind))
        .after(delay)
}

/// Returns the latency of `repo` as a multiple of the mean.
fn share(repo: &RepoRef, sigma: f64) -> f64 {
    let hash = Sha256::digest(repo.to_string());
    // Strictly between 0 and 1.
    let uniform = |at: usize| {
        let bytes = [hash[at], hash[at + 1], hash[at + 2], hash[at + 3]];
        (f64::from(u32::from_be_bytes(bytes)) + 0.5) / (f64::from(u32::MAX) + 1.0)
    };
    let normal = (-2.0 * uniform(0).ln()).sqrt() * (std::f64::consts::TAU * uniform(4)).cos();
    (sigma * normal - sigma * sigma / 2.0).exp()
}

/// Returns the response that `fault` gives in place of git's, if any.
fn instead(fault: &Fault, kind: Kind, request: &Request) -> Option<Response> {
    let response = match fault {
        Fault::Status {
            code,
            headers,
            body,
        } => with_headers(Response::new(*code, body.clone()), headers),
        Fault::Redirect { code, location } => {
            Response::new(*code, "elsewhere\n").header("location", location)
        }
        Fault::Moved { to } => {
            let tail = match kind {
                Kind::InfoRefs => format!("info/refs?{}", request.query),
                Kind::UploadPack => "git-upload-pack".to_owned(),
            };
            Response::new(301, "moved\n").header("location", format!("{to}/{tail}"))
        }
        Fault::Hang => Response::hang(),
        Fault::Reset => Response::reset(),
        Fault::WrongContentType => Response::new(200, "<!DOCTYPE html><title>Sign in</title>\n")
            .header("content-type", "text/html; charset=utf-8"),
        Fault::HugeAdvertisement { bytes } => {
            let count = usize::try_from(bytes / REF_PAGE).unwrap_or(usize::MAX);
            let pieces = stream::once(future::ready(advertisement_head()))
                .chain(stream::iter(ref_pages().take(count)))
                .chain(stream::once(future::ready(Bytes::from_static(b"0000"))));
            Response::streamed(200, pieces.map(Ok).boxed()).header(
                "content-type",
                "application/x-git-upload-pack-advertisement",
            )
        }
        Fault::Flood => match kind {
            Kind::InfoRefs => {
                let pieces = stream::once(future::ready(advertisement_head()))
                    .chain(stream::iter(ref_pages()));
                Response::streamed(200, pieces.map(Ok).boxed()).header(
                    "content-type",
                    "application/x-git-upload-pack-advertisement",
                )
            }
            Kind::UploadPack if is_v2(request) => Response::endless(
                line("packfile\n"),
                line("\u{2}still counting\n").repeat(500),
            )
            .header("content-type", "application/x-git-upload-pack-result"),
            Kind::UploadPack => {
                let shallow = line(&format!("shallow {NO_SUCH_OBJECT}"));
                Response::endless("", shallow.repeat(500))
                    .header("content-type", "application/x-git-upload-pack-result")
            }
        },
        Fault::Says {
            place,
            words,
            headers,
        } => with_headers(says(*place, words, kind, is_v2(request)), headers),
        Fault::RefuseToken { code, headers } => {
            with_headers(Response::new(*code, "not with this token\n"), headers)
        }
        Fault::RequireToken(_) => Response::new(401, "no such repository, or not for you\n")
            .header("www-authenticate", "Basic realm=\"GitHub\""),
        Fault::Latency(_)
        | Fault::Drip { .. }
        | Fault::Truncate { .. }
        | Fault::Stall { .. }
        | Fault::Corrupt { .. }
        | Fault::Headers(_) => return None,
    };
    Some(response)
}

fn with_headers(response: Response, headers: &[(String, String)]) -> Response {
    let headers = headers.iter();
    headers.fold(response, |response, (name, value)| {
        response.header(name, value)
    })
}

/// Returns a well-formed answer that consists of `words`.
fn says(place: Place, words: &str, kind: Kind, is_v2: bool) -> Response {
    let packet = match place {
        Place::Err => line(&format!("ERR {words}\n")),
        Place::SideBand3 => {
            let before = match is_v2 {
                true => line("packfile\n"),
                // Over HTTP the server repeats the shallow boundary before the NAK.
                false => format!(
                    "{}0000{}",
                    line(&format!("shallow {}", "1".repeat(40))),
                    line("NAK\n")
                ),
            };
            format!("{before}{}0000", line(&format!("\u{3}{words}\n")))
        }
    };
    match kind {
        Kind::InfoRefs => Response::new(
            200,
            format!("{}0000{packet}", line("# service=git-upload-pack\n")),
        )
        .header(
            "content-type",
            "application/x-git-upload-pack-advertisement",
        ),
        Kind::UploadPack => Response::new(200, packet)
            .header("content-type", "application/x-git-upload-pack-result"),
    }
}

/// `/{owner}/{name}[.git]/info/refs?service=git-upload-pack` or `…/git-upload-pack`.
fn route(request: &Request) -> Option<(RepoRef, Kind)> {
    let (repo, kind) = match request.method.as_str() {
        "GET" if request.query == "service=git-upload-pack" => {
            (request.path.strip_suffix("/info/refs")?, Kind::InfoRefs)
        }
        "POST" => (
            request.path.strip_suffix("/git-upload-pack")?,
            Kind::UploadPack,
        ),
        _ => return None,
    };
    let repo = repo.strip_prefix('/')?;
    let repo = repo.strip_suffix(".git").unwrap_or(repo);
    Some((repo.parse().ok()?, kind))
}

/// Returns git's response.
async fn backend(
    shared: &Arc<Shared>,
    repo: &RepoRef,
    kind: Kind,
    request: &Request,
) -> io::Result<Response> {
    if !shared.root.join(format!("{repo}.git")).is_dir() {
        return Ok(Response::new(404, "no such repository\n"));
    }
    let dialect = locked(&shared.dialect).clone();
    if let Some(response) = dialect.says(&request.body) {
        return Ok(response);
    }
    let body = dialect.heard(&request.body);
    let mut command = backend_command(shared, repo, kind, request, &dialect);
    command.env("CONTENT_LENGTH", body.len().to_string());
    let child = command.spawn()?;
    let mut process = Process {
        child: Some(child),
        tasks: shared.tasks.clone(),
    };
    let Some((mut stdin, stdout)) = process
        .child
        .as_mut()
        .and_then(|child| child.stdin.take().zip(child.stdout.take()))
    else {
        return Err(io::Error::other("started without pipes"));
    };
    shared.tasks.spawn(async move {
        // If git ends before it has read everything, its response says why.
        let _ = stdin.write_all(&body).await;
    });
    let mut stdout = BufReader::with_capacity(PIECE, stdout);
    let (status, headers) = cgi_head(&mut stdout).await?;
    let body = stream::try_unfold((stdout, process), |(mut stdout, process)| async {
        let mut piece = Vec::with_capacity(PIECE);
        if stdout.read_buf(&mut piece).await? == 0 {
            process.ended().await;
            return Ok(None);
        }
        Ok(Some((Bytes::from(piece), (stdout, process))))
    });
    let response = Response::streamed(status, body.boxed());
    Ok(headers
        .into_iter()
        .fold(response, |response, (k, v)| response.header(k, v)))
}

/// Returns an http-backend for `request`, in a process group of its own.
fn backend_command(
    shared: &Shared,
    repo: &RepoRef,
    kind: Kind,
    request: &Request,
    dialect: &Dialect,
) -> Command {
    let mut command = Command::new(&shared.backend);
    command.env_clear();
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    let github = [
        ("safe.directory", "*"),
        ("uploadpack.allowFilter", "true"),
        ("uploadpack.allowAnySHA1InWant", "true"),
    ];
    // The last value of a key counts.
    let config = github.iter().chain(&dialect.config);
    command.env("GIT_CONFIG_COUNT", config.clone().count().to_string());
    for (index, (key, value)) in config.enumerate() {
        command.env(format!("GIT_CONFIG_KEY_{index}"), key);
        command.env(format!("GIT_CONFIG_VALUE_{index}"), value);
    }
    let tail = match kind {
        Kind::InfoRefs => "info/refs",
        Kind::UploadPack => "git-upload-pack",
    };
    command
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_PROJECT_ROOT", &shared.root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REQUEST_METHOD", &request.method)
        .env("PATH_INFO", format!("/{repo}.git/{tail}"))
        .env("QUERY_STRING", &request.query)
        .env("REMOTE_ADDR", "127.0.0.1");
    for (variable, header) in [
        ("CONTENT_TYPE", "content-type"),
        ("HTTP_CONTENT_ENCODING", "content-encoding"),
        ("GIT_PROTOCOL", "git-protocol"),
    ] {
        if dialect.only_v0 && variable == "GIT_PROTOCOL" {
            continue;
        }
        if let Some(value) = request.header(header) {
            command.env(variable, value);
        }
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Its children can then be killed with it.
        .process_group(0);
    command
}

/// Reads a CGI response's headers: the status (200 by default) and the others.
async fn cgi_head(stdout: &mut BufReader<ChildStdout>) -> io::Result<(u16, Vec<(String, String)>)> {
    let mut status = 200;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if stdout.read_line(&mut line).await? == 0 {
            return Err(io::Error::other("ended before its headers did"));
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok((status, headers));
        }
        let (name, value) = line
            .split_once(": ")
            .ok_or_else(|| io::Error::other(format!("no header: {line:?}")))?;
        if name.eq_ignore_ascii_case("status") {
            let code = value.split(' ').next().unwrap_or_default();
            status = code.parse().map_err(io::Error::other)?;
        } else {
            headers.push((name.to_owned(), value.to_owned()));
        }
    }
}

/// An http-backend with its children. They are killed on drop, and reaped before the server ends.
struct Process {
    child: Option<Child>,
    tasks: TaskTracker,
}

impl Process {
    /// Waits for a process that has closed its output.
    async fn ended(mut self) {
        if let Some(child) = &mut self.child
            && child.wait().await.is_ok()
        {
            self.child = None;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        // A child with an id is not yet reaped: the id is still its own.
        let group = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        if let Some(group) = group {
            // Fails if it is gone already.
            let _ = kill_process_group(group, Signal::KILL);
        }
        self.tasks.spawn(async move { child.wait().await });
    }
}

/// Passes a response on and counts it.
fn count(body: Body, shared: Arc<Shared>, repo: RepoRef, kind: Kind) -> Body {
    let start = (body, PackScan::default());
    stream::try_unfold(start, move |(mut body, mut scan)| {
        let (shared, repo) = (Arc::clone(&shared), repo.clone());
        async move {
            let Some(piece) = body.try_next().await? else {
                if kind == Kind::UploadPack && scan.is_whole() {
                    shared.update(&repo, |stats| stats.packs += 1);
                }
                return Ok(None);
            };
            if kind == Kind::UploadPack {
                scan.pack_ranges(&piece);
            }
            shared.update(&repo, |stats| stats.bytes_sent += piece.len() as u64);
            Ok(Some((piece, (body, scan))))
        }
    })
    .boxed()
}

/// Flips the byte at offset `at` of the pack.
fn corrupt(body: Body, at: u64) -> Body {
    let mut scan = PackScan::default();
    body.map_ok(move |piece| {
        let ranges = scan.pack_ranges(&piece);
        let mut piece = Vec::from(piece);
        for (offset, range) in ranges {
            let inside = at
                .checked_sub(offset)
                .and_then(|inside| usize::try_from(inside).ok());
            if let Some(byte) = inside.and_then(|inside| piece[range].get_mut(inside)) {
                *byte = !*byte;
            }
        }
        Bytes::from(piece)
    })
    .boxed()
}

/// Follows git's framing (`pkt-line` with side bands, which every client requests) to find the pack in
/// a response.
#[derive(Default)]
struct PackScan {
    /// The digits of a line's length so far.
    digits: Vec<u8>,
    /// Bytes of the line still to come.
    left: usize,
    part: Part,
    pack_bytes: u64,
    /// Whether a flush has come since.
    flushed: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Part {
    /// A line's length.
    #[default]
    Length,
    /// A line's first byte: the band, or a letter.
    First,
    /// The rest of a line of the pack.
    Pack,
    /// The rest of any other line.
    Other,
}

impl PackScan {
    /// Scans the next piece of a response. Returns its ranges that are pack, with their offsets in the
    /// pack.
    fn pack_ranges(&mut self, piece: &[u8]) -> Vec<(u64, Range<usize>)> {
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < piece.len() {
            match self.part {
                Part::Length => {
                    self.digits.push(piece[at]);
                    at += 1;
                    self.length();
                }
                Part::First => {
                    self.part = match piece[at] {
                        1 => Part::Pack,
                        _ => Part::Other,
                    };
                    at += 1;
                    self.advance(1);
                }
                Part::Pack | Part::Other => {
                    let length = self.left.min(piece.len() - at);
                    if self.part == Part::Pack {
                        ranges.push((self.pack_bytes, at..at + length));
                        self.pack_bytes += length as u64;
                        self.flushed = false;
                    }
                    at += length;
                    self.advance(length);
                }
            }
        }
        ranges
    }

    /// Whether a pack has come whole.
    fn is_whole(&self) -> bool {
        self.pack_bytes > 0 && self.flushed
    }

    fn length(&mut self) {
        if self.digits.len() < 4 {
            return;
        }
        let digits = std::str::from_utf8(&self.digits).unwrap_or_default();
        let length = usize::from_str_radix(digits, 16).unwrap_or_default();
        self.digits.clear();
        // Below 4 there is no line: flush, delimiter or end of response.
        self.flushed |= length == 0;
        if length > 4 {
            (self.part, self.left) = (Part::First, length - 4);
        }
    }

    fn advance(&mut self, length: usize) {
        self.left -= length;
        if self.left == 0 {
            self.part = Part::Length;
        }
    }
}

/// Returns the start of a made-up advertisement in protocol v0.
fn advertisement_head() -> Bytes {
    let service = line("# service=git-upload-pack\n");
    let head = line(&format!(
        "{NO_SUCH_OBJECT} HEAD\0multi_ack_detailed side-band-64k ofs-delta shallow \
         no-progress include-tag symref=HEAD:refs/heads/main object-format=sha1 agent=git/none\n"
    ));
    Bytes::from(format!("{service}0000{head}"))
}

/// Approximate size of a piece of [`ref_pages`].
const REF_PAGE: u64 = 500 * 76;

/// Returns endless refs, 500 at a time.
fn ref_pages() -> impl Iterator<Item = Bytes> {
    (0_u64..).step_by(500).map(|first| {
        let refs = (first..first + 500).map(|number| {
            line(&format!(
                "{NO_SUCH_OBJECT} refs/heads/branch-{number:012}\n"
            ))
        });
        Bytes::from(refs.collect::<String>())
    })
}

fn line(text: &str) -> String {
    format!("{:04x}{text}", text.len() + 4)
}

/// Whether a request in protocol v2 asks for a pack.
fn asks_for_pack(request: &Request) -> bool {
    let asked = if is_v2(request) {
        "command=fetch"
    } else {
        "done\n"
    };
    String::from_utf8_lossy(&request.body).contains(asked)
}

fn is_v2(request: &Request) -> bool {
    let versions = request.header("git-protocol").unwrap_or_default();
    versions.split(':').any(|version| version == "version=2")
}

fn parse(repo: &str) -> RepoRef {
    repo.parse().expect("owner/name")
}

fn http_backend() -> io::Result<PathBuf> {
    let output = std::process::Command::new("git")
        .arg("--exec-path")
        .output()?;
    let path = String::from_utf8_lossy(&output.stdout);
    let backend = Path::new(path.trim_end()).join("git-http-backend");
    if backend.is_file() {
        return Ok(backend);
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("git has no {}", backend.display()),
    ))
}

fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::new();
    for three in text.as_bytes().chunks(3) {
        let byte = |index| u32::from(three.get(index).copied().unwrap_or_default());
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            encoded.push(if place <= three.len() {
                char::from(DIGITS[(bits >> (18 - 6 * place) & 63) as usize])
            } else {
                '='
            });
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the pack that [`PackScan`] finds in `answer`, received in pieces of `size`.
    fn packs(answer: &[u8], size: usize) -> (Vec<u8>, bool) {
        let mut scan = PackScan::default();
        let mut pack = Vec::new();
        for piece in answer.chunks(size) {
            for (offset, range) in scan.pack_ranges(piece) {
                assert_eq!(offset, pack.len() as u64);
                pack.extend_from_slice(&piece[range]);
            }
        }
        (pack, scan.is_whole())
    }

    #[test]
    fn latencies_spread_around_their_mean() {
        let shares = |sigma| -> Vec<f64> {
            let repos = (0..4000).map(|i| RepoRef::new("owner", &format!("name-{i}")).unwrap());
            let mut shares: Vec<_> = repos.map(|repo| share(&repo, sigma)).collect();
            shares.sort_by(f64::total_cmp);
            shares
        };
        assert!(shares(0.0).iter().all(|share| (share - 1.0).abs() < 1e-9));
        let spread = shares(1.0);
        let mean = spread.iter().sum::<f64>() / spread.len() as f64;
        assert!((mean - 1.0).abs() < 0.1, "{mean}");
        assert!((spread[2000] - 0.6).abs() < 0.05, "{}", spread[2000]);
        assert!((spread[3960] - 6.2).abs() < 1.0, "{}", spread[3960]);
    }

    #[test]
    fn packs_are_found_however_an_answer_is_cut_up() {
        let v0 = "0035shallow 1111111111111111111111111111111111111111\n00000008NAK\n\
                  000d\u{2}counting0009\u{1}PACK0008\u{1}123000e\u{2}done 100%0005\u{1}0006\u{1}40000";
        let v2 = "000dpackfile\n000cPACK\u{1}\u{1}\u{1}\u{1}000d\u{1}PACK123400000002";
        let refs = "003f1111111111111111111111111111111111111111 refs/heads/main PACK\n0000";
        for size in 1..80 {
            let expected = (b"PACK1234".to_vec(), true);
            assert_eq!(packs(v0.as_bytes(), size), expected, "v0 by {size}");
            assert_eq!(packs(v2.as_bytes(), size), expected, "v2 by {size}");
            let cut = &v0.as_bytes()[..v0.len() - 1];
            assert!(!packs(cut, size).1);
            assert_eq!(packs(refs.as_bytes(), size), (Vec::new(), false));
        }
    }

    #[test]
    fn base64_is_padded() {
        let encoded = ["", "f", "fo", "foo", "foob", "x-access-token:t"].map(base64);
        let expected = [
            "",
            "Zg==",
            "Zm8=",
            "Zm9v",
            "Zm9vYg==",
            "eC1hY2Nlc3MtdG9rZW46dA==",
        ];
        assert_eq!(encoded, expected);
    }
}
