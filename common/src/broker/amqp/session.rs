//! Connections: made, watched, given up and made again.
//!
//! lapin's own recovery is not used: it hung in three of three broker restarts under load. Here a
//! connection that failed in any way is thrown away whole, and the next one who needs it makes a
//! new one: back off, connect, declare.
//!
//! A connection that is given up while its peer says nothing, but still takes what is sent, keeps
//! its thread and its socket until the kernel ends it: some 15 minutes.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lapin::options::ConfirmSelectOptions;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::types::ShortString;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::topology::{self, Look, Names};
use crate::fault::Fault;
use crate::retry;

/// Seconds between heartbeats; a peer that is silent for two of them is gone.
const HEARTBEAT: u16 = 20;
/// Pauses between attempts to connect grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A connection that lived this long was a good one: the next pause is short again.
const GOOD_LIFE: Duration = Duration::from_secs(10);
/// Channels that are kept for those who publish next. More are made, and closed, when more publish
/// at once.
const IDLE_CHANNELS: usize = 64;
/// How long closing may take.
const CLOSING: Duration = Duration::from_secs(5);

/// Where the broker is, and with whose rights.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Server {
    uri: AMQPUri,
}

impl Server {
    /// Reads `amqp://…` or `amqps://…`. No error repeats any of it: there is a password in it.
    pub(super) fn parse(url: &str) -> Result<Self, Fault> {
        let wrong = || {
            Fault::infra(
                "the broker's URL is not of the form amqp://USER:PASSWORD@HOST:PORT/VHOST (or amqps://…); it is not shown here, since it may hold a password. Characters such as @ / : # % in user or password must be written as %40 %2F %3A %23 %25",
            )
        };
        // lapin takes such an address for localhost without a word.
        if url.contains("@[") || url.contains("//[") {
            return Err(Fault::infra(
                "the broker's URL names its host by an IPv6 address, which is not supported: use a host name",
            ));
        }
        let mut uri = AMQPUri::from_str(url).map_err(|_| wrong())?;
        if uri.authority.host.is_empty() {
            return Err(wrong());
        }
        if uri.vhost.is_empty() {
            "/".clone_into(&mut uri.vhost);
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        Ok(Self { uri })
    }

    /// How long the broker may take to notice that a connection is gone: at most three heartbeats,
    /// and a margin.
    pub(super) fn notices_within(&self) -> Duration {
        let heartbeat = self.uri.query.heartbeat.unwrap_or(HEARTBEAT);
        Duration::from_secs(10) + 4 * Duration::from_secs(heartbeat.into())
    }

    /// The fault of a broker that cannot be used.
    pub(super) fn unreachable(&self, why: &str) -> Fault {
        // What a peer that speaks no TLS answers to its greeting.
        let plain = self.uri.scheme == AMQPScheme::AMQPS && why.contains("InvalidContentType");
        let remedy = match plain {
            true => "; that port speaks no TLS: say amqp:// for it, or name the one that does",
            false => "",
        };
        Fault::infra(format!(
            "the broker {self} cannot be used: {}{remedy}",
            self.scrub(why)
        ))
    }

    /// What went wrong, without anybody's name or password in it.
    fn scrub(&self, text: &str) -> String {
        let user = &self.uri.authority.userinfo;
        // As RabbitMQ writes it; elsewhere the word may be part of a queue's name.
        let text = text.replace(&format!("user '{}'", user.username), "user (hidden)");
        // One of a letter or two would only garble the text.
        if user.password.len() > 2 {
            return text.replace(&user.password, "(hidden)");
        }
        text
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.uri.scheme {
            AMQPScheme::AMQP => "amqp",
            AMQPScheme::AMQPS => "amqps",
        };
        let authority = &self.uri.authority;
        write!(f, "{scheme}://{}:{}", authority.host, authority.port)?;
        match self.uri.vhost.as_str() {
            "/" => Ok(()),
            vhost => write!(f, "/{vhost}"),
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({self})")
    }
}

/// Why there is no connection.
#[derive(Debug)]
struct Refused {
    message: String,
    /// Asking again will not help: wrong password, no such vhost, queues of another shape.
    lasting: bool,
}

impl Refused {
    fn passing(message: String) -> Self {
        Self {
            message,
            lasting: false,
        }
    }

    fn new(what: &str, error: &lapin::Error) -> Self {
        let lasting = match error.kind() {
            ErrorKind::ProtocolError(error) => matches!(
                error.kind(),
                AMQPErrorKind::Soft(
                    AMQPSoftError::ACCESSREFUSED | AMQPSoftError::PRECONDITIONFAILED
                ) | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
            ),
            // What rustls says of a certificate that it does not believe.
            ErrorKind::IOError(error) => error.kind() == std::io::ErrorKind::InvalidData,
            ErrorKind::InvalidProtocolVersion(_) => true,
            _ => false,
        };
        Self {
            message: format!("{what}: {error}"),
            lasting,
        }
    }
}

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// The broker takes nothing from this connection: it is short of memory or disk. What was sent
    /// arrives when that has passed.
    Blocked,
    /// Something is wrong with the connection, or with what was asked for.
    Broken(String),
}

/// One connection on which everything is declared.
pub(super) struct Session {
    connection: Arc<Connection>,
    /// In confirm mode, and nobody's at present. A clone of a channel costs more than one would
    /// think, and one is made for each message that is on its way.
    idle: Mutex<Vec<Arc<Channel>>>,
    /// Cancelled when the connection was given up.
    pub(super) failed: CancellationToken,
    opened: Instant,
    /// How many connections before it, one after the other, broke as soon as they were made.
    hasty: usize,
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
    async fn open(
        server: &Server,
        names: &Names,
        purpose: &str,
        limit: Duration,
        hasty: usize,
    ) -> Result<Self, Refused> {
        let connection = Arc::new(connect(server, names, purpose, limit).await?);
        let this = async {
            let channel = connection.create_channel().await?;
            // On a channel of its own: a no closes it.
            let looking = connection.create_channel().await?;
            let jobs_were_missing = match topology::look(&looking, names.jobs()).await {
                Ok(_) => false,
                Err(error) if is_soft(&error, &AMQPSoftError::NOTFOUND) => true,
                Err(error) => return Err(error),
            };
            topology::declare(&channel, names).await?;
            channel
                .confirm_select(ConfirmSelectOptions::default())
                .await?;
            Ok(Self {
                connection: Arc::clone(&connection),
                idle: Mutex::new(vec![Arc::new(channel)]),
                failed: CancellationToken::new(),
                opened: Instant::now(),
                hasty,
                limit,
                blocked: AtomicBool::new(false),
                jobs_were_missing,
                runtime: Handle::current(),
            })
        };
        let what = "declaring exchanges and queues";
        match tokio::time::timeout(limit, this).await {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => {
                let mut refused = Refused::new(what, &error);
                // 3.10, killed in the second after the first stream of its life was declared, does
                // not remember that it has any: the stream never comes back by itself.
                if refused.message.contains("is down or inaccessible") {
                    refused.message.push_str(
                        "; this passes once the broker has recovered, but if it lasts for minutes, delete that queue: it is made anew, and the next run of the producer finds what is missing",
                    );
                }
                if is_soft(&error, &AMQPSoftError::PRECONDITIONFAILED) {
                    refused.message.push_str(
                        "; another version made it: delete it once it is empty, or choose another --queue-prefix",
                    );
                }
                Err(refused)
            }
            Err(_) => Err(Refused::passing(format!(
                "{what}: no answer for {} s",
                limit.as_secs()
            ))),
        }
    }

