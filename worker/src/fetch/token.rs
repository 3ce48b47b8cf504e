//! Tokens for hosts: where the operator keeps them, and what one looks like.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};

use common::text::unsubstituted;
use serde::{Deserialize, Serialize};
use url::Url;
use zeroize::Zeroizing;

use super::host::{AllowedHost, authority, literal_address};

/// The variable of a token for [`GITHUB`].
const VARIABLE: &str = "GITHUB_TOKEN";
/// The host that most repositories are on.
pub const GITHUB: &str = "github.com";
/// Most bytes of a file of tokens that are read.
const MAX_FILE: u64 = 64 << 10;

/// A token and the one host that receives it.
#[derive(Clone, Serialize, Deserialize)]
pub struct HostToken {
    /// The host.
    pub host: AllowedHost,
    /// The token. Never printed.
    pub secret: Zeroizing<String>,
    /// Where the operator keeps it: a variable, or a file and the line in it. Of no use to a slot.
    #[serde(skip)]
    pub source: String,
}

impl HostToken {
    /// Whether the token belongs to the host of `url`, and the connection is encrypted or local.
    pub fn is_for(&self, url: &Url) -> bool {
        is_private(url) && self.host.allows(url)
    }

    /// The name to send it with. Most hosts take any: [GitHub] documents this one, [GitLab] wants one that
    /// is not blank, Gitea and Forgejo look at the password alone (`services/auth/basic.go`). Only
    /// [Bitbucket] wants its own.
    ///
    /// [GitHub]: https://docs.github.com/en/apps/creating-github-apps/authenticating-with-a-github-app/authenticating-as-a-github-app-installation
    /// [GitLab]: https://docs.gitlab.com/user/profile/personal_access_tokens/
    /// [Bitbucket]: https://support.atlassian.com/bitbucket-cloud/docs/using-project-access-tokens/
    pub(super) fn user(&self) -> &'static str {
        match self.host.host.as_str() {
            "bitbucket.org" => "x-token-auth",
            _ => "x-access-token",
        }
    }
}

impl fmt::Debug for HostToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut token = f.debug_struct("HostToken");
        token.field("host", &self.host);
        token.field("source", &self.source).finish_non_exhaustive()
    }
}

/// Whether a token may be sent there.
fn is_private(url: &Url) -> bool {
    url.scheme() == "https" || literal_address(url).is_some_and(|address| address.is_loopback())
}

/// Returns the host of a repository to which a token could be sent.
pub fn host_for_token(url: &str) -> Option<String> {
    let url = Url::parse(url).ok()?;
    is_private(&url).then(|| authority(&url))
}

/// Says how to give a token for a host, after "give".
pub fn remedy(host: &str) -> String {
    match host {
        GITHUB => format!("a token in {VARIABLE}"),
        host => format!("a token with --token-for {host}=VARIABLE"),
    }
}

/// A value of `--token-for`. Never printed, since it may be a token by mistake.
#[derive(Clone)]
pub struct TokenOption(String);

impl From<String> for TokenOption {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for TokenOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenOption")
    }
}

