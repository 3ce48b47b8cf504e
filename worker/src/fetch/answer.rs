//! What a host's answer means if it is not what was asked for: from status, headers and the host's own
//! words to a fault. The one place that decides so, whatever reads the repository; pure.
//!
//! A host's words decide about the host or the repository, never about this machine.

use std::time::Duration;

use common::fault::Fault;
use common::text::printable;
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

use super::token::remedy;
use crate::host_throttle::THROTTLE_PAUSE;

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

/// Bytes of a refusal's body that are read for the host's words.
pub(super) const WORDS_READ: usize = 8 << 10;
/// Most characters of a host's words that are quoted.
const QUOTED: usize = 300;
/// Most refs that a fault names.
const LISTED: usize = 3;
/// GitHub's sign that it limits, with the reason in words.
const EDGE_MESSAGE: &str = "x-github-edge-message";
/// GitHub's sign that a token is not authorized for an organization's single sign-on.
const SINGLE_SIGN_ON: &str = "x-github-sso";
/// Words for "not now", in lower case.
const LIMITING: [&str; 6] = [
    "temporarily limiting",
    "unauthenticated downloads",
    "rate limit",
    "rate-limit",
    "too many requests",
    "abuse detection",
];
/// Words for "never", if they are said of a repository, in lower case.
const BARRED: [&str; 12] = [
    "disabled",
    "taken down",
    "takedown",
    "dmca",
    "blocked",
    "suspended",
    "removed",
    "deleted",
    "terminated",
    "unavailable",
    "violat",
    "not allowed",
];

/// Which of a fetch's requests was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// `GET info/refs`.
    Refs,
    /// `POST git-upload-pack`: what follows that, the pack in the end.
    Pack,
}

/// An answer's circumstances, on which the meaning of words and statuses depends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context<'a> {
    /// The request.
    pub(super) asked: Asked,
    /// The host, if the request was sent without a token.
    pub(super) anonymous: Option<&'a str>,
    /// The answer's headers.
    pub(super) headers: &'a HeaderMap,
    /// When it came.
    pub(super) now: OffsetDateTime,
}

/// Why a request with a token is repeated without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenRefusal {
    /// 401: the host does not know the token, or not any more.
    Unknown,
    /// 403: the token is not authorized for an organization's single sign-on.
    SingleSignOn,
}

impl TokenRefusal {
    /// Returns why, if an answer with this status and these headers refuses the token.
    pub(super) fn of(status: StatusCode, headers: &HeaderMap) -> Option<Self> {
        match status.as_u16() {
            401 if !headers.contains_key(EDGE_MESSAGE) => Some(Self::Unknown),
            403 if headers.contains_key(SINGLE_SIGN_ON) => Some(Self::SingleSignOn),
            _ => None,
        }
    }
}

/// Classifies a status that is not a success. `body` is the beginning of the answer's body.
///
/// [`Fault::retry_after`] is set where the host itself limits. A 403 without any reason has none: it
/// may concern this repository alone.
pub(super) fn refusal(status: StatusCode, body: &[u8], context: Context<'_>) -> Fault {
    let headers = context.headers;
    let edge = headers.get(EDGE_MESSAGE).map(|value| value.as_bytes());
    let words = edge.and_then(quote).or_else(|| quote(body));
    let said = Said(edge.into_iter().chain([body]).map(lower_case).collect());
    let asked = retry_after(headers, context.now).or_else(|| used_up(headers, context.now));
    let limits = edge.is_some() || said.limits();
    let pause = asked.or_else(|| limits.then_some(THROTTLE_PAUSE));
    let message = with_words(format!("HTTP status {status}"), words);
    let limited = |pause| Fault::throttled(with_remedy(&message, &said, edge, context), pause);
    match (status.as_u16(), pause) {
        (429, pause) => limited(pause.or(Some(THROTTLE_PAUSE))),
        (401, Some(pause)) if limits => limited(Some(pause)),
        (403 | 503, Some(pause)) => limited(Some(pause)),
        (403, None) if said.bars_repository() => Fault::gone(message),
        (403, None) => Fault::throttled(message, None),
        // Whoever was answered before may see the repository.
        (401, _) if context.asked == Asked::Pack => Fault::throttled(message, None),
        (408 | 425 | 500..=599, _) => Fault::transient(message),
        _ => Fault::gone(message),
    }
}

