//! The store in an S3-compatible bucket: Cloudflare R2, Amazon S3, SeaweedFS and their like.
//!
//! A digest is one object with its metadata, stored by one PUT, so a reader never sees a mixture.
//! Compare-and-put is a conditional PUT: If-None-Match if nothing is expected, else If-Match with
//! the ETag. An ETag depends on the content alone, and a push elsewhere in a repository leaves the
//! text as it was. So each PUT also leaves a random mark in the metadata, the second half of a
//! [`Version`], and the mark is read once more before a digest is replaced. One race is left: if two
//! writers replace the same text at the same moment, one of them by the very same text of another
//! push, then the later one wins. The next cache check notices.
//!
//! A renewal reads the text and stores it again with other metadata. A copy on the server would save
//! the bytes, but not every server can make it depend on what it overwrites: S3's condition is on the
//! source alone, which may be replaced between reading and writing.
//!
//! A server that ignores conditions is found out by the first probe, or else before the first PUT.
//! There, reading the mark is all the protection: the last writer wins.
//!
//! Sources: [conditional writes](https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html),
//! [R2's S3 API](https://developers.cloudflare.com/r2/api/s3/api/).

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::types::Object;
use futures::StreamExt;
use futures::stream::{self, BoxStream, TryStreamExt};

use self::client::Client;
use self::conditions::{Conditions, PROBE_NAME, Probe};
use self::config::S3Config;
use self::errors::is_conflict;
use self::metadata::{millis, quoted, unquoted};
use super::{
    DIGESTS, Digest, DigestMeta, DigestStore, DocumentKey, Expected, Found, Listed, MAX_TEXT_BYTES,
    Put, Renewal, SharedStore, Version, WITHDRAWN,
};
use crate::fault::Fault;
use crate::ids::RepoRef;
use crate::text::sha256;

pub mod config;

mod client;
mod conditions;
mod errors;
mod metadata;

/// A [`DigestStore`] in a bucket.
pub struct S3Store {
    client: Arc<Client>,
    probe: Arc<Probe>,
    /// Where its digests are.
    shelf: &'static str,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the client, which holds the credentials.
        f.debug_struct("S3Store")
            .field("config", &self.client.config)
            .field("probe", &self.probe)
            .field("shelf", &self.shelf)
            .finish_non_exhaustive()
    }
}

impl S3Store {
    /// Opens the store that `config` names. Nothing is sent yet.
    pub fn new(config: &S3Config) -> Self {
        Self {
            client: Arc::new(Client::new(config)),
            probe: Arc::default(),
            shelf: DIGESTS,
        }
    }

    fn key(&self, key: &str) -> String {
        self.client.config.key(key)
    }

    fn digest_key(&self, repo: &RepoRef) -> String {
        self.key(&format!("{}/{repo}/summary.txt", self.shelf))
    }

    /// Stores a text if the object's ETag is still that of `expected`.
    async fn put_if(
        &self,
        key: &str,
        text: Vec<u8>,
        meta: &DigestMeta,
        conditions: Conditions,
        expected: &Expected,
    ) -> Result<Put, Fault> {
        let mark = format!("{:016x}", fastrand::u64(..));
        // The predecessor's content type: some readers compare it.
        let put = self
            .client
            .put(key, "text/plain", text)
            .set_metadata(Some(metadata::of(meta, &mark)));
        match conditional(put, conditions, expected).send().await {
            Ok(answer) if answer.e_tag().is_some() => {
                let etag = unquoted(answer.e_tag());
                Ok(Put::Stored(Version(format!("{etag} {mark}"))))
            }
            // Some proxy's page, perhaps. What is there counts.
            Ok(_) => match self.client.head(key).await? {
                Some(seen) if seen.metadata.mark == mark => Ok(Put::Stored(seen.version())),
                _ => Err(Fault::infra(format!(
                    "store {}: the answer to writing {key} has no ETag, and what was written is not there; is that an S3 server?",
                    self.client.config.place()
                ))),
            },
            // The SDK repeats a PUT that got no answer, which then meets its own earlier self.
            Err(error) if is_conflict(&error) => match self.client.head(key).await? {
                Some(seen) if seen.metadata.mark == mark => Ok(Put::Stored(seen.version())),
                _ => Ok(Put::Conflict),
            },
            Err(error) => Err(self.client.fault("write", key, &error)),
        }
    }