    fn usable(&self) -> bool {
        !self.failed.is_cancelled() && self.connection.status().connected()
    }

    /// Has the connection replaced before anybody uses it again. Jobs on loan through it go back.
    pub(super) fn fail(&self, why: &str) {
        if self.failed.is_cancelled() {
            return;
        }
        warn!(operation = "broker", "the connection is given up: {why}");
        self.end();
    }

    fn end(&self) {
        if self.failed.is_cancelled() {
            return;
        }
        self.failed.cancel();
        let connection = Arc::clone(&self.connection);
        self.runtime.spawn(async move { close(&connection).await });
    }

    /// A new channel.
    pub(super) async fn channel(&self) -> Result<Channel, String> {
        let opening = self.connection.create_channel();
        within(self.limit, "opening a channel", opening).await
    }

    /// What the broker says of a queue that must exist.
    pub(super) async fn look(
        &self,
        deadline: Instant,
        queue: ShortString,
    ) -> Result<Look, Unanswered> {
        // Not a new one for each look: lapin gives out the numbers of channels anew after the
        // 2047th, and a number is of no use any more once the broker has closed its channel.
        let channel = self.confirming(deadline).await?;
        let what = format!("looking at {queue}");
        let looking = topology::look(&channel, queue);
        let look = self.answered(deadline, &what, looking).await?;
        self.give_back(channel);
        Ok(look)
    }