/// Classifies what a host says inside a well-formed answer instead of going on: after `ERR`, or in
/// side band 3.
pub(super) fn said(words: &[u8], context: Context<'_>) -> Fault {
    let said = Said(vec![lower_case(words)]);
    let message = with_words("the host broke off".to_owned(), quote(words));
    if !said.limits() {
        return Fault::transient(message);
    }
    let asked = retry_after(context.headers, context.now);
    let pause = asked.or_else(|| used_up(context.headers, context.now));
    let pause = pause.unwrap_or(THROTTLE_PAUSE);
    Fault::throttled(with_remedy(&message, &said, None, context), Some(pause))
}

/// Classifies a successful answer that is not of git's smart protocol.
pub(super) fn not_git(content_type: Option<&str>, body: &[u8]) -> Fault {
    // A file's lines are `ID TAB NAME`.
    let id = body.split(|byte| *byte == b'\t').next().unwrap_or_default();
    let is_file = matches!(id.len(), 40 | 64) && id.iter().all(u8::is_ascii_hexdigit);
    if is_file && body.len() > id.len() {
        return Fault::gone(
            "the server speaks only git's dumb protocol, which is not supported: it serves the repository's files",
        );
    }
    let seen = content_type.map_or_else(|| "missing".to_owned(), printable);
    let message = format!("not a git response: content type {seen}");
    Fault::transient(with_words(message, quote(body)))
}

/// Returns what a packet of an answer says, if it is the host's last word.
pub(super) fn last_word(packet: &[u8]) -> Option<&[u8]> {
    let words = packet.strip_prefix(b"ERR ");
    words.or_else(|| packet.strip_prefix(b"\x03"))
}

/// Returns a fault if `packet`, of an advertisement, says that the repository cannot be read.
pub(super) fn unreadable(packet: &[u8]) -> Option<Fault> {
    let nul = packet.iter().position(|byte| *byte == 0)?;
    let capabilities = packet[nul + 1..].split(|byte| byte.is_ascii_whitespace());
    let mut formats = capabilities.filter_map(|word| word.strip_prefix(b"object-format="));
    formats
        .find(|format| *format == b"sha256")
        .map(|_| sha256())
}

/// The fault of a repository whose objects are named by SHA-256.
pub(super) fn sha256() -> Fault {
    Fault::gone("the repository's object format is SHA-256, which is not supported")
}

/// Returns the ref, other than HEAD, that a packet names: of an advertisement, or in protocol v2.
pub(super) fn advertised(packet: &[u8]) -> Option<String> {
    let line = packet.split(|byte| *byte == 0).next()?;
    let space = line.iter().position(|byte| *byte == b' ')?;
    let (id, name) = (&line[..space], &line[space + 1..]);
    let is_ref = id.iter().all(u8::is_ascii_hexdigit) && name.starts_with(b"refs/");
    is_ref.then(|| String::from_utf8_lossy(name).trim_end().to_owned())
}

/// The fault of a repository whose HEAD names a branch that does not exist, while `others` do.
pub(super) fn unborn_head(branch: Option<&str>, others: &[String]) -> Fault {
    let short = |name: &str| {
        let name = name.strip_prefix("refs/heads/").unwrap_or(name);
        quote(name.as_bytes()).unwrap_or_default()
    };
    let branch = branch.map_or_else(
        || "a branch".to_owned(),
        |name| format!("the branch {}", short(name)),
    );
    let listed: Vec<_> = others.iter().take(LISTED).map(|name| short(name)).collect();
    let (listed, more) = (listed.join(", "), others.len() > LISTED);
    Fault::gone(format!(
        "HEAD names {branch}, which does not exist; there {} {listed}{}; make an existing branch the default",
        if others.len() == 1 { "is" } else { "are" },
        if more { " and more" } else { "" },
    ))
}

