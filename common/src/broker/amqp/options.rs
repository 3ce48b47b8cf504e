//! Where the broker is, and how long to wait for it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use lapin::uri::{AMQPScheme, AMQPUri};

use super::topology::{CONSUMER_TIMEOUT, Names};
use crate::fault::Fault;

/// Seconds between heartbeats; a peer that is silent for two of them is gone.
const HEARTBEAT: u16 = 20;

/// How to use a RabbitMQ.
#[derive(Clone, Debug)]
pub struct Options {
    pub(super) server: Server,
    pub(super) names: Names,
    /// How long to wait for a broker that is away, or full, before a call fails. Streams wait for
    /// ever.
    pub patience: Duration,
    /// How long the broker may take to answer one call. An answer can be lost for ever.
    pub call_limit: Duration,
    /// How long a producer that lost its connection asks for its lock again when it is refused:
    /// until the broker has noticed the loss, it is the lost connection that holds the lock.
    pub lock_grace: Duration,
    /// The broker's `consumer_timeout`, RabbitMQ's default of 30 minutes unless set. It cannot be
    /// read over AMQP: a server with a lower one takes jobs back while they are worked on.
    pub loan_limit: Duration,
}

impl Options {
    /// For the broker at `url`, with names that begin with `prefix`.
    ///
    /// # Errors
    /// If either is malformed. No error repeats the URL.
    pub fn new(url: &str, prefix: &str) -> Result<Self, Fault> {
        let server = Server::parse(url)?;
        Ok(Self {
            names: Names::new(prefix)?,
            patience: Duration::from_secs(300),
            call_limit: Duration::from_secs(10),
            lock_grace: server.notices_within(),
            loan_limit: CONSUMER_TIMEOUT,
            server,
        })
    }
}

/// The broker's address and credentials.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) uri: AMQPUri,
}

impl Server {
    /// Parses `amqp://…` or `amqps://…`. No error repeats any of it, since it holds a password.
    fn parse(url: &str) -> Result<Self, Fault> {
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
    fn notices_within(&self) -> Duration {
        let heartbeat = self.uri.query.heartbeat.unwrap_or(HEARTBEAT);
        Duration::from_secs(10) + 4 * Duration::from_secs(heartbeat.into())
    }

    /// The fault of a broker that cannot be used.
    pub(super) fn unreachable(&self, why: impl fmt::Display) -> Fault {
        let why = self.scrub(&why.to_string());
        Fault::infra(format!("the broker {self} cannot be used: {why}"))
    }

    /// Removes user name and password from an error.
    pub(super) fn scrub(&self, text: &str) -> String {
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
