//! Connections: made, watched, given up and made again.
//!
//! lapin's own recovery is not used: it hung in three of three broker restarts under load. Here a
//! connection that failed in any way is thrown away whole, and its [`Link`] makes a new one: back
//! off, connect, declare.
//!
//! A connection that is given up while its peer says nothing, but still takes what is sent, keeps
//! its thread and its socket until the kernel ends it: some 15 minutes.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use lapin::options::ConfirmSelectOptions;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::types::ShortString;
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::options::{Options, Server};
use super::topology::{self, QueueDepth};
use crate::fault::Fault;
use crate::retry;
use crate::text::format_duration;

/// Pauses between attempts to connect grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A connection that lived this long was a good one: the next pause is short again.
const GOOD_LIFE: Duration = Duration::from_secs(10);
/// How often an idle connection is checked.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How often an outage that lasts is logged.
const REPORT_EVERY: Duration = Duration::from_secs(60);
/// Channels that are kept for the next publishers. More are made, and closed, when more publish at
/// once.
const IDLE_CHANNELS: usize = 64;
/// How long closing may take.
const CLOSING: Duration = Duration::from_secs(5);

/// Why a call failed, sorted by what helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The broker takes nothing from this connection: it is short of memory or disk. What was sent
    /// arrives when that has passed.
    Blocked,
    /// A queue is full.
    Full,
    /// The queue does not exist.
    Missing,
    /// Another connection has the queue to itself.
    Locked,
    /// The queue exists, but with other arguments.
    Mismatch,
    /// Asking again will not help: wrong password, no such vhost, no TLS.
    Refused,
    /// Anything else; another connection may help.
    Broken,
}

/// A call that failed.
#[derive(Debug)]
pub(super) struct CallError {
    pub(super) failure: Failure,
    message: String,
    /// What a person can do about it, put behind the message.
    remedy: &'static str,
}

impl CallError {
    pub(super) fn new(failure: Failure, message: impl Into<String>) -> Self {
        Self {
            failure,
            message: message.into(),
            remedy: "",
        }
    }

    fn of(what: &str, error: &lapin::Error) -> Self {
        let failure = match error.kind() {
            ErrorKind::ProtocolError(error) => match error.kind() {
                AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Failure::Missing,
                AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED) => Failure::Locked,
                AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => Failure::Mismatch,
                AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
                | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => Failure::Refused,
                _ => Failure::Broken,
            },
            // What rustls says of a certificate that it does not believe.
            ErrorKind::IOError(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                Failure::Refused
            }
            ErrorKind::InvalidProtocolVersion(_) => Failure::Refused,
            _ => Failure::Broken,
        };
        Self::new(failure, format!("{what}: {error}"))
    }

    /// Whether asking again will not help.
    fn is_lasting(&self) -> bool {
        matches!(self.failure, Failure::Refused | Failure::Mismatch)
    }

    fn silence(what: &str, limit: Duration) -> Self {
        let message = format!("{what}: no answer for {}", format_duration(limit));
        Self::new(Failure::Broken, message)
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.message, self.remedy)
    }
}

/// Bounds a call: every one can be lost for ever (a confirm never came after a restart).
pub(super) async fn within<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(CallError::of(what, &error)),
        Err(_) => Err(CallError::silence(what, limit)),
    }
}

/// One connection on which everything is declared.
pub(super) struct Session {
    connection: Arc<Connection>,
    /// In confirm mode and unused at present. A clone of a channel costs more than one would think,
    /// and one is made for each message that is on its way.
    idle: Mutex<Vec<Arc<Channel>>>,
    /// Cancelled when the connection was given up.
    pub(super) failed: CancellationToken,
    /// Why it was given up.
    cause: OnceLock<String>,
    /// How long the broker may take to answer one call.
    limit: Duration,
    /// The broker has blocked the connection, and that was logged.
    blocked: AtomicBool,
    /// The jobs queue was not there and had to be declared.
    pub(super) jobs_were_missing: bool,
    /// Kept, since a session may be dropped outside of the runtime.
    runtime: Handle,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("usable", &self.usable())
            .finish_non_exhaustive()
    }
}

