//! Which broker to use.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::SharedBroker;
use super::amqp::AmqpBroker;
use super::amqp::options::Options;
use crate::exit::{self, ExitError};
use crate::text::unsubstituted;

/// Which broker to use.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Broker")]
pub struct BrokerConfig {
    /// RabbitMQ's address, `amqp://USER:PASSWORD@HOST:PORT/VHOST` or `amqps://…`.
    // Any text is accepted here: clap repeats a value that it refuses, and this holds a password.
    #[arg(
        long,
        env = "BROKER_URL",
        hide_env_values = true,
        value_name = "URL",
        value_parser = Secret::parse
    )]
    pub broker_url: Option<Secret>,
    /// Prefix of the names of exchanges and queues; fleets that share a broker need different ones.
    #[arg(
        long,
        env = "QUEUE_PREFIX",
        value_name = "PREFIX",
        default_value = "repofleet"
    )]
    pub queue_prefix: String,
}

impl BrokerConfig {
    /// Connects to the broker, if one is named; gives up after `patience`.
    ///
    /// # Errors
    /// [`exit::USAGE`] for a malformed URL or prefix, [`exit::UNAVAILABLE`] if the broker cannot be
    /// reached or refuses.
    pub async fn connect(&self, patience: Duration) -> Result<Option<SharedBroker>, ExitError> {
        let Some(url) = &self.broker_url else {
            return Ok(None);
        };
        if let Some(why) = unsubstituted("--broker-url", &url.0) {
            return Err(ExitError::new(exit::USAGE, why));
        }
        let mut options = Options::new(&url.0, &self.queue_prefix)
            .map_err(|fault| ExitError::new(exit::USAGE, fault))?;
        options.patience = patience;
        let broker = AmqpBroker::connect(options)
            .await
            .map_err(|fault| ExitError::new(exit::UNAVAILABLE, fault))?;
        Ok(Some(Arc::new(broker)))
    }
}

/// A text that no log or error shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl Secret {
    fn parse(text: &str) -> Result<Self, std::convert::Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}
