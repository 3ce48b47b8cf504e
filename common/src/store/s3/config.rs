//! Which bucket, where, and with what credentials: read from the environment, as values.
//!
//! Keys come from the environment, R2_* before any other source. Without keys, the SDK's chain is
//! asked on the first request: profile, web identity, container, instance. Address and region come
//! from the environment alone.

use std::fmt;
use std::time::Duration;

use hyper::Uri;

use crate::text::unsubstituted;

/// A bucket, how to reach it, and what it takes to be let in.
#[derive(Clone)]
pub struct S3Config {
    /// The bucket.
    pub bucket: String,
    /// What every key begins with; no slash at either end.
    pub prefix: String,
    /// `https://host[:port]`; `None` for Amazon's own.
    pub endpoint: Option<String>,
    /// The region; `auto` for servers that have none, and always for the predecessor's variables.
    pub region: String,
    /// How long to wait for the server, and how often.
    pub limits: Limits,
    keys: Option<Keys>,
    names: Names,
    /// What says where the server is.
    address_variable: &'static str,
}

/// Credentials from the environment.
#[derive(Clone)]
pub(super) struct Keys {
    pub(super) access: String,
    pub(super) secret: String,
    pub(super) session_token: Option<String>,
}

/// How long to wait for the server, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How often a request is sent, the first time included.
    pub attempts: u32,
    /// For a connection.
    pub connect: Duration,
    /// For the answer to one attempt.
    pub attempt: Duration,
    /// For an operation with all its attempts.
    pub operation: Duration,
    /// Up to this long before the second attempt, twice that before the third.
    pub first_pause: Duration,
    /// Between two writes of the same key: R2 refuses more than one a second.
    pub between_writes: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            attempts: 3,
            connect: Duration::from_secs(3),
            attempt: Duration::from_secs(20),
            operation: Duration::from_secs(60),
            first_pause: Duration::from_secs(1),
            between_writes: Duration::from_millis(1200),
        }
    }
}

/// The variables that a configuration came from, for messages that name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// As every tool for S3 reads them.
    Aws,
    /// The predecessor's.
    R2,
}

impl Names {
    pub(super) fn access_key(self) -> &'static str {
        match self {
            Self::Aws => "AWS_ACCESS_KEY_ID",
            Self::R2 => "R2_ACCESS_KEY",
        }
    }

    pub(super) fn secret_key(self) -> &'static str {
        match self {
            Self::Aws => "AWS_SECRET_ACCESS_KEY",
            Self::R2 => "R2_SECRET_KEY",
        }
    }
}