impl Session {
    async fn open(options: &Options, purpose: &str) -> Result<Self, CallError> {
        let limit = options.call_limit;
        let connection = Arc::new(connect(options, purpose).await?);
        let mut may_declare = true;
        let declared = async {
            let channel = connection.create_channel().await?;
            // On a channel of its own: a no closes it.
            let asking = connection.create_channel().await?;
            let missing = match topology::depth(&asking, &options.names.jobs).await {
                Ok(_) => false,
                Err(error) if CallError::of("", &error).failure == Failure::Missing => true,
                Err(error) => return Err(error),
            };
            let declared = topology::declare(&channel, &options.names).await;
            let channel = match declared {
                // A worker or an observer needs no right to declare, where a producer has done so.
                Err(error) if CallError::of("", &error).failure == Failure::Refused => {
                    may_declare = false;
                    let channel = connection.create_channel().await?;
                    topology::look(&channel, &options.names).await?;
                    channel
                }
                declared => declared.map(|()| channel)?,
            };
            let confirm = ConfirmSelectOptions::default();
            channel.confirm_select(confirm).await?;
            Ok((channel, missing))
        };
        let declared = within(limit, "declaring exchanges and queues", declared).await;
        let (channel, jobs_were_missing) = declared.map_err(|mut error| {
            error.remedy = match error.failure {
                Failure::Missing if !may_declare => {
                    "; this user may not declare it: start a producer once, whose user may, or give this one the right to configure"
                }
                // 3.10, killed in the second after the first stream of its life was declared, does
                // not remember that it has any: the stream never comes back by itself.
                Failure::Missing => {
                    "; this passes once the broker has recovered, but if it lasts for minutes, delete that queue: it is made anew, and the next run of the producer finds what is missing"
                }
                Failure::Mismatch => {
                    "; another version made it: delete it once it is empty, or choose another --queue-prefix"
                }
                _ => "",
            };
            error
        })?;
        Ok(Self {
            connection,
            idle: Mutex::new(vec![Arc::new(channel)]),
            failed: CancellationToken::new(),
            cause: OnceLock::new(),
            limit,
            blocked: AtomicBool::new(false),
            jobs_were_missing,
            runtime: Handle::current(),
        })
    }

    fn usable(&self) -> bool {
        !self.failed.is_cancelled() && self.connection.status().connected()
    }

    /// Has the connection replaced before its next use. Jobs on loan through it go back.
    pub(super) fn fail(&self, why: impl fmt::Display) {
        if self.failed.is_cancelled() {
            return;
        }
        _ = self.cause.set(why.to_string());
        self.failed.cancel();
        let connection = Arc::clone(&self.connection);
        self.runtime.spawn(async move { close(&connection).await });
    }

    /// Passes on why the connection was lost, if it was: whoever uses it learns of that first.
    pub(super) fn fail_if_lost(&self, why: impl fmt::Display) {
        if !self.connection.status().connected() {
            self.fail(why);
        }
    }

    /// Waits until the connection is lost or given up, and says why.
    async fn lost(&self) -> &str {
        let idle = async {
            while self.usable() {
                tokio::time::sleep(CHECK_EVERY).await;
            }
        };
        tokio::select! {
            () = self.failed.cancelled() => {}
            () = idle => self.fail("the connection was lost"),
        }
        self.cause.get().map_or("it was closed", String::as_str)
    }

    /// A new channel.
    pub(super) async fn channel(&self) -> Result<Channel, CallError> {
        let opening = self.connection.create_channel();
        within(self.limit, "opening a channel", opening).await
    }

    /// The depth of a queue that must exist.
    pub(super) async fn depth(
        &self,
        deadline: Instant,
        queue: &ShortString,
    ) -> Result<QueueDepth, CallError> {
        // Not a new channel each time: lapin gives out the numbers of channels anew after the
        // 2047th, and a number is of no use any more once the broker has closed its channel.
        let channel = self.confirming(deadline).await?;
        let what = format!("asking for the depth of {queue}");
        let asking = topology::depth(&channel, queue);
        let depth = self.answered(deadline, &what, asking).await?;
        self.give_back(channel);
        Ok(depth)
    }

