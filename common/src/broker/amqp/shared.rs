//! What all parts of the broker share.

use std::sync::Arc;
use std::time::Instant;

use lapin::types::ShortString;
use tokio_util::sync::CancellationToken;

use super::options::Options;
use super::session::{Link, Outage, Session};
use super::topology::QueueDepth;
use crate::fault::Fault;

/// What streams, deliveries and the broker itself share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) publishing: Link,
    pub(super) consuming: Arc<Link>,
    pub(super) outage: Arc<Outage>,
    /// Cancelled by `close`, and when the broker is dropped.
    pub(super) closed: CancellationToken,
}

impl Shared {
    /// When a call that begins now must have ended.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.options.patience
    }

    /// The depth of `queue`, asked by the publishing connection: if the question breaks the
    /// connection, the loans of the other one stay.
    pub(super) async fn depth(
        &self,
        queue: &ShortString,
        deadline: Instant,
    ) -> Result<QueueDepth, Fault> {
        let asking = async |session: Arc<Session>| session.depth(deadline, queue).await;
        self.publishing.call(deadline, asking).await
    }
}