    /// Reads a listed object; `None` for anything but a digest.
    fn listed(&self, object: &Object) -> Option<Listed> {
        let key = object
            .key()?
            .strip_prefix(&self.key(&format!("{}/", self.shelf)))?;
        let repo = key.strip_suffix("/summary.txt")?.parse().ok()?;
        Some(Listed {
            repo,
            etag: unquoted(object.e_tag()),
            modified_millis: object.last_modified().map_or(0, millis),
            bytes: object
                .size()
                .and_then(|bytes| u64::try_from(bytes).ok())
                .unwrap_or(0),
        })
    }
}

/// Adds the condition that the object is still what is expected.
fn conditional(
    put: PutObjectFluentBuilder,
    conditions: Conditions,
    expected: &Expected,
) -> PutObjectFluentBuilder {
    match (conditions, expected) {
        (Conditions::Ignored, _) => put,
        (Conditions::Kept, Expected::Absent) => put.if_none_match("*"),
        (Conditions::Kept, Expected::Version(version)) => put.if_match(quoted(version.etag())),
    }
}

#[async_trait]
impl DigestStore for S3Store {
    async fn head(&self, repo: &RepoRef) -> Result<Found, Fault> {
        let seen = self.client.head(&self.digest_key(repo)).await?;
        Ok(seen.map_or(Found::Absent, |seen| seen.found()))
    }

    async fn get(&self, repo: &RepoRef) -> Result<Option<Digest>, Fault> {
        let key = &self.digest_key(repo);
        let Some((seen, Some(content))) = self.client.get(key, MAX_TEXT_BYTES).await? else {
            return Ok(None);
        };
        let Found::Stored { meta, .. } = seen.found() else {
            return Ok(None);
        };
        let text = String::from_utf8(content).ok();
        Ok(text.map(|text| Digest { text, meta }))
    }

    async fn put(
        &self,
        repo: &RepoRef,
        digest: &Digest,
        expected: &Expected,
    ) -> Result<Put, Fault> {
        let key = &self.digest_key(repo);
        let conditions = self.probe.conditions(&self.client).await?;
        // An ETag does not tell one push from another that left the text as it was.
        let look_first = match expected {
            Expected::Absent => conditions == Conditions::Ignored,
            Expected::Version(_) => true,
        };
        if look_first && self.head(repo).await?.expected() != *expected {
            return Ok(Put::Conflict);
        }
        let text = digest.text.clone().into_bytes();
        self.put_if(key, text, &digest.meta, conditions, expected)
            .await
    }

    async fn renew(
        &self,
        repo: &RepoRef,
        meta: &DigestMeta,
        version: &Version,
    ) -> Result<Renewal, Fault> {
        let key = &self.digest_key(repo);
        let conditions = self.probe.conditions(&self.client).await?;
        let Some((seen, text)) = self.client.get(key, MAX_TEXT_BYTES).await? else {
            return Ok(Renewal::Conflict);
        };
        let stored = match seen.found() {
            Found::Stored {
                meta,
                version: found,
            } if found == *version => meta,
            _ => return Ok(Renewal::Conflict),
        };
        let Some(text) = text.filter(|text| stored.describes(text)) else {
            return Ok(Renewal::Torn);
        };
        let meta = DigestMeta {
            bytes: stored.bytes,
            sha256: stored.sha256.or_else(|| Some(sha256(&text))),
            ..meta.clone()
        };
        let expected = Expected::Version(version.clone());
        let put = self.put_if(key, text, &meta, conditions, &expected).await?;
        Ok(match put {
            Put::Stored(version) => Renewal::Renewed(version),
            Put::Conflict => Renewal::Conflict,
        })
    }

