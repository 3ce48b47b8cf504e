//! A small HTTP server with a closure as its handler, and with every kind of bad response.
//!
//! For feeds and the cache API. [`git_server`](super::git_server) builds on it.

use std::fmt;
use std::future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Largest request body that is read.
const REQUEST_MAX: usize = 64 << 20;
/// How long `wait_…` waits before it panics. Far more than any test needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// An HTTP server on a free port on 127.0.0.1 until it is dropped.
///
/// It runs in a thread with its own runtime, for synchronous and asynchronous tests alike.
#[derive(Debug)]
pub struct HttpServer {
    server: Server,
    seen: Arc<Watched<Vec<Request>>>,
}

impl HttpServer {
    /// Starts a server with this handler.
    ///
    /// The handler runs on the server's only thread: to be slow, return a slow [`Response`]. If it
    /// panics, the connection is closed.
    ///
    /// # Panics
    /// If no port is free.
    pub fn start(handler: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        let seen = Arc::new(Watched::new("requests", Vec::new()));
        let server = {
            let seen = Arc::clone(&seen);
            let handler = move |request: Request| -> BoxFuture<'static, Response> {
                seen.update(|all| all.push(request.clone()));
                let response = handler(&request);
                Box::pin(future::ready(response))
            };
            Server::start(any_port(), TaskTracker::new(), handler).expect("a port on 127.0.0.1")
        };
        Self { server, seen }
    }

    /// Returns `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Returns `127.0.0.1:PORT`.
    pub fn authority(&self) -> String {
        self.server.address().to_string()
    }

    /// Returns every request so far, oldest first.
    pub fn requests(&self) -> Vec<Request> {
        self.seen.get()
    }

    /// Returns the number of requests so far.
    pub fn request_count(&self) -> usize {
        self.seen.read(Vec::len)
    }

    /// Returns the highest number of concurrent requests.
    pub fn max_concurrent(&self) -> usize {
        self.server.max_concurrent()
    }

    /// Blocks the thread until `count` requests have come. In an asynchronous test they must come
    /// from another thread or process.
    ///
    /// # Panics
    /// If they have not come within a minute.
    pub fn wait_for_requests(&self, count: usize) {
        self.seen
            .wait(&format!("{count} requests"), |all| all.len() >= count);
    }
}

/// A request with its body.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET`, `POST` …
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The part after the `?`, or an empty string.
    pub query: String,
    /// The headers in order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, unchunked but not decompressed.
    pub body: Bytes,
}

impl Request {
    /// Returns the first header called `name` (in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(key, _)| key == name)?;
        Some(value)
    }
}

/// A response, or the lack of one.
pub struct Response {
    status: u16,
    headers: Vec<(String, String)>,
    body: Body,
    delay: Duration,
    fate: Fate,
}

/// The pieces of a response's body. An error closes the connection.
pub type Body = BoxStream<'static, io::Result<Bytes>>;

enum Fate {
    Answer,
    Hang,
    Reset,
}

impl Response {
    /// Returns a response with a Content-Length.
    pub fn new(status: u16, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let length = body.len().to_string();
        Self::streamed(status, stream::once(future::ready(Ok(body))).boxed())
            .header("content-length", length)
    }

    /// Returns a 200 with a JSON body.
    pub fn json(value: &serde_json::Value) -> Self {
        Self::new(200, value.to_string()).header("content-type", "application/json")
    }

    /// Returns a response of unknown length, sent in chunks.
    pub fn streamed(status: u16, body: Body) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body,
            delay: Duration::ZERO,
            fate: Fate::Answer,
        }
    }

    /// Returns a 200 whose body is `head` and then `again`, endlessly.
    pub fn endless(head: impl Into<Bytes>, again: impl Into<Bytes>) -> Self {
        let head = stream::once(future::ready(head.into()));
        let body = head.chain(stream::repeat(again.into()));
        Self::streamed(200, body.map(Ok).boxed())
    }

    /// Reads the request, keeps the connection open, and never answers.
    pub fn hang() -> Self {
        let mut response = Self::new(200, "");
        response.fate = Fate::Hang;
        response
    }

    /// Resets the connection (RST) instead of answering.
    pub fn reset() -> Self {
        let mut response = Self::new(200, "");
        response.fate = Fate::Reset;
        response
    }

    /// Adds a header.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Waits before it answers, on top of any earlier wait.
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay += delay;
        self
    }

    /// Sends the body this slowly.
    pub fn dripped(self, bytes_per_second: u64) -> Self {
        self.map_body(|body| drip(body, bytes_per_second))
    }

    /// Closes the connection after this many bytes of the body, or right before its end.
    pub fn cut(self, after_bytes: u64) -> Self {
        let broken = stream::once(future::ready(Err(io::Error::other("cut short on purpose"))));
        self.map_body(|body| first_bytes(body, after_bytes).chain(broken).boxed())
    }

    /// Sends nothing after this many bytes of the body, and keeps the connection open.
    pub fn stalled(self, after_bytes: u64) -> Self {
        // The empty piece releases the one before it, which waits for a successor.
        let silence = stream::once(future::ready(Ok(Bytes::new()))).chain(stream::pending());
        self.map_body(|body| first_bytes(body, after_bytes).chain(silence).boxed())
    }

    /// Replaces the body.
    pub fn map_body(mut self, change: impl FnOnce(Body) -> Body) -> Self {
        self.body = change(self.body);
        self
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Response")
            .field("status", &self.status)
            .field("headers", &self.headers)
            .finish_non_exhaustive()
    }
}

