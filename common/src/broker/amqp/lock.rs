//! The lock: a queue that only its owner's connection may touch, and that goes with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::session::Link;
use super::shared::Shared;
use super::subscription::{Queue, Subscription, Unattached};
use crate::broker::ProducerLock;
use crate::fault::Fault;

/// Takes the lock; `None` while another has it.
///
/// It has a connection of its own: to its own connection the broker never refuses it, so two
/// producers in one process would both have it.
pub(super) async fn take(shared: &Arc<Shared>) -> Result<Option<ProducerLock>, Fault> {
    let released = shared.closed.child_token();
    let release = released.clone().drop_guard();
    let link = Link::new("lock", &shared.options, &shared.outage, released);
    let mut queue = Subscription::new(shared, &Arc::new(link), Queue::Lock);
    match queue.attach(Some(shared.deadline())).await {
        Ok(()) => {}
        Err(Unattached::Fault(fault)) => return Err(fault),
        Err(Unattached::Locked | Unattached::Missing) => return Ok(None),
    }
    let lost = CancellationToken::new();
    tokio::spawn(keep(queue, lost.clone(), shared.options.lock_grace));
    Ok(Some(ProducerLock::new(lost, release)))
}

/// Takes a lock that went with its connection again, until it is released; cancels `lost` where
/// another was faster.
///
/// A broker that has not noticed the loss refuses the lock to its owner: for a while a refusal
/// means nothing.
async fn keep(mut queue: Subscription, lost: CancellationToken, grace: Duration) {
    loop {
        // Nothing comes through it.
        while queue.receive().await.is_some() {}
        let gone = Instant::now();
        debug!(
            operation = "lock",
            "the producer's lock went with its connection"
        );
        loop {
            match queue.attach(None).await {
                Ok(()) => break,
                // Released, or the broker was closed.
                Err(Unattached::Fault(_)) => return,
                Err(_) if gone.elapsed() < grace => {}
                Err(_) => {
                    error!(
                        operation = "lock",
                        "another producer has taken the lock meanwhile"
                    );
                    lost.cancel();
                    return;
                }
            }
        }
    }
}
