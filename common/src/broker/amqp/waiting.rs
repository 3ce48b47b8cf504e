//! Jobs that wait, taken one by one from wherever they are.
//!
//! Not by a consumer: it would count as a worker, and what the queue still sends it while it is
//! cancelled comes back as a delivery that failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt, TryStreamExt};
use lapin::Channel;
use lapin::options::BasicGetOptions;
use lapin::types::ShortString;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::session::{Session, within};
use super::shared::Shared;
use super::topology::PAUSES;
use crate::broker::Delivery;
use crate::fault::Fault;

/// How many jobs are asked for at a time.
const CHANNELS: usize = 16;

/// The jobs that wait now, in the order in which a job moves on, so that none is passed over.
pub(super) fn jobs(
    shared: Arc<Shared>,
    until: CancellationToken,
) -> BoxStream<'static, Result<Delivery, Fault>> {
    let names = &shared.options.names;
    let pauses = PAUSES.map(|pause| names.retry(pause));
    let queues: Vec<_> = pauses.into_iter().chain([names.jobs.clone()]).collect();
    let taken = stream::iter(queues).then(move |queue| {
        let (shared, until) = (Arc::clone(&shared), until.clone());
        async move { jobs_of(shared, queue, until).await }
    });
    taken.try_flatten().boxed()
}

/// As many jobs as the queue holds now: those that are put back come behind them.
async fn jobs_of(
    shared: Arc<Shared>,
    queue: ShortString,
    until: CancellationToken,
) -> Result<impl Stream<Item = Result<Delivery, Fault>> + Send, Fault> {
    let deadline = shared.deadline();
    let count = shared.depth(&queue, deadline).await?.ready;
    let channels = CHANNELS.min(usize::try_from(count).unwrap_or(CHANNELS));
    let opening = shared.consuming.call(deadline, async |session| {
        let opening = (0..channels).map(|_| session.channel());
        let channels = futures::future::try_join_all(opening).await?;
        Ok((session, channels))
    });
    let (session, channels) = opening.await?;
    let left = Arc::new(AtomicU64::new(count));
    let takers = channels.into_iter().map(|channel| Taker {
        shared: Arc::clone(&shared),
        session: Arc::clone(&session),
        channel,
        queue: queue.clone(),
        left: Arc::clone(&left),
        until: until.clone(),
    });
    let takers = takers.map(|taker| {
        let taken = stream::try_unfold(taker, async |taker| {
            Ok(taker.take().await?.map(|delivery| (delivery, taker)))
        });
        taken.boxed()
    });
    Ok(stream::select_all(takers))
}

/// One of those that share a queue.
struct Taker {
    shared: Arc<Shared>,
    session: Arc<Session>,
    channel: Channel,
    queue: ShortString,
    /// How many jobs are left to take.
    left: Arc<AtomicU64>,
    until: CancellationToken,
}

impl Taker {
    async fn take(&self) -> Result<Option<Delivery>, Fault> {
        let one_less = |left: u64| left.checked_sub(1);
        let order = Ordering::Relaxed;
        while !self.until.is_cancelled() && self.left.fetch_update(order, order, one_less).is_ok() {
            let options = BasicGetOptions::default();
            let get = self.channel.basic_get(self.queue.clone(), options);
            let got = within(self.shared.options.call_limit, "taking a job", get).await;
            let got = got.map_err(|error| self.shared.consuming.given_up(&self.session, &error));
            let Some(message) = got? else {
                // Others take jobs too.
                return Ok(None);
            };
            let (channel, runtime) = (self.channel.clone(), Handle::current());
            let read = self
                .shared
                .read(&self.queue, message.delivery, channel, &runtime);
            if let Some(delivery) = read.await {
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }
}
