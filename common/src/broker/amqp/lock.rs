//! The lock: a queue that only its owner's connection may touch, and that goes with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::Shared;
use super::session::{close, connect_for_lock, is_soft};
use crate::broker::ProducerLock;
use crate::fault::Fault;
use crate::retry;

/// Pauses before the lock is taken again grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The lock in hand.
#[derive(Debug)]
struct Owned {
    connection: Connection,
    /// Closes itself when it is dropped.
    _channel: Channel,
    /// Nothing ever comes through it; it ends with the queue or the connection.
    watching: Consumer,
}

/// Takes the lock, unless another has it.
///
/// It has a connection of its own: to its own connection the broker never refuses it, so two
/// producers in one process would both be the one.
pub(super) async fn take(shared: &Arc<Shared>) -> Result<Option<ProducerLock>, Fault> {
    let deadline = Instant::now() + shared.options.patience;
    let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
    loop {
        let fault = match shared.ask().await {
            Ok(owned) => return Ok(owned.map(|owned| keep(shared, owned))),
            Err(fault) => fault,
        };
        let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
        if Instant::now() + pause >= deadline {
            return Err(fault);
        }
        tokio::time::sleep(pause).await;
    }
}

/// Watches over a lock until it is dropped: takes it again after a lost connection, and says so
/// where another was faster.
fn keep(shared: &Arc<Shared>, mut owned: Owned) -> ProducerLock {
    let (lost, released) = (CancellationToken::new(), CancellationToken::new());
    let lock = ProducerLock::new(lost.clone(), released.clone().drop_guard());
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = released.cancelled() => return close(&owned.connection).await,
                () = shared.closed.cancelled() => return close(&owned.connection).await,
                _ = owned.watching.next() => {}
            }
            warn!(
                operation = "lock",
                "the producer's lock went with its connection: taking it again"
            );
            let again = async {
                close(&owned.connection).await;
                shared.ask_again().await
            };
            let asked = tokio::select! {
                () = released.cancelled() => return,
                () = shared.closed.cancelled() => return,
                asked = again => asked,
            };
            match asked {
                Some(again) => owned = again,
                None => {
                    error!(
                        operation = "lock",
                        "another producer has taken the lock meanwhile"
                    );
                    lost.cancel();
                    return;
                }
            }
        }
    });
    lock
}

impl Shared {
    /// Asks after a lost connection, for as long as it takes; `None` where somebody else has it.
    ///
    /// A broker that has not noticed the loss refuses the lock to its owner: for a while a refusal
    /// says nothing.
    async fn ask_again(&self) -> Option<Owned> {
        let lost = Instant::now();
        let mut pauses = retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            match self.ask().await {
                Ok(Some(owned)) => return Some(owned),
                Ok(None) if lost.elapsed() >= self.options.lock_grace => return None,
                Ok(None) => {}
                Err(fault) => warn!(operation = "lock", "{fault}"),
            }
            tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }

    /// Asks once; `None` where somebody else has it.
    async fn ask(&self) -> Result<Option<Owned>, Fault> {
        let limit = self.options.call_limit;
        let connection = connect_for_lock(&self.server, &self.names, limit).await?;
        let asked = async {
            let channel = connection.create_channel().await?;
            // Exclusive queues must be classic and transient; 4.x has no quarrel with that.
            let options = QueueDeclareOptions {
                exclusive: true,
                ..Default::default()
            };
            let declared = channel
                .queue_declare(self.names.producer(), options, FieldTable::default())
                .await;
            match declared {
                Ok(_) => {}
                Err(error) if is_soft(&error, &AMQPSoftError::RESOURCELOCKED) => return Ok(None),
                Err(error) => return Err(error),
            }
            let consume = BasicConsumeOptions::default();
            let producer = self.names.producer();
            let watching = channel
                .basic_consume(producer, "".into(), consume, FieldTable::default())
                .await?;
            Ok(Some((channel, watching)))
        };
        let asked = super::session::within(limit, "taking the producer's lock", asked).await;
        match asked {
            Ok(Some((channel, watching))) => Ok(Some(Owned {
                connection,
                _channel: channel,
                watching,
            })),
            Ok(None) => {
                close(&connection).await;
                Ok(None)
            }
            Err(why) => {
                close(&connection).await;
                Err(self.server.unreachable(&why))
            }
        }
    }
}
