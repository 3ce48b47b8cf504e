//! Which sources may be fetched from: schemes and hosts.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::text::parse_size;
use serde::{Deserialize, Serialize};
use strum::{AsRefStr, VariantArray};
use url::Url;

use super::host::{AllowedHost, authority, literal_address};
use super::token::{self, HostToken, TokenOption};

/// Hosts that are always allowed.
pub const DEFAULT_HOSTS: [&str; 4] = ["github.com", "gitlab.com", "bitbucket.org", "codeberg.org"];

/// Options of fetching.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Fetching")]
pub struct FetchConfig {
    /// Also fetch from this host, whatever its address; HOST (at the scheme's own port) or HOST:PORT, repeatable.
    ///
    /// Always allowed: github.com, gitlab.com, bitbucket.org, codeberg.org.
    #[arg(long, env = "ALLOW_HOST", value_name = "HOST", value_delimiter = ',')]
    pub allow_host: Vec<AllowedHost>,
    /// Tokens for a host: the name of a variable that holds one, or a file with one a line; repeatable.
    ///
    /// gitlab.com=GITLAB_TOKEN names a variable, in capital letters; github.com=/run/secrets/github a file, which
    /// begins with / or ./. GITHUB_TOKEN is for github.com without this. Several for one host are used in turn,
    /// except those that it limits or refuses. In the environment, separate values by commas.
    #[arg(
        long,
        env = "TOKEN_FOR",
        value_name = "HOST=ENV|FILE",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub token_for: Vec<TokenOption>,
    /// Also fetch over plain http.
    #[arg(long, env = "ALLOW_HTTP")]
    pub allow_http: bool,
    /// Also read repositories on this machine, by path.
    #[arg(long, env = "ALLOW_LOCAL")]
    pub allow_local: bool,
    /// Fetch repositories through this proxy; it alone then decides which addresses may be reached.
    ///
    /// For a trusted egress proxy: names are resolved there, so addresses are not checked here. An http
    /// or https URL, with credentials if it needs any.
    #[arg(long, env = "FETCH_PROXY", value_name = "URL", hide_env_values = true)]
    pub fetch_proxy: Option<FetchProxy>,
    /// Largest download for one repository; over it the repository fails as too_large.
    #[arg(long, env = "MAX_FETCH_BYTES", value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub max_fetch_bytes: u64,
    /// How to fetch: v2 asks only for what a digest can show, and reads it in memory; git2 leaves it to libgit2;
    /// auto is v2, and git2 where a server or its answer is not as v2 needs it.
    #[arg(long, env = "FETCH", value_name = "WAY", default_value = "auto")]
    pub fetch: FetchMode,
}

/// Which ways of fetching are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FetchMode {
    /// Protocol v2, and libgit2 if something about the server's answers surprises.
    Auto,
    /// Protocol v2 alone: a surprise is a fault.
    V2,
    /// libgit2 alone.
    Git2,
}

/// How a repository was fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, AsRefStr, VariantArray)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
pub enum FetchWay {
    /// By protocol v2, without what no digest shows.
    V2,
    /// By protocol v2, trees first, and then only the files that a digest shows.
    ObjectInfo,
    /// Like [`Self::V2`], since [`Self::ObjectInfo`] failed.
    ObjectInfoFallback,
    /// By libgit2, as the operator wants it.
    Git2,
    /// By libgit2, since protocol v2 failed.
    Fallback,
}

impl FetchWay {
    /// Returns what was done instead, if this is a fallback.
    pub fn instead(self) -> Option<&'static str> {
        match self {
            Self::V2 | Self::ObjectInfo | Self::Git2 => None,
            Self::ObjectInfoFallback => Some("in one pack"),
            Self::Fallback => Some("with libgit2"),
        }
    }
}

