//! Whatever a host says: it decides about the host or the repository, and can be shown to a person.

use common::fault::FaultKind;
use reqwest::header::{HeaderName, HeaderValue};

use super::*;

/// More characters than any message has: the longest quotes the names of some branches.
const MESSAGE: usize = (LISTED + 2) * QUOTED;

pub(in crate::fetch) fn answer(input: &[u8]) {
    let (status, headers, body) = parsed(input);
    for asked in [Asked::Refs, Asked::Pack] {
        let context = |anonymous: bool| Context {
            asked,
            anonymous: anonymous.then_some("github.com"),
            headers: &headers,
            now: OffsetDateTime::UNIX_EPOCH,
        };
        if !status.is_success() {
            let fault = alike(|anonymous| refusal(status, body, context(anonymous)));
            if status == StatusCode::TOO_MANY_REQUESTS {
                assert!(fault.kind == FaultKind::Throttled && fault.retry_after.is_some());
            }
        }
        alike(|anonymous| said(body, context(anonymous)));
    }
    let content_type = headers
        .get("content-type")
        .and_then(|value| value.to_str().ok());
    check(&not_git(content_type, body));
    TokenRefusal::of(status, &headers);
    unreadable(body).iter().for_each(check);
    let refs: Vec<_> = body
        .split(|byte| *byte == b'\n')
        .filter_map(advertised)
        .collect();
    assert!(refs.iter().all(|name| name.starts_with("refs/")));
    let branch = last_word(body).map(String::from_utf8_lossy);
    check(&unborn_head(branch.as_deref(), &refs));
    if let Some(quoted) = quote(body) {
        check_text(&quoted);
        let inside = &quoted[1..quoted.len() - 1];
        assert!((1..=QUOTED).contains(&inside.chars().count()));
        // Quoting does not change what has been quoted.
        assert!(inside.trim_start().starts_with('<') || quote(inside.as_bytes()) == Some(quoted));
    }
}

/// Parses `STATUS`, lines of headers, and after an empty line the body.
fn parsed(input: &[u8]) -> (StatusCode, HeaderMap, &[u8]) {
    let mut lines = input.splitn(2, |byte| *byte == b'\n');
    let status = lines.next().unwrap_or_default();
    let mut rest = lines.next().unwrap_or_default();
    let mut headers = HeaderMap::new();
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let line = &rest[..end];
        rest = &rest[end + 1..];
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            break;
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            headers.append(name, value);
        }
    }
    (
        StatusCode::from_bytes(status).unwrap_or(StatusCode::FORBIDDEN),
        headers,
        rest,
    )
}

/// Fails unless the fault is the same with and without a token, but for the remedy.
fn alike(fault: impl Fn(bool) -> Fault) -> Fault {
    let [anonymous, named] = [fault(true), fault(false)];
    check(&anonymous);
    check(&named);
    assert_eq!(
        (anonymous.kind, anonymous.retry_after),
        (named.kind, named.retry_after)
    );
    assert!(anonymous.message.starts_with(&named.message));
    named
}

fn check(fault: &Fault) {
    use FaultKind::{Gone, Throttled, Transient};
    assert!(
        matches!(fault.kind, Gone | Throttled | Transient),
        "{fault:?}"
    );
    assert!(fault.retry_after.is_none() || fault.kind == Throttled);
    check_text(&fault.message);
}

/// Fails unless a text is short, on one line, and read in the order in which it is written.
fn check_text(text: &str) {
    assert!(text.chars().count() <= MESSAGE);
    let is_bad = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!text.contains(is_bad), "{text:?}");
}
