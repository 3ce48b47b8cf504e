//! Finds out whether a server honours If-Match and If-None-Match: Garage ignores them.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::primitives::ByteStream;
use tokio::sync::OnceCell;
use tokio::time::timeout;
use tracing::warn;

use super::super::{DIGESTS, PROBE_BYTES};
use super::client::Client;
use super::errors::{is_conflict, overloaded, status};
use super::metadata::quoted;
use crate::fault::Fault;

/// The content of a probe's objects.
const PROBE: &[u8] = b"repofleet looks how the store works; this may be removed\n";

/// How the name of an object begins that is written where digests go. No owner is called so.
pub(super) const PROBE_NAME: &str = ".probe-";

/// What a server does about If-Match and If-None-Match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conditions {
    Kept,
    Ignored,
}

/// Probes a server by writing objects of no other use.
#[derive(Debug, Default)]
pub(super) struct Probe {
    conditions: OnceCell<Conditions>,
    /// Whether an object that cannot be removed was warned of.
    warned: AtomicBool,
}

impl Probe {
    /// Tells whether the server keeps conditions; asks it once.
    pub(super) async fn conditions(&self, client: &Client) -> Result<Conditions, Fault> {
        let found = self.conditions.get_or_try_init(|| async {
            // One object for each condition.
            let (one, another) = (key(client), key(client));
            let conditions = keeps_conditions(client, &one, &another).await?;
            self.remove(client, &one).await;
            self.remove(client, &another).await;
            if conditions == Conditions::Ignored {
                warn!(
                    operation = "store",
                    "store {}: the server ignores If-Match and If-None-Match: if two workers store \
                     one digest at the same moment, the last one wins",
                    client.config.place()
                );
            }
            Ok(conditions)
        });
        // A caller that waits for another's probe has no other time limit.
        let limit = client.config.limits.operation;
        match timeout(limit, found).await {
            Ok(conditions) => conditions.copied(),
            Err(_) => Err(Fault::infra(format!(
                "store {}: whether the server keeps If-Match could not be found out {}",
                client.config.place(),
                overloaded(limit)
            ))),
        }
    }

    /// Writes an object, lists it, and removes it; and then one where digests go, as large as they
    /// may be: rights and quotas are often those of a prefix, or of a size.
    pub(super) async fn write(&self, client: &Client) -> Result<(), Fault> {
        let key = key(client);
        let sent = put(client, &key).send().await;
        sent.map_err(|error| client.fault("write", &key, &error))?;
        let listed = client.list_one(&key).await;
        self.remove(client, &key).await;
        listed?;
        // One of a few keys: without the right to remove it, no more than these stay behind.
        let random = fastrand::u8(..64);
        let key = format!("{DIGESTS}/{PROBE_NAME}{random:02x}");
        let key = client.config.key(&key);
        let put = client.put(&key, "text/plain", vec![b' '; PROBE_BYTES]);
        let sent = put.send().await;
        sent.map_err(|error| client.fault("write", &key, &error))?;
        self.remove(client, &key).await;
        Ok(())
    }

    /// Without the right to remove it, an object stays behind. It does no harm, so one warning is
    /// enough.
    async fn remove(&self, client: &Client, key: &str) {
        if let Err(fault) = client.remove(key).await
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            warn!(
                operation = "store",
                "an object of a probe stays behind: {fault}"
            );
        }
    }
}

async fn keeps_conditions(client: &Client, one: &str, another: &str) -> Result<Conditions, Fault> {
    for key in [one, another] {
        let sent = put(client, key).if_none_match("*").send().await;
        if judged(client, key, sent)? == Some(Conditions::Ignored) {
            return Ok(Conditions::Ignored);
        }
    }
    // Both objects now exist, whichever process wrote them.
    tokio::time::sleep(client.config.limits.between_writes).await;
    let absent = put(client, one).if_none_match("*").send().await;
    let nobodys = put(client, another).if_match(quoted(&"0".repeat(32)));
    let nobodys = nobodys.send().await;
    for (key, sent) in [(one, absent), (another, nobodys)] {
        if judged(client, key, sent)? != Some(Conditions::Kept) {
            return Ok(Conditions::Ignored);
        }
    }
    Ok(Conditions::Kept)
}

/// What the answer to a conditional PUT says; `None` if it was simply done.
fn judged<T, E>(
    client: &Client,
    key: &str,
    sent: Result<T, SdkError<E, HttpResponse>>,
) -> Result<Option<Conditions>, Fault>
where
    E: ProvideErrorMetadata + Error + 'static,
{
    match sent {
        Ok(_) => Ok(None),
        Err(error) if is_conflict(&error) => Ok(Some(Conditions::Kept)),
        // NotImplemented: the server says that it does not know the header.
        Err(error) if status(&error) == Some(501) => Ok(Some(Conditions::Ignored)),
        Err(error) => Err(client.fault("write", key, &error)),
    }
}

/// A new key each time: R2 takes one write a second of a key. It is below `runs/`, so that a policy
/// needs to allow no place of its own for it.
fn key(client: &Client) -> String {
    let random = fastrand::u64(..);
    client.config.key(&format!("runs/probe-{random:016x}"))
}

fn put(client: &Client, key: &str) -> PutObjectFluentBuilder {
    client.put(key, "text/plain", ByteStream::from_static(PROBE))
}