/// A listening socket and the thread that serves it, with its tasks. Dropping it ends them and waits
/// for that.
#[derive(Debug)]
pub(super) struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    load: Arc<Mutex<Load>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `handler` on `address`. The thread ends when everything in `tasks` has ended.
    pub(super) fn start(
        address: SocketAddr,
        tasks: TaskTracker,
        handler: impl Fn(Request) -> BoxFuture<'static, Response> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        if !address.ip().is_loopback() {
            // Nothing here authenticates clients.
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{address} is not a loopback address"),
            ));
        }
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let stop = CancellationToken::new();
        let load = Arc::new(Mutex::new(Load::default()));
        let connections = Connections {
            handler: Arc::new(handler),
            load: Arc::clone(&load),
            stop: stop.clone(),
            tasks,
        };
        let thread = thread::Builder::new()
            .name(format!("http-{}", address.port()))
            .spawn(move || runtime.block_on(connections.accept(listener)))?;
        Ok(Self {
            address,
            stop,
            load,
            thread: Some(thread),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(super) fn max_concurrent(&self) -> usize {
        locked(&self.load).max
    }

    pub(super) fn connections(&self) -> u64 {
        locked(&self.load).connections
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed there.
            let _ = thread.join();
        }
    }
}

/// 127.0.0.1, on a port that the system picks.
pub(super) fn any_port() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

/// A value that tests can wait on.
pub(super) struct Watched<T> {
    what: &'static str,
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    pub(super) fn new(what: &'static str, value: T) -> Self {
        Self {
            what,
            value: Mutex::new(value),
            changed: Condvar::new(),
        }
    }

    pub(super) fn read<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&locked(&self.value))
    }

    pub(super) fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(&mut locked(&self.value));
        self.changed.notify_all();
        result
    }
}

impl<T: Clone> Watched<T> {
    pub(super) fn get(&self) -> T {
        self.read(T::clone)
    }
}

impl<T: fmt::Debug> Watched<T> {
    /// Blocks until `there` returns true. Panics after [`PATIENCE`].
    pub(super) fn wait(&self, what: &str, there: impl Fn(&T) -> bool) {
        let (value, timeout) = self
            .changed
            .wait_timeout_while(locked(&self.value), PATIENCE, |value| !there(value))
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            !timeout.timed_out(),
            "waited {PATIENCE:?} for {what}, but the {} are {:#?}",
            self.what,
            *value
        );
    }
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(self.what).finish_non_exhaustive()
    }
}

/// Locks a value, poisoned or not: a panic has failed its own test already.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Load {
    now: usize,
    max: usize,
    connections: u64,
}

/// One request that is being answered.
struct InFlight(Arc<Mutex<Load>>);

impl InFlight {
    fn new(load: Arc<Mutex<Load>>) -> Self {
        {
            let mut load = locked(&load);
            load.now += 1;
            load.max = load.max.max(load.now);
        }
        Self(load)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        locked(&self.0).now -= 1;
    }
}

