//! The cache check against an HTTP API.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::exit::ExitError;
use common::retry::{Attempt, Policy, retry};
use common::run::documents::CacheReason;
use futures::stream::{self, StreamExt};
use serde::Serialize;
use serde_json::Value;
use tracing::warn;
use url::Url;

use super::answer::Answer;
use crate::feed::entry::FeedRepo;
use crate::feed::fetch::{Plain, http_client, root_cause, shown};

/// Repositories in one request, by the API's contract.
const BATCH: usize = 500;
/// Requests under way at the same time.
const WIDTH: usize = 4;
/// An answer about [`BATCH`] repositories has 75 kB at most.
const ANSWER_BYTES: usize = 1 << 20;

/// Address of a cache API. Shown without what may be secret: credentials and query.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiUrl(Url);

impl FromStr for ApiUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| error.to_string())?;
        match url.scheme() {
            "https" | "http" => Ok(Self(url)),
            _ => Err("expected an https or http URL".to_owned()),
        }
    }
}

impl fmt::Display for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.0))
    }
}

impl fmt::Debug for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiUrl({self})")
    }
}

/// Asks the API about every repository. One that does not answer is only warned of.
pub(crate) async fn by_api(
    url: &ApiUrl,
    timeout: Duration,
    policy: &Policy,
    repositories: &[FeedRepo],
) -> Result<Vec<Answer>, ExitError> {
    let api = Api {
        client: http_client(None, timeout, Plain::Allowed, &url.0)?,
        url: url.clone(),
        retry: policy.clone(),
        away: AtomicBool::new(false),
    };
    let requests: Vec<_> = repositories
        .chunks(BATCH)
        .map(|batch| api.ask(batch))
        .collect();
    let answers: Vec<Vec<Answer>> = stream::iter(requests).buffered(WIDTH).collect().await;
    Ok(answers.into_iter().flatten().collect())
}

/// The cache API: tells for each repository whether it needs processing.
struct Api {
    client: reqwest::Client,
    url: ApiUrl,
    retry: Policy,
    /// Set when a request failed in all its attempts: the remaining batches are not asked.
    away: AtomicBool,
}

#[derive(Serialize)]
struct Question<'a> {
    repos: Vec<QuestionRepo<'a>>,
}

#[derive(Serialize)]
struct QuestionRepo<'a> {
    org: &'a str,
    name: &'a str,
    #[serde(rename = "pushedAt")]
    pushed_at: &'a str,
    url: &'a str,
}

impl Api {
    async fn ask(&self, batch: &[FeedRepo]) -> Vec<Answer> {
        match self.request(batch).await {
            Ok(needed) => batch
                .iter()
                .map(|entry| match needed.get(&entry.repo.to_string()) {
                    Some(Value::Bool(false)) => CacheReason::Hit.into(),
                    Some(Value::Bool(true)) => Answer::called_for(CacheReason::Miss),
                    Some(_) => Answer::unknown("the API said neither true nor false"),
                    None => Answer::unknown("the API did not speak of it"),
                })
                .collect(),
            Err(why) => {
                warn!(
                    operation = "cache-check",
                    repositories = batch.len(),
                    "{} repositories count as misses: cache API {}: {why}",
                    batch.len(),
                    self.url
                );
                vec![Answer::unknown(why); batch.len()]
            }
        }
    }

    async fn request(&self, batch: &[FeedRepo]) -> Result<HashMap<String, Value>, String> {
        let question = Question {
            repos: batch
                .iter()
                .map(|entry| QuestionRepo {
                    org: entry.repo.owner(),
                    name: entry.repo.name(),
                    pushed_at: entry.pushed_at.as_str(),
                    url: &entry.url,
                })
                .collect(),
        };
        let what = format!("asking the cache API {}", self.url);
        retry(&self.retry, &what, || self.request_once(&question))
            .await
            .inspect_err(|error| {
                if let ApiError::Away(_) = error {
                    self.away.store(true, Ordering::Relaxed);
                }
            })
            .map_err(|error| error.to_string())
    }

    async fn request_once(
        &self,
        question: &Question<'_>,
    ) -> Result<HashMap<String, Value>, Attempt<ApiError>> {
        if self.away.load(Ordering::Relaxed) {
            return Err(Attempt::Final(ApiError::NotAsked));
        }
        let away = |error: reqwest::Error| Attempt::Again(ApiError::Away(root_cause(error)));
        let request = self.client.post(self.url.0.clone()).json(question);
        let mut response = request.send().await.map_err(away)?;
        let status = response.status();
        if !status.is_success() {
            let why = format!("it answered {status}");
            return Err(
                if status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
                    Attempt::Again(ApiError::Away(why))
                } else {
                    Attempt::Final(ApiError::Odd(why))
                },
            );
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > ANSWER_BYTES {
                let why = format!("it answered more than {ANSWER_BYTES} bytes");
                return Err(Attempt::Final(ApiError::Odd(why)));
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body)
            .map_err(|error| Attempt::Final(ApiError::Odd(format!("no JSON object: {error}"))))
    }
}

/// What went wrong with a request to the API.
#[derive(Debug, thiserror::Error)]
enum ApiError {
    /// It is not there, or not now.
    #[error("{0}")]
    Away(String),
    /// It is there and makes no sense.
    #[error("{0}")]
    Odd(String),
    /// It was away for another batch.
    #[error("not asked again, since it did not answer before")]
    NotAsked,
}
