//! The store in an S3-compatible bucket: Cloudflare R2, Amazon S3, SeaweedFS and their like.
//!
//! A digest is one object with its metadata, stored by one PUT, so a reader never sees a mixture.
//! Compare-and-put is a conditional PUT: If-None-Match where nothing is expected, else If-Match with
//! the ETag. An ETag is made of the content alone, and a push elsewhere in a repository leaves HEAD's
//! text as it was. So each PUT also leaves a random mark in the metadata, the second half of a
//! [`Version`], and before a digest is replaced its mark is looked at once more. What is left is
//! this: of two who at the same moment replace one text, one of them by the very same text of
//! another push, the later wins. The next cache check finds that out.
//!
//! A server that ignores conditions (Garage does) is found out with objects of no other use, by
//! the first probe or else before the first PUT. There, the look is all there is: the last writer
//! wins.
//!
//! The SDK alone tries again, as often as [`config::Limits`] says, whatever went wrong elsewhere: its
//! own quota of retries, shared by the process and refilled by successes only, would be used up by
//! a fleet's few bad seconds, and then one 503 would stop a worker.
//!
//! Sources: [conditional writes](https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html),
//! [R2's S3 API](https://developers.cloudflare.com/r2/api/s3/api/).

use std::error::Error;
use std::fmt;
use std::sync::Once;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::interceptors::InterceptorContext;
use aws_sdk_s3::config::retry::{
    ClassifyRetry, RetryAction, RetryConfig, RetryPartition, TokenBucket,
};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::Object;
use futures::StreamExt;
use futures::stream::{self, BoxStream, TryStreamExt};
use tokio::sync::OnceCell;
use tokio::time::timeout;
use tracing::warn;

use self::config::S3Config;
use self::failure::Failure;
use self::metadata::Metadata;
use super::{Digest, DigestStore, DocumentKey, Expected, Found, Listed, Put, Version};
use crate::fault::Fault;
use crate::ids::RepoRef;

pub mod config;

mod failure;

mod metadata;

/// A [`DigestStore`] in a bucket.
pub struct S3Store {
    client: Client,
    config: S3Config,
    conditions: OnceCell<Conditions>,
    /// Whether the bucket was seen: the answer to a HEAD does not tell what is missing.
    bucket: OnceCell<()>,
    /// So that what cannot be removed is warned of once.
    not_removed: Once,
}

/// Has the SDK try again what was answered by 429: its own classifiers know some words for it, but
/// not the status.
#[derive(Debug)]
struct TooManyRequests;

impl ClassifyRetry for TooManyRequests {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        match context.response().map(|answer| answer.status().as_u16()) {
            Some(429) => RetryAction::throttling_error(),
            _ => RetryAction::NoActionIndicated,
        }
    }

    fn name(&self) -> &'static str {
        "status 429"
    }
}

/// What the server does about If-Match and If-None-Match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Conditions {
    Kept,
    Ignored,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the client, which holds the credentials.
        f.debug_struct("S3Store")
            .field("config", &self.config)
            .field("conditions", &self.conditions)
            .finish_non_exhaustive()
    }
}