struct Connections<H> {
    handler: Arc<H>,
    load: Arc<Mutex<Load>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl<H> Connections<H>
where
    H: Fn(Request) -> BoxFuture<'static, Response> + Send + Sync + 'static,
{
    async fn accept(self, listener: TcpListener) {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a nonblocking socket");
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.stop.cancelled() => break,
            };
            match accepted {
                Ok((socket, _)) => {
                    locked(&self.load).connections += 1;
                    self.tasks.spawn(self.serve(socket));
                }
                // Probably out of file descriptors: leave others time to close some.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        drop(listener);
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn serve(&self, socket: TcpStream) -> impl Future<Output = ()> + use<H> {
        let reset = Arc::new(Notify::new());
        let service = {
            let (handler, load, reset) = (
                Arc::clone(&self.handler),
                Arc::clone(&self.load),
                Arc::clone(&reset),
            );
            service_fn(move |request| {
                let in_flight = InFlight::new(Arc::clone(&load));
                answer(request, Arc::clone(&handler), in_flight, Arc::clone(&reset))
            })
        };
        let stop = self.stop.clone();
        async move {
            // Otherwise the end of a response waits 40 ms for the client's delayed ACK.
            let _ = socket.set_nodelay(true);
            let mut connection = http1::Builder::new()
                .header_read_timeout(None)
                .serve_connection(TokioIo::new(socket), service);
            tokio::select! {
                // The client saw how it ended.
                _ = &mut connection => {}
                () = stop.cancelled() => {}
                () = reset.notified() => {
                    let socket = connection.into_parts().io.into_inner();
                    // Closing with this set sends RST.
                    let _ = socket.set_zero_linger();
                }
            }
        }
    }
}

async fn answer<H>(
    request: hyper::Request<Incoming>,
    handler: Arc<H>,
    in_flight: InFlight,
    reset: Arc<Notify>,
) -> io::Result<hyper::Response<StreamBody<BoxStream<'static, io::Result<Frame<Bytes>>>>>>
where
    H: Fn(Request) -> BoxFuture<'static, Response>,
{
    let (head, body) = request.into_parts();
    let body = Limited::new(body, REQUEST_MAX)
        .collect()
        .await
        .map_err(io::Error::other)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers = head.headers.iter();
    let response = handler(Request {
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        headers: headers
            .map(|(name, value)| (name.to_string(), text(value.as_bytes())))
            .collect(),
        body: body.to_bytes(),
    })
    .await;
    tokio::time::sleep(response.delay).await;
    match response.fate {
        Fate::Answer => {}
        Fate::Hang => future::pending::<()>().await,
        Fate::Reset => {
            reset.notify_one();
            future::pending::<()>().await;
        }
    }
    let body = until_last(response.body, in_flight)
        .map_ok(Frame::data)
        .boxed();
    let mut answer = hyper::Response::builder().status(response.status);
    for (name, value) in response.headers {
        answer = answer.header(name, value);
    }
    answer.body(StreamBody::new(body)).map_err(io::Error::other)
}

/// Passes each piece on once the next has come, and drops `guard` before the last: a client that has
/// read a whole response finds it counted, and no longer concurrent.
fn until_last(body: Body, guard: InFlight) -> Body {
    struct State {
        body: Body,
        held: Option<Bytes>,
        failed: Option<io::Error>,
        guard: Option<InFlight>,
    }
    let start = State {
        body,
        held: None,
        failed: None,
        guard: Some(guard),
    };
    stream::try_unfold(start, |mut state| async {
        if let Some(error) = state.failed.take() {
            // The error drops the connection and unsent data: let that go out first.
            tokio::task::yield_now().await;
            return Err(error);
        }
        while state.guard.is_some() {
            match state.body.next().await {
                Some(Ok(piece)) => {
                    if let Some(previous) = state.held.replace(piece) {
                        return Ok(Some((previous, state)));
                    }
                }
                Some(Err(error)) => {
                    state.failed = Some(error);
                    let rest = state.held.take().unwrap_or_default();
                    return Ok(Some((rest, state)));
                }
                None => state.guard = None,
            }
        }
        Ok(state.held.take().map(|last| (last, state)))
    })
    .boxed()
}

fn first_bytes(body: Body, count: u64) -> Body {
    stream::try_unfold((body, count), |(mut body, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let Some(mut piece) = body.try_next().await? else {
            return Ok(None);
        };
        piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        let left = left - piece.len() as u64;
        Ok(Some((piece, (body, left))))
    })
    .boxed()
}

fn drip(body: Body, bytes_per_second: u64) -> Body {
    let bytes_per_second = bytes_per_second.max(1);
    // Ten pieces a second, or single bytes if that is too fast.
    let size = usize::try_from(bytes_per_second / 10)
        .unwrap_or(usize::MAX)
        .max(1);
    let pause = Duration::from_secs_f64(size as f64 / bytes_per_second as f64);
    let start = (body, Bytes::new());
    stream::try_unfold(start, move |(mut body, mut rest)| async move {
        while rest.is_empty() {
            match body.try_next().await? {
                Some(piece) => rest = piece,
                None => return Ok(None),
            }
        }
        tokio::time::sleep(pause).await;
        let piece = rest.split_to(size.min(rest.len()));
        Ok(Some((piece, (body, rest))))
    })
    .boxed()
}
