//! Connections: made, watched, given up and made again.
//!
//! lapin's own recovery is not used: it hung in three of three broker restarts under load. Here a
//! connection that failed in any way is thrown away whole, and the next one who needs it makes a
//! new one: back off, connect, declare.

use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::options::ConfirmSelectOptions;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::topology::{self, Names};
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

    /// The fault of a broker that cannot be used.
    pub(super) fn unreachable(&self, why: &str) -> Fault {
        Fault::infra(format!(
            "the broker {self} cannot be used: {}",
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

/// One connection on which everything is declared.
pub(super) struct Session {
    connection: Arc<Connection>,
    /// In confirm mode.
    pub(super) publishing: Channel,
    /// Cancelled when the connection was given up.
    pub(super) failed: CancellationToken,
    opened: Instant,
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
                publishing: channel,
                failed: CancellationToken::new(),
                opened: Instant::now(),
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
        !self.failed.is_cancelled()
            && self.connection.status().connected()
            && self.publishing.status().connected()
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
    pub(super) async fn channel(&self, limit: Duration) -> Result<Channel, String> {
        within(limit, "opening a channel", self.connection.create_channel()).await
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
        Ok(Err(error)) => Err(Refused::new("connecting", &error)),
        Err(_) => {
            let limit = limit.as_secs();
            Err(Refused::passing(format!(
                "connecting: no answer for {limit} s"
            )))
        }
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
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        if let Some(lost) = lost {
            lost.fail("it was lost");
            // One that breaks as soon as it is made is not made again and again without a pause.
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            let hasty = lost.opened.elapsed() < GOOD_LIFE;
            tokio::time::sleep(if hasty { pause * 4 } else { pause }).await;
        }
        loop {
            let opened = Session::open(&self.server, &self.names, self.purpose, self.limit).await;
            let refused = match opened {
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
