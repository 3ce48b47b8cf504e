//! Bodies, headers and properties of messages.

use lapin::types::{AMQPValue, FieldTable};
use time::OffsetDateTime;

use crate::fault::Fault;

/// Names of headers.
pub(super) mod header {
    pub(in super::super) const ATTEMPT: &str = "attempt";
    pub(in super::super) const WAITS: &str = "waits";
    /// How often the job had come back before it was last set aside.
    pub(in super::super) const RETURNS: &str = "returns";
    /// Why a worker dead-lettered the message.
    pub(in super::super) const CAUSE: &str = "cause";
    /// Set by quorum queues: how often the message came back since then.
    pub(in super::super) const DELIVERY_COUNT: &str = "x-delivery-count";
}

/// RabbitMQ's word for the cause of death of a message that a consumer rejected.
pub(super) const REJECTED: &str = "rejected";

pub(super) fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(value).map_err(Fault::infra)
}

/// A header that is a count; absent or odd ones count as 0.
pub(super) fn count_of(headers: Option<&FieldTable>, name: &str) -> u32 {
    let value = headers.and_then(|headers| headers.inner().get(name));
    value
        .and_then(integer)
        .map_or(0, |count| u32::try_from(count.max(0)).unwrap_or(u32::MAX))
}

/// An integer of whatever width the broker sent it in.
pub(super) fn integer(value: &AMQPValue) -> Option<i64> {
    Some(match value {
        AMQPValue::ShortShortInt(n) => i64::from(*n),
        AMQPValue::ShortShortUInt(n) => i64::from(*n),
        AMQPValue::ShortInt(n) => i64::from(*n),
        AMQPValue::ShortUInt(n) => i64::from(*n),
        AMQPValue::LongInt(n) => i64::from(*n),
        AMQPValue::LongUInt(n) => i64::from(*n),
        AMQPValue::LongLongInt(n) => *n,
        _ => return None,
    })
}

/// The property `timestamp`.
pub(super) fn time_of(properties: &lapin::BasicProperties) -> Option<OffsetDateTime> {
    let seconds = (*properties.timestamp())?;
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()
}

pub(super) fn id_of(properties: &lapin::BasicProperties) -> &str {
    properties
        .message_id()
        .as_ref()
        .map_or("", |id| id.as_str())
}
