//! Notices: from one process to all that listen, kept for nobody.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use lapin::options::BasicAckOptions;
use tracing::debug;

use super::properties::json;
use super::publish::Message;
use super::shared::Shared;
use super::subscription::{Queue, Subscription};
use super::topology::kind;
use crate::broker::Notice;
use crate::fault::Fault;

impl Shared {
    /// The message of a notice.
    pub(super) fn notice_message(&self, notice: &Notice) -> Result<Message, Fault> {
        let body = json(notice)?;
        let exchange = self.options.names.notices.clone();
        Ok(Message::new(exchange, "", kind::NOTICE, "", body).transient())
    }
}

/// What is announced from now on. What is announced while there is no connection is missed.
pub(super) async fn announcements(
    shared: &Arc<Shared>,
) -> Result<BoxStream<'static, Notice>, Fault> {
    let subscription = Subscription::start(shared, Queue::Notices).await?;
    let stream = stream::unfold(subscription, async |mut subscription| {
        loop {
            let incoming = subscription.next().await?;
            // The next one comes for it. Where it fails, the queue has gone with its connection.
            _ = incoming.acker.ack(BasicAckOptions::default()).await;
            match Notice::parse(&incoming.data) {
                Ok(notice) => return Some((notice, subscription)),
                // A later version's.
                Err(error) => debug!(operation = "announcement", "not understood: {error}"),
            }
        }
    });
    Ok(stream.boxed())
}
