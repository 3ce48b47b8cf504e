//! Which sources may be fetched from: schemes, hosts, addresses.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use common::exit::{self, ExitError};
use common::fault::Fault;
use common::text::parse_size;
use serde::{Deserialize, Serialize};
use strum::{AsRefStr, VariantArray};
use url::{Host, Url};
use zeroize::Zeroizing;

/// Hosts that are always allowed.
pub const DEFAULT_HOSTS: [&str; 4] = ["github.com", "gitlab.com", "bitbucket.org", "codeberg.org"];

/// The host that GITHUB_TOKEN is for.
const TOKEN_HOST: &str = "github.com";

/// Options of fetching.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Fetching")]
pub struct FetchConfig {
    /// Also fetch from this host, whatever its address; HOST (at the scheme's own port) or HOST:PORT, repeatable.
    ///
    /// Always allowed: github.com, gitlab.com, bitbucket.org, codeberg.org.
    #[arg(long, env = "ALLOW_HOST", value_name = "HOST", value_delimiter = ',')]
    pub allow_host: Vec<AllowedHost>,
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
    /// By libgit2, as the operator wants it.
    Git2,
    /// By libgit2, since protocol v2 failed.
    Fallback,
}

impl FetchConfig {
    /// Returns the policy of these options, with the value of GITHUB_TOKEN as token for github.com.
    ///
    /// # Errors
    /// [`exit::USAGE`] if that cannot be a token.
    pub fn policy(&self, token: Option<OsString>) -> Result<FetchPolicy, ExitError> {
        let token = checked_token(token).map_err(|why| ExitError::new(exit::USAGE, why))?;
        Ok(FetchPolicy {
            hosts: self.allow_host.clone(),
            http: self.allow_http,
            local: self.allow_local,
            max_bytes: self.max_fetch_bytes,
            mode: self.fetch,
            token: token.map(|token| HostToken {
                host: TOKEN_HOST.to_owned(),
                secret: Zeroizing::new(token),
            }),
            proxy: self.fetch_proxy.clone(),
        })
    }
}

/// Checks the form of a token; empty is none. Never repeats it.
fn checked_token(token: Option<OsString>) -> Result<Option<String>, String> {
    let Some(token) = token.filter(|token| !token.is_empty()) else {
        return Ok(None);
    };
    let token = token.to_str().unwrap_or("\u{fffd}");
    let wrong = token.chars().find_map(|c| match c {
        '\n' | '\r' => Some("a line break"),
        '"' | '\'' | '`' => Some("a quote"),
        c if c.is_whitespace() => Some("a blank"),
        c if c.is_ascii_graphic() => None,
        _ => Some("a character that no token has"),
    });
    match wrong {
        Some(what) => Err(format!(
            "GITHUB_TOKEN is not a token: it contains {what}; give the token alone, or leave the variable empty"
        )),
        None => Ok(Some(token.to_owned())),
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

/// A host that the operator named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedHost {
    /// Lower case; an IPv6 address in brackets.
    pub host: String,
    /// `None` for the scheme's default port only.
    pub port: Option<u16>,
}

impl AllowedHost {
    fn allows(&self, url: &Url) -> bool {
        // `Url::port` leaves out the scheme's default.
        let port = match self.port {
            Some(_) => url.port_or_known_default(),
            None => url.port(),
        };
        port == self.port && url.host_str() == Some(&self.host)
    }
}

impl FromStr for AllowedHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not HOST or HOST:PORT");
        if text.contains(['*', '?']) {
            return Err(format!(
                "{text:?}: a host is named in full, without wildcards"
            ));
        }
        // Any scheme will do.
        let url = Url::parse(&format!("allow://{text}")).map_err(|_| wrong())?;
        let plain = url.path().is_empty() && url.username().is_empty() && url.query().is_none();
        match url.host_str() {
            Some(host) if plain && !host.is_empty() => Ok(Self {
                host: host.to_ascii_lowercase(),
                port: url.port(),
            }),
            _ => Err(wrong()),
        }
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
    /// Sent to its host only.
    pub token: Option<HostToken>,
    /// Decides about addresses in place of this process.
    pub proxy: Option<FetchProxy>,
    /// How to fetch.
    pub mode: FetchMode,
}

/// A token and the one host that receives it.
#[derive(Clone, Serialize, Deserialize)]
pub struct HostToken {
    /// Host, with its port unless that is the scheme's default.
    pub host: String,
    /// The token. Never printed.
    pub secret: Zeroizing<String>,
}