impl S3Store {
    /// The store that `config` names. Nothing is sent yet.
    pub fn new(config: &S3Config) -> Self {
        let limits = &config.limits;
        let credentials = Credentials::new(
            config.access_key(),
            config.secret_key(),
            config.session_token().map(str::to_owned),
            None,
            "environment",
        );
        let mut builder = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(config.region.clone()))
            .credentials_provider(credentials)
            .force_path_style(true)
            // What the SDK sends otherwise, R2 refused for a time: the trailing CRC32.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(limits.connect)
                    .operation_attempt_timeout(limits.attempt)
                    .operation_timeout(limits.operation)
                    .build(),
            )
            .retry_config(
                RetryConfig::standard()
                    .with_max_attempts(limits.attempts)
                    .with_initial_backoff(limits.first_pause),
            )
            .retry_partition(
                RetryPartition::custom("repofleet")
                    .token_bucket(TokenBucket::unlimited())
                    .build(),
            )
            .retry_classifier(TooManyRequests);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        Self {
            client: Client::from_conf(builder.build()),
            config: config.clone(),
            conditions: OnceCell::new(),
            bucket: OnceCell::new(),
            not_removed: Once::new(),
        }
    }

    /// The key of an object of no other use, another one each time: R2 takes one write a second of
    /// a key. Below `runs/`, so that a policy needs to name no place of its own for it.
    fn probe_key(&self) -> String {
        let random = fastrand::u64(..);
        self.config.key(&format!("runs/probe-{random:016x}"))
    }

    fn digest_key(&self, repo: &RepoRef) -> String {
        self.config.key(&repo.digest_key())
    }

    /// Names the place, what was tried, and the remedy.
    fn fault<E>(&self, verb: &str, key: &str, error: &SdkError<E, HttpResponse>) -> Fault
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let failure = Failure::of(error);
        Fault::infra(format!(
            "store {}: cannot {verb} {key}: {}",
            self.config.place(),
            failure.sentence(&self.config)
        ))
        .lasting(failure.is_lasting())
    }

    /// What [`DigestStore::head`] and [`S3Store::put`] look at.
    async fn look(&self, key: &str) -> Result<Option<Seen>, Fault> {
        let (bucket, client) = (&self.config.bucket, &self.client);
        let head = client.head_object().bucket(bucket).key(key).send().await;
        match head {
            Ok(head) => Ok(Some(Seen::new(
                head.metadata(),
                head.e_tag(),
                head.last_modified(),
                head.content_length(),
            ))),
            Err(error) if status(&error) == Some(404) => {
                self.bucket
                    .get_or_try_init(|| async { self.list_one(key).await })
                    .await?;
                Ok(None)
            }
            Err(error) => {
                // The answer to a HEAD has no body, which would say why. Where the status says it
                // all, another request would be one too many for a server that asks for patience.
                if matches!(status(&error), Some(301 | 307 | 400 | 401 | 403)) {
                    self.list_one(key).await?;
                }
                Err(self.fault("read", key, &error))
            }
        }
    }

    /// Asks for no more than an answer.
    async fn list_one(&self, key: &str) -> Result<(), Fault> {
        let list = self.client.list_objects_v2().bucket(&self.config.bucket);
        let sent = list.prefix(key).max_keys(1).send().await;
        sent.map_err(|error| self.fault("list", key, &error))?;
        Ok(())
    }

    /// Finds out, once, whether the server keeps conditions.
    async fn conditions(&self) -> Result<Conditions, Fault> {
        let found = self.conditions.get_or_try_init(|| async {
            let conditions = self.try_conditions().await?;
            if conditions == Conditions::Ignored {
                warn!(
                    operation = "store",
                    "store {}: the server ignores If-Match and If-None-Match, so where two \
                     workers store one digest at the same moment, the last one wins",
                    self.config.place()
                );
            }
            Ok(conditions)
        });
        // Who waits for another to find out has no other limit.
        let limit = self.config.limits.operation;
        match timeout(limit, found).await {
            Ok(conditions) => conditions.copied(),
            Err(_) => Err(Fault::infra(format!(
                "store {}: whether the server keeps If-Match could not be found out {}",
                self.config.place(),
                failure::overloaded(limit)
            ))),
        }
    }

    /// Asks with two objects of no other use, each for one of the conditions.
    async fn try_conditions(&self) -> Result<Conditions, Fault> {
        let (one, another) = (self.probe_key(), self.probe_key());
        let kept = self.keeps_conditions(&one, &another).await?;
        self.remove_probe(&one).await;
        self.remove_probe(&another).await;
        Ok(kept)
    }

    async fn keeps_conditions(&self, one: &str, another: &str) -> Result<Conditions, Fault> {
        for key in [one, another] {
            let put = self.put_probe(key).if_none_match("*");
            if self.kept(key, put.send().await)? == Some(Conditions::Ignored) {
                return Ok(Conditions::Ignored);
            }
        }
        // There are such objects now, whoever put them.
        tokio::time::sleep(self.config.limits.between_writes).await;
        let absent = self.put_probe(one).if_none_match("*").send().await;
        let nobodys = self.put_probe(another).if_match(quoted(&"0".repeat(32)));
        let nobodys = nobodys.send().await;
        for (key, sent) in [(one, absent), (another, nobodys)] {
            if self.kept(key, sent)? != Some(Conditions::Kept) {
                return Ok(Conditions::Ignored);
            }
        }
        Ok(Conditions::Kept)
    }

    fn put_probe(&self, key: &str) -> PutObjectFluentBuilder {
        let put = self.client.put_object().bucket(&self.config.bucket);
        put.key(key)
            .content_type("text/plain")
            .body(ByteStream::from_static(
                b"repofleet looks how the store works; this may be removed\n",
            ))
    }

    /// What the answer to a conditional PUT says; `None` where it was simply done.
    fn kept<T, E>(
        &self,
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
            Err(error) => Err(self.fault("write", key, &error)),
        }
    }

    /// What is left behind for want of the right to remove it does no harm, so saying so once is
    /// enough.
    async fn remove_probe(&self, key: &str) {
        let delete = self.client.delete_object().bucket(&self.config.bucket);
        if let Err(error) = delete.key(key).send().await {
            let fault = self.fault("remove", key, &error);
            self.not_removed.call_once(|| {
                warn!(
                    operation = "store",
                    "an object of a few bytes stays behind: {fault}"
                );
            });
        }
    }

    /// An object's whole content.
    async fn read(&self, key: &str, body: ByteStream) -> Result<Vec<u8>, Fault> {
        // The SDK's limits are for what comes before the content.
        let limit = self.config.limits.operation;
        let broken = match timeout(limit, body.collect()).await {
            Ok(Ok(content)) => return Ok(content.to_vec()),
            Ok(Err(error)) => format!("broke off: {}", failure::innermost(&error)),
            Err(_) => format!("did not come to an end {}", failure::overloaded(limit)),
        };
        let place = self.config.place();
        Err(Fault::infra(format!(
            "store {place}: reading {key} {broken}"
        )))
    }

    /// The page after the one that ended with `token`.
    async fn page(
        &self,
        prefix: &str,
        token: Option<String>,
    ) -> Result<ListObjectsV2Output, Fault> {
        let list = self.client.list_objects_v2().bucket(&self.config.bucket);
        let sent = list
            .prefix(prefix)
            .set_continuation_token(token)
            .send()
            .await;
        sent.map_err(|error| self.fault("list", prefix, &error))
    }

    /// `None` for what is not a digest.
    fn listed(&self, object: &Object) -> Option<Listed> {
        let key = object.key()?.strip_prefix(&self.config.key("gitingest/"))?;
        let repo = key.strip_suffix("/summary.txt")?.parse().ok()?;
        Some(Listed {
            repo,
            etag: unquoted(object.e_tag().unwrap_or_default()),
            modified_millis: object.last_modified().map_or(0, millis),
            bytes: object
                .size()
                .and_then(|bytes| u64::try_from(bytes).ok())
                .unwrap_or(0),
        })
    }
}

