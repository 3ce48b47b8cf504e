//! Hosts as the operator names them, and the addresses behind them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use url::{Host, Url};

/// The default port of https.
const HTTPS: u16 = 443;

/// A host that the operator named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedHost {
    /// Lower case; an IPv6 address in brackets.
    pub host: String,
    /// `None` for the scheme's default port only.
    pub port: Option<u16>,
}

impl AllowedHost {
    /// Whether it is the host and port of `url`.
    pub fn allows(&self, url: &Url) -> bool {
        // `Url::port` leaves out the scheme's default.
        let port = match self.port {
            Some(_) => url.port_or_known_default(),
            None => url.port(),
        };
        port == self.port && url.host_str() == Some(&self.host)
    }

    /// Returns it as an https URL names it: without the scheme's default port.
    #[must_use]
    pub fn of_https(mut self) -> Self {
        self.port = self.port.filter(|port| *port != HTTPS);
        self
    }
}

impl fmt::Display for AllowedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.host)?;
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
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
    use super::*;

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
        assert_eq!(v6.to_string(), "[::1]:80");
    }
}