impl fmt::Debug for HostToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut token = f.debug_struct("HostToken");
        token.field("host", &self.host).finish_non_exhaustive()
    }
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

    /// Like [`FetchPolicy::source`], for a URL, which may be the target of a redirect.
    pub fn remote(&self, mut url: Url) -> Result<FetchSource, Fault> {
        match url.scheme() {
            "https" => {}
            "http" if self.http => {}
            "http" => return Err(Fault::refused("plain http is not allowed (--allow-http)")),
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
                "host {host} is not allowed (--allow-host {host})"
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

    /// Whether there could be a token for the host of `url`, but is none.
    pub fn lacks_token(&self, url: &str) -> bool {
        let on_host = |url: Url| url.scheme() == "https" && authority(&url) == TOKEN_HOST;
        self.token.is_none() && Url::parse(url).is_ok_and(on_host)
    }

    /// Returns the token if it belongs to the host of `url`, and the connection is encrypted or local.
    pub fn token_for(&self, url: &Url) -> Option<&str> {
        let token = self.token.as_ref()?;
        let private = url.scheme() == "https"
            || literal_address(url).is_some_and(|address| address.is_loopback());
        (private && token.host == authority(url)).then_some(token.secret.as_str())
    }
}

/// Returns a URL's host, with its port unless that is the scheme's default.
pub fn authority(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}"));
    url.host_str().unwrap_or_default().to_owned() + &port.unwrap_or_default()
}

/// Returns the address of a URL that names one instead of a host.
pub fn literal_address(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Ipv4(address) => Some(address.into()),
        Host::Ipv6(address) => Some(address.into()),
        Host::Domain(_) => None,
    }
}

/// Whether an address can belong to a public host, by IANA's special-purpose address registries. An
/// IPv6 form of an IPv4 address counts as that. `IpAddr::is_global` is not stable yet.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_broadcast()
        || address.is_documentation()
        || address.is_multicast()
        || a == 0
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (b == 18 || b == 19))
        || a >= 240)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        // ::ffff:a.b.c.d, and 64:ff9b::a.b.c.d of NAT64
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            embedded(high, low)
        }
        // 6to4
        [0x2002, high, low, ..] => embedded(high, low),
        // Teredo and the rest of 2001::/23, documentation
        [0x2001, second, ..] if second < 0x200 || second == 0xdb8 => false,
        [0x3fff, second, ..] if second < 0x1000 => false,
        // Only 2000::/3 is public.
        [first, ..] => (0x2000..0x4000).contains(&first),
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
            token: Some(HostToken {
                host: "github.com".to_owned(),
                secret: "sesame".to_owned().into(),
            }),
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
    fn the_token_goes_to_its_host_only_and_is_never_shown() {
        let policy = policy();
        let for_url = |url: &str| policy.token_for(&Url::parse(url).unwrap()).is_some();
        assert!(for_url("https://github.com/a/b"));
        assert!(!for_url("http://github.com/a/b"));
        assert!(!for_url("https://github.com:8443/a/b"));
        assert!(!for_url("https://gitlab.com/a/b"));
        assert!(!for_url("https://git.example.org/github.com"));
        assert!(!format!("{policy:?}").contains("sesame"));
    }

    #[test]
    fn a_token_has_the_form_of_one() {
        let check = |text: &str| checked_token(Some(text.into()));
        assert_eq!(checked_token(None), Ok(None));
        assert_eq!(check(""), Ok(None));
        assert_eq!(check("ghp_aZ09"), Ok(Some("ghp_aZ09".to_owned())));
        for (text, what) in [
            ("ghp_sesame\n", "a line break"),
            ("\"ghp_sesame\"", "a quote"),
            ("'ghp_sesame'", "a quote"),
            (" ghp_sesame", "a blank"),
            ("ghp_sesame\t", "a blank"),
            (" ", "a blank"),
            ("ghp_sesäme", "a character"),
        ] {
            let error = check(text).unwrap_err();
            assert!(error.contains(what), "{error}");
            assert!(!error.contains("ghp_"), "{error}");
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

    #[test]
    fn addresses() {
        for address in [
            "140.82.121.4",
            "8.8.8.8",
            "2606:50c0:8000::153",
            "64:ff9b::8.8.8.8",
        ] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
        for address in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "192.0.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::10.0.0.1",
            "2002:7f00:1::",
            "2001:db8::1",
            "2001::1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn allowed_hosts_are_hosts() {
        for text in ["", "a/b", "user@host", "https://host", "host:99999", "a b"] {
            assert!(text.parse::<AllowedHost>().is_err(), "{text:?}");
        }
        let v6: AllowedHost = "[::1]:80".parse().unwrap();
        assert_eq!((v6.host.as_str(), v6.port), ("[::1]", Some(80)));
    }
}
