//! Ignore files match as pathspec 1.1.1 does, translated anew and without any of the short cuts.

use std::sync::LazyLock;

use super::pattern::is_python_space;
use super::rules::{DEFAULTS, Rules, patterns};

/// Bytes of input beyond which a pattern may be too large to be compiled.
const LONGEST: usize = 600;
/// Steps after which a comparison is given up: the translation knows no better than to try everything.
const STEPS: usize = 20_000;

static DEFAULT_PATTERNS: LazyLock<Vec<Translated>> = LazyLock::new(|| {
    DEFAULTS
        .split_ascii_whitespace()
        .filter_map(translated)
        .collect()
});

pub(in crate::digest) fn ignore(input: &[u8]) {
    if input.len() > LONGEST {
        return;
    }
    let input = input.split(|byte| *byte == 0);
    let parts: Vec<_> = input.map(String::from_utf8_lossy).collect();
    let (path, files) = parts.split_first().expect("there is always one part");
    let mut rules = Rules::new();
    let mut all = Vec::new();
    for file in files.chunks_exact(2) {
        let directory = names(&file[0]).join("/");
        rules.add_file(&directory, file[1].as_bytes());
        all.extend(patterns(&directory, &file[1]).filter_map(|text| translated(&text)));
    }
    if !rules.overflowed() {
        compare(&rules, &all, &names(path));
    }
}

/// Splits a path into names that a checkout may have.
fn names(path: &str) -> Vec<&str> {
    let names = path.split('/');
    names
        .filter(|name| !matches!(*name, "" | "." | ".."))
        .collect()
}

/// Walks down a path as a digest does, and fails where anything is ignored that the patterns do not
/// ignore, or the other way round.
fn compare(rules: &Rules, all: &[Translated], names: &[&str]) {
    let mut place = rules.root();
    let mut is_pruned = false;
    let mut steps = 0;
    for (at, name) in names.iter().enumerate() {
        let path = names[..=at].join("/");
        let Some(expected) = is_ignored(all, &path) else {
            return;
        };
        if expected {
            is_pruned = false;
        }
        let verdict = rules.judge(&place, &path, name, &mut steps);
        assert_eq!(verdict.ignored, expected, "{path:?}");
        if expected {
            break;
        }
        is_pruned |= verdict.pruned && at + 1 < names.len();
        place = place.child(rules, &path, name, verdict);
    }
    assert!(!is_pruned, "{names:?} is shown, and would be left out");
    let length = names.iter().map(|name| name.len() + 1).sum::<usize>() + 1;
    let most = (DEFAULT_PATTERNS.len() + all.len()) * names.len() * 64 * (LONGEST + length);
    assert!(steps <= most as u64, "{steps}");
}

/// Whether the last pattern that matches excludes a path; `None` if that takes too long.
fn is_ignored(all: &[Translated], path: &str) -> Option<bool> {
    let characters: Vec<char> = path.chars().collect();
    let mut steps = STEPS;
    for pattern in DEFAULT_PATTERNS.iter().chain(all).rev() {
        let is_match = match &pattern.rule {
            Rule::AnyCharacter => characters.iter().any(|c| *c != '\n'),
            Rule::AnySlash => characters.contains(&'/'),
            Rule::Anchored(parts) => matches(parts, &characters, &mut steps)?,
        };
        if is_match {
            return Some(!pattern.negated);
        }
    }
    Some(false)
}

/// A pattern as a regular expression of pathspec's.
struct Translated {
    negated: bool,
    rule: Rule,
}

enum Rule {
    /// `.`
    AnyCharacter,
    /// `/`
    AnySlash,
    /// `^…`
    Anchored(Vec<Part>),
}

enum Part {
    Character(char),
    /// `[^/]`
    One,
    /// `[^/]*`, or `[^/]+`
    Some {
        least: usize,
    },
    Class {
        negated: bool,
        ranges: Vec<(char, char)>,
    },
    /// `(?:.+/)?`
    Leading,
    /// `(?:/.+)?`
    Between,
    /// `(?:/|$)`
    SlashOrEnd,
}

