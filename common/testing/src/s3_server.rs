//! An S3 server in this process: one bucket in memory, and every way to fail at hand.
//!
//! Crate `s3s` speaks S3 and checks signatures; what an object is stands here, under one lock, so
//! that conditions are atomic, as Amazon and R2 promise.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use futures::stream;
use http_body_util::BodyExt;
use hyper::body::Bytes;
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::{
    DeleteObjectInput, DeleteObjectOutput, ETag, ETagCondition, GetObjectInput, GetObjectOutput,
    HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, Metadata,
    PutObjectInput, PutObjectOutput, StreamingBlob, Timestamp,
};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpRequest, S3, S3Request, S3Response, S3Result, s3_error};
use sha2::{Digest as _, Sha256};
use tokio_util::task::TaskTracker;

use super::http_server::{Request, Response, Server, any_port, locked};
use common::store::s3::S3Store;
use common::store::s3::config::S3Config;

/// The bucket that there is.
pub const BUCKET: &str = "digests";
/// The key that is let in.
pub const ACCESS_KEY: &str = "test-access-key";
/// Its secret.
pub const SECRET_KEY: &str = "test-secret-key";

/// Keys on a page of a listing, as at Amazon.
const PAGE: usize = 1000;

/// An S3 server on a port of its own on 127.0.0.1, until it is dropped.
#[derive(Debug)]
pub struct S3Server {
    server: Server,
    shared: Arc<Shared>,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is answered.
    Answered,
    /// It is answered, this much later.
    Late(Duration),
    /// It is refused with a status and S3's word for it, and nothing is done.
    Denied(u16, &'static str),
    /// It is done, and the connection reset in place of an answer.
    AnswerLost,
    /// It is not done, and the connection reset in place of an answer.
    Lost,
    /// Nothing is done, and nothing said.
    Silence,
    /// It is answered, but after this many bytes of the content the connection is closed.
    Cut(u64),
    /// It is answered, but this many bytes a second.
    Dripped(u64),
}

/// A request as the one who decides about its [`Fate`] sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// `GET`, `PUT` …
    pub method: String,
    /// The key; empty for the bucket itself.
    pub key: String,
    /// The query.
    pub query: String,
}

/// What the server keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredObject {
    /// The content.
    pub content: Bytes,
    /// Metadata as they came, names in lower case.
    pub metadata: BTreeMap<String, String>,
    /// Its Content-Type.
    pub content_type: Option<String>,
    /// When it was stored.
    pub modified: SystemTime,
}

impl StoredObject {
    /// Of the content alone, as everywhere; the same content has the same.
    fn etag(&self) -> String {
        let sum = Sha256::digest(&self.content);
        sum.iter().take(16).map(|b| format!("{b:02x}")).collect()
    }
}

type Decider = Box<dyn FnMut(&Call) -> Fate + Send>;

struct Shared {
    state: Mutex<State>,
    decide: Mutex<Decider>,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, StoredObject>,
    ignores_conditions: bool,
    calls: BTreeMap<String, usize>,
    writes: BTreeMap<String, Vec<BTreeMap<String, String>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shared")
    }
}

impl S3Server {
    /// Starts a server with an empty bucket, on which all goes well.
    ///
    /// # Panics
    /// When no port can be had.
    pub fn start() -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            decide: Mutex::new(Box::new(|_| Fate::Answered)),
        });
        let mut builder = S3ServiceBuilder::new(Backend(Arc::clone(&shared)));
        builder.set_auth(Doorkeeper);
        let service = builder.build();
        let handler = {
            let shared = Arc::clone(&shared);
            move |request: Request| -> BoxFuture<'static, Response> {
                let (shared, service) = (Arc::clone(&shared), service.clone());
                Box::pin(async move { answer(&shared, &service, request).await })
            }
        };
        let server =
            Server::start(any_port(), TaskTracker::new(), handler).expect("a port on 127.0.0.1");
        Self { server, shared }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// What the store needs to know of it, with short pauses between attempts.
    pub fn config(&self) -> S3Config {
        config(&self.url(), BUCKET)
    }

    /// A store in its bucket.
    pub fn store(&self) -> S3Store {
        S3Store::new(&self.config())
    }

    /// Has `decide` decide about each request from now on.
    pub fn decide(&self, decide: impl FnMut(&Call) -> Fate + Send + 'static) {
        *locked(&self.shared.decide) = Box::new(decide);
    }

    /// Does as Garage does: If-Match and If-None-Match mean nothing from now on.
    pub fn ignore_conditions(&self) {
        locked(&self.shared.state).ignores_conditions = true;
    }

    /// How many requests there were so far that `what` names: `PUT`, `HEAD`, `GET`, `DELETE` for
    /// objects, `LIST` for the bucket.
    pub fn calls(&self, what: &str) -> usize {
        let state = locked(&self.shared.state);
        state.calls.get(what).copied().unwrap_or(0)
    }

    /// Begins to count anew.
    pub fn forget_calls(&self) {
        locked(&self.shared.state).calls.clear();
    }

    /// The most requests that were being answered at the same time.
    pub fn max_concurrent(&self) -> usize {
        self.server.max_concurrent()
    }

    /// All that is in the bucket.
    pub fn objects(&self) -> BTreeMap<String, StoredObject> {
        locked(&self.shared.state).objects.clone()
    }

    /// The metadata of everything that was ever put at `key`, oldest first.
    pub fn writes(&self, key: &str) -> Vec<BTreeMap<String, String>> {
        let state = locked(&self.shared.state);
        state.writes.get(key).cloned().unwrap_or_default()
    }

    /// Puts something in the bucket, past all rules.
    pub fn insert(&self, key: &str, object: StoredObject) {
        let mut state = locked(&self.shared.state);
        state.objects.insert(key.to_owned(), object);
    }

    /// Takes something out of the bucket.
    pub fn remove(&self, key: &str) -> Option<StoredObject> {
        locked(&self.shared.state).objects.remove(key)
    }

    /// Makes all that is in the bucket older.
    pub fn age(&self, by: Duration) {
        for object in locked(&self.shared.state).objects.values_mut() {
            object.modified -= by;
        }
    }
}

