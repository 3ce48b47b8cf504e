//! From what people write for a repository to the URL that is fetched.

use url::Url;

use super::policy::DEFAULT_HOSTS;

/// What follows a repository's path in the address of one of its pages, on hosts with two parts to it.
const PAGES: [&str; 20] = [
    "actions",
    "activity",
    "blame",
    "blob",
    "branches",
    "commit",
    "commits",
    "discussions",
    "issues",
    "network",
    "packages",
    "pull",
    "pull-requests",
    "pulls",
    "raw",
    "releases",
    "src",
    "tags",
    "tree",
    "wiki",
];

/// A repository's URL, and what was left out of the text that it was made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The URL.
    pub url: String,
    /// A page of the repository, such as `tree/main`.
    pub page: Option<String>,
}

/// Returns the address that `text` means; `None` if it is none, so that it may be a path.
///
/// Understands `git@HOST:OWNER/NAME`, `ssh://git@HOST/…` and, for well-known hosts, a missing scheme and
/// the addresses of pages in a repository.
///
/// # Errors
/// Says what is wrong with it, in a clause about "it", without repeating it.
pub fn parse(text: &str) -> Result<Option<Address>, String> {
    let Some(text) = with_scheme(text) else {
        return Ok(None);
    };
    let url = Url::parse(&text).map_err(|error| format!("does not parse: {error}"))?;
    if url.fragment().is_some() {
        return Err("has a # part, but the digest is always of HEAD; leave that out".to_owned());
    }
    if url.query().is_some() {
        return Err("has a ? part, which names no repository; leave that out".to_owned());
    }
    let host = url.host_str().unwrap_or_default();
    let known = matches!(url.scheme(), "https" | "http") && url.port().is_none();
    if !known || !DEFAULT_HOSTS.contains(&host) {
        return Ok(Some(Address {
            url: text,
            page: None,
        }));
    }
    on_known_host(&text, &url, host).map(Some)
}

/// Returns the text as a URL, if it can be one.
fn with_scheme(text: &str) -> Option<String> {
    if let Some((scheme, rest)) = text.split_once("://") {
        let rest = rest.strip_prefix("git@").unwrap_or(rest);
        let is_ssh = scheme.eq_ignore_ascii_case("ssh") && is_known(rest.split('/').next());
        return Some(match is_ssh {
            true => format!("https://{rest}"),
            false => text.to_owned(),
        });
    }
    let before_slash = text.split('/').next().unwrap_or_default();
    if let Some((host, _)) = before_slash.split_once(':') {
        let path = &text[host.len() + 1..];
        let user = host.split_once('@');
        let host = user.map_or(host, |(_, host)| host);
        let is_scp = user.is_some_and(|(user, _)| user == "git") || is_known(Some(host));
        let path = path.trim_start_matches('/');
        return is_scp.then(|| format!("https://{host}/{path}"));
    }
    is_known(Some(before_slash)).then(|| format!("https://{text}"))
}

fn is_known(host: Option<&str>) -> bool {
    host.is_some_and(|host| {
        DEFAULT_HOSTS
            .iter()
            .any(|known| known.eq_ignore_ascii_case(host))
    })
}