impl FetchConfig {
    /// Returns the policy of these options, with the tokens of these variables.
    ///
    /// # Errors
    /// [`exit::USAGE`] if a token is missing, cannot be one, or could never be sent.
    pub fn policy(
        &self,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<FetchPolicy, ExitError> {
        let usage = |why| ExitError::new(exit::USAGE, why);
        let tokens = token::read(&self.token_for, variable).map_err(usage)?;
        let unknown = tokens.iter().map(|token| &token.host).find(|host| {
            let is_known = host.port.is_none() && DEFAULT_HOSTS.contains(&host.host.as_str());
            let mut allowed = self.allow_host.iter().cloned().map(AllowedHost::of_https);
            !is_known && !allowed.any(|allowed| allowed == **host)
        });
        if let Some(host) = unknown {
            let why =
                format!("--token-for {host}: the host is not allowed; add --allow-host {host}");
            return Err(usage(why));
        }
        Ok(FetchPolicy {
            hosts: self.allow_host.clone(),
            http: self.allow_http,
            local: self.allow_local,
            max_bytes: self.max_fetch_bytes,
            mode: self.fetch,
            tokens,
            proxy: self.fetch_proxy.clone(),
        })
    }
}

/// The proxy that repositories are fetched through. It may hold a password, and is never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FetchProxy(Url);

impl FetchProxy {
    /// Its URL.
    pub fn url(&self) -> &Url {
        &self.0
    }
}

impl FromStr for FetchProxy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| error.to_string())?;
        match url.scheme() {
            "http" | "https" => Ok(Self(url)),
            _ => Err("expected an http or https URL".to_owned()),
        }
    }
}

impl TryFrom<String> for FetchProxy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<FetchProxy> for String {
    fn from(proxy: FetchProxy) -> Self {
        proxy.0.into()
    }
}

impl fmt::Debug for FetchProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FetchProxy({})", authority(&self.0))
    }
}

/// [`FetchConfig`] as it is sent to a slot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FetchPolicy {
    /// Hosts allowed besides [`DEFAULT_HOSTS`], whatever their address.
    pub hosts: Vec<AllowedHost>,
    /// Whether plain http is allowed.
    pub http: bool,
    /// Whether paths are allowed.
    pub local: bool,
    /// Byte budget of one fetch.
    pub max_bytes: u64,
    /// Each is sent to its host only. A slot gets one at most.
    pub tokens: Vec<HostToken>,
    /// Decides about addresses in place of this process.
    pub proxy: Option<FetchProxy>,
    /// How to fetch.
    pub mode: FetchMode,
}

/// A source that the policy allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchSource {
    /// A repository on this machine.
    Local(PathBuf),
    /// A repository on a host.
    Remote {
        /// Without credentials, query and fragment.
        url: Url,
        /// Whether the operator named the host; its addresses are then not checked.
        named: bool,
    },
}

impl FetchPolicy {
    /// Returns the source that `url` names, if it is allowed.
    ///
    /// # Errors
    /// [`FaultKind::Refused`](common::fault::FaultKind::Refused), naming the option that allows it.
    pub fn source(&self, url: &str) -> Result<FetchSource, Fault> {
        let shown: String = url.chars().take(200).collect();
        let refused = |why: &str| Err(Fault::refused(format!("{shown:?} is {why}")));
        match Url::parse(url) {
            Ok(url) => self.remote(url),
            Err(_) if url.contains("://") => refused("not a URL"),
            Err(_) if !self.local => {
                refused("a path, and local sources are not allowed (--allow-local)")
            }
            Err(_) if url.starts_with('/') => Ok(FetchSource::Local(PathBuf::from(url))),
            // A slot has another working directory.
            Err(_) => refused("not an absolute path"),
        }
    }

    /// Returns what metrics call the host of a URL; a feed adds no names to those that are allowed.
    pub fn label(&self, url: &str) -> String {
        match self.source(url) {
            Ok(FetchSource::Remote { url, .. }) => authority(&url),
            Ok(FetchSource::Local(_)) => "local".to_owned(),
            Err(_) => "other".to_owned(),
        }
    }

    /// The [labels](FetchPolicy::label) of the hosts that are allowed.
    pub fn labels(&self) -> impl Iterator<Item = String> {
        let named = self.hosts.iter();
        let named = named.map(|host| host.clone().of_https().to_string());
        named.chain(DEFAULT_HOSTS.map(str::to_owned))
    }