/// What the store needs to know of a server at `url` that lets the test's key in, with short
/// pauses between attempts.
///
/// # Panics
/// Where `url` and `bucket` are none.
pub fn config(url: &str, bucket: &str) -> S3Config {
    let mut config = S3Config::from_env(Some(&format!("s3://{bucket}")), |name| {
        Some(match name {
            "AWS_ENDPOINT_URL" => url.to_owned(),
            "AWS_ACCESS_KEY_ID" => ACCESS_KEY.to_owned(),
            "AWS_SECRET_ACCESS_KEY" => SECRET_KEY.to_owned(),
            _ => return None,
        })
    })
    .expect("a sound configuration");
    config.limits.first_pause = Duration::from_millis(10);
    config.limits.between_writes = Duration::ZERO;
    config
}

async fn answer(shared: &Shared, service: &S3Service, request: Request) -> Response {
    let call = Call {
        method: request.method.clone(),
        key: request
            .path
            .trim_start_matches('/')
            .split_once('/')
            .map_or("", |(_, key)| key)
            .to_owned(),
        query: request.query.clone(),
    };
    {
        let what = match call.key.as_str() {
            "" => "LIST".to_owned(),
            _ => call.method.clone(),
        };
        *locked(&shared.state).calls.entry(what).or_default() += 1;
    }
    let fate = (*locked(&shared.decide))(&call);
    match fate {
        Fate::Answered => serve(service, request).await,
        Fate::Late(delay) => serve(service, request).await.after(delay),
        Fate::Denied(status, code) => {
            let xml = format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code>\
                 <Message>as the test wants it</Message></Error>"
            );
            let body = if call.method == "HEAD" {
                String::new()
            } else {
                xml
            };
            Response::new(status, body).header("content-type", "application/xml")
        }
        Fate::AnswerLost => {
            serve(service, request).await;
            Response::reset()
        }
        Fate::Lost => Response::reset(),
        Fate::Silence => Response::hang(),
        Fate::Cut(bytes) => serve(service, request).await.cut(bytes),
        Fate::Dripped(bytes) => serve(service, request).await.dripped(bytes),
    }
}

async fn serve(service: &S3Service, request: Request) -> Response {
    let uri = match request.query.as_str() {
        "" => request.path.clone(),
        query => format!("{}?{query}", request.path),
    };
    let mut http = hyper::Request::builder()
        .method(request.method.as_str())
        .uri(uri);
    for (name, value) in &request.headers {
        http = http.header(name, value);
    }
    let http: HttpRequest = http
        .body(Body::from(request.body.clone()))
        .expect("it was a request before");
    let (head, body) = match service.call(http).await {
        Ok(answer) => answer.into_parts(),
        Err(error) => return Response::new(500, format!("{error:?}")),
    };
    let body = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Response::new(500, error.to_string()),
    };
    let told = head.headers.contains_key("content-length");
    let status = head.status.as_u16();
    let mut response = if told || status == 204 {
        Response::streamed(status, Box::pin(stream::iter([Ok(body)])))
    } else {
        Response::new(status, body)
    };
    for (name, value) in &head.headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        response = response.header(name.as_str(), value);
    }
    response
}

/// Knows one key. `s3s` checks the signatures.
struct Doorkeeper;

#[async_trait::async_trait]
impl S3Auth for Doorkeeper {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        match access_key {
            ACCESS_KEY => Ok(SecretKey::from(SECRET_KEY)),
            _ => Err(s3_error!(InvalidAccessKeyId)),
        }
    }
}

/// The bucket, as `s3s` sees it.
struct Backend(Arc<Shared>);

impl Backend {
    /// Everything happens in here, under the lock.
    fn on<T>(&self, bucket: &str, work: impl FnOnce(&mut State) -> S3Result<T>) -> S3Result<T> {
        if bucket != BUCKET {
            return Err(s3_error!(NoSuchBucket));
        }
        work(&mut locked(&self.0.state))
    }
}