    /// A channel in confirm mode for one task alone: lapin numbers a message and queues it under
    /// two locks, so that of two messages at once on one channel each may get the other's confirm.
    ///
    /// To be given back after use. Dropped, it is closed: its next user would get the confirms of
    /// earlier messages.
    pub(super) async fn confirming(&self, deadline: Instant) -> Result<Arc<Channel>, CallError> {
        let idle = self.idle().pop();
        if let Some(channel) = idle.filter(|channel| channel.status().connected()) {
            return Ok(channel);
        }
        let opening = async {
            let channel = self.connection.create_channel().await?;
            let confirm = ConfirmSelectOptions::default();
            channel.confirm_select(confirm).await?;
            Ok(Arc::new(channel))
        };
        self.answered(deadline, "opening a channel", opening).await
    }

    /// Keeps a channel of [`Session::confirming`] for its next user.
    pub(super) fn give_back(&self, channel: Arc<Channel>) {
        let mut idle = self.idle();
        if idle.len() < IDLE_CHANNELS {
            idle.push(channel);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Arc<Channel>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bounds a call as [`within`] does, by the limit of one call; but a broker that has blocked
    /// the connection is waited for until `deadline`. It reads nothing meanwhile and lapin writes
    /// nothing, so another connection would only bring the same messages a second time.
    pub(super) async fn answered<T>(
        &self,
        deadline: Instant,
        what: &str,
        call: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, CallError> {
        let mut call = pin!(call);
        let step = self.limit / 10;
        let mut silent = Duration::ZERO;
        while silent < self.limit {
            match tokio::time::timeout(step, &mut call).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => return Err(CallError::of(what, &error)),
                Err(_) if !self.is_blocked() => silent += step,
                Err(_) if Instant::now() >= deadline => {
                    return Err(CallError::new(
                        Failure::Blocked,
                        "it is short of memory or disk and takes no messages (an alarm, see `rabbitmq-diagnostics alarms`)",
                    ));
                }
                Err(_) => silent = Duration::ZERO,
            }
        }
        Err(CallError::silence(what, self.limit))
    }

    /// Whether the broker has blocked the connection; logged once each time.
    fn is_blocked(&self) -> bool {
        let blocked = self.connection.status().blocked();
        let known = self.blocked.swap(blocked, Ordering::Relaxed);
        if blocked && !known {
            warn!(
                operation = "broker",
                "the broker is short of memory or disk and takes no messages: waiting for it"
            );
        }
        blocked
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.fail("it is no longer used");
    }
}

async fn connect(options: &Options, purpose: &str) -> Result<Connection, CallError> {
    // Shown by RabbitMQ's tools in the list of connections.
    let name = format!(
        "{} {purpose} {}",
        options.names.exchange,
        std::process::id()
    );
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connecting = Connection::connect_uri(options.server.uri.clone(), properties);
    match tokio::time::timeout(options.call_limit, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(CallError {
            remedy: remedy(&error),
            ..CallError::of("connecting", &error)
        }),
        Err(_) => Err(CallError {
            remedy: "; check host and port in --broker-url",
            ..CallError::silence("connecting", options.call_limit)
        }),
    }
}

/// What to do about a connection that could not be made.
fn remedy(error: &lapin::Error) -> &'static str {
    match error.kind() {
        ErrorKind::IOError(error) => match error.kind() {
            std::io::ErrorKind::ConnectionRefused => {
                ": nobody listens there; start RabbitMQ, or check --broker-url"
            }
            // What rustls says.
            std::io::ErrorKind::InvalidData => {
                "; either that port speaks no TLS (say amqp://, or name the port that does), or its certificate is not trusted"
            }
            _ => "; check host and port in --broker-url",
        },
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                "; check user and password in --broker-url"
            }
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => {
                "; check the virtual host, the part behind the last / of --broker-url"
            }
            _ => "",
        },
        _ => "",
    }
}

/// Closes a connection in good order: unacknowledged deliveries go back at once.
async fn close(connection: &Connection) {
    // It fails where the connection is closed already.
    let closing = connection.close(200, "goodbye".into());
    _ = tokio::time::timeout(CLOSING, closing).await;
}

/// The connection of one purpose, kept up from its first use until `closed`.
#[derive(Debug)]
pub(super) struct Link {
    supervisor: Supervisor,
    /// Set by the supervisor's task, which starts with the first use.
    phase: OnceLock<watch::Receiver<Phase>>,
}

