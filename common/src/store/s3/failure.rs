//! What went wrong with a request, and the sentence that says what to do about it.

use std::error::Error;
use std::io;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::config::S3Config;

/// How much of what the server says is repeated.
const SAID_MAX_CHARS: usize = 200;

/// A request that failed, after all its attempts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The server said no.
    Answer {
        status: u16,
        /// S3's word for it; empty where the answer had none.
        code: String,
        message: String,
    },
    /// No answer in time.
    Silence,
    /// Nobody listens there.
    Refused,
    /// The host's name leads nowhere.
    Name(String),
    /// The server's certificate is not one that this machine trusts.
    Certificate(String),
    /// No answer, or half of one.
    Broken(String),
}

impl Failure {
    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        if let SdkError::TimeoutError(_) = error {
            return Self::Silence;
        }
        if let SdkError::DispatchFailure(failure) = error
            && failure.is_timeout()
        {
            return Self::Silence;
        }
        if let (Some(service), Some(raw)) = (error.as_service_error(), error.raw_response()) {
            return Self::Answer {
                status: raw.status().as_u16(),
                code: service.code().unwrap_or_default().to_owned(),
                message: service.message().unwrap_or_default().to_owned(),
            };
        }
        Self::without_answer(error)
    }

    /// By the causes, of which the SDK's own types say little.
    fn without_answer(error: &(dyn Error + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(cause) = next {
            if let Some(io) = cause.downcast_ref::<io::Error>()
                && io.kind() == io::ErrorKind::ConnectionRefused
            {
                return Self::Refused;
            }
            let text = cause.to_string();
            if text.contains("dns error") || text.contains("lookup address") {
                return Self::Name(innermost(cause).to_string());
            }
            if text.contains("certificate") {
                return Self::Certificate(text);
            }
            next = cause.source();
        }
        Self::Broken(innermost(error).to_string())
    }

    /// What happened, and the remedy.
    pub(super) fn sentence(&self, config: &S3Config) -> String {
        let names = config.names();
        let (endpoint, key, secret) = (names.endpoint(), names.access_key(), names.secret_key());
        match self {
            Self::Silence => format!(
                "no answer within {} s; the server or the way to it is overloaded",
                config.limits.operation.as_secs()
            ),
            Self::Refused => {
                format!(
                    "connection refused: nobody listens there; start the server, or check {endpoint}"
                )
            }
            Self::Name(why) => {
                format!(
                    "its name cannot be resolved ({why}); check {endpoint}, and this machine's DNS"
                )
            }
            Self::Certificate(why) => format!(
                "its certificate is not trusted ({why}); install ca-certificates, or check {endpoint}"
            ),
            Self::Broken(why) => format!("{why}; check that {endpoint} is an S3 server's address"),
            Self::Answer {
                status,
                code,
                message,
            } => {
                let bucket = &config.bucket;
                let remedy = match (code.as_str(), status) {
                    ("InvalidAccessKeyId", _) | (_, 401) => {
                        format!("the server does not know the access key: check {key}")
                    }
                    ("SignatureDoesNotMatch", _) => {
                        format!("the secret does not belong to the access key: check {secret}")
                    }
                    ("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired", _) => {
                        "the session has ended: renew AWS_SESSION_TOKEN and its keys".to_owned()
                    }
                    ("RequestTimeTooSkewed" | "RequestExpired", _) => {
                        "this machine's clock is wrong by minutes: set it, best by NTP".to_owned()
                    }
                    ("NoSuchBucket", _) => {
                        format!("there is no bucket {bucket}: create it, or correct its name")
                    }
                    (
                        "PermanentRedirect"
                        | "AuthorizationHeaderMalformed"
                        | "IllegalLocationConstraintException",
                        _,
                    )
                    | (_, 301 | 307) => {
                        "the bucket is in another region: set AWS_REGION to its own".to_owned()
                    }
                    ("QuotaExceeded" | "EntityTooLarge" | "InsufficientStorage", _) | (_, 507) => {
                        "the bucket has no room left: make some".to_owned()
                    }
                    ("SlowDown" | "TooManyRequests" | "Throttling", _) | (_, 429) => {
                        "the server asks for patience: fewer workers, or more of its quota"
                            .to_owned()
                    }
                    (_, 403) => format!(
                        "the key {key} may not do this: give it the rights to list, read, write \
                         and delete in {bucket}"
                    ),
                    (_, 500..) => "the server is at fault".to_owned(),
                    _ => format!("check that {endpoint} is an S3 server's address"),
                };
                let said = said(*status, code, message);
                format!("{said}; {remedy}")
            }
        }
    }
}

/// What the server said, on one line and not too long.
fn said(status: u16, code: &str, message: &str) -> String {
    let words = [code, message].into_iter().filter(|word| !word.is_empty());
    let words = words.collect::<Vec<_>>().join(": ");
    let words: String = words
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SAID_MAX_CHARS)
        .collect();
    match words.as_str() {
        "" => format!("the server answered {status}"),
        words => format!("the server answered {status} {words}"),
    }
}

/// The cause that has none itself.
fn innermost<'a>(mut error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    while let Some(cause) = error.source() {
        error = cause;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_own_remedy() {
        let config = S3Config::from_env(Some("s3://digests"), |name| {
            Some(match name {
                "AWS_ENDPOINT_URL" => "http://127.0.0.1:9000".to_owned(),
                "AWS_ACCESS_KEY_ID" => "key".to_owned(),
                "AWS_SECRET_ACCESS_KEY" => "hush".to_owned(),
                _ => return None,
            })
        })
        .unwrap();
        let answer = |status, code: &str| Failure::Answer {
            status,
            code: code.to_owned(),
            message: "it says\nso".to_owned(),
        };
        for (failure, part) in [
            (answer(403, "InvalidAccessKeyId"), "check AWS_ACCESS_KEY_ID"),
            (answer(401, "Unauthorized"), "check AWS_ACCESS_KEY_ID"),
            (
                answer(403, "SignatureDoesNotMatch"),
                "check AWS_SECRET_ACCESS_KEY",
            ),
            (answer(400, "ExpiredToken"), "AWS_SESSION_TOKEN"),
            (answer(403, "RequestTimeTooSkewed"), "clock"),
            (answer(404, "NoSuchBucket"), "no bucket digests"),
            (answer(301, "PermanentRedirect"), "AWS_REGION"),
            (answer(507, ""), "no room"),
            (answer(503, "SlowDown"), "patience"),
            (answer(429, ""), "patience"),
            (answer(403, "AccessDenied"), "rights to list"),
            (answer(403, ""), "rights to list"),
            (answer(500, "InternalError"), "server is at fault"),
            (answer(405, "MethodNotAllowed"), "AWS_ENDPOINT_URL"),
            (Failure::Silence, "no answer within 60 s"),
            (Failure::Refused, "connection refused"),
            (Failure::Name("no such host".to_owned()), "DNS"),
            (Failure::Certificate("expired".to_owned()), "certificate"),
            (Failure::Broken("reset".to_owned()), "reset"),
        ] {
            let sentence = failure.sentence(&config);
            assert!(sentence.contains(part), "{part:?} in {sentence:?}");
            assert!(!sentence.contains('\n') && !sentence.contains("hush"));
        }
    }
}