#[async_trait::async_trait]
impl S3 for Backend {
    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        let content = match input.body {
            Some(body) => Body::from(body).collect().await,
            None => Body::empty().collect().await,
        };
        let object = StoredObject {
            content: content.map_err(|_| s3_error!(IncompleteBody))?.to_bytes(),
            metadata: input.metadata.unwrap_or_default().into_iter().collect(),
            content_type: input.content_type.map(|mime| mime.to_string()),
            modified: SystemTime::now(),
        };
        self.on(&input.bucket, |state| {
            let there = state.objects.get(&input.key);
            if !state.ignores_conditions {
                if let Some(condition) = &input.if_match {
                    let Some(there) = there else {
                        return Err(s3_error!(NoSuchKey));
                    };
                    if !is_met(condition, there) {
                        return Err(s3_error!(PreconditionFailed));
                    }
                }
                if let (Some(condition), Some(there)) = (&input.if_none_match, there)
                    && is_met(condition, there)
                {
                    return Err(s3_error!(PreconditionFailed));
                }
            }
            let output = PutObjectOutput {
                e_tag: Some(ETag::Strong(object.etag())),
                ..PutObjectOutput::default()
            };
            let writes = state.writes.entry(input.key.clone()).or_default();
            writes.push(object.metadata.clone());
            state.objects.insert(input.key, object);
            Ok(S3Response::new(output))
        })
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = request.input;
        self.on(&input.bucket, |state| {
            let object = found(state, &input.key)?;
            Ok(S3Response::new(HeadObjectOutput {
                content_length: Some(length(object)),
                e_tag: Some(ETag::Strong(object.etag())),
                last_modified: Some(Timestamp::from(object.modified)),
                metadata: Some(metadata(object)),
                ..HeadObjectOutput::default()
            }))
        })
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        self.on(&input.bucket, |state| {
            let object = found(state, &input.key)?;
            Ok(S3Response::new(GetObjectOutput {
                body: Some(StreamingBlob::from(Body::from(object.content.clone()))),
                content_length: Some(length(object)),
                e_tag: Some(ETag::Strong(object.etag())),
                last_modified: Some(Timestamp::from(object.modified)),
                metadata: Some(metadata(object)),
                ..GetObjectOutput::default()
            }))
        })
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = request.input;
        self.on(&input.bucket, |state| {
            state.objects.remove(&input.key);
            Ok(S3Response::new(DeleteObjectOutput::default()))
        })
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        self.on(&input.bucket, |state| {
            let prefix = input.prefix.clone().unwrap_or_default();
            let wanted = input.max_keys.and_then(|keys| usize::try_from(keys).ok());
            let wanted = wanted.unwrap_or(PAGE).min(PAGE);
            let start = match &input.continuation_token {
                Some(last) => Bound::Excluded(last.clone()),
                None => Bound::Included(prefix.clone()),
            };
            let (mut contents, mut prefixes) = (Vec::new(), Vec::<String>::new());
            let (mut last, mut is_truncated) = (None, false);
            let keys = state.objects.range((start, Bound::Unbounded));
            for (key, object) in keys.take_while(|(key, _)| key.starts_with(&prefix)) {
                let common = input.delimiter.as_ref().and_then(|delimiter| {
                    let end = key[prefix.len()..].find(delimiter.as_str())?;
                    Some(key[..prefix.len() + end + delimiter.len()].to_owned())
                });
                // Shown already, on this page or the one before.
                if common.is_some() && (common == last || common == input.continuation_token) {
                    continue;
                }
                if contents.len() + prefixes.len() == wanted {
                    is_truncated = true;
                    break;
                }
                last = Some(common.clone().unwrap_or_else(|| key.clone()));
                match common {
                    Some(common) => prefixes.push(common),
                    None => contents.push(s3s::dto::Object {
                        key: Some(key.clone()),
                        e_tag: Some(ETag::Strong(object.etag())),
                        last_modified: Some(Timestamp::from(object.modified)),
                        size: Some(length(object)),
                        ..s3s::dto::Object::default()
                    }),
                }
            }
            let prefixes = prefixes.into_iter().map(|prefix| s3s::dto::CommonPrefix {
                prefix: Some(prefix),
            });
            Ok(S3Response::new(ListObjectsV2Output {
                is_truncated: Some(is_truncated),
                next_continuation_token: last.filter(|_| is_truncated),
                key_count: i32::try_from(contents.len()).ok(),
                contents: Some(contents),
                common_prefixes: Some(prefixes.collect()),
                prefix: Some(prefix),
                ..ListObjectsV2Output::default()
            }))
        })
    }
}

fn is_met(condition: &ETagCondition, there: &StoredObject) -> bool {
    match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(etag) => etag.value() == there.etag(),
    }
}

fn found<'a>(state: &'a State, key: &str) -> S3Result<&'a StoredObject> {
    state.objects.get(key).ok_or_else(|| s3_error!(NoSuchKey))
}

fn length(object: &StoredObject) -> i64 {
    i64::try_from(object.content.len()).unwrap_or(i64::MAX)
}

fn metadata(object: &StoredObject) -> Metadata {
    object.metadata.clone().into_iter().collect()
}