/// Translates a pattern; `None` if it matches nothing, or is none.
fn translated(text: &str) -> Option<Translated> {
    let text = match text.ends_with("\\ ") {
        true => text,
        false => text.trim_end_matches(is_python_space),
    };
    if matches!(text, "" | "/") || text.starts_with('#') {
        return None;
    }
    let (negated, text) = match text.strip_prefix('!') {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut segments: Vec<&str> = text.split('/').collect();
    let is_directory = segments.last() == Some(&"");
    match segments.as_slice() {
        ["", ..] => _ = segments.remove(0),
        [one] | [one, ""] if *one != "**" => segments.insert(0, "**"),
        _ => {}
    }
    if let Some(last) = segments.last_mut().filter(|last| last.is_empty()) {
        *last = "**";
    }
    segments.dedup_by(|b, a| *a == "**" && *b == "**");
    let rule = match (segments.as_slice(), is_directory) {
        ([], _) => return None,
        (["**"], false) | (["**", "*"], _) => Rule::AnyCharacter,
        (["**"], true) | (["**", "*", "**"], _) => Rule::AnySlash,
        (segments, _) => Rule::Anchored(parts(segments)?),
    };
    Some(Translated { negated, rule })
}

fn parts(segments: &[&str]) -> Option<Vec<Part>> {
    let end = segments.len() - 1;
    let mut parts = Vec::new();
    let mut needs_slash = false;
    for (at, segment) in segments.iter().enumerate() {
        if *segment == "**" {
            match at {
                0 => parts.push(Part::Leading),
                _ if at == end => parts.push(Part::Character('/')),
                _ => parts.push(Part::Between),
            }
            needs_slash |= at > 0;
            continue;
        }
        if needs_slash {
            parts.push(Part::Character('/'));
        }
        match *segment {
            "*" => parts.push(Part::Some { least: 1 }),
            segment => push_segment(segment, &mut parts)?,
        }
        if at == end {
            parts.push(Part::SlashOrEnd);
        }
        needs_slash = true;
    }
    Some(parts)
}

fn push_segment(segment: &str, parts: &mut Vec<Part>) -> Option<()> {
    let characters: Vec<char> = segment.chars().collect();
    let mut at = 0;
    while let Some(c) = characters.get(at) {
        at += 1;
        parts.push(match c {
            '\\' => {
                at += 1;
                Part::Character(*characters.get(at - 1)?)
            }
            '*' => Part::Some { least: 0 },
            '?' => Part::One,
            '[' => {
                let negated = matches!(characters.get(at), Some('!' | '^'));
                let from = at + usize::from(negated);
                // A bracket in first place does not end it.
                let end = (from + 1..characters.len()).find(|at| characters[*at] == ']')?;
                at = end + 1;
                let ranges = ranges(&characters[from..end])?;
                Part::Class { negated, ranges }
            }
            c => Part::Character(*c),
        });
    }
    Some(())
}

/// Reads a class as Python does; `None` if it has a range that ends before it begins.
fn ranges(mut characters: &[char]) -> Option<Vec<(char, char)>> {
    let mut ranges = Vec::new();
    loop {
        match characters {
            [] => return Some(ranges),
            [low, '-', high, rest @ ..] => {
                ranges.push((low <= high).then_some((*low, *high))?);
                characters = rest;
            }
            [one, rest @ ..] => {
                ranges.push((*one, *one));
                characters = rest;
            }
        }
    }
}

/// Whether the parts match a beginning of the path; `None` when there are no steps left.
fn matches(parts: &[Part], path: &[char], steps: &mut usize) -> Option<bool> {
    *steps = steps.checked_sub(1)?;
    let Some((part, rest)) = parts.split_first() else {
        return Some(true);
    };
    // How many characters it may take.
    let one_if = |fits: bool| if fits { 1..2 } else { 0..0 };
    let run = |from: usize, stop: char| {
        let characters = path.iter().skip(from);
        from + characters.take_while(|c| **c != stop).count()
    };
    let takes =
        match part {
            Part::Character(wanted) => one_if(path.first() == Some(wanted)),
            Part::One => one_if(path.first().is_some_and(|c| *c != '/')),
            Part::Class { negated, ranges } => one_if(path.first().is_some_and(|c| {
                ranges.iter().any(|(low, high)| low <= c && c <= high) != *negated
            })),
            Part::Some { least } => *least..run(0, '/') + 1,
            Part::SlashOrEnd => return Some(matches!(path, [] | ['\n'] | ['/', ..])),
            Part::Leading => 0..run(0, '\n') + 1,
            Part::Between if path.first() == Some(&'/') => 0..run(1, '\n') + 1,
            Part::Between => 0..1,
        };
    for taken in takes {
        let fits = match part {
            Part::Leading => taken == 0 || (taken > 1 && path[taken - 1] == '/'),
            Part::Between => taken != 1,
            _ => true,
        };
        if fits && matches(rest, &path[taken..], steps)? {
            return Some(true);
        }
    }
    Some(false)
}
