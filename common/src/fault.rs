//! Errors sorted by what is to be done about them.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use strum::{AsRefStr, Display, EnumString, VariantArray};

/// The class of a fault. It alone decides what happens next
/// ([`decide`](crate::outcome::decide)). Reports list classes in this order.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    Display,
    EnumString,
    AsRefStr,
    VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum FaultKind {
    /// May well pass: reset, early end, 5xx, stall, name not resolved. Tried again.
    Transient,
    /// The host asks for patience: 429, a bare 403, Retry-After. The host is left alone a while.
    Throttled,
    /// Not there for us, and asking again will not help: 404, 410, 451, 401.
    Gone,
    /// Our own rules forbid the source: scheme, host, address or redirect not allowed.
    Refused,
    /// Over the byte budget or the time limit.
    TooLarge,
    /// The slot crashed, or its memory or CPU limit ended it.
    Killed,
    /// The message does not decode.
    Poison,
    /// The machine, broker or store is at fault, not the repository: work pauses until they are
    /// well. Ends a job only where they look well each time and this job alone goes on failing.
    Infra,
    /// The feed's entry names no usable repository.
    InvalidEntry,
}

/// Something that went wrong, classified where it was first seen.
///
/// Made at the call that failed: `.map_err(Fault::transient)?`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What to do about it.
    pub kind: FaultKind,
    /// What happened, for a person.
    pub message: String,
    /// How long the host asked us to wait ([`FaultKind::Throttled`] only); `None` where it turned us
    /// away without asking.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<Duration>,
}

impl Fault {
    /// A fault of class `kind`.
    pub fn new(kind: FaultKind, message: impl fmt::Display) -> Self {
        // The alternate form of an `anyhow::Error` is its whole chain.
        let message = format!("{message:#}");
        Self {
            kind,
            message,
            retry_after: None,
        }
    }

    /// See [`FaultKind::Transient`].
    pub fn transient(message: impl fmt::Display) -> Self {
        Self::new(FaultKind::Transient, message)
    }

    /// See [`FaultKind::Throttled`]. `retry_after` is what the host asked for, if it did.
    pub fn throttled(message: impl fmt::Display, retry_after: Option<Duration>) -> Self {
        Self {
            retry_after,
            ..Self::new(FaultKind::Throttled, message)
        }
    }

    /// See [`FaultKind::Gone`].
    pub fn gone(message: impl fmt::Display) -> Self {
        Self::new(FaultKind::Gone, message)
    }

    /// See [`FaultKind::Refused`].
    pub fn refused(message: impl fmt::Display) -> Self {
        Self::new(FaultKind::Refused, message)
    }

    /// See [`FaultKind::TooLarge`].
    pub fn too_large(message: impl fmt::Display) -> Self {
        Self::new(FaultKind::TooLarge, message)
    }

    /// See [`FaultKind::Killed`].
    pub fn killed(message: impl fmt::Display) -> Self {
        Self::new(FaultKind::Killed, message)
    }

    /// See [`FaultKind::Poison`].
    pub fn poison(message: impl fmt::Display) -> Self {
        Self::new(FaultKind::Poison, message)
    }

    /// See [`FaultKind::Infra`].
    pub fn infra(message: impl fmt::Display) -> Self {
        Self::new(FaultKind::Infra, message)
    }
}