    /// A channel in confirm mode for one task alone: lapin numbers a message and queues it under
    /// two locks, so that of two messages at once on one channel each may get the other's confirm.
    ///
    /// To be given back after use. Dropped, it is closed, so that whoever is next is not told what
    /// became of an earlier message.
    pub(super) async fn confirming(&self, deadline: Instant) -> Result<Arc<Channel>, Unanswered> {
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

    /// Keeps a channel of [`Session::confirming`] for whoever is next.
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
    ) -> Result<T, Unanswered> {
        let mut call = pin!(call);
        let step = self.limit / 10;
        let mut silent = Duration::ZERO;
        while silent < self.limit {
            match tokio::time::timeout(step, &mut call).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => return Err(Unanswered::Broken(format!("{what}: {error}"))),
                Err(_) if !self.is_blocked() => silent += step,
                Err(_) if Instant::now() >= deadline => return Err(Unanswered::Blocked),
                Err(_) => silent = Duration::ZERO,
            }
        }
        let limit = self.limit.as_secs();
        Err(Unanswered::Broken(format!(
            "{what}: no answer for {limit} s"
        )))
    }

    /// Whether the broker has blocked the connection; said once each time.
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
        self.end();
    }
}

/// A connection with nothing declared on it.
pub(super) async fn connect_for_lock(
    server: &Server,
    names: &Names,
    limit: Duration,
) -> Result<Connection, Fault> {
    connect(server, names, "lock", limit)
        .await
        .map_err(|refused| server.unreachable(&refused.message))
}

async fn connect(
    server: &Server,
    names: &Names,
    purpose: &str,
    limit: Duration,
) -> Result<Connection, Refused> {
    // Shown by RabbitMQ's tools to whoever looks who is connected.
    let name = format!("{} {purpose} {}", names.exchange(), std::process::id());
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connecting = Connection::connect_uri(server.uri.clone(), properties);
    match tokio::time::timeout(limit, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => {
            let mut refused = Refused::new("connecting", &error);
            refused.message += remedy(&error);
            Err(refused)
        }
        Err(_) => {
            let limit = limit.as_secs();
            Err(Refused::passing(format!(
                "connecting: no answer for {limit} s; check host and port in --broker-url"
            )))
        }
    }
}

/// What to do about a connection that did not come about, to be put behind the reason.
fn remedy(error: &lapin::Error) -> &'static str {
    match error.kind() {
        ErrorKind::IOError(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            ": nobody listens there; start RabbitMQ, or check --broker-url"
        }
        ErrorKind::IOError(error) if error.kind() != std::io::ErrorKind::InvalidData => {
            "; check host and port in --broker-url"
        }
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
pub(super) async fn close(connection: &Connection) {
    // It says why it cannot be closed when it is closed already.
    let closing = connection.close(200, "goodbye".into());
    _ = tokio::time::timeout(CLOSING, closing).await;
}

/// Whether the broker refused a call in this way, at the cost of its channel.
pub(super) fn is_soft(error: &lapin::Error, expected: &AMQPSoftError) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(error) => {
            matches!(error.kind(), AMQPErrorKind::Soft(soft) if soft == expected)
        }
        _ => false,
    }
}

