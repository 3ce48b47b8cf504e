//! Whole digests of the parity fixtures, byte for byte.
//!
//! The expected texts are in `parity/`. Those of `negations` and of fixtures marked
//! `Expected::Gitingest` were made with the real gitingest by `deploy/parity/expected.py`; the others
//! are our own decisions.

use std::fs;
use std::path::Path;

use worker::digest::assemble::assemble;
use worker::digest::write::write;
use worker::digest::{DigestLimits, Part, Subject};
use worker::fetch::objects::Objects;

use self::fixtures::{Expected, Fixture, OWNER, fixtures};

pub(crate) mod fixtures;

/// Returns the digest of the repository at `path`.
fn digest(path: &Path, subject: &Subject, limits: &DigestLimits) -> String {
    let source = Objects::open(path).unwrap();
    let (mut tree, mut content) = (String::new(), String::new());
    let facts = write(&source, subject, limits, &mut |part, text| {
        match part {
            Part::Tree => tree.push_str(text),
            Part::Content => content.push_str(text),
        }
        Ok(())
    });
    assemble(&facts.unwrap(), &tree, &content, limits.max_text_bytes).text
}

fn repository(fixture: &Fixture) -> Subject {
    Subject::Repository {
        owner: OWNER.to_owned(),
        name: fixture.name.to_owned(),
    }
}

fn directory(fixture: &Fixture) -> Subject {
    Subject::Directory {
        slug: fixture.name.to_owned(),
    }
}

/// Compares the digest of every fixture for which there is a text `{name}{suffix}`.
fn compare(suffix: &str, subject: impl Fn(&Fixture) -> Subject, limits: &DigestLimits) -> usize {
    let root = tempfile::tempdir().unwrap();
    let texts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/parity");
    let mut compared = 0;
    let mut different = Vec::new();
    for fixture in fixtures() {
        let Ok(expected) = fs::read(texts.join(format!("{}{suffix}", fixture.name))) else {
            continue;
        };
        let actual = digest(&fixture.build(root.path()), &subject(&fixture), limits);
        compared += 1;
        if actual.as_bytes() != expected {
            let at = actual
                .bytes()
                .zip(&expected)
                .take_while(|(a, b)| a == *b)
                .count();
            let around = |bytes: &[u8]| {
                let bytes = &bytes[at.saturating_sub(60)..bytes.len().min(at + 60)];
                String::from_utf8_lossy(bytes).into_owned()
            };
            let whose = match fixture.expected {
                Expected::Gitingest => "gitingest's",
                Expected::Decided(why) => why,
            };
            different.push(format!(
                "{}{suffix} ({whose}) at byte {at}:\n  ours     {:?}\n  expected {:?}",
                fixture.name,
                around(actual.as_bytes()),
                around(&expected)
            ));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
    compared
}

#[test]
fn whole_digests_are_gitingests() {
    let limits = DigestLimits {
        max_text_bytes: None,
        ..DigestLimits::default()
    };
    assert_eq!(compare(".txt", repository, &limits), fixtures().len());
}

#[test]
fn a_limit_that_is_not_reached_changes_nothing() {
    assert_eq!(
        compare(".txt", repository, &DigestLimits::default()),
        fixtures().len()
    );
}

#[test]
fn cut_digests_are_gitingests_cut() {
    let limits = DigestLimits {
        max_text_bytes: Some(600),
        ..DigestLimits::default()
    };
    assert!(compare(".cut-600.txt", repository, &limits) >= 20);
}

#[test]
fn gitingests_own_limits_show_files_up_to_10_mebibytes() {
    assert_eq!(
        compare(".10m.txt", repository, &DigestLimits::gitingest()),
        1
    );
}

#[test]
fn the_local_form_names_a_directory_and_no_commit() {
    assert_eq!(
        compare(".local.txt", directory, &DigestLimits::default()),
        2
    );
}
