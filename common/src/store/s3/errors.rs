//! What went wrong with a request, and the sentence that says what to do about it.

use std::error::Error;
use std::io;
use std::time::Duration;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::dns::ResolveDnsError;

use super::config::{Names, S3Config};

/// How much of the server's own words is repeated.
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
    /// No connection in time.
    Unconnected,
    /// Nobody listens there.
    Refused,
    /// The host's name leads nowhere.
    Name(String),
    /// The server's certificate is not one that this machine trusts.
    Certificate(String),
    /// No source gave credentials.
    NoCredentials {
        why: String,
        /// No source is configured, so waiting does not help.
        is_lasting: bool,
    },
    /// No answer, or half of one.
    Broken(String),
}

/// The status of the answer, if there was one.
pub(super) fn status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    Some(error.raw_response()?.status().as_u16())
}

/// S3's code for the error, if the server sent one.
pub(super) fn code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Option<&str> {
    error.as_service_error()?.code()
}

/// Whether a conditional PUT met something else than it expected.
///
/// 412: the condition does not hold; 409: another writer is at it; 404: If-Match, and nothing there.
/// The last only with S3's own code: proxies, and other servers, answer 404 too.
pub(super) fn is_conflict<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    match status(error) {
        Some(412 | 409) => true,
        Some(404) => code(error) == Some("NoSuchKey"),
        _ => false,
    }
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
            // The only limit that is set there.
            return Self::Unconnected;
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
        for cause in causes(error) {
            if let Some(io) = cause.downcast_ref::<io::Error>()
                && io.kind() == io::ErrorKind::ConnectionRefused
            {
                return Self::Refused;
            }
            if let Some(rustls::Error::InvalidCertificate(why)) = cause.downcast_ref() {
                return Self::Certificate(why.to_string());
            }
            if cause.is::<ResolveDnsError>() {
                return Self::Name(innermost(cause).to_string());
            }
            if let Some(error) = cause.downcast_ref::<CredentialsError>() {
                use CredentialsError::{CredentialsNotLoaded, InvalidConfiguration};
                return Self::NoCredentials {
                    why: innermost(cause).to_string(),
                    is_lasting: matches!(error, CredentialsNotLoaded(_) | InvalidConfiguration(_)),
                };
            }
        }
        Self::Broken(innermost(error).to_string())
    }

    /// Whether waiting will not help: the server understood, and said no.
    pub(super) fn is_lasting(&self) -> bool {
        match self {
            Self::Answer { status, .. } => *status < 500 && !matches!(status, 408 | 429),
            Self::Certificate(_) => true,
            Self::NoCredentials { is_lasting, .. } => *is_lasting,
            _ => false,
        }
    }

    /// What happened, and the remedy.
    pub(super) fn sentence(&self, config: &S3Config) -> String {
        let (address, limits) = (config.address_variable(), &config.limits);
        match self {
            Self::Silence => format!("no answer {}", overloaded(limits.operation)),
            Self::Unconnected => format!(
                "no connection within {} s; check {address}, and what is between here and there",
                limits.connect.as_secs_f64()
            ),
            Self::Refused => {
                format!(
                    "connection refused: nobody listens there; start the server, or check {address}"
                )
            }
            Self::Name(why) => {
                format!(
                    "its name cannot be resolved ({why}); check {address}, and this machine's DNS"
                )
            }
            Self::Certificate(why) => format!(
                "its certificate is not trusted ({why}); install ca-certificates, or check {address}"
            ),
            Self::NoCredentials { why, .. } => format!(
                "no credentials ({why}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or check \
                 the profile, web identity, container or instance role"
            ),
            Self::Broken(why) => format!("{why}; {}", no_s3_server(config)),
            Self::Answer {
                status,
                code,
                message,
            } => format!(
                "{}; {}",
                said(*status, code, message),
                remedy(*status, code, config)
            ),
        }
    }
}

/// What to do about an answer.
fn remedy(status: u16, code: &str, config: &S3Config) -> String {
    let (names, bucket) = (config.names(), &config.bucket);
    let (key, secret) = (names.access_key(), names.secret_key());
    match (code, status) {
        ("InvalidAccessKeyId", _) | (_, 401) => {
            format!("the server does not know the access key: check {key}")
        }
        ("SignatureDoesNotMatch", _) => {
            format!("the secret does not belong to the access key: check {secret}")
        }
        ("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired", _) => {
            "the session has ended: renew AWS_SESSION_TOKEN and its keys".to_owned()
        }
        ("RequestTimeTooSkewed" | "RequestExpired" | "ExpiredRequest", _) => {
            "this machine's clock is wrong by minutes: set it, best by NTP".to_owned()
        }
        ("NoSuchBucket", _) => {
            format!("there is no bucket {bucket}: create it, or correct its name")
        }
        (
            "PermanentRedirect"
            | "AuthorizationHeaderMalformed"
            | "IllegalLocationConstraintException"
            | "InvalidRegionName",
            _,
        )
        | (_, 301 | 307) => match names {
            Names::Aws => "the bucket is in another region: set AWS_REGION to its own".to_owned(),
            // Their region is always `auto`.
            Names::R2 => format!(
                "the bucket is elsewhere: check {}",
                config.address_variable()
            ),
        },
        ("QuotaExceeded" | "EntityTooLarge" | "InsufficientStorage", _) | (_, 507) => {
            "the bucket has no room left: make some".to_owned()
        }
        ("SlowDown" | "TooManyRequests" | "Throttling", _) | (_, 429) => {
            "the server asks for patience: fewer workers, or more of its quota".to_owned()
        }
        (_, 403) => format!(
            "the key {key} may not do this: give it the rights to list, read, write and delete in \
             {bucket}"
        ),
        (_, 500..) => "the server is at fault".to_owned(),
        _ => no_s3_server(config),
    }
}

