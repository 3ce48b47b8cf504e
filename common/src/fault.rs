//! Errors, sorted by what to do about them.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Chain;
use serde::{Deserialize, Serialize};
use strum::{AsRefStr, Display, EnumString, VariantArray};
use tracing::debug;

/// The class of a fault. It alone decides what happens next
/// (the worker's `verdict`). Reports list classes in this order.
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
    AsRefStr,
    Display,
    EnumString,
    VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum FaultKind {
    /// May well pass: reset, early end, 5xx, stall, name not resolved. Retried.
    Transient,
    /// The host says "not now", or refuses without a reason: 429, a bare 403, Retry-After, a limit on
    /// anonymous downloads. The fleet backs off from it.
    Throttled,
    /// Not there for us, now and later: 404, 410, 451, 401, a 403 that says why, no branch at HEAD, an
    /// object format that is not supported.
    Gone,
    /// Scheme, host, address or redirect not allowed.
    Refused,
    /// Over the byte budget or the time limit.
    TooLarge,
    /// The slot crashed, or reached its memory or CPU limit.
    Killed,
    /// The message does not decode.
    Poison,
    /// The machine, broker or store is at fault, not the repository: work pauses until they are
    /// well. Ends a job only if this job alone goes on failing while they look well.
    Infra,
    /// The feed's entry names no usable repository.
    InvalidEntry,
    /// Nobody tried: its run was cancelled while the job waited.
    Cancelled,
}

/// An error, classified where it was first seen: `.map_err(Fault::transient)?`.
///
/// Two faults are equal if a person would read the same, whatever their causes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// What to do about it.
    pub kind: FaultKind,
    /// What happened, for a person: one clause. Deeper causes are in [`Error::source`].
    pub message: String,
    /// How long the host asked us to wait ([`FaultKind::Throttled`] only); `None` if it refused
    /// without naming a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<Duration>,
    /// The host about which nothing is known, since no name server gave a definitive answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unresolved: Option<String>,
    /// The error that this was made from, or one that explains it.
    #[serde(skip)]
    cause: Option<Arc<dyn Error + Send + Sync>>,
    /// Whether waiting will not help: wrong credentials, no such bucket. Known of stores and
    /// brokers only.
    #[serde(skip)]
    pub lasting: bool,
}

impl Fault {
    /// Classifies `cause`, an error or a message, as `kind`.
    pub fn new(kind: FaultKind, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let cause = cause.into();
        let fault = Self {
            kind,
            message: cause.to_string(),
            retry_after: None,
            lasting: false,
            unresolved: None,
            cause: Some(cause.into()),
        };
        fault.log_causes();
        fault
    }

    /// Adds the error that explains this fault, for logs and [`Fault::cause`].
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into().into());
        self.log_causes();
        self
    }

    /// Sets [`Fault::unresolved`].
    #[must_use]
    pub fn unresolved(mut self, host: Option<String>) -> Self {
        self.unresolved = host;
        self
    }

    /// Returns the error of type `E` that this fault was made from or explained by, or that is
    /// among their sources.
    pub fn cause<E: Error + 'static>(&self) -> Option<&E> {
        let cause: &(dyn Error + 'static) = self.cause.as_deref()?;
        Chain::new(cause).find_map(|error| error.downcast_ref())
    }

    /// The message alone is for people; at debug level the log has the rest.
    fn log_causes(&self) {
        if self.source().is_some() {
            let chain: Vec<_> = Chain::new(self).map(ToString::to_string).collect();
            debug!(operation = "fault", class = %self.kind, "{}", chain.join(": "));
        }
    }

    /// Sets [`Fault::lasting`].
    pub fn lasting(self, lasting: bool) -> Self {
        Self { lasting, ..self }
    }

    /// See [`FaultKind::Transient`].
    pub fn transient(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FaultKind::Transient, cause)
    }

    /// See [`FaultKind::Throttled`]. `retry_after` is what the host asked for, if it did.
    pub fn throttled(
        cause: impl Into<Box<dyn Error + Send + Sync>>,
        retry_after: Option<Duration>,
    ) -> Self {
        Self {
            retry_after,
            ..Self::new(FaultKind::Throttled, cause)
        }
    }

    /// See [`FaultKind::Gone`].
    pub fn gone(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FaultKind::Gone, cause)
    }

    /// See [`FaultKind::Refused`].
    pub fn refused(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FaultKind::Refused, cause)
    }

    /// See [`FaultKind::TooLarge`].
    pub fn too_large(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FaultKind::TooLarge, cause)
    }

    /// See [`FaultKind::Killed`].
    pub fn killed(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FaultKind::Killed, cause)
    }

    /// See [`FaultKind::Poison`].
    pub fn poison(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FaultKind::Poison, cause)
    }

    /// See [`FaultKind::Infra`].
    pub fn infra(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(FaultKind::Infra, cause)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Fault {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        let cause: &(dyn Error + 'static) = self.cause.as_deref()?;
        // An error that the fault was made from says the same as the fault itself.
        if cause.to_string() == self.message {
            cause.source()
        } else {
            Some(cause)
        }
    }
}

impl PartialEq for Fault {
    fn eq(&self, other: &Self) -> bool {
        let parts = |fault: &Self| (fault.kind, fault.retry_after);
        parts(self) == parts(other) && self.message == other.message
    }
}

impl Eq for Fault {}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_fault_keeps_its_causes_apart_from_its_message() {
        let inner = || Fault::gone("no such host").because(io::Error::other("EAI_NONAME"));
        let chain = |fault: &Fault| -> Vec<String> {
            Chain::new(fault).skip(1).map(ToString::to_string).collect()
        };
        let made_from = Fault::infra(inner());
        assert_eq!(made_from.to_string(), "no such host");
        assert_eq!(chain(&made_from), ["EAI_NONAME"]);
        assert_eq!(made_from.cause::<Fault>(), Some(&inner()));
        let explained = Fault::infra("cannot reach the store").because(inner());
        assert_eq!(chain(&explained), ["no such host", "EAI_NONAME"]);
        assert!(explained.cause::<io::Error>().is_some());
        assert!(explained.cause::<fmt::Error>().is_none());
        assert_eq!(explained, Fault::infra("cannot reach the store"));
        assert_ne!(explained, Fault::gone("cannot reach the store"));

        let wire = serde_json::to_string(&explained).unwrap();
        assert_eq!(
            wire,
            r#"{"kind":"infra","message":"cannot reach the store"}"#
        );
        assert_eq!(serde_json::from_str::<Fault>(&wire).unwrap(), explained);
        assert!(Fault::killed("text").source().is_none());
    }
}