/// Quotes a host's words: one line, printable, at most [`QUOTED`] characters; `None` if there are none.
/// Of a web page only the title counts.
pub(super) fn quote(words: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(words);
    let text = match text.trim_start().starts_with('<') {
        true => title(&text)?,
        false => &text,
    };
    // Invisible characters could turn the text around it about.
    let visible = |c: &char| !matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    let text: String = text.chars().filter(visible).collect();
    let line = printable(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    let mut quoted: String = line.chars().take(QUOTED).collect();
    if quoted.len() < line.len() {
        quoted.pop();
        quoted.push('…');
    }
    (!quoted.is_empty()).then(|| format!("\"{quoted}\""))
}

/// Returns a web page's title.
fn title(page: &str) -> Option<&str> {
    // Lengths in bytes stay the same.
    let lower = page.to_ascii_lowercase();
    let from = lower.find("<title")?;
    let from = from + lower[from..].find('>')? + 1;
    let to = from + lower[from..].find("</title")?;
    Some(&page[from..to])
}

fn with_words(message: String, words: Option<String>) -> String {
    match words {
        Some(words) => format!("{message}: the host says {words}"),
        None => message,
    }
}

/// Adds what helps against a limit on those who don't say who they are.
fn with_remedy(message: &str, said: &Said, edge: Option<&[u8]>, context: Context<'_>) -> String {
    let about_anonymous = edge.is_some() || said.mentions("authenticate");
    match context.anonymous.filter(|_| about_anonymous) {
        Some(host) => {
            let remedy = remedy(host);
            format!("{message}; the limit is on anonymous downloads: give {remedy}")
        }
        None => message.to_owned(),
    }
}

/// A host's words in lower case.
struct Said(Vec<String>);

impl Said {
    fn mentions(&self, word: &str) -> bool {
        self.0.iter().any(|text| text.contains(word))
    }

    fn limits(&self) -> bool {
        LIMITING.iter().any(|word| self.mentions(word))
    }

    /// Whether they say why the repository is unavailable. Unless they mention a repository, they may
    /// be about the client's address or account.
    fn bars_repository(&self) -> bool {
        let subject = self.mentions("repositor") || self.mentions("project");
        subject && BARRED.iter().any(|word| self.mentions(word))
    }
}

fn lower_case(words: &[u8]) -> String {
    String::from_utf8_lossy(words).to_lowercase()
}

/// Returns for how long the limit of whoever asked is used up, if it is. GitHub names the time at which it
/// begins anew, in seconds of Unix time.
pub(super) fn used_up(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    headers
        .get("x-ratelimit-remaining")
        .filter(|left| *left == "0")?;
    let reset = headers.get("x-ratelimit-reset");
    let reset = reset.and_then(|reset| reset.to_str().ok()?.trim().parse().ok());
    let Some(reset) = reset.and_then(|reset| OffsetDateTime::from_unix_timestamp(reset).ok())
    else {
        return Some(THROTTLE_PAUSE);
    };
    Some(Duration::try_from(reset - now).unwrap_or_default())
}

/// Parses Retry-After: seconds, or a date.
fn retry_after(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = OffsetDateTime::parse(value, &Rfc2822).ok()?;
    Some(Duration::try_from(date - now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind::{self, Gone, Throttled, Transient};

    use super::Asked::{Pack, Refs};
    use super::*;

    const GITHUB: &str = "GitHub is temporarily limiting some unauthenticated downloads to protect the \
                          stability of the platform. Please retry later or authenticate.";
    const DISABLED: &str = "Access to this repository has been disabled by GitHub staff.";

    fn now() -> OffsetDateTime {
        OffsetDateTime::parse("Wed, 21 Oct 2026 07:28:00 GMT", &Rfc2822).unwrap()
    }

    fn headers(given: &[(&'static str, &str)]) -> HeaderMap {
        let given = given.iter();
        given
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn context(headers: &HeaderMap, asked: Asked) -> Context<'_> {
        Context {
            asked,
            anonymous: Some("github.com"),
            headers,
            now: now(),
        }
    }

    type Header = (&'static str, &'static str);

    const EDGE: Header = (EDGE_MESSAGE, GITHUB);
    const AFTER: Header = ("retry-after", "7");
    const SPENT: Header = ("x-ratelimit-remaining", "0");

    /// Request, status, headers and body; class and pause.
    type Refusal = (
        Asked,
        u16,
        &'static [Header],
        &'static str,
        FaultKind,
        Option<u64>,
    );

    const REFUSALS: [Refusal; 37] = [
        (Refs, 401, &[], "", Gone, None),
        (Refs, 401, &[], "Repository not found.", Gone, None),
        (Refs, 401, &[AFTER], "", Gone, None),
        (Refs, 401, &[EDGE], "", Throttled, Some(30)),
        (Refs, 401, &[], GITHUB, Throttled, Some(30)),
        (Pack, 401, &[EDGE], "", Throttled, Some(30)),
        (Pack, 401, &[EDGE, AFTER], "", Throttled, Some(7)),
        (Pack, 401, &[], GITHUB, Throttled, Some(30)),
        (Pack, 401, &[], "", Throttled, None),
        (Refs, 403, &[], "", Throttled, None),
        (Refs, 403, &[], "Forbidden", Throttled, None),
        (Refs, 403, &[AFTER], "", Throttled, Some(7)),
        (Refs, 403, &[SPENT], "", Throttled, Some(30)),
        (
            Refs,
            403,
            &[("x-ratelimit-remaining", "1")],
            DISABLED,
            Gone,
            None,
        ),
        (Refs, 403, &[EDGE], "", Throttled, Some(30)),
        (
            Refs,
            403,
            &[],
            "You have exceeded a secondary rate limit.",
            Throttled,
            Some(30),
        ),
        (Refs, 403, &[], DISABLED, Gone, None),
        (Pack, 403, &[], DISABLED, Gone, None),
        // Evidence about the host comes first.
        (Refs, 403, &[AFTER], DISABLED, Throttled, Some(7)),
        (
            Refs,
            403,
            &[],
            "Repository unavailable due to DMCA takedown.",
            Gone,
            None,
        ),
        (
            Refs,
            403,
            &[],
            "You are not allowed to download code from this project.",
            Gone,
            None,
        ),
        // About the client.
        (
            Refs,
            403,
            &[],
            "Your IP address is blocked.",
            Throttled,
            None,
        ),
        (
            Refs,
            403,
            &[],
            "Your account is suspended.",
            Throttled,
            None,
        ),
        (Refs, 404, &[], "Not Found", Gone, None),
        (Refs, 404, &[], GITHUB, Gone, None),
        (Refs, 410, &[], "", Gone, None),
        (Refs, 418, &[], "", Gone, None),
        (Refs, 451, &[], "Repository unavailable", Gone, None),
        (Refs, 429, &[], "", Throttled, Some(30)),
        (Pack, 429, &[AFTER], "", Throttled, Some(7)),
        (Refs, 408, &[], "", Transient, None),
        (Refs, 425, &[], "", Transient, None),
        (Refs, 500, &[], DISABLED, Transient, None),
        (Refs, 502, &[], "", Transient, None),
        (Pack, 503, &[], "", Transient, None),
        (Pack, 503, &[AFTER], "", Throttled, Some(7)),
        (Refs, 507, &[], "No space left on device", Transient, None),
    ];

    #[test]
    fn each_refusal_has_its_class() {
        for (asked, status, given, body, kind, pause) in REFUSALS {
            let headers = headers(given);
            let code = StatusCode::from_u16(status).unwrap();
            let fault = refusal(code, body.as_bytes(), context(&headers, asked));
            let expected = (kind, pause.map(Duration::from_secs));
            assert_eq!(
                (fault.kind, fault.retry_after),
                expected,
                "{status} {given:?} {body:?}: {fault}"
            );
            let words = if given.contains(&EDGE) { GITHUB } else { body };
            assert!(fault.message.contains(words), "{fault}");
        }
    }

    #[test]
    fn a_limit_on_anonymous_downloads_asks_for_a_token_unless_there_is_one() {
        let edge = headers(&[("x-github-edge-message", "limited")]);
        let none = HeaderMap::new();
        let code = StatusCode::UNAUTHORIZED;
        let mut context = context(&edge, Asked::Pack);
        let elsewhere = "--token-for git.example.org=VARIABLE";
        for (anonymous, remedy) in [
            (Some("github.com"), Some("a token in GITHUB_TOKEN")),
            (Some("git.example.org"), Some(elsewhere)),
            (None, None),
        ] {
            context.anonymous = anonymous;
            let in_band = Context {
                headers: &none,
                ..context
            };
            for fault in [
                refusal(code, b"", context),
                said(GITHUB.as_bytes(), in_band),
            ] {
                assert_eq!(fault.kind, Throttled);
                let expected = remedy.map(|remedy| fault.message.ends_with(remedy));
                assert_ne!(expected, Some(false), "{fault}");
                assert_eq!(
                    fault.message.contains("anonymous"),
                    remedy.is_some(),
                    "{fault}"
                );
            }
        }
        let fault = refusal(StatusCode::TOO_MANY_REQUESTS, b"slow down", context);
        assert!(!fault.message.contains("anonymous"), "{fault}");
    }

    #[test]
    fn what_a_host_says_in_band_is_about_the_host() {
        let none = HeaderMap::new();
        let after = headers(&[("retry-after", "3")]);
        for (words, headers, kind, pause) in [
            (GITHUB, &none, Throttled, Some(30)),
            (GITHUB, &after, Throttled, Some(3)),
            ("too many requests", &none, Throttled, Some(30)),
            ("No space left on device", &none, Transient, None),
            ("File too large", &after, Transient, None),
            ("Cannot allocate memory", &none, Transient, None),
            ("upload-pack: not our ref 11", &none, Transient, None),
            ("", &none, Transient, None),
        ] {
            let fault = said(words.as_bytes(), context(headers, Asked::Pack));
            let expected = (kind, pause.map(Duration::from_secs));
            assert_eq!((fault.kind, fault.retry_after), expected, "{words}");
            assert!(fault.message.contains(words), "{fault}");
        }
    }

    #[test]
    fn what_is_no_git_is_told_from_a_server_of_files() {
        let id = "1".repeat(40);
        let file = format!("{id}\trefs/heads/main\n");
        for (content_type, body, kind) in [
            (Some("text/plain"), file.as_str(), Gone),
            (None, &file, Gone),
            (Some("text/plain"), &id, Transient),
            (Some("text/plain"), "", Transient),
            (
                Some("text/html"),
                "<!DOCTYPE html><title>Sign in</title>",
                Transient,
            ),
        ] {
            let fault = not_git(content_type, body.as_bytes());
            assert_eq!(fault.kind, kind, "{body}: {fault}");
        }
        let fault = not_git(Some("text/html"), b"<html><TITLE x>Sign\n in</title>");
        assert!(fault.message.ends_with("says \"Sign in\""), "{fault}");
    }

    #[test]
    fn packets_are_looked_at_for_last_words_and_formats() {
        assert_eq!(last_word(b"ERR no"), Some(&b"no"[..]));
        assert_eq!(last_word(b"\x03no"), Some(&b"no"[..]));
        assert_eq!(last_word(b"\x01ERR no"), None);
        assert_eq!(last_word(b"NAK\n"), None);
        for (packet, readable) in [
            ("1 HEAD\0side-band object-format=sha256 agent=x\n", false),
            ("1 HEAD\0side-band object-format=sha256\n", false),
            ("1 HEAD\0side-band object-format=sha1\n", true),
            ("1 refs/heads/object-format=sha256\n", true),
            ("1 refs/heads/object-format=sha256\0agent=x\n", true),
        ] {
            assert_eq!(
                unreadable(packet.as_bytes()).is_none(),
                readable,
                "{packet}"
            );
        }
    }

    #[test]
    fn refs_are_read_from_an_advertisement() {
        for (packet, name) in [
            ("11 refs/heads/main\n", Some("refs/heads/main")),
            ("11 refs/heads/main\0side-band\n", Some("refs/heads/main")),
            ("11 HEAD\0side-band\n", None),
            ("00 capabilities^{}\0side-band\n", None),
            ("# service=git-upload-pack\n", None),
            ("shallow refs/heads/main", None),
        ] {
            assert_eq!(advertised(packet.as_bytes()).as_deref(), name, "{packet}");
        }
    }

    #[test]
    fn a_hosts_words_are_quoted_printable_and_short() {
        for (words, expected) in [
            (&b" a\r\n  b\tc "[..], Some("\"a b c\"")),
            (b"\x1b[31mred\0", Some("\"\\u{1b}[31mred\\u{0}\"")),
            (b"\xff", Some("\"\u{fffd}\"")),
            ("a\u{202e}b".as_bytes(), Some("\"ab\"")),
            (b" \n", None),
            ("\u{200b} \u{202e}".as_bytes(), None),
            (b"<html>no title", None),
            (b"<title>\n</title>", None),
        ] {
            assert_eq!(quote(words).as_deref(), expected);
        }
        let long = quote("ä".repeat(1000).as_bytes()).unwrap();
        assert_eq!(long.chars().count(), QUOTED + 2);
        assert!(long.ends_with("…\""));
    }

    #[test]
    fn a_head_without_a_branch_is_named() {
        let others: Vec<String> = (0..5).map(|i| format!("refs/heads/b{i}")).collect();
        let fault = unborn_head(Some("refs/heads/nowhere"), &others);
        assert_eq!(
            (fault.kind, fault.message.as_str()),
            (
                Gone,
                "HEAD names the branch \"nowhere\", which does not exist; there are \"b0\", \"b1\", \"b2\" and more; make an existing branch the default"
            )
        );
        let fault = unborn_head(None, &others[..1]);
        assert!(
            fault
                .message
                .contains("names a branch, which does not exist; there is \"b0\";"),
            "{fault}"
        );
    }

    #[test]
    fn a_token_is_refused_by_401_and_by_single_sign_on() {
        let edge = headers(&[("x-github-edge-message", "limited")]);
        let sso = headers(&[(
            "x-github-sso",
            "required; url=https://github.com/orgs/x/sso",
        )]);
        let none = HeaderMap::new();
        for (status, headers, expected) in [
            (401, &none, Some(TokenRefusal::Unknown)),
            (401, &edge, None),
            (403, &sso, Some(TokenRefusal::SingleSignOn)),
            (403, &none, None),
            (404, &none, None),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(TokenRefusal::of(status, headers), expected);
        }
    }

    #[test]
    fn a_limit_that_is_used_up_begins_anew_when_the_host_says() {
        let reset = (now().unix_timestamp() + 90).to_string();
        let past = (now().unix_timestamp() - 90).to_string();
        for (left, reset, expected) in [
            (Some("0"), Some(reset.as_str()), Some(90)),
            (Some("0"), Some(&past), Some(0)),
            (Some("0"), Some("soon"), Some(30)),
            (Some("0"), None, Some(30)),
            (Some("1"), Some(&reset), None),
            (None, Some(&reset), None),
        ] {
            let left = left.map(|left| ("x-ratelimit-remaining", left));
            let reset = reset.map(|reset| ("x-ratelimit-reset", reset));
            let headers = headers(&left.into_iter().chain(reset).collect::<Vec<_>>());
            let expected = expected.map(Duration::from_secs);
            assert_eq!(used_up(&headers, now()), expected, "{left:?} {reset:?}");
            if expected.is_some() {
                let fault = refusal(StatusCode::FORBIDDEN, b"", context(&headers, Refs));
                assert_eq!((fault.kind, fault.retry_after), (Throttled, expected));
            }
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        for (value, expected) in [
            ("7", Some(7)),
            (" 7 ", Some(7)),
            ("99999999", Some(99_999_999)),
            ("Wed, 21 Oct 2026 07:28:30 GMT", Some(30)),
            ("Wed, 21 Oct 2026 07:00:00 GMT", Some(0)),
            ("soon", None),
            ("-3", None),
        ] {
            let headers = headers(&[("retry-after", value)]);
            assert_eq!(
                retry_after(&headers, now()),
                expected.map(Duration::from_secs),
                "{value}"
            );
        }
        assert_eq!(retry_after(&HeaderMap::new(), now()), None);
    }
}