impl S3Config {
    /// What `url` (`s3://BUCKET[/PREFIX]`) and the variables of `env` say.
    ///
    /// Keys are taken from one family of variables, never from both: AWS_* if any of its two keys is
    /// set, else R2_*. Without a URL the bucket is R2_BUCKET, with R2_* only. With neither family,
    /// credentials are looked for when they are needed. A variable that is empty counts as not set.
    ///
    /// # Errors
    /// With a sentence that names everything that is missing, and no value that may be secret.
    pub fn from_env(
        url: Option<&str>,
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let env = Environment(env);
        let names = match url {
            Some(_) if env.any(&["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]) => Names::Aws,
            Some(_) if env.any(&["R2_ENDPOINT", "R2_ACCESS_KEY", "R2_SECRET_KEY"]) => Names::R2,
            Some(_) => Names::Aws,
            None => Names::R2,
        };
        let mut missing = Vec::new();
        let (bucket, prefix) = match url {
            Some(url) => bucket_and_prefix(url)?,
            None => (env.need("R2_BUCKET", &mut missing), String::new()),
        };
        let (address_variable, endpoint) = match names {
            Names::Aws => env
                .first(["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
                .map_or(("AWS_REGION", None), |(name, value)| (name, Some(value))),
            Names::R2 => ("R2_ENDPOINT", Some(env.need("R2_ENDPOINT", &mut missing))),
        };
        let region = match names {
            Names::Aws => env.first(["AWS_REGION", "AWS_DEFAULT_REGION"]),
            // R2 refuses the region that some other program on this machine needs.
            Names::R2 => None,
        };
        if endpoint.is_none() && region.is_none() {
            missing.push("AWS_ENDPOINT_URL (or AWS_REGION, for a bucket at Amazon)");
        }
        let variables = [names.access_key(), names.secret_key()];
        let keys = (names == Names::R2 || env.any(&variables)).then(|| {
            let [access, secret] = variables.map(|name| env.need(name, &mut missing));
            let session_token = match names {
                Names::Aws => env.get("AWS_SESSION_TOKEN"),
                Names::R2 => None,
            };
            Keys {
                access,
                secret,
                session_token,
            }
        });
        if !missing.is_empty() {
            return Err(format!(
                "missing environment variables for the store {}: {}; .env.example says what each \
                 is for",
                url.unwrap_or("R2_BUCKET"),
                missing.join(", ")
            ));
        }
        env.check_substituted()?;
        if let Some(keys) = &keys {
            check_visible(names.access_key(), &keys.access)?;
            check_visible(names.secret_key(), &keys.secret)?;
            let token = keys.session_token.as_deref().unwrap_or_default();
            check_visible("AWS_SESSION_TOKEN", token)?;
        }
        check_bucket(&bucket)?;
        let endpoint = endpoint
            .map(|endpoint| check_endpoint(address_variable, &endpoint, &bucket))
            .transpose()?;
        Ok(Self {
            bucket,
            prefix,
            endpoint,
            region: region.map_or_else(|| "auto".to_owned(), |(_, region)| region),
            limits: Limits::default(),
            keys,
            names,
            address_variable,
        })
    }

    /// Whether the environment speaks of a bucket in the predecessor's words.
    pub fn is_predecessors(env: impl Fn(&str) -> Option<String>) -> bool {
        Environment(env).any(&["R2_BUCKET", "R2_ENDPOINT", "R2_ACCESS_KEY", "R2_SECRET_KEY"])
    }

    /// The keys that the environment names, if any.
    pub(super) fn keys(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    pub(super) fn names(&self) -> Names {
        self.names
    }

    /// The variable that says where the server is: the endpoint's, or the region's at Amazon.
    pub(super) fn address_variable(&self) -> &'static str {
        self.address_variable
    }

    /// The key of what a store without a prefix would have under `key`.
    pub(super) fn key(&self, key: &str) -> String {
        match self.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    /// `s3://BUCKET[/PREFIX]`.
    pub fn url(&self) -> String {
        format!("s3://{}", self.key_of_bucket())
    }

    fn key_of_bucket(&self) -> String {
        match self.prefix.as_str() {
            "" => self.bucket.clone(),
            prefix => format!("{}/{prefix}", self.bucket),
        }
    }

    /// The URL, and where its bucket is.
    pub(super) fn place(&self) -> String {
        match &self.endpoint {
            Some(endpoint) => format!("{} at {endpoint}", self.url()),
            None => format!("{} in {}", self.url(), self.region),
        }
    }
}

impl fmt::Debug for S3Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not even the access key: it is half of what one needs.
        f.debug_struct("S3Config")
            .field("url", &self.url())
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// [`unsubstituted`] for values in which `${` may well stand.
fn unsubstituted_whole(name: &str, value: &str) -> Option<String> {
    let variable = value.strip_prefix("${")?.strip_suffix('}')?;
    let named = variable.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    unsubstituted(name, value).filter(|_| named && !variable.contains(['{', '}']))
}

/// The variables of a process.
struct Environment<F>(F);

impl<F: Fn(&str) -> Option<String>> Environment<F> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.trim().is_empty())
    }

    /// The first of `names` that is set, with its value.
    fn first<const N: usize>(&self, names: [&'static str; N]) -> Option<(&'static str, String)> {
        names
            .into_iter()
            .find_map(|name| Some((name, self.get(name)?)))
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some())
    }

    fn need(&self, name: &'static str, missing: &mut Vec<&'static str>) -> String {
        self.get(name).unwrap_or_else(|| {
            missing.push(name);
            String::new()
        })
    }

    fn check_substituted(&self) -> Result<(), String> {
        const PLAIN: [&str; 6] = [
            "R2_BUCKET",
            "R2_ENDPOINT",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
            "AWS_REGION",
            "AWS_DEFAULT_REGION",
        ];
        // A secret may hold anything, so only all of it can be told for a mistake.
        const SECRET: [&str; 5] = [
            "R2_ACCESS_KEY",
            "R2_SECRET_KEY",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
        ];
        let plain = PLAIN
            .iter()
            .filter_map(|name| unsubstituted(name, &self.get(name)?));
        let secret = SECRET
            .iter()
            .filter_map(|name| unsubstituted_whole(name, &self.get(name)?));
        plain.chain(secret).next().map_or(Ok(()), Err)
    }
}

/// Refuses a key with an invisible character, mostly the end of the line that it was read from: the
/// server would only say that it is wrong.
fn check_visible(name: &str, key: &str) -> Result<(), String> {
    if key.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(format!(
        "{name} holds a space, a line end or another invisible character, which no key does: set it \
         to the key alone"
    ))
}

fn bucket_and_prefix(url: &str) -> Result<(String, String), String> {
    if let Some(why) = unsubstituted("the store's URL", url) {
        return Err(why);
    }
    let Some(rest) = url.strip_prefix("s3://") else {
        let scheme = url.split("://").next().unwrap_or_default();
        // Not the whole address, which may hold credentials.
        return Err(format!(
            "a store at {scheme}://… is not supported; give a folder or s3://BUCKET[/PREFIX]"
        ));
    };
    if rest.contains(['@', '?', '#']) {
        return Err(
            "the store's URL is s3://BUCKET[/PREFIX]; credentials and options go into variables, \
             see .env.example"
                .to_owned(),
        );
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_matches('/');
    let word = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.=".contains(&b))
    };
    if !prefix.is_empty() && !prefix.split('/').all(word) {
        return Err(format!(
            "the prefix {prefix:?} of the store's URL is not made of letters, digits, - _ . = and \
             single slashes"
        ));
    }
    Ok((bucket.to_owned(), prefix.to_owned()))
}

fn check_bucket(bucket: &str) -> Result<(), String> {
    let ok = (3..=63).contains(&bucket.len())
        && bucket.starts_with(|c: char| c.is_ascii_alphanumeric())
        && bucket
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if ok {
        return Ok(());
    }
    Err(format!(
        "{bucket:?} is not the name of a bucket, which has 3 to 63 letters, digits, dots and dashes"
    ))
}

fn check_endpoint(name: &str, endpoint: &str, bucket: &str) -> Result<String, String> {
    let endpoint = endpoint.trim().trim_end_matches('/');
    let shape = || format!("{name} must be https://HOST or http://HOST[:PORT]");
    let uri: Uri = endpoint.parse().map_err(|_| shape())?;
    let known = matches!(uri.scheme_str(), Some("https" | "http"));
    let Some(authority) = uri.authority().filter(|_| known) else {
        return Err(shape());
    };
    if authority.as_str().contains('@') || uri.query().is_some() {
        return Err(format!(
            "{}; credentials go into variables of their own",
            shape()
        ));
    }
    // As Cloudflare's dashboard shows it.
    if uri.path().rsplit('/').next() == Some(bucket) {
        return Err(format!(
            "{name} must not name the bucket: leave out /{bucket} at its end"
        ));
    }
    Ok(endpoint.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn config(url: Option<&str>, variables: &[(&str, &str)]) -> Result<S3Config, String> {
        S3Config::from_env(url, |name| {
            let (_, value) = variables.iter().find(|(key, _)| *key == name)?;
            Some((*value).to_owned())
        })
    }

    const R2: [(&str, &str); 4] = [
        ("R2_BUCKET", "digests"),
        ("R2_ENDPOINT", "https://acc.r2.cloudflarestorage.com/"),
        ("R2_ACCESS_KEY", "r2-key"),
        ("R2_SECRET_KEY", "r2-$ecret-${x"),
    ];
    const AWS: [(&str, &str); 3] = [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000"),
        ("AWS_ACCESS_KEY_ID", "aws-key"),
        ("AWS_SECRET_ACCESS_KEY", "aws-secret"),
    ];

    fn pair(config: &S3Config) -> (&str, &str) {
        let keys = config.keys().unwrap();
        (&keys.access, &keys.secret)
    }

    #[test]
    fn without_keys_the_sdk_looks_for_credentials() {
        let variables = [("AWS_REGION", "eu-west-2"), ("AWS_ACCESS_KEY_ID", " ")];
        let config = config(Some("s3://bucket"), &variables).unwrap();
        assert!(config.keys().is_none());
    }

    #[test]
    fn the_predecessors_variables_are_enough() {
        let config = config(None, &R2).unwrap();
        assert_eq!(config.url(), "s3://digests");
        assert_eq!(config.key("runs/x"), "runs/x");
        assert_eq!(
            config.endpoint.as_deref(),
            Some("https://acc.r2.cloudflarestorage.com")
        );
        assert_eq!(config.region, "auto");
        assert_eq!(pair(&config), ("r2-key", "r2-$ecret-${x"));
    }

    #[test]
    fn the_usual_variables_are_read() {
        let more = [
            ("AWS_ENDPOINT_URL_S3", "https://s3.example/base/"),
            ("AWS_REGION", "eu-west-2"),
            ("AWS_SESSION_TOKEN", "token"),
        ];
        // Credentials are of one family, whatever else is set.
        let variables = [&AWS[..], &R2[..], &more[..]].concat();
        let config = config(Some("s3://bucket/a/b/"), &variables).unwrap();
        assert_eq!((&*config.bucket, &*config.prefix), ("bucket", "a/b"));
        assert_eq!(config.key("runs/x"), "a/b/runs/x");
        assert_eq!(config.endpoint.as_deref(), Some("https://s3.example/base"));
        assert_eq!(config.region, "eu-west-2");
        assert_eq!(pair(&config), ("aws-key", "aws-secret"));
        assert_eq!(
            config.keys().unwrap().session_token.as_deref(),
            Some("token")
        );
        assert_eq!(config.place(), "s3://bucket/a/b at https://s3.example/base");
    }

    #[test]
    fn a_bucket_may_be_named_beside_the_predecessors_credentials() {
        let config = config(Some("s3://other"), &R2).unwrap();
        assert_eq!(config.bucket, "other");
        assert_eq!(pair(&config).0, "r2-key");
    }

    #[test]
    fn amazon_itself_needs_a_region_in_place_of_an_endpoint() {
        let variables = [AWS[1], AWS[2], ("AWS_DEFAULT_REGION", "eu-west-2")];
        let config = config(Some("s3://bucket"), &variables).unwrap();
        assert_eq!(config.endpoint, None);
        assert_eq!(config.place(), "s3://bucket in eu-west-2");
    }

    #[test]
    fn all_that_is_missing_is_named_at_once() {
        let missing = |url, variables: &[(&str, &str)]| {
            let why = config(url, variables).unwrap_err();
            let (_, names) = why.split_once(": ").unwrap();
            names.split(';').next().unwrap().to_owned()
        };
        assert_eq!(
            missing(Some("s3://bucket"), &[("AWS_REGION", " ")]),
            "AWS_ENDPOINT_URL (or AWS_REGION, for a bucket at Amazon)"
        );
        assert_eq!(
            missing(None, &[("R2_ENDPOINT", "https://x"), ("R2_SECRET_KEY", "")]),
            "R2_BUCKET, R2_ACCESS_KEY, R2_SECRET_KEY"
        );
        assert_eq!(
            missing(Some("s3://bucket"), &[AWS[0], AWS[1]]),
            "AWS_SECRET_ACCESS_KEY"
        );
    }

    #[test]
    fn what_docker_left_unsubstituted_is_refused() {
        for (name, value) in [
            ("R2_BUCKET", "${BUCKET}"),
            ("R2_ENDPOINT", "https://${ACCOUNT}.r2.cloudflarestorage.com"),
            ("R2_ACCESS_KEY", "${KEY}"),
            ("R2_SECRET_KEY", "${SECRET:-none}"),
        ] {
            let mut variables = R2;
            variables
                .iter_mut()
                .find(|(key, _)| *key == name)
                .unwrap()
                .1 = value;
            let why = config(None, &variables).unwrap_err();
            assert!(why.contains(name) && why.contains("Docker"), "{why}");
        }
        let why = config(Some("s3://${BUCKET}"), &AWS).unwrap_err();
        assert!(why.contains("Docker"), "{why}");
    }

    #[test]
    fn keys_with_what_no_key_holds_are_refused_by_name() {
        for (name, value) in [
            ("AWS_ACCESS_KEY_ID", "hush\u{a0}"),
            ("AWS_SECRET_ACCESS_KEY", "hush\n"),
            ("AWS_SESSION_TOKEN", "hush\u{200b}hush"),
        ] {
            let mut variables: BTreeMap<_, _> = AWS.into_iter().collect();
            variables.insert(name, value);
            let variables: Vec<_> = variables.into_iter().collect();
            let why = config(Some("s3://bucket"), &variables).unwrap_err();
            assert!(why.starts_with(name) && !why.contains("hush"), "{why}");
        }
        let mut variables = R2;
        variables[3].1 = "hush\r";
        let why = config(None, &variables).unwrap_err();
        assert!(why.starts_with("R2_SECRET_KEY"), "{why}");
        // Not among what is used there.
        let more = [&R2[..], &[("AWS_SESSION_TOKEN", "a b")]].concat();
        config(None, &more).unwrap();
    }

    #[test]
    fn the_predecessors_region_is_always_auto() {
        let more = [("AWS_REGION", "eu-west-2"), ("AWS_DEFAULT_REGION", "x")];
        let variables = [&R2[..], &more[..]].concat();
        for url in [None, Some("s3://other")] {
            assert_eq!(config(url, &variables).unwrap().region, "auto");
        }
    }

    #[test]
    fn messages_name_the_variable_that_the_address_came_from() {
        let amazon = [AWS[1], AWS[2], ("AWS_REGION", "eu-west-2")];
        let own = [&AWS[..], &[("AWS_ENDPOINT_URL_S3", "ftp://x")]].concat();
        for (url, variables, name) in [
            (None, &R2[..], "R2_ENDPOINT"),
            (Some("s3://bucket"), &AWS, "AWS_ENDPOINT_URL"),
            (Some("s3://bucket"), &amazon, "AWS_REGION"),
        ] {
            assert_eq!(config(url, variables).unwrap().address_variable(), name);
        }
        let why = config(Some("s3://bucket"), &own).unwrap_err();
        assert!(why.starts_with("AWS_ENDPOINT_URL_S3 must be"), "{why}");
    }

    #[test]
    fn mistakes_are_explained_without_telling_secrets() {
        for (url, endpoint, part) in [
            ("gs://bucket", "http://x", "gs://…"),
            ("s3://key:hush@bucket", "http://x", ".env.example"),
            ("s3://b", "http://x", "3 to 63"),
            ("s3://", "http://x", "3 to 63"),
            ("s3://../etc", "http://x", "bucket"),
            ("s3://bucket/a//b", "http://x", "prefix"),
            ("s3://bucket/../b", "http://x", "prefix"),
            ("s3://bucket", "x", "https://HOST"),
            ("s3://bucket", "ftp://x", "https://HOST"),
            (
                "s3://bucket",
                "https://key:hush@x",
                "variables of their own",
            ),
            ("s3://bucket", "https://x/bucket/", "leave out /bucket"),
        ] {
            let variables = [("AWS_ENDPOINT_URL", endpoint), AWS[1], AWS[2]];
            let why = config(Some(url), &variables).unwrap_err();
            assert!(why.contains(part), "{part:?} in {why:?}");
            assert!(!why.contains("hush"), "{why}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", config(None, &R2).unwrap());
        assert!(shown.contains("s3://digests"), "{shown}");
        assert!(!shown.contains("r2-"), "{shown}");
    }
}