    fn list(&self, prefix: &str) -> BoxStream<'_, Result<Listed, Fault>> {
        let pages = self
            .client
            .pages(self.key(&format!("{}/{prefix}", self.shelf)), None);
        pages
            .map_ok(|page| {
                let listed = page
                    .contents()
                    .iter()
                    .filter_map(|object| self.listed(object));
                stream::iter(listed.map(Ok).collect::<Vec<_>>())
            })
            .try_flatten()
            .boxed()
    }

    async fn owners(&self) -> Result<Vec<String>, Fault> {
        let below = self.key(&format!("{}/", self.shelf));
        let pages: Vec<_> = self
            .client
            .pages(below.clone(), Some("/"))
            .try_collect()
            .await?;
        let owners = pages
            .iter()
            .flat_map(|page| page.common_prefixes())
            .filter_map(|common| common.prefix()?.strip_prefix(&below)?.strip_suffix('/'));
        Ok(owners.map(str::to_owned).collect())
    }

    async fn strays(&self) -> Result<Vec<String>, Fault> {
        let below = self.key(&format!("{}/", self.shelf));
        let root = self.key("");
        let pages: Vec<_> = self.client.pages(below, None).try_collect().await?;
        let objects = pages.iter().flat_map(|page| page.contents());
        let strays = objects.filter(|object| self.listed(object).is_none());
        let keys = strays.filter_map(|object| object.key());
        let keys = keys.map(|key| key.strip_prefix(&root).unwrap_or(key));
        let probe = format!("{}/{PROBE_NAME}", self.shelf);
        Ok(keys
            .filter(|key| !key.starts_with(&probe))
            .map(str::to_owned)
            .collect())
    }

    async fn remove(&self, repo: &RepoRef, version: &Version) -> Result<bool, Fault> {
        // A conditional DELETE is known to Amazon alone.
        if self.head(repo).await?.expected() != Expected::Version(version.clone()) {
            return Ok(false);
        }
        self.client.remove(&self.digest_key(repo)).await?;
        Ok(true)
    }

    fn withdrawn(&self) -> SharedStore {
        Arc::new(Self {
            client: Arc::clone(&self.client),
            probe: Arc::clone(&self.probe),
            shelf: WITHDRAWN,
        })
    }

    async fn write_document(
        &self,
        key: &DocumentKey,
        content: &[u8],
        expected: Option<&Expected>,
    ) -> Result<Put, Fault> {
        let name = &self.key(&key.to_string());
        let mut put = self.client.put(name, key.content_type(), content.to_vec());
        if let Some(expected) = expected {
            let conditions = self.probe.conditions(&self.client).await?;
            if conditions == Conditions::Ignored {
                let seen = self.client.head(name).await?;
                let now = seen.map_or(Expected::Absent, |seen| seen.content().into());
                if now != *expected {
                    return Ok(Put::Conflict);
                }
            }
            put = conditional(put, conditions, expected);
        }
        match put.send().await {
            Ok(answer) => Ok(Put::Stored(Version(unquoted(answer.e_tag())))),
            // A lost answer to an earlier attempt: what it wrote is written again on another copy.
            Err(error) if is_conflict(&error) => Ok(Put::Conflict),
            Err(error) => Err(self.client.fault("write", name, &error)),
        }
    }

    async fn read_document(&self, key: &DocumentKey) -> Result<Option<(Vec<u8>, Version)>, Fault> {
        let name = &self.key(&key.to_string());
        let Some((seen, content)) = self.client.get(name, key.max_bytes()).await? else {
            return Ok(None);
        };
        let place = self.client.config.place();
        let content = content.ok_or_else(|| key.too_large(&place.to_string()))?;
        Ok(Some((content, seen.content())))
    }

    async fn reachable(&self) -> Result<(), Fault> {
        // A GET of some hundred bytes: the answer to a HEAD would not say what is wrong.
        let key = &self.key(&DocumentKey::Latest.to_string());
        self.client.get(key, 0).await.map(drop)
    }

    async fn probe(&self) -> Result<(), Fault> {
        self.probe.conditions(&self.client).await?;
        self.probe.write(&self.client).await
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn location(&self) -> String {
        self.client.config.url()
    }
}
