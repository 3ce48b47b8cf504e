//! Name resolution, as the system does it, and whether this machine resolves names at all.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use common::fault::Fault;
use dns_lookup::{AddrInfoHints, LookupErrorKind, SockType, getaddrinfo};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long a lookup may take: less than a connection, of which it is a part.
const LOOKUP_LIMIT: Duration = Duration::from_secs(10);

/// The addresses of `host`, with port 0.
///
/// # Errors
/// [`FaultKind::Transient`](common::fault::FaultKind::Transient). [`Fault::unresolved`] is set if
/// no server gave a definitive answer, so that nothing is known about the host.
pub async fn lookup(host: &str) -> Result<Vec<SocketAddr>, Fault> {
    let name = host.to_owned();
    let looking = tokio::task::spawn_blocking(move || {
        let hints = AddrInfoHints {
            // One of each address.
            socktype: SockType::Stream.into(),
            ..AddrInfoHints::default()
        };
        let found = getaddrinfo(Some(&name), None, Some(hints)).map_err(|error| error.kind())?;
        let addresses: io::Result<Vec<_>> = found.map(|a| a.map(|a| a.sockaddr)).collect();
        addresses.map_err(|_| LookupErrorKind::IO)
    });
    match tokio::time::timeout(LOOKUP_LIMIT, looking).await {
        Ok(Ok(Ok(addresses))) => Ok(addresses),
        Ok(Ok(Err(LookupErrorKind::NoName | LookupErrorKind::NoData))) => Err(Fault::transient(
            format!("cannot resolve {host}: no such name"),
        )),
        _ => {
            let fault = Fault::transient(format!("cannot resolve {host}: no answer from DNS"));
            Err(fault.unresolved(Some(host.to_owned())))
        }
    }
}

/// Tells a host that does not resolve from a machine that resolves nothing.
#[derive(Debug)]
pub struct Resolver {
    names: Vec<String>,
    /// When names were last looked up, and whether any got a definitive answer. Locked meanwhile:
    /// one looks, the others use what it finds.
    last: Mutex<Option<(Instant, bool)>>,
}

impl Resolver {
    /// Looks up `names` to find out.
    pub fn new(names: Vec<String>) -> Self {
        Self {
            names,
            last: Mutex::new(None),
        }
    }

    /// Whether a name other than `failed` got a definitive answer after `since`.
    pub async fn answers(&self, failed: &str, since: Instant) -> bool {
        let mut last = self.last.lock().await;
        if let Some((at, answers)) = *last
            && at >= since
        {
            return answers;
        }
        let at = Instant::now();
        let names = self.names.iter().filter(|name| *name != failed);
        let mut looking: FuturesUnordered<_> = names.map(|name| lookup(name)).collect();
        let mut answers = false;
        while let Some(found) = looking.next().await
            && !answers
        {
            answers = found.map_or_else(|fault| fault.unresolved.is_none(), |_| true);
        }
        *last = Some((at, answers));
        answers
    }

    /// # Errors
    /// [`FaultKind::Infra`](common::fault::FaultKind::Infra) if no name got a definitive answer.
    pub async fn probe(&self) -> Result<(), Fault> {
        match self.answers("", Instant::now()).await {
            true => Ok(()),
            false => Err(self.dead()),
        }
    }

    /// What is wrong with a machine that resolves nothing.
    pub fn dead(&self) -> Fault {
        let names = self.names.join(", ");
        Fault::infra(format!(
            "this machine cannot resolve any name (tried {names}); check its DNS settings"
        ))
        .unresolved(Some(names))
    }
}