/// What a process does with one connection, and the connection while it is well.
#[derive(Debug)]
pub(super) struct Link {
    phase: Arc<watch::Sender<Phase>>,
    supervisor: Supervisor,
}

/// How a link is.
#[derive(Debug)]
enum Phase {
    /// Nobody has asked for it yet.
    Idle,
    /// A task is at it.
    Connecting {
        /// Why it has not come about yet.
        last: Option<String>,
    },
    /// It was connected, and may have failed since.
    Connected(Arc<Session>),
    /// It never was, and waiting will not help.
    Refused(String),
}

/// What it takes to connect. Clones connect to the same.
#[derive(Clone, Debug)]
struct Supervisor {
    purpose: &'static str,
    server: Server,
    names: Names,
    limit: Duration,
    closed: CancellationToken,
}

impl Link {
    pub(super) fn new(
        purpose: &'static str,
        server: Server,
        names: Names,
        limit: Duration,
        closed: CancellationToken,
    ) -> Self {
        Self {
            phase: Arc::new(watch::Sender::new(Phase::Idle)),
            supervisor: Supervisor {
                purpose,
                server,
                names,
                limit,
                closed,
            },
        }
    }

    /// The connection, made again where it is not well; for ever, or until `deadline`.
    pub(super) async fn session(&self, deadline: Option<Instant>) -> Result<Arc<Session>, Fault> {
        let server = &self.supervisor.server;
        let closed = &self.supervisor.closed;
        let gone = || Fault::infra("the connection to the broker was closed");
        if closed.is_cancelled() {
            return Err(gone());
        }
        let reached = async {
            match deadline {
                None => Ok(self.connected().await),
                Some(deadline) => tokio::time::timeout_at(deadline.into(), self.connected()).await,
            }
        };
        let reached = tokio::select! {
            reached = reached => reached,
            () = closed.cancelled() => return Err(gone()),
        };
        match reached {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(refused)) => Err(server.unreachable(&refused)),
            Err(_) => match &*self.phase.borrow() {
                Phase::Connecting { last: Some(last) } => Err(server.unreachable(last)),
                _ => Err(server.unreachable("no answer")),
            },
        }
    }

    /// Connecting is done by a task of its own: a caller may stop polling, as one does who has left
    /// a stream alone, and others are waiting for the same connection.
    async fn connected(&self) -> Result<Arc<Session>, String> {
        let mut phase = self.phase.subscribe();
        // An earlier refusal is no answer to this call.
        let mut asked = false;
        loop {
            match &*phase.borrow_and_update() {
                Phase::Connected(session) if session.usable() => return Ok(Arc::clone(session)),
                Phase::Refused(why) if asked => return Err(why.clone()),
                _ => {}
            }
            asked = true;
            let mut lost = None;
            let start = self.phase.send_if_modified(|phase| {
                if matches!(phase, Phase::Connected(session) if session.usable()) {
                    return false;
                }
                let connecting = Phase::Connecting { last: None };
                match std::mem::replace(phase, connecting) {
                    Phase::Idle | Phase::Refused(_) => true,
                    Phase::Connected(session) => {
                        lost = Some(session);
                        true
                    }
                    other => {
                        *phase = other;
                        false
                    }
                }
            });
            if start {
                let supervisor = self.supervisor.clone();
                tokio::spawn(supervisor.connect(Arc::clone(&self.phase), lost));
            }
            // The sender is ours, so this cannot fail.
            _ = phase.changed().await;
        }
    }

    /// Closes the connection for good, after the token was cancelled.
    pub(super) async fn close(&self) {
        if let Phase::Connected(session) = self.phase.send_replace(Phase::Idle) {
            session.failed.cancel();
            close(&session.connection).await;
        }
    }
}