fn no_s3_server(config: &S3Config) -> String {
    let address = config.address_variable();
    match config.endpoint {
        Some(_) => format!("check that {address} is an S3 server's address"),
        None => format!("check {address}, and what is between here and there"),
    }
}

/// What ends a sentence about something that took longer than `limit`.
pub(super) fn overloaded(limit: Duration) -> String {
    format!(
        "within {} s; the server or the way to it is overloaded",
        limit.as_secs_f64()
    )
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

/// The error, its cause, the cause's cause, and so on.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| {
        // An `io::Error` gives the source of the error in it, but not that error.
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        }
    })
}

/// The cause that has none itself.
pub(super) fn innermost<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    causes(error).last().unwrap_or(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(address: (&str, &str)) -> S3Config {
        let keys = [
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "hush"),
        ];
        let variables = [address, keys[0], keys[1]];
        S3Config::from_env(Some("s3://digests"), |name| {
            let (_, value) = variables.iter().find(|(key, _)| *key == name)?;
            Some((*value).to_owned())
        })
        .unwrap()
    }

    fn answer(status: u16, code: &str) -> Failure {
        Failure::Answer {
            status,
            code: code.to_owned(),
            message: "it says\nso".to_owned(),
        }
    }

    #[test]
    fn at_amazon_the_region_says_where_the_server_is() {
        let config = config(("AWS_REGION", "eu-west-9"));
        for failure in [
            Failure::Unconnected,
            Failure::Refused,
            Failure::Name("no such host".to_owned()),
            Failure::Certificate("expired".to_owned()),
            Failure::Broken("reset".to_owned()),
            answer(404, ""),
        ] {
            let sentence = failure.sentence(&config);
            assert!(sentence.contains("check AWS_REGION"), "{sentence}");
            assert!(!sentence.contains("ENDPOINT"), "{sentence}");
        }
    }

    #[test]
    fn the_predecessors_are_not_told_of_a_region_that_they_cannot_set() {
        let config = S3Config::from_env(None, |name| {
            Some(match name {
                "R2_BUCKET" => "digests".to_owned(),
                "R2_ENDPOINT" => "https://acc.r2.cloudflarestorage.com".to_owned(),
                "R2_ACCESS_KEY" | "R2_SECRET_KEY" => "key".to_owned(),
                _ => return None,
            })
        })
        .unwrap();
        let sentence = answer(301, "").sentence(&config);
        assert!(sentence.contains("check R2_ENDPOINT"), "{sentence}");
        assert!(!sentence.contains("AWS_"), "{sentence}");
    }

    #[test]
    fn each_failure_has_its_own_remedy() {
        let no_credentials = Failure::NoCredentials {
            why: "none".to_owned(),
            is_lasting: true,
        };
        let config = config(("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000"));
        for (failure, part) in [
            (answer(403, "InvalidAccessKeyId"), "check AWS_ACCESS_KEY_ID"),
            (answer(401, "Unauthorized"), "check AWS_ACCESS_KEY_ID"),
            (
                answer(403, "SignatureDoesNotMatch"),
                "check AWS_SECRET_ACCESS_KEY",
            ),
            (answer(400, "ExpiredToken"), "AWS_SESSION_TOKEN"),
            (answer(403, "RequestTimeTooSkewed"), "clock"),
            (answer(403, "ExpiredRequest"), "clock"),
            (answer(404, "NoSuchBucket"), "no bucket digests"),
            (answer(301, "PermanentRedirect"), "AWS_REGION"),
            (answer(400, "InvalidRegionName"), "AWS_REGION"),
            (answer(507, ""), "no room"),
            (answer(503, "SlowDown"), "patience"),
            (answer(429, ""), "patience"),
            (answer(403, "AccessDenied"), "rights to list"),
            (answer(403, ""), "rights to list"),
            (answer(500, "InternalError"), "server is at fault"),
            (answer(405, "MethodNotAllowed"), "AWS_ENDPOINT_URL_S3"),
            (Failure::Silence, "no answer within 60 s"),
            (Failure::Unconnected, "no connection within 3 s"),
            (Failure::Refused, "check AWS_ENDPOINT_URL_S3"),
            (Failure::Name("no such host".to_owned()), "DNS"),
            (Failure::Certificate("expired".to_owned()), "certificate"),
            (no_credentials, "set AWS_ACCESS_KEY_ID"),
            (Failure::Broken("reset".to_owned()), "reset"),
        ] {
            let sentence = failure.sentence(&config);
            assert!(sentence.contains(part), "{part:?} in {sentence:?}");
            assert!(!sentence.contains('\n') && !sentence.contains("hush"));
        }
    }
}
