//! Dead letters, read one by one.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicQosOptions};
use lapin::{Acker, Channel};

use super::properties::{count_of, header, id_of, time_of};
use super::session::{Session, within};
use super::shared::Shared;
use crate::broker::{DeadLetter, Receipt, Settlement};
use crate::fault::Fault;
use crate::job::Job;

/// As many as there are now, each taken when it is asked for, on a channel that gives back what is
/// left when it is closed.
pub(super) async fn letters(
    shared: Arc<Shared>,
) -> Result<BoxStream<'static, Result<DeadLetter, Fault>>, Fault> {
    let deadline = shared.deadline();
    let count = shared
        .depth(&shared.options.names.dead, deadline)
        .await?
        .ready;
    let opening = shared.consuming.call(deadline, async |session| {
        let channel = session.channel().await?;
        Ok((session, channel))
    });
    let (session, channel) = opening.await?;
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
        self: &Arc<Self>,
        session: &Session,
        channel: &Channel,
    ) -> Result<Option<DeadLetter>, Fault> {
        let get = channel.basic_get(self.options.names.dead.clone(), BasicGetOptions::default());
        let got = within(self.options.call_limit, "taking a dead letter", get).await;
        let Some(message) = got.map_err(|error| self.consuming.given_up(session, &error))? else {
            return Ok(None);
        };
        let message = message.delivery;
        let id = match id_of(&message.properties) {
            "" => DeadLetter::payload_id(&message.data),
            id => id.to_owned(),
        };
        let receipt = LetterReceipt {
            shared: Arc::clone(self),
            acker: message.acker,
            channel: channel.clone(),
        };
        Ok(Some(DeadLetter::new(
            id,
            Job::decode(&message.data).map_err(|fault| fault.message),
            message.data,
            count_of(message.properties.headers().as_ref(), header::ATTEMPT),
            time_of(&message.properties),
            Box::new(receipt),
        )))
    }
}

/// Dropped, it does nothing: a letter that was given back at once would be the next one shown.
struct LetterReceipt {
    shared: Arc<Shared>,
    acker: Acker,
    channel: Channel,
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
        // Nothing answers an acknowledgement. A later question on the same channel (no limit, as
        // before) is answered only when it was taken.
        let acknowledged = async {
            let there = self.acker.ack(BasicAckOptions::default()).await?;
            let unlimited = BasicQosOptions::default();
            self.channel.basic_qos(0, unlimited).await?;
            Ok(there)
        };
        self.shared
            .settled("removing a dead letter", acknowledged)
            .await
    }
}
