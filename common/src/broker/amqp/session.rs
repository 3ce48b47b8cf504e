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
use tokio::sync::Mutex;
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

    /// What went wrong, without anybody's password in it.
    fn scrub(&self, text: &str) -> String {
        let user = &self.uri.authority.userinfo;
        let mut text = text.to_owned();
        for secret in [&user.password, &user.username] {
            // A secret of a letter or two would only garble the text.
            if secret.len() > 2 {
                text = text.replace(secret.as_str(), "(hidden)");
            }
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
            let jobs_were_missing = match topology::ready(&looking, names.jobs()).await {
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
        // Several calls, on a broker that has perhaps just started.
        match tokio::time::timeout(limit * 2, this).await {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(error)) => {
                let mut refused = Refused::new(what, &error);
                if is_soft(&error, &AMQPSoftError::PRECONDITIONFAILED) {
                    refused.message.push_str(
                        "; another version made it: delete it once it is empty, or choose another --queue-prefix",
                    );
                }
                Err(refused)
            }
            Err(_) => Err(Refused::passing(format!("{what}: no answer"))),
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
    purpose: &'static str,
    server: Server,
    names: Names,
    limit: Duration,
    closed: CancellationToken,
    state: Mutex<State>,
}

struct State {
    session: Option<Arc<Session>>,
    pauses: Box<dyn Iterator<Item = Duration> + Send>,
    connected_before: bool,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
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
            purpose,
            server,
            names,
            limit,
            closed,
            state: Mutex::new(State {
                session: None,
                pauses: pauses(),
                connected_before: false,
            }),
        }
    }

    /// The connection, made again where it is not well; for ever, or until `deadline`.
    pub(super) async fn session(&self, deadline: Option<Instant>) -> Result<Arc<Session>, Fault> {
        let mut last = None;
        let session = self.session_at_last(&mut last, deadline.is_some());
        let gone = || Fault::infra("the connection to the broker was closed");
        if self.closed.is_cancelled() {
            return Err(gone());
        }
        let reached = async {
            match deadline {
                None => Ok(session.await),
                Some(deadline) => tokio::time::timeout_at(deadline.into(), session).await,
            }
        };
        let reached = tokio::select! {
            reached = reached => reached,
            () = self.closed.cancelled() => return Err(gone()),
        };
        match reached {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(refused)) => Err(self.server.unreachable(&refused)),
            Err(_) => {
                let last = last.unwrap_or_else(|| "no answer".to_owned());
                Err(self.server.unreachable(&last))
            }
        }
    }

    /// Gives up only where waiting cannot help, and only before the first success: later, whoever
    /// changed a password will change it back, and a worker is to wait for that.
    async fn session_at_last(
        &self,
        last: &mut Option<String>,
        may_give_up: bool,
    ) -> Result<Arc<Session>, String> {
        // One connects; the others wait here for it.
        let mut state = self.state.lock().await;
        if let Some(session) = state.session.take() {
            if session.usable() {
                state.session = Some(Arc::clone(&session));
                return Ok(session);
            }
            session.fail("it was lost");
            if session.opened.elapsed() >= GOOD_LIFE {
                state.pauses = pauses();
            }
            let pause = state.pauses.next().unwrap_or(LONGEST_PAUSE);
            tokio::time::sleep(pause).await;
        }
        loop {
            let opened = Session::open(&self.server, &self.names, self.purpose, self.limit).await;
            let refused = match opened {
                Ok(session) => {
                    self.report(&session, state.connected_before);
                    let session = Arc::new(session);
                    state.connected_before = true;
                    state.session = Some(Arc::clone(&session));
                    return Ok(session);
                }
                Err(refused) => refused,
            };
            let message = self.server.scrub(&refused.message);
            if refused.lasting && may_give_up && !state.connected_before {
                return Err(message);
            }
            let pause = state.pauses.next().unwrap_or(LONGEST_PAUSE);
            warn!(
                operation = "broker",
                pause_seconds = pause.as_secs_f64(),
                "{}: {message}; trying again in {:.1} s",
                self.server,
                pause.as_secs_f64()
            );
            *last = Some(message);
            tokio::time::sleep(pause).await;
        }
    }

    fn report(&self, session: &Session, connected_before: bool) {
        if connected_before {
            info!(
                operation = "broker",
                "{}: connected again ({})", self.server, self.purpose
            );
        }
        if connected_before && session.jobs_were_missing {
            error!(
                operation = "broker",
                "{}: the jobs queue was gone, and what was in it; it was made anew. Run the producer again: it finds what is missing",
                self.server
            );
        }
    }

    /// Closes the connection for good; [`Link::closed`] is cancelled before.
    pub(super) async fn close(&self) {
        let session = self.state.lock().await.session.take();
        if let Some(session) = session {
            session.failed.cancel();
            close(&session.connection).await;
        }
    }
}

fn pauses() -> Box<dyn Iterator<Item = Duration> + Send> {
    Box::new(retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE))
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
            assert!(!fault.message.contains("s3cr3t"), "{fault}");
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