#[async_trait]
impl DigestStore for S3Store {
    async fn head(&self, repo: &RepoRef) -> Result<Found, Fault> {
        let seen = self.look(&self.digest_key(repo)).await?;
        Ok(seen.map_or(Found::Absent, Seen::found))
    }

    async fn get(&self, repo: &RepoRef) -> Result<Option<Digest>, Fault> {
        let (bucket, key) = (&self.config.bucket, &self.digest_key(repo));
        let get = self.client.get_object().bucket(bucket).key(key);
        let object = match get.send().await {
            Ok(object) => object,
            Err(error) if code(&error) == Some("NoSuchKey") => return Ok(None),
            Err(error) => return Err(self.fault("read", key, &error)),
        };
        let seen = Seen::new(
            object.metadata(),
            object.e_tag(),
            object.last_modified(),
            object.content_length(),
        );
        let Found::Stored { meta, .. } = seen.found() else {
            return Ok(None);
        };
        let text = String::from_utf8(self.read(key, object.body).await?);
        Ok(text.ok().map(|text| Digest { text, meta }))
    }

    async fn put(
        &self,
        repo: &RepoRef,
        digest: &Digest,
        expected: &Expected,
    ) -> Result<Put, Fault> {
        let key = &self.digest_key(repo);
        let conditions = self.conditions().await?;
        // An ETag does not tell one push from another that left the text as it was.
        let look_first = match expected {
            Expected::Absent => conditions == Conditions::Ignored,
            Expected::Version(_) => true,
        };
        if look_first && self.head(repo).await?.expected() != *expected {
            return Ok(Put::Conflict);
        }

        let mark = format!("{:016x}", fastrand::u64(..));
        let put = self
            .client
            .put_object()
            .bucket(&self.config.bucket)
            .key(key)
            // As the predecessor's: some readers compare it.
            .content_type("text/plain")
            .set_metadata(Some(metadata::of(&digest.meta, &mark)))
            .body(ByteStream::from(digest.text.clone().into_bytes()));
        let put = match (conditions, expected) {
            (Conditions::Ignored, _) => put,
            (Conditions::Kept, Expected::Absent) => put.if_none_match("*"),
            (Conditions::Kept, Expected::Version(version)) => put.if_match(quoted(version.etag())),
        };
        match put.send().await {
            Ok(_) => Ok(Put::Stored),
            // The SDK sends again what got no answer, and then meets what it stored itself.
            Err(error) if is_conflict(&error) => match self.look(key).await? {
                Some(seen) if seen.metadata.mark == mark => Ok(Put::Stored),
                _ => Ok(Put::Conflict),
            },
            Err(error) => Err(self.fault("write", key, &error)),
        }
    }