/// How a link is.
#[derive(Debug)]
enum Phase {
    /// There is no connection, and maybe a reason for that.
    Connecting(Option<String>),
    /// It was connected, and may have failed since.
    Connected(Arc<Session>),
    /// It never was connected, and waiting will not help.
    Refused(String),
}

/// What keeps a link connected.
#[derive(Clone, Debug)]
struct Supervisor {
    purpose: &'static str,
    options: Options,
    outage: Arc<Outage>,
    closed: CancellationToken,
}

impl Link {
    pub(super) fn new(
        purpose: &'static str,
        options: &Options,
        outage: &Arc<Outage>,
        closed: CancellationToken,
    ) -> Self {
        Self {
            supervisor: Supervisor {
                purpose,
                options: options.clone(),
                outage: Arc::clone(outage),
                closed,
            },
            phase: OnceLock::new(),
        }
    }

    /// Cancelled when the link is closed for good.
    pub(super) fn closed(&self) -> &CancellationToken {
        &self.supervisor.closed
    }

    /// The connection; waits for it for ever, or until `deadline`.
    pub(super) async fn session(&self, deadline: Option<Instant>) -> Result<Arc<Session>, Fault> {
        let server = &self.supervisor.options.server;
        let phase = self.phase.get_or_init(|| self.supervisor.start());
        let reached = async {
            let mut phase = phase.clone();
            loop {
                match &*phase.borrow_and_update() {
                    Phase::Connected(session) if session.usable() => {
                        return Ok(Arc::clone(session));
                    }
                    Phase::Connected(session) => session.fail("the connection was lost"),
                    Phase::Refused(why) => return Err(server.unreachable(why).lasting(true)),
                    Phase::Connecting(_) => {}
                }
                if phase.changed().await.is_err() {
                    // Closed.
                    std::future::pending::<()>().await;
                }
            }
        };
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.closed().cancelled() => Err(Fault::infra("the connection to the broker was closed")),
            reached = reached => reached,
            () = late => match &*phase.borrow() {
                Phase::Connecting(Some(why)) => Err(server.unreachable(why)),
                _ => Err(server.unreachable("no answer")),
            },
        }
    }

    /// Makes a call on the connection, and again on the next one if it breaks before `deadline`.
    pub(super) async fn call<T, F>(
        &self,
        deadline: Instant,
        call: impl Fn(Arc<Session>) -> F,
    ) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        loop {
            let session = self.session(Some(deadline)).await?;
            match call(Arc::clone(&session)).await {
                Ok(value) => return Ok(value),
                Err(error) if error.failure == Failure::Broken && Instant::now() < deadline => {
                    session.fail(error);
                }
                Err(error) => return Err(self.given_up(&session, &error)),
            }
        }
    }

    /// The fault of a call that is not made again. A connection that gave no proper answer is
    /// replaced: what is missing is declared again with the next one.
    pub(super) fn given_up(&self, session: &Session, error: &CallError) -> Fault {
        if !matches!(error.failure, Failure::Blocked | Failure::Full) {
            session.fail(error);
        }
        self.supervisor.options.server.unreachable(error)
    }

    /// Closes the connection, after the token was cancelled.
    pub(super) async fn close(&self) {
        let session = self.phase.get().and_then(|phase| match &*phase.borrow() {
            Phase::Connected(session) => Some(Arc::clone(session)),
            _ => None,
        });
        if let Some(session) = session {
            session.failed.cancel();
            close(&session.connection).await;
        }
    }
}

