//! Announcements: from one worker to all that listen, kept for nobody.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use time::OffsetDateTime;
use tracing::{debug, warn};

use super::Shared;
use super::publish::Message;
use super::session::{Session, within};
use super::topology::kind;
use crate::broker::Notice;
use crate::fault::Fault;
use crate::retry;

/// Pauses before it is tried again to listen grow from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl Shared {
    /// The message of a notice.
    pub(super) fn announcement(&self, notice: &Notice) -> Result<Message, Fault> {
        Ok(Message::new(
            self.names.hosts(),
            "".into(),
            kind::HOST,
            "",
            OffsetDateTime::now_utc(),
            serde_json::to_vec(notice).map_err(Fault::infra)?,
        )
        .for_whoever_listens())
    }
}

/// What is announced from now on, over as many connections as it takes. What is announced while
/// there is none is missed.
pub(super) async fn announcements(
    shared: Arc<Shared>,
) -> Result<BoxStream<'static, Notice>, Fault> {
    let session = shared.consuming.session(Some(shared.deadline())).await?;
    let mut listening = Listening {
        shared,
        live: None,
        pauses: pauses(),
    };
    let attached = listening.attach(session).await;
    attached.map_err(|why| listening.shared.server.unreachable(&why))?;
    let stream = stream::unfold(listening, |mut listening| async move {
        let notice = listening.next().await?;
        Some((notice, listening))
    });
    Ok(stream.boxed())
}

struct Listening {
    shared: Arc<Shared>,
    live: Option<Live>,
    /// Before it is tried again to listen.
    pauses: Pauses,
}

type Pauses = Box<dyn Iterator<Item = Duration> + Send>;

fn pauses() -> Pauses {
    Box::new(retry::pauses(SHORTEST_PAUSE, LONGEST_PAUSE))
}

struct Live {
    session: Arc<Session>,
    /// Closes itself when it is dropped, and takes its queue with it.
    _channel: Channel,
    consumer: Consumer,
}

impl Listening {
    /// Where it fails the connection stays as it is: jobs are on loan through it, and they matter
    /// more.
    async fn attach(&mut self, session: Arc<Session>) -> Result<(), String> {
        let limit = self.shared.options.call_limit;
        let attached = async {
            let channel = session.channel().await?;
            let attach = async {
                // Of this connection alone, with a name that the broker chooses; it goes with it.
                let own = QueueDeclareOptions {
                    exclusive: true,
                    auto_delete: true,
                    ..Default::default()
                };
                let queue = channel
                    .queue_declare("".into(), own, FieldTable::default())
                    .await?;
                let (name, hosts) = (queue.name().clone(), self.shared.names.hosts());
                let (bind, none) = (QueueBindOptions::default(), FieldTable::default());
                channel
                    .queue_bind(name.clone(), hosts, "".into(), bind, none)
                    .await?;
                let consume = BasicConsumeOptions {
                    no_ack: true,
                    ..Default::default()
                };
                channel
                    .basic_consume(name, "".into(), consume, FieldTable::default())
                    .await
            };
            let consumer = within(limit, "listening to announcements", attach).await?;
            Ok::<_, String>((channel, consumer))
        };
        let (channel, consumer) = attached.await?;
        self.pauses = pauses();
        self.live = Some(Live {
            session,
            _channel: channel,
            consumer,
        });
        Ok(())
    }

    /// `None` when the broker was closed.
    async fn next(&mut self) -> Option<Notice> {
        loop {
            let Some(live) = &mut self.live else {
                let session = self.shared.consuming.session(None).await.ok()?;
                if let Err(why) = self.attach(session).await {
                    self.lost(&why).await;
                }
                continue;
            };
            let incoming = tokio::select! {
                incoming = live.consumer.next() => incoming,
                () = live.session.failed.cancelled() => None,
                () = self.shared.closed.cancelled() => return None,
            };
            match incoming {
                Some(Ok(incoming)) => match serde_json::from_slice(&incoming.data) {
                    Ok(notice) => return Some(notice),
                    // A later version's.
                    Err(error) => debug!(operation = "announcement", "not understood: {error}"),
                },
                Some(Err(error)) => self.lost(&error.to_string()).await,
                None => self.lost("the broker ended the consumer").await,
            }
        }
    }

    async fn lost(&mut self, why: &str) {
        self.live = None;
        let pause = self.pauses.next().unwrap_or(LONGEST_PAUSE);
        warn!(
            operation = "announcement",
            "announcements are not heard: {why}; trying again in {:.1} s",
            pause.as_secs_f64()
        );
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.shared.closed.cancelled() => {}
        }
    }
}