    /// Like [`FetchPolicy::source`], for a URL, which may be the target of a redirect.
    pub fn remote(&self, mut url: Url) -> Result<FetchSource, Fault> {
        match url.scheme() {
            "https" => {}
            "http" if self.http => {}
            "http" => {
                return Err(Fault::refused(
                    "plain http is not allowed (--allow-http, read when a worker starts)",
                ));
            }
            other => {
                let why = format!("scheme {other:?} is not allowed, only https");
                return Err(Fault::refused(why));
            }
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Fault::refused("the URL holds credentials"));
        }
        url.set_query(None);
        url.set_fragment(None);
        // In lower case, for these schemes.
        let host = url.host_str().unwrap_or_default();
        let named = self.hosts.iter().any(|allowed| allowed.allows(&url));
        let known = url.port().is_none() && DEFAULT_HOSTS.contains(&host);
        if !named && !known {
            let host = authority(&url);
            return Err(Fault::refused(format!(
                "host {host} is not allowed (--allow-host {host}, read when a worker starts)"
            )));
        }
        Ok(FetchSource::Remote { url, named })
    }

    /// Returns the TCP ports that fetches lead to, by redirects as well.
    pub fn ports(&self) -> Vec<u16> {
        if let Some(proxy) = &self.proxy {
            return proxy.url().port_or_known_default().into_iter().collect();
        }
        let schemes = [Some(443), self.http.then_some(80)];
        let hosts = self.hosts.iter().map(|allowed| allowed.port);
        schemes.into_iter().chain(hosts).flatten().collect()
    }

    /// Names of hosts that only DNS knows, to find out whether it answers.
    pub fn names(&self) -> Vec<String> {
        if let Some(proxy) = &self.proxy {
            // It resolves all other names.
            let host = proxy.url().domain();
            return host.map(str::to_owned).into_iter().collect();
        }
        let hosts = self.hosts.iter().map(|allowed| allowed.host.as_str());
        // Addresses, `localhost` and the names of a container network don't need DNS.
        let named = hosts.filter(|host| {
            host.contains('.')
                && Url::parse(&format!("https://{host}"))
                    .is_ok_and(|url| literal_address(&url).is_none())
        });
        named.chain(DEFAULT_HOSTS).map(str::to_owned).collect()
    }

    /// Returns the first token that may be sent to `url`.
    pub fn token_for(&self, url: &Url) -> Option<&HostToken> {
        self.tokens.iter().find(|token| token.is_for(url))
    }
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;

    use super::*;

    fn policy() -> FetchPolicy {
        FetchPolicy {
            hosts: vec![
                "Git.Example.org".parse().unwrap(),
                "127.0.0.1:8080".parse().unwrap(),
                "port.example.org:443".parse().unwrap(),
            ],
            http: false,
            local: false,
            max_bytes: 1,
            mode: FetchMode::Auto,
            tokens: vec![HostToken {
                host: "github.com".parse().unwrap(),
                secret: "sesame".to_owned().into(),
                source: String::new(),
            }],
            proxy: None,
        }
    }

    #[test]
    fn only_https_to_allowed_hosts() {
        let policy = policy();
        for (url, named) in [
            ("https://github.com/a/b", false),
            ("https://GitHub.com/a/b?x=1#y", false),
            ("https://git.example.org/a/b", true),
            ("https://127.0.0.1:8080/a/b", true),
            ("https://port.example.org/a/b", true),
            ("https://port.example.org:443/a/b", true),
        ] {
            match policy.source(url).unwrap() {
                FetchSource::Remote { named: n, url } => {
                    assert_eq!(n, named, "{url}");
                    assert!(!url.as_str().contains(['?', '#']));
                }
                other => panic!("{other:?}"),
            }
        }
        for url in [
            "http://github.com/a/b",
            "https://github.com:8443/a/b",
            "https://github.com.evil.org/a/b",
            "https://user:pass@github.com/a/b",
            "https://127.0.0.1/a/b",
            "https://127.0.0.1:8081/a/b",
            "https://git.example.org:1/a/b",
            "ssh://github.com/a/b",
            "file:///etc",
            "git@github.com:a/b",
            "/etc",
            "../other",
            "https://",
            "",
        ] {
            let fault = policy.source(url).unwrap_err();
            assert_eq!(fault.kind, FaultKind::Refused, "{url}");
            assert!(!fault.message.contains("pass"), "{}", fault.message);
        }
    }

    #[test]
    fn metrics_know_no_hosts_but_those_that_are_allowed() {
        let policy = FetchPolicy {
            http: true,
            ..policy()
        };
        let labels: Vec<_> = policy.labels().collect();
        for (url, label) in [
            ("https://GitHub.com/a/b", "github.com"),
            ("http://git.example.org/a/b", "git.example.org"),
            ("https://127.0.0.1:8080/a/b", "127.0.0.1:8080"),
            ("https://port.example.org:443/a/b", "port.example.org"),
        ] {
            assert_eq!(policy.label(url), label);
            assert!(labels.iter().any(|known| known == label), "{labels:?}");
        }
        for url in ["https://other.example.org/a/b", "/srv/a", "https://"] {
            assert_eq!(policy.label(url), "other");
        }
    }

    #[test]
    fn paths_and_plain_http_are_allowed_when_asked_for() {
        let policy = FetchPolicy {
            http: true,
            local: true,
            ..policy()
        };
        assert_eq!(
            policy.source("/srv/a").unwrap(),
            FetchSource::Local("/srv/a".into())
        );
        assert!(policy.source("srv/a").is_err());
        assert!(policy.source("http://github.com/a/b").is_ok());
        assert!(policy.source("http://example.org/a/b").is_err());
    }

    #[test]
    fn a_token_is_for_a_host_that_may_be_fetched_from() {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            fetch: FetchConfig,
        }
        let policy = |arguments: &[&str]| {
            let line = [&["x"], arguments].concat();
            let config = <Line as clap::Parser>::parse_from(line).fetch;
            config.policy(|name| (name == "MINE").then(|| "sesame".into()))
        };
        let allowed = ["--allow-host", "git.example.org:8443"];
        let default_port = ["--allow-host", "git.example.org:443"];
        for (option, allow, expected) in [
            ("gitlab.com=MINE", &[][..], 1),
            ("gitlab.com:443=MINE", &[], 1),
            ("git.example.org=MINE", &default_port, 1),
            ("git.example.org:443=MINE", &default_port, 1),
            (
                "git.example.org:8443=MINE,codeberg.org=MINE",
                &allowed[..],
                2,
            ),
        ] {
            let tokens = policy(&[&["--token-for", option], allow].concat())
                .unwrap()
                .tokens;
            assert_eq!(tokens.len(), expected);
        }
        for option in ["git.example.org=MINE", "gitlab.com:8443=MINE"] {
            let error = policy(&[&["--token-for", option], &allowed[..]].concat()).unwrap_err();
            assert!(error.to_string().contains("--allow-host"), "{error}");
        }
    }

    #[test]
    fn fetches_lead_to_the_ports_of_what_is_allowed() {
        let with = |http, hosts: &[&str]| {
            let hosts = hosts.iter().map(|host| host.parse().unwrap()).collect();
            FetchPolicy {
                http,
                hosts,
                ..policy()
            }
            .ports()
        };
        assert_eq!(with(false, &[]), [443]);
        assert_eq!(with(true, &["git.example.org"]), [443, 80]);
        assert_eq!(with(false, &["[::1]:8443", "x:22"]), [443, 8443, 22]);
    }

    #[test]
    fn a_proxy_is_never_printed_and_is_the_only_name_to_resolve() {
        let proxy: FetchProxy = "http://user:sesame@proxy.example.org:3128".parse().unwrap();
        let policy = FetchPolicy {
            proxy: Some(proxy),
            ..policy()
        };
        assert!(!format!("{policy:?}").contains("sesame"));
        assert_eq!(policy.names(), ["proxy.example.org"]);
        assert_eq!(policy.ports(), [3128]);
        for text in ["", "proxy", "proxy:3128", "socks5://proxy:1", "ftp://proxy"] {
            assert!(text.parse::<FetchProxy>().is_err(), "{text}");
        }
    }
}