impl Supervisor {
    /// Connecting is done by a task of its own: a caller may stop polling, and others wait for the
    /// same connection.
    fn start(&self) -> watch::Receiver<Phase> {
        let (sender, receiver) = watch::channel(Phase::Connecting(None));
        let this = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = this.closed.cancelled() => { this.outage.forget(this.purpose); }
                () = this.keep_connected(sender) => {}
            }
        });
        receiver
    }

    async fn keep_connected(&self, phase: watch::Sender<Phase>) {
        let (options, server) = (&self.options, &self.options.server);
        let new_pauses = || retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        let (mut pauses, mut first, mut steady) = (new_pauses(), true, true);
        loop {
            match Session::open(options, self.purpose).await {
                Ok(session) => {
                    if !first && session.jobs_were_missing {
                        error!(
                            operation = "broker",
                            "{server}: the jobs queue was gone, and what was in it; it was made anew. Run the producer again: it finds what is missing"
                        );
                    }
                    first = false;
                    let session = Arc::new(session);
                    phase.send_replace(Phase::Connected(Arc::clone(&session)));
                    // A connection that breaks as soon as it is used ends no outage.
                    if steady {
                        self.outage.end(server, self.purpose);
                    }
                    steady = tokio::time::timeout(GOOD_LIFE, session.lost())
                        .await
                        .is_err();
                    if steady {
                        self.outage.end(server, self.purpose);
                        pauses = new_pauses();
                    }
                    let why = session.lost().await;
                    phase.send_replace(Phase::Connecting(Some(why.to_owned())));
                    self.outage.report(server, self.purpose, &server.scrub(why));
                }
                Err(error) if first && error.is_lasting() => {
                    phase.send_replace(Phase::Refused(error.to_string()));
                }
                // Once connected, it is waited for whatever it says: a password that somebody
                // changed will be changed back. The remedy is for those who have just set it up.
                Err(error) => {
                    let why = match first {
                        true => error.to_string(),
                        false => error.message,
                    };
                    self.outage
                        .report(server, self.purpose, &server.scrub(&why));
                    phase.send_replace(Phase::Connecting(Some(why)));
                }
            }
            tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }
}

/// An outage of the broker, however many links notice it: logged when it begins, once a minute, and
/// when it ends.
#[derive(Debug, Default)]
pub(super) struct Outage(Mutex<Option<Down>>);

#[derive(Debug)]
struct Down {
    since: Instant,
    logged: Instant,
    /// The purposes of the links that are not connected.
    links: BTreeSet<&'static str>,
}

/// What there is to log of a failure.
#[derive(Debug, PartialEq, Eq)]
enum Notable {
    Begin,
    /// The outage has lasted this long.
    Lasting(Duration),
    No,
}

impl Outage {
    fn report(&self, server: &Server, link: &'static str, why: &str) {
        match self.note(link, Instant::now()) {
            Notable::Begin => warn!(
                operation = "broker",
                "{server}: {why}; connecting again until it answers"
            ),
            Notable::Lasting(since) => warn!(
                operation = "broker",
                "{server}: away for {}: {why}",
                format_duration(since)
            ),
            Notable::No => debug!(operation = "broker", "{server} ({link}): {why}"),
        }
    }

    fn end(&self, server: &Server, link: &'static str) {
        if let Some(since) = self.forget(link) {
            info!(
                operation = "broker",
                "{server}: connected again after {}",
                format_duration(since.elapsed())
            );
        }
    }

    fn down(&self) -> MutexGuard<'_, Option<Down>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a link that is not connected.
    fn note(&self, link: &'static str, now: Instant) -> Notable {
        let mut guard = self.down();
        let begun = guard.is_none();
        let down = guard.get_or_insert_with(|| Down {
            since: now,
            logged: now,
            links: BTreeSet::new(),
        });
        down.links.insert(link);
        if begun {
            Notable::Begin
        } else if now - down.logged < REPORT_EVERY {
            Notable::No
        } else {
            down.logged = now;
            Notable::Lasting(now - down.since)
        }
    }

    /// Takes a link out of the outage; gives its beginning if that ends it.
    fn forget(&self, link: &'static str) -> Option<Instant> {
        let mut down = self.down();
        down.take_if(|down| {
            down.links.remove(link);
            down.links.is_empty()
        })
        .map(|down| down.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_reported_once_a_minute_whoever_meets_it() {
        let (outage, start) = (Outage::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for (seconds, link, expected) in [
            (0, "publishing", Notable::Begin),
            (0, "consuming", Notable::No),
            (59, "publishing", Notable::No),
            (61, "lock", Notable::Lasting(Duration::from_secs(61))),
            (62, "consuming", Notable::No),
            (120, "publishing", Notable::No),
            (121, "consuming", Notable::Lasting(Duration::from_secs(121))),
        ] {
            assert_eq!(outage.note(link, at(seconds)), expected, "{seconds} {link}");
        }
        assert_eq!(outage.forget("publishing"), None);
        assert_eq!(outage.forget("lock"), None);
        assert_eq!(outage.forget("consuming"), Some(start));
        assert_eq!(outage.forget("consuming"), None);
        assert_eq!(outage.note("consuming", at(200)), Notable::Begin);
    }
}
