//! Dead letters, looked at one by one.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicQosOptions};
use lapin::{Acker, Channel};

use super::session::{Session, within};
use super::{Shared, count_of, header, id_of, time_of};
use crate::broker::{DeadLetter, Receipt, Settlement};
use crate::fault::Fault;
use crate::job::Job;

/// As many as there are now, on a channel that gives back what is left when it is closed.
pub(super) async fn letters(
    shared: Arc<Shared>,
) -> Result<BoxStream<'static, Result<DeadLetter, Fault>>, Fault> {
    let deadline = shared.deadline();
    let count = shared.look(shared.names.dead(), deadline).await?.ready;
    let session = shared.consuming.session(Some(deadline)).await?;
    let channel = session.channel().await;
    let channel = channel.map_err(|why| shared.server.unreachable(&why))?;
    let stream = stream::unfold(Some((session, channel, count)), move |state| {
        let shared = Arc::clone(&shared);
        async move {
            let (session, channel, left) = state?;
            let next = shared.letter(&session, &channel).await.transpose()?;
            // A broken connection has given back all of them: to go on would show them twice.
            let state = (next.is_ok() && left > 1).then(|| (session, channel, left - 1));
            Some((next, state))
        }
    });
    Ok(stream
        .take(usize::try_from(count).unwrap_or(usize::MAX))
        .boxed())
}

impl Shared {
    async fn letter(
        &self,
        session: &Arc<Session>,
        channel: &Channel,
    ) -> Result<Option<DeadLetter>, Fault> {
        let get = channel.basic_get(self.names.dead(), BasicGetOptions::default());
        let got = within(self.options.call_limit, "taking a dead letter", get).await;
        let got = got.map_err(|why| {
            session.fail(&why);
            self.server.unreachable(&why)
        })?;
        let Some(message) = got else {
            return Ok(None);
        };
        let properties = &message.delivery.properties;
        let payload = message.delivery.data.clone();
        let job = Job::decode(&payload).map_err(|fault| fault.message);
        let id = match id_of(properties) {
            "" => DeadLetter::payload_id(&payload),
            id => id.to_owned(),
        };
        let attempt = count_of(properties.headers().as_ref(), header::ATTEMPT);
        let at = time_of(properties);
        let receipt = LetterReceipt {
            acker: message.delivery.acker,
            channel: channel.clone(),
            server: self.server.clone(),
            limit: self.options.call_limit,
        };
        Ok(Some(DeadLetter::new(
            id,
            job,
            payload,
            attempt,
            at,
            Box::new(receipt),
        )))
    }
}

/// Dropped, it does nothing: a letter that was given back at once would be the next one shown.
struct LetterReceipt {
    acker: Acker,
    channel: Channel,
    server: super::session::Server,
    limit: std::time::Duration,
}

impl fmt::Debug for LetterReceipt {
    /// Without the channel, which shows the user's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LetterReceipt").finish_non_exhaustive()
    }
}

#[async_trait]
impl Receipt for LetterReceipt {
    async fn settle(self: Box<Self>, _: Settlement) -> Result<(), Fault> {
        // Nothing answers an acknowledgement. What is asked for after it on the same channel (no
        // limit, as ever) is answered only when it was taken.
        let acknowledged = async {
            let there = self.acker.ack(BasicAckOptions::default()).await?;
            self.channel
                .basic_qos(0, BasicQosOptions::default())
                .await?;
            Ok(there)
        };
        match within(self.limit, "removing a dead letter", acknowledged).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(self
                .server
                .unreachable("the connection was lost; the letter is not removed")),
            Err(why) => Err(self.server.unreachable(&why)),
        }
    }
}
