//! What must hold for any feed: each entry is judged alone. `common/testing/fuzz` looks for feeds for which it
//! does not; its seeds are replayed here.

use std::path::Path;

use super::details::Details;
use super::*;

/// A good entry, which none of the others can spoil.
const GOOD: &str =
    r#"{"owner":"good","name":"one","url":"https://h/x","pushedAt":"2026-01-01T00:00:00Z"}"#;
/// More characters than any reason has.
const REASON: usize = 800;

/// Reads a feed, from a server or with absolute paths.
pub fn feed(input: &[u8]) {
    for folder in [None, Some(Path::new(""))] {
        check(input, folder);
    }
}

fn check(input: &[u8], folder: Option<&Path>) {
    let feed = match parse("feed".to_owned(), input, folder) {
        Ok(feed) => feed,
        Err(error) => return check_text(&error.to_string()),
    };
    feed.why_unusable()
        .iter()
        .for_each(|why| assert!(why.len() < 4 * REASON));
    let entries = entry::parse(input, folder).expect("a feed has entries");
    let joined = feed.repositories.len() + feed.repeated.len();
    assert_eq!(joined, entries.repositories.len());
    assert_eq!(feed.invalid, entries.invalid);
    for repo in &feed.repositories {
        check_repository(repo);
        let newest = entries
            .repositories
            .iter()
            .filter(|entry| entry.repo == repo.repo);
        assert_eq!(
            newest.map(|entry| &entry.pushed_at).max(),
            Some(&repo.pushed_at)
        );
    }
    for entry in &feed.invalid {
        check_text(&entry.reason);
    }

    let text = String::from_utf8_lossy(input);
    let mut elements: Vec<&str> = Vec::new();
    form::entries(&text, |_| true, |element| elements.push(element)).expect("it is a feed");
    let alone = |text: &str| {
        let feed = format!("[{text}]");
        let mut entries = entry::parse(feed.as_bytes(), folder).expect("one entry is a feed");
        (entries.repositories.pop(), entries.invalid.pop())
    };
    let mut repositories = entries.repositories.into_iter();
    let mut invalid = entries.invalid.into_iter();
    for (index, element) in elements.iter().enumerate() {
        let expected = match alone(element) {
            (Some(repo), None) => (Some(FeedRepo { index, ..repo }), None),
            (None, Some(entry)) => (None, Some(InvalidEntry { index, ..entry })),
            other => panic!("one entry is either: {other:?}"),
        };
        let is_usable = expected.0.is_some();
        let found = match is_usable {
            true => (repositories.next(), None),
            false => (None, invalid.next()),
        };
        assert_eq!(found, expected);
    }
    assert!(repositories.next().is_none() && invalid.next().is_none());
    let beside: Vec<_> = [GOOD].into_iter().chain(elements.iter().copied()).collect();
    let beside = format!("[{},{GOOD}]", beside.join(","));
    let beside = entry::parse(beside.as_bytes(), folder).expect("two more entries are no harm");
    assert_eq!(beside.invalid.len(), feed.invalid.len());
    assert_eq!(beside.repositories.len(), joined + 2);
}

/// Fails unless an entry is safe, and the same once it is written.
fn check_repository(repo: &FeedRepo) {
    assert!(repo.url.is_ascii() && repo.url.len() <= 1024);
    assert!(!repo.url.contains(char::is_control));
    // Folders may have spaces in their names.
    assert!(repo.url.starts_with('/') || !repo.url.contains(' '));
    let parts = [repo.repo.owner(), repo.repo.name()];
    assert!(
        parts
            .iter()
            .all(|part| !matches!(*part, "" | "." | "..") && !part.contains(['/', '\\', '\0']))
    );
    let written = serde_json::json!([{
        "full_name": repo.repo.to_string(),
        "url": repo.url,
        "pushed_at": repo.pushed_at.as_str(),
    }]);
    let entries = entry::parse(written.to_string().as_bytes(), Some(Path::new("")));
    let again = entries.expect("one entry is a feed").repositories.pop();
    assert_eq!(
        again,
        Some(FeedRepo {
            index: 0,
            details: Details::of(&written[0].to_string()),
            ..repo.clone()
        })
    );
}

/// Fails unless a person can be shown a text.
fn check_text(text: &str) {
    assert!(text.chars().count() <= REASON, "{text}");
    assert!(!text.contains(char::is_control), "{text:?}");
}

#[cfg(test)]
mod tests {
    #[test]
    fn feeds_hold() {
        testing::seeds::replay("feed", super::feed);
    }
}