    fn list(&self, prefix: &str) -> BoxStream<'_, Result<Listed, Fault>> {
        enum Next {
            Page(Option<String>),
            End,
        }
        let prefix = self.config.key(&format!("gitingest/{prefix}"));
        stream::try_unfold(Next::Page(None), move |next| {
            let prefix = prefix.clone();
            async move {
                let Next::Page(token) = next else {
                    return Ok::<_, Fault>(None);
                };
                let page = self.page(&prefix, token).await?;
                let listed: Vec<_> = page.contents().iter().map(|o| self.listed(o)).collect();
                let next = match (page.is_truncated(), page.next_continuation_token) {
                    // Some servers leave IsTruncated out.
                    (Some(true) | None, Some(token)) => Next::Page(Some(token)),
                    (Some(true), None) => {
                        let place = self.config.place();
                        return Err(Fault::infra(format!(
                            "store {place}: the list of {prefix} ends without its last page"
                        )));
                    }
                    _ => Next::End,
                };
                let listed = stream::iter(listed.into_iter().flatten().map(Ok));
                Ok(Some((listed, next)))
            }
        })
        .try_flatten()
        .boxed()
    }

    async fn put_document(&self, key: &DocumentKey, content: &[u8]) -> Result<(), Fault> {
        let key = &self.config.key(&key.to_string());
        let put = self.client.put_object().bucket(&self.config.bucket);
        put.key(key)
            .content_type("application/json")
            .body(ByteStream::from(content.to_vec()))
            .send()
            .await
            .map_err(|error| self.fault("write", key, &error))?;
        Ok(())
    }

    async fn document(&self, key: &DocumentKey) -> Result<Option<Vec<u8>>, Fault> {
        let key = &self.config.key(&key.to_string());
        let get = self.client.get_object().bucket(&self.config.bucket);
        let object = match get.key(key).send().await {
            Ok(object) => object,
            Err(error) if code(&error) == Some("NoSuchKey") => return Ok(None),
            Err(error) => return Err(self.fault("read", key, &error)),
        };
        Ok(Some(self.read(key, object.body).await?))
    }

    async fn reachable(&self) -> Result<(), Fault> {
        // A GET of some hundred bytes: the answer to a HEAD would not say what is wrong.
        self.document(&DocumentKey::Latest).await.map(drop)
    }

    async fn probe(&self) -> Result<(), Fault> {
        self.conditions().await?;
        let key = &self.probe_key();
        let sent = self.put_probe(key).send().await;
        sent.map_err(|error| self.fault("write", key, &error))?;
        let listed = self.list_one(key).await;
        self.remove_probe(key).await;
        listed
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn location(&self) -> String {
        self.config.url()
    }
}

/// What the server says of an object that is there.
struct Seen {
    metadata: Metadata,
    etag: String,
    /// For an object without a mark, in its place.
    modified_millis: i64,
    /// `None` where the server does not say, as HTTP allows it to.
    bytes: Option<u64>,
}

impl Seen {
    fn new(
        metadata: Option<&metadata::Map>,
        etag: Option<&str>,
        modified: Option<&DateTime>,
        bytes: Option<i64>,
    ) -> Self {
        let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
        Self {
            metadata: Metadata::read(metadata, bytes),
            etag: unquoted(etag.unwrap_or_default()),
            modified_millis: modified.map_or(0, millis),
            bytes,
        }
    }

    fn found(self) -> Found {
        let Metadata { mark, meta } = self.metadata;
        let version = Version(match mark.as_str() {
            "" => {
                let bytes = self.bytes.unwrap_or_default();
                format!("{} {}-{bytes}", self.etag, self.modified_millis)
            }
            mark => format!("{} {mark}", self.etag),
        });
        match meta {
            Ok(meta) => Found::Stored { meta, version },
            Err(why) => Found::Unreadable { version, why },
        }
    }
}

fn status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    Some(error.raw_response()?.status().as_u16())
}

fn code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Option<&str> {
    error.as_service_error()?.code()
}

/// 412: the condition does not hold; 409: somebody else is writing just now; 404: If-Match, and
/// nothing there. Only with S3's own word for it: there are 404s of proxies, and of other servers.
fn is_conflict<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    match status(error) {
        Some(412 | 409) => true,
        Some(404) => code(error) == Some("NoSuchKey"),
        _ => false,
    }
}

fn millis(time: &DateTime) -> i64 {
    time.to_millis().unwrap_or(0)
}

/// Listings of some servers have ETags without quotes.
fn unquoted(etag: &str) -> String {
    etag.trim_matches('"').to_owned()
}

fn quoted(etag: &str) -> String {
    format!("\"{etag}\"")
}