/// Where a token is, as an option says.
enum Place<'a> {
    Variable(&'a str),
    File(&'a str),
}

impl TokenOption {
    /// Splits `HOST=VARIABLE` or `HOST=FILE`. A token that was meant to be either is neither.
    fn parse(&self) -> Option<(AllowedHost, Place<'_>)> {
        let (host, place) = self.0.split_once('=')?;
        let is_file = ["/", "./", "../"]
            .iter()
            .any(|start| place.starts_with(start));
        let is_variable = place.starts_with(|c: char| c.is_ascii_uppercase() || c == '_')
            && place
                .bytes()
                .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
        let place = match (is_file, is_variable) {
            (true, _) => Place::File(place),
            (_, true) => Place::Variable(place),
            _ => return None,
        };
        // A token is sent by https.
        let host: AllowedHost = host.parse().ok()?;
        Some((host.of_https(), place))
    }
}

/// Reads the tokens that `options` name, and that of GITHUB_TOKEN.
///
/// # Errors
/// Says what is wrong with an option, or with a token, without repeating either.
pub(super) fn read(
    options: &[TokenOption],
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<HostToken>, String> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let mut tokens = Tokens(Vec::new());
    if let Some(secret) = variable(VARIABLE) {
        let github = AllowedHost {
            host: GITHUB.to_owned(),
            port: None,
        };
        tokens.add(&github, secret.to_str(), VARIABLE.to_owned())?;
    }
    for (index, option) in options.iter().enumerate() {
        let Some((host, place)) = option.parse() else {
            return Err(format!(
                "--token-for: value {} is not HOST=VARIABLE, the variable in capital letters, or HOST=FILE, the \
                 file with a / or ./ in front; a token itself does not belong there",
                index + 1
            ));
        };
        match place {
            Place::Variable(name) => {
                let secret = variable(name).ok_or_else(|| {
                    format!("--token-for {host}={name}: the variable {name} is not set; set it to a token for {host}")
                })?;
                tokens.add(&host, secret.to_str(), name.to_owned())?;
            }
            Place::File(path) => {
                let wrong = |why: String| format!("--token-for {host}={path}: {why}");
                let text =
                    read_file(path).map_err(|error| wrong(format!("cannot read it: {error}")))?;
                let before = tokens.0.len();
                for (line, secret) in text
                    .lines()
                    .enumerate()
                    .filter(|(_, line)| !line.is_empty())
                {
                    tokens.add(&host, Some(secret), format!("{path}, line {}", line + 1))?;
                }
                if tokens.0.len() == before {
                    return Err(wrong("the file holds no token; give one a line".to_owned()));
                }
            }
        }
    }
    Ok(tokens.0)
}

fn read_file(path: &str) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

struct Tokens(Vec<HostToken>);

impl Tokens {
    /// Adds a token that has the form of one.
    fn add(
        &mut self,
        host: &AllowedHost,
        secret: Option<&str>,
        source: String,
    ) -> Result<(), String> {
        let secret = checked(secret, &source)?;
        let known = |token: &HostToken| token.host == *host && *token.secret == secret;
        if !self.0.iter().any(known) {
            self.0.push(HostToken {
                host: host.clone(),
                secret: secret.to_owned().into(),
                source,
            });
        }
        Ok(())
    }
}

/// Checks the form of a token; `None` is not even text. Never repeats it.
fn checked<'a>(secret: Option<&'a str>, source: &str) -> Result<&'a str, String> {
    let secret = secret.unwrap_or("\u{fffd}");
    if let Some(why) = unsubstituted(source, secret) {
        return Err(why);
    }
    let wrong = secret.chars().find_map(|c| match c {
        '\n' | '\r' => Some("a line break"),
        '"' | '\'' | '`' => Some("a quote"),
        c if c.is_whitespace() => Some("a blank"),
        c if c.is_ascii_graphic() && !"${}".contains(c) => None,
        _ => Some("a character that no token has"),
    });
    match wrong {
        Some(what) => Err(format!(
            "{source} is not a token: it contains {what}; give the token alone"
        )),
        None => Ok(secret),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Reads options where the variables are `GITHUB_TOKEN`, if given, and `MINE`.
    fn read_with(options: &[&str], github: &str) -> Result<Vec<HostToken>, String> {
        let options: Vec<_> = options
            .iter()
            .map(|text| TokenOption((*text).to_owned()))
            .collect();
        read(&options, |name| match name {
            "GITHUB_TOKEN" => Some(github.into()),
            "MINE" => Some("sesame-mine".into()),
            "EMPTY" => Some("".into()),
            _ => None,
        })
    }

    fn shown(tokens: &[HostToken]) -> Vec<(String, &str, &str)> {
        let tokens = tokens.iter();
        tokens
            .map(|t| (t.host.to_string(), t.secret.as_str(), &*t.source))
            .collect()
    }

    #[test]
    fn tokens_are_in_variables_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokens");
        fs::write(&file, "sesame-1\r\n\nsesame-2\nsesame-1\n").unwrap();
        let file = file.to_str().unwrap();
        let options = [
            &format!("git.example.org:8443={file}"),
            "gitlab.com=MINE",
            "github.com=MINE",
        ];
        let [first, second] = [1, 3].map(|line| format!("{file}, line {line}"));
        assert_eq!(
            shown(&read_with(&options, "sesame-hub").unwrap()),
            [
                ("github.com".to_owned(), "sesame-hub", "GITHUB_TOKEN"),
                ("git.example.org:8443".to_owned(), "sesame-1", &first),
                ("git.example.org:8443".to_owned(), "sesame-2", &second),
                ("gitlab.com".to_owned(), "sesame-mine", "MINE"),
                ("github.com".to_owned(), "sesame-mine", "MINE"),
            ]
        );
        assert_eq!(read_with(&[], "").unwrap().len(), 0);
        // The same one twice counts once.
        assert_eq!(
            read_with(&["github.com=MINE"], "sesame-mine")
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    fn a_tokens_host_is_named_as_that_of_urls() {
        for (option, url) in [
            ("github.com:443=MINE", "https://github.com/o/n"),
            ("github.com=MINE", "https://github.com:443/o/n"),
            ("github.com:8443=MINE", "https://github.com:8443/o/n"),
        ] {
            let tokens = read_with(&[option], "").unwrap();
            let host = host_for_token(url).unwrap();
            assert_eq!(tokens[0].host.to_string(), host, "{option}");
            assert!(tokens[0].is_for(&Url::parse(url).unwrap()), "{option}");
        }
    }

    #[test]
    fn what_is_missing_is_named_and_what_may_be_a_token_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (empty, quoted) = (
            file("empty", "\n\n"),
            file("quoted", "sesame-1\n'sesame-2'\n"),
        );
        for (option, parts) in [
            (
                "gitlab.com=GONE",
                &["gitlab.com=GONE", "GONE is not set"][..],
            ),
            ("gitlab.com=EMPTY", &["EMPTY is not set"]),
            (
                "gitlab.com=/no/such/file",
                &["/no/such/file", "cannot read it"],
            ),
            (&format!("gitlab.com={empty}"), &["holds no token"]),
            (
                &format!("gitlab.com={quoted}"),
                &["quoted, line 2", "a quote"],
            ),
            ("gitlab.com=sesame", &["value 1 is not HOST=VARIABLE"]),
            ("gitlab.com=sesame/sesame", &["value 1 is not"]),
            ("sesame", &["value 1 is not"]),
            ("sesame@host=MINE", &["value 1 is not"]),
            ("=MINE", &["value 1 is not"]),
            ("", &["value 1 is not"]),
        ] {
            let error = read_with(&[option], "").unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{option}: {error}");
            }
            assert!(!error.contains("sesame"), "{error}");
        }
    }

    #[test]
    fn a_token_has_the_form_of_one() {
        for (text, what) in [
            ("ghp_sesame\n", "a line break"),
            ("\"ghp_sesame\"", "a quote"),
            ("'ghp_sesame'", "a quote"),
            (" ghp_sesame", "a blank"),
            ("ghp_sesame\t", "a blank"),
            (" ", "a blank"),
            ("ghp_sesäme", "a character"),
            ("${ghp_sesame}", "a literal ${…}"),
            ("${ghp_sesame", "a character"),
        ] {
            let error = read_with(&[], text).unwrap_err();
            assert!(error.starts_with("GITHUB_TOKEN is"), "{error}");
            assert!(error.contains(what), "{error}");
            assert!(!error.contains("ghp_"), "{error}");
        }
    }

    #[test]
    fn a_token_goes_to_its_host_only_and_is_never_shown() {
        let token = |host: &str| HostToken {
            host: host.parse().unwrap(),
            secret: "sesame".to_owned().into(),
            source: "MINE".to_owned(),
        };
        for (host, url, expected) in [
            ("github.com", "https://github.com/a/b", true),
            ("github.com", "http://github.com/a/b", false),
            ("github.com", "https://github.com:8443/a/b", false),
            ("github.com", "https://gitlab.com/a/b", false),
            ("github.com", "https://git.example.org/github.com", false),
            ("127.0.0.1:80", "http://127.0.0.1/a/b", true),
            ("10.0.0.1", "http://10.0.0.1/a/b", false),
            ("10.0.0.1", "https://10.0.0.1/a/b", true),
        ] {
            let token = token(host);
            assert_eq!(token.is_for(&Url::parse(url).unwrap()), expected, "{url}");
        }
        assert!(!format!("{:?}", token("github.com")).contains("sesame"));
        assert!(!format!("{:?}", TokenOption("sesame".to_owned())).contains("sesame"));
        assert_eq!(token("gitlab.com").user(), "x-access-token");
        assert_eq!(token("bitbucket.org").user(), "x-token-auth");
    }
}
