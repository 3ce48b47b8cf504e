//! Requests to a bucket: retries, time limits, and errors that name the remedy.
//!
//! The SDK alone retries, as often as [`Limits`](super::config::Limits) allows, whatever went wrong
//! elsewhere. Its own quota of retries is shared by the process and refilled by successes only: a
//! fleet's few bad seconds would use it up, and then one 503 would stop a worker.

use std::error::Error;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_sdk_s3::Client as Sdk;
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
use aws_sdk_s3::primitives::{ByteStream, ByteStreamError};
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use futures::Stream;
use futures::stream;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::config::{Keys, S3Config};
use super::errors::{self, Failure, code, status};
use super::metadata::Seen;
use crate::fault::Fault;

/// A bucket's server.
pub(super) struct Client {
    sdk: Sdk,
    pub(super) config: S3Config,
    /// Set once the bucket was seen: the answer to a HEAD does not tell what is missing.
    bucket: OnceCell<()>,
}

/// Makes the SDK retry after a 429: its own classifiers know error codes, but not this status.
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

/// Name resolution as the system does it, whose failures can be told from others by their type.
#[derive(Clone, Debug)]
struct SystemResolver;

impl ResolveDns for SystemResolver {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        DnsFuture::new(async move {
            let found = tokio::net::lookup_host((name, 0)).await;
            let found = found.map_err(ResolveDnsError::new)?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

/// The SDK's own sources of credentials: environment, profile, web identity, container, instance.
/// Set up on first use.
#[derive(Debug)]
struct CredentialsChain {
    region: Region,
    http: SharedHttpClient,
    chain: OnceCell<DefaultCredentialsChain>,
}

impl ProvideCredentials for CredentialsChain {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            let client = ProviderConfig::default().with_http_client(self.http.clone());
            let chain = DefaultCredentialsChain::builder()
                .configure(client)
                .region(self.region.clone());
            let chain = self.chain.get_or_init(|| chain.build()).await;
            chain.provide_credentials().await
        })
    }
}

impl Client {
    /// Sets up a client. Nothing is sent yet.
    pub(super) fn new(config: &S3Config) -> Self {
        let limits = &config.limits;
        let region = Region::new(config.region.clone());
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(Provider::Rustls(CryptoMode::Ring))
            .build_with_resolver(SystemResolver);
        let mut builder = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .http_client(http.clone())
            .region(region.clone())
            .force_path_style(true)
            // By default the SDK sends a trailing CRC32, which R2 refused for a time.
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
        builder = match config.keys().cloned() {
            Some(Keys {
                access,
                secret,
                session_token,
            }) => builder.credentials_provider(Credentials::new(
                access,
                secret,
                session_token,
                None,
                "environment",
            )),
            None => builder.credentials_provider(CredentialsChain {
                region,
                http,
                chain: OnceCell::new(),
            }),
        };
        if let Some(endpoint) = &config.endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        Self {
            sdk: Sdk::from_conf(builder.build()),
            config: config.clone(),
            bucket: OnceCell::new(),
        }
    }

    /// Names the store, what was tried, and the remedy.
    pub(super) fn fault<E>(&self, verb: &str, key: &str, error: &SdkError<E, HttpResponse>) -> Fault
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let place = self.config.place();
        let failure = Failure::of(error);
        let sentence = failure.sentence(&self.config);
        Fault::infra(format!("store {place}: cannot {verb} {key}: {sentence}"))
            .lasting(failure.is_lasting())
    }

    /// Reads an object's metadata; `None` if there is no object.
    pub(super) async fn head(&self, key: &str) -> Result<Option<Seen>, Fault> {
        let head = self.sdk.head_object().bucket(&self.config.bucket);
        match head.key(key).send().await {
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
                // The answer to a HEAD has no body, which would say why. Not after a 429 or 5xx:
                // another request would be one too many for a server that asks for patience.
                if matches!(status(&error), Some(301 | 307 | 400 | 401 | 403)) {
                    self.list_one(key).await?;
                }
                Err(self.fault("read", key, &error))
            }
        }
    }

    /// Reads an object; `None` if there is none, and no content if that has more than `max_bytes`.
    pub(super) async fn get(
        &self,
        key: &str,
        max_bytes: u64,
    ) -> Result<Option<(Seen, Option<Vec<u8>>)>, Fault> {
        let get = self.sdk.get_object().bucket(&self.config.bucket);
        let mut object = match get.key(key).send().await {
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
        let mut content = Vec::new();
        let read = async {
            while let Some(piece) = object.body.try_next().await? {
                if (content.len() + piece.len()) as u64 > max_bytes {
                    return Ok(false);
                }
                content.extend_from_slice(&piece);
            }
            Ok(true)
        };
        // The SDK's limits are for what comes before the content.
        let limit = self.config.limits.operation;
        let broken = match timeout(limit, read).await {
            Ok(Ok(whole)) => return Ok(Some((seen, whole.then_some(content)))),
            Ok(Err(error)) => {
                let error: ByteStreamError = error;
                format!("broke off: {}", errors::innermost(&error))
            }
            Err(_) => format!("did not come to an end {}", errors::overloaded(limit)),
        };
        let place = self.config.place();
        Err(Fault::infra(format!(
            "store {place}: reading {key} {broken}"
        )))
    }

    /// Begins a PUT.
    pub(super) fn put(
        &self,
        key: &str,
        content_type: &str,
        content: impl Into<ByteStream>,
    ) -> PutObjectFluentBuilder {
        let put = self.sdk.put_object().bucket(&self.config.bucket);
        put.key(key).content_type(content_type).body(content.into())
    }

    /// Removes an object.
    pub(super) async fn remove(&self, key: &str) -> Result<(), Fault> {
        let delete = self.sdk.delete_object().bucket(&self.config.bucket);
        let sent = delete.key(key).send().await;
        sent.map(drop)
            .map_err(|error| self.fault("remove", key, &error))
    }

    /// Lists one key: asks for no more than an answer.
    pub(super) async fn list_one(&self, prefix: &str) -> Result<(), Fault> {
        let list = self.sdk.list_objects_v2().bucket(&self.config.bucket);
        let sent = list.prefix(prefix).max_keys(1).send().await;
        sent.map(drop)
            .map_err(|error| self.fault("list", prefix, &error))
    }

    /// Lists what begins with `prefix`, page after page. With a delimiter, keys that go on after it
    /// are shown as one common prefix.
    pub(super) fn pages(
        &self,
        prefix: String,
        delimiter: Option<&'static str>,
    ) -> impl Stream<Item = Result<ListObjectsV2Output, Fault>> + Send {
        enum Next {
            Page(Option<String>),
            End,
        }
        stream::try_unfold(Next::Page(None), move |next| {
            let prefix = prefix.clone();
            async move {
                let Next::Page(token) = next else {
                    return Ok(None);
                };
                let list = self.sdk.list_objects_v2().bucket(&self.config.bucket);
                let sent = list
                    .prefix(&prefix)
                    .set_delimiter(delimiter.map(str::to_owned))
                    .set_continuation_token(token)
                    .send()
                    .await;
                let page = sent.map_err(|error| self.fault("list", &prefix, &error))?;
                let next = match (page.is_truncated(), page.next_continuation_token()) {
                    // Some servers leave IsTruncated out.
                    (Some(true) | None, Some(token)) => Next::Page(Some(token.to_owned())),
                    (Some(true), None) => {
                        let place = self.config.place();
                        return Err(Fault::infra(format!(
                            "store {place}: the list of {prefix} ends without its last page"
                        )));
                    }
                    _ => Next::End,
                };
                Ok(Some((page, next)))
            }
        })
    }
}