/// Cuts off what follows a repository's path.
fn on_known_host(text: &str, url: &Url, host: &str) -> Result<Address, String> {
    let segments: Vec<&str> = url.path().split('/').filter(|s| !s.is_empty()).collect();
    let names = match host {
        // Groups may nest; `-` separates a project from its pages.
        "gitlab.com" => segments.iter().position(|segment| *segment == "-"),
        _ => Some(2).filter(|two| segments.len() > *two),
    };
    let (names, page) = segments.split_at(names.unwrap_or(segments.len()));
    let is_page = host == "gitlab.com" || page.first().is_none_or(|page| PAGES.contains(page));
    if names.len() < 2 || !is_page {
        return Err(format!(
            "names no repository; give https://{host}/OWNER/NAME"
        ));
    }
    if page.is_empty() {
        // As it was written.
        return Ok(Address {
            url: text.to_owned(),
            page: None,
        });
    }
    let mut url = url.clone();
    url.set_path(&names.join("/"));
    Ok(Address {
        url: url.into(),
        page: Some(page.join("/")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "https://github.com/o/n";

    /// What is written, the URL, and the page.
    const UNDERSTOOD: [(&str, &str, Option<&str>); 22] = [
        (URL, URL, None),
        (
            "https://github.com/o/n.git/",
            "https://github.com/o/n.git/",
            None,
        ),
        ("https://github.com/o/n/tree/main", URL, Some("tree/main")),
        (
            "https://github.com/o/n/blob/a/b.rs",
            URL,
            Some("blob/a/b.rs"),
        ),
        ("https://github.com/o/n/issues/5", URL, Some("issues/5")),
        ("https://github.com/o/n/pulls", URL, Some("pulls")),
        ("github.com/o/n", URL, None),
        ("github.com/o/n/tree/main", URL, Some("tree/main")),
        ("git@github.com:o/n", URL, None),
        ("git@github.com:o/n.git", "https://github.com/o/n.git", None),
        ("github.com:o/n", URL, None),
        ("ssh://git@github.com/o/n", URL, None),
        (
            "git@git.example.org:o/n.git",
            "https://git.example.org/o/n.git",
            None,
        ),
        (
            "https://gitlab.com/g/s/p/-/tree/main",
            "https://gitlab.com/g/s/p",
            Some("-/tree/main"),
        ),
        (
            "https://gitlab.com/g/tree/p",
            "https://gitlab.com/g/tree/p",
            None,
        ),
        (
            "https://codeberg.org/o/n/src/branch/x",
            "https://codeberg.org/o/n",
            Some("src/branch/x"),
        ),
        (
            "https://bitbucket.org/o/n/src",
            "https://bitbucket.org/o/n",
            Some("src"),
        ),
        // Only what is unambiguous.
        ("https://GitHub.com/o/n", "https://GitHub.com/o/n", None),
        (
            "https://git.example.org/o/n/tree/main",
            "https://git.example.org/o/n/tree/main",
            None,
        ),
        (
            "http://127.0.0.1:1/o/n.git",
            "http://127.0.0.1:1/o/n.git",
            None,
        ),
        (
            "ssh://git@git.example.org/o/n",
            "ssh://git@git.example.org/o/n",
            None,
        ),
        (
            "https://user:secret@github.com/o/n",
            "https://user:secret@github.com/o/n",
            None,
        ),
    ];

    #[test]
    fn what_people_write_is_understood() {
        for (text, expected, page) in UNDERSTOOD {
            let expected = Address {
                url: expected.to_owned(),
                page: page.map(str::to_owned),
            };
            assert_eq!(parse(text), Ok(Some(expected)), "{text}");
        }
        for path in [
            "o/n",
            "/srv/o/n",
            ".",
            "../n",
            "c:/x",
            "user@host:x",
            "",
            "github.com.example/o/n",
        ] {
            assert_eq!(parse(path), Ok(None), "{path}");
        }
    }

    #[test]
    fn what_names_no_repository_is_refused_with_what_to_say_instead() {
        for (text, why) in [
            ("https://github.com/o/n#main", "# part"),
            ("https://git.example.org/o/n#main", "# part"),
            ("https://github.com/o/n?tab=readme", "? part"),
            ("https://github.com/o", "https://github.com/OWNER/NAME"),
            ("https://github.com/", "https://github.com/OWNER/NAME"),
            (
                "https://github.com/o/n/x/y",
                "https://github.com/OWNER/NAME",
            ),
            (
                "https://gitlab.com/p/-/issues",
                "https://gitlab.com/OWNER/NAME",
            ),
            ("https://[", "does not parse"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