impl Supervisor {
    /// Connects, for as long as it takes.
    async fn connect(self, phase: Arc<watch::Sender<Phase>>, lost: Option<Arc<Session>>) {
        let connected = self.connected(&phase, lost.as_deref());
        let outcome = tokio::select! {
            outcome = connected => outcome,
            () = self.closed.cancelled() => Phase::Idle,
        };
        phase.send_replace(outcome);
    }

    async fn connected(&self, phase: &watch::Sender<Phase>, lost: Option<&Session>) -> Phase {
        let mut hasty = 0;
        if let Some(lost) = lost {
            lost.fail("it was lost");
            if lost.opened.elapsed() < GOOD_LIFE {
                hasty = lost.hasty + 1;
            }
            tokio::time::sleep(pause_after(hasty)).await;
        }
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            let opened = Session::open(&self.server, &self.names, self.purpose, self.limit, hasty);
            let refused = match opened.await {
                Ok(session) => {
                    self.report(&session, lost.is_some());
                    return Phase::Connected(Arc::new(session));
                }
                Err(refused) => refused,
            };
            let message = self.server.scrub(&refused.message);
            // Later, whoever changed a password will change it back, and a worker is to wait for
            // that.
            if refused.lasting && lost.is_none() {
                return Phase::Refused(message);
            }
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            warn!(
                operation = "broker",
                pause_seconds = pause.as_secs_f64(),
                "{}: {message}; trying again in {:.1} s",
                self.server,
                pause.as_secs_f64()
            );
            phase.send_replace(Phase::Connecting {
                last: Some(message),
            });
            tokio::time::sleep(pause).await;
        }
    }

    fn report(&self, session: &Session, again: bool) {
        if again {
            info!(
                operation = "broker",
                "{}: connected again ({})", self.server, self.purpose
            );
        }
        if again && session.jobs_were_missing {
            error!(
                operation = "broker",
                "{}: the jobs queue was gone, and what was in it; it was made anew. Run the producer again: it finds what is missing",
                self.server
            );
        }
    }
}

/// The pause before a lost connection is made again. What opens, but breaks as soon as it is used,
/// would else be made again and again at once.
fn pause_after(hasty: usize) -> Duration {
    let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
    pauses.nth(hasty.min(10)).unwrap_or(LONGEST_PAUSE)
}

/// Bounds a call: every one can be lost for ever (a confirm never came after a restart).
pub(super) async fn within<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T, String> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(format!("{what}: {error}")),
        Err(_) => Err(format!("{what}: no answer for {} s", limit.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_of_an_address_holds_no_secret() {
        for (url, shown) in [
            (
                "amqp://user:s3cr3t@rabbit:5671/fleet",
                "amqp://rabbit:5671/fleet",
            ),
            ("amqps://user:s3cr3t@rabbit", "amqps://rabbit:5671"),
            ("amqp://rabbit/", "amqp://rabbit:5672"),
            (
                "amqp://us%40er:s3cr3t@rabbit/%2f?heartbeat=5",
                "amqp://rabbit:5672",
            ),
        ] {
            let server = Server::parse(url).unwrap();
            assert_eq!(server.to_string(), shown);
            assert_eq!(format!("{server:?}"), format!("Server({shown})"));
            let fault = server.unreachable("user 'user' with s3cr3t was refused");
            let repeated = fault.message.contains("s3cr3t");
            assert!(!repeated || !url.contains("s3cr3t"), "{fault}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused_without_being_repeated() {
        for url in [
            "",
            "rabbit",
            "http://user:s3cr3t@rabbit",
            "amqp:s3cr3t",
            "amqp://user:s3cr3t@",
            "amqp://user:s3cr3t@rabbit:port",
            "amqp://user:s3cr3t/x@rabbit",
            "amqp://user:s3cr3t@[::1]:5672",
            "amqp://user:s3cr3t@rabbit?heartbeat=often",
        ] {
            let fault = Server::parse(url).unwrap_err();
            assert!(!fault.message.contains("s3cr3t"), "{url}: {fault}");
        }
    }
}
