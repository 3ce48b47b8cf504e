//! `changes.csv`: what changed in the catalogue, newest first.
//!
//! A reader that polls reads from the top to the last time that it has seen. It never needs the whole
//! file, which begins with a line of names and ends with the oldest change that is kept.

use std::fmt::Write;
use std::time::Duration;

use common::ids::RepoRef;
use strum::{AsRefStr, EnumString};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Catalog, Line, LineDigest, State};

/// How long a change is kept.
const KEPT: Duration = Duration::from_secs(31 * 24 * 60 * 60);
/// Most changes that are kept: 10 MB.
const MOST: usize = 100_000;
const NAMES: &str = "time,id,what\n";

/// What happened to a repository's digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, AsRefStr, EnumString)]
#[strum(serialize_all = "snake_case")]
pub enum What {
    /// It has another text; fetch it.
    Stored,
    /// It covers a later push with the same text.
    Renewed,
    /// Readers have it no more; drop it.
    Withdrawn,
    /// A digest of the last push could not be made; an earlier one stays.
    Failed,
}

/// Returns what differs between two catalogues, in their order.
pub fn between(old: &Catalog, new: &Catalog) -> Vec<(RepoRef, What)> {
    let gone = old
        .lines
        .iter()
        .filter(|(id, _)| !new.lines.contains_key(id));
    let gone = gone.filter(|(_, line)| line.digest.is_some());
    let gone = gone.map(|(id, _)| (id.clone(), What::Withdrawn));
    let changed = new.lines.values().filter_map(|line| {
        let what = what(old.lines.get(&line.id), line)?;
        Some((line.id.clone(), what))
    });
    gone.chain(changed).collect()
}

fn what(old: Option<&Line>, new: &Line) -> Option<What> {
    let before = old.and_then(|line| line.digest.as_ref());
    match (before, &new.digest) {
        (Some(_), None) => Some(What::Withdrawn),
        (None, Some(_)) => Some(What::Stored),
        (Some(before), Some(now)) if !same_text(before, now) => Some(What::Stored),
        (Some(before), Some(now)) if before.pushed_at != now.pushed_at => Some(What::Renewed),
        _ => {
            let is_news = matches!(new.state, State::Failed(_))
                && old.is_none_or(|old| old.state != new.state);
            is_news.then_some(What::Failed)
        }
    }
}

/// Without hashes, two texts made at different times count as different.
fn same_text(a: &LineDigest, b: &LineDigest) -> bool {
    match (&a.sha256, &b.sha256) {
        (Some(a), Some(b)) => a == b,
        _ => a.processed_at == b.processed_at,
    }
}

/// Returns `file` with `changes` at the top, and without what is too old. What is no change in it is
/// left out.
pub fn add(file: &[u8], changes: &[(RepoRef, What)], now: OffsetDateTime) -> String {
    let time = now.replace_nanosecond(0).unwrap_or(now);
    let time = time.format(&Rfc3339).unwrap_or_default();
    let mut text = NAMES.to_owned();
    for (id, what) in changes.iter().take(MOST) {
        // Never an error: it is memory.
        writeln!(text, "{time},{id},{}", what.as_ref()).ok();
    }
    let file = String::from_utf8_lossy(file);
    let rest = MOST.saturating_sub(changes.len());
    for line in file
        .lines()
        .skip(1)
        .filter(|line| is_kept(line, now))
        .take(rest)
    {
        text += line;
        text.push('\n');
    }
    text
}

fn is_kept(line: &str, now: OffsetDateTime) -> bool {
    let mut fields = line.split(',');
    let time = fields
        .next()
        .and_then(|time| OffsetDateTime::parse(time, &Rfc3339).ok());
    let is_change = fields
        .next()
        .is_some_and(|id| id.parse::<RepoRef>().is_ok())
        && fields
            .next()
            .is_some_and(|what| what.parse::<What>().is_ok())
        && fields.next().is_none();
    is_change && time.is_some_and(|time| now - time < KEPT)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use common::fault::FaultKind;
    use common::ids::{PushedAt, RunId};
    use common::store::DigestMeta;
    use time::macros::datetime;

    use super::*;

    const START: OffsetDateTime = datetime!(2026-11-01 3:00 UTC);

    fn line(id: &str, push: i64, text: &str) -> Line {
        let push = OffsetDateTime::from_unix_timestamp(push).unwrap();
        let meta = DigestMeta {
            pushed_at: PushedAt::new(&push.format(&Rfc3339).unwrap()).unwrap(),
            url: String::new(),
            processed_at: String::new(),
            commit: None,
            format: String::new(),
            bytes: 1,
            truncated: false,
            run: RunId::new(),
            sha256: Some(text.to_owned()),
            tokens: None,
            files: None,
        };
        Line::new(id.parse().unwrap(), "", State::Current).with_digest(Some(&meta))
    }

    fn catalog(lines: &[Line]) -> Catalog {
        let mut catalog = Catalog::default();
        lines.iter().for_each(|line| catalog.insert(line.clone()));
        catalog
    }

    #[test]
    fn each_kind_of_change_has_its_word() {
        let one = line("a/b", 1, "x");
        let failed = |class| Line {
            state: State::Failed(class),
            ..one.clone()
        };
        let withdrawn = Line::new(one.id.clone(), "", State::Withdrawn);
        let stale = Line {
            state: State::Stale,
            ..one.clone()
        };
        let (gone, large) = (failed(FaultKind::Gone), failed(FaultKind::TooLarge));
        for (before, after, expected) in [
            (None, Some(&one), Some(What::Stored)),
            (Some(&one), Some(&one), None),
            (Some(&one), Some(&line("a/b", 1, "y")), Some(What::Stored)),
            (Some(&one), Some(&line("a/b", 2, "y")), Some(What::Stored)),
            (Some(&one), Some(&line("a/b", 2, "x")), Some(What::Renewed)),
            (Some(&one), Some(&stale), None),
            (Some(&one), Some(&withdrawn), Some(What::Withdrawn)),
            (Some(&one), None, Some(What::Withdrawn)),
            (Some(&withdrawn), None, None),
            (Some(&withdrawn), Some(&one), Some(What::Stored)),
            (Some(&one), Some(&gone), Some(What::Failed)),
            (
                None,
                Some(&Line {
                    digest: None,
                    ..gone.clone()
                }),
                Some(What::Failed),
            ),
            (Some(&gone), Some(&gone), None),
            (Some(&gone), Some(&large), Some(What::Failed)),
            (Some(&gone), Some(&one), None),
        ] {
            let of = |line: Option<&Line>| catalog(line.cloned().as_slice());
            let found = between(&of(before), &of(after));
            let expected: Vec<_> = expected
                .map(|what| (one.id.clone(), what))
                .into_iter()
                .collect();
            assert_eq!(found, expected, "{before:?} {after:?}");
        }
    }

    #[test]
    fn what_is_old_or_no_change_is_left_out() {
        let changes = [("a/b".parse().unwrap(), What::Stored)];
        let first = add(b"", &changes, START);
        assert_eq!(first, "time,id,what\n2026-11-01T03:00:00Z,a/b,stored\n");
        let odd =
            format!("{first}x\n2026-11-01T03:00:00Z,a/b,eaten\n2026-11-01T03:00:00Z,..,stored\n");
        assert_eq!(add(odd.as_bytes(), &[], START), first);
        assert_eq!(add(first.as_bytes(), &[], START + KEPT), "time,id,what\n");
        let many = vec![changes[0].clone(); MOST + 1];
        assert_eq!(
            add(first.as_bytes(), &many, START).lines().count(),
            MOST + 1
        );
    }

    /// A reader that looks once a day at the first 100 kB has what a full listing shows: at a tenth
    /// of the feed's size, a tenth of a megabyte.
    #[test]
    fn a_month_of_polling_ends_equal_to_a_listing() {
        let mut random = fastrand::Rng::with_seed(11);
        let mut now = Catalog::default();
        let mut file = Vec::new();
        let (mut reader, mut seen) = (BTreeMap::new(), None);
        for day in 0..31 {
            let before = now.clone();
            let count = if day == 0 { 2_450 } else { 250 };
            for _ in 0..count {
                let id = match day {
                    0 => format!("owner-{}/name-{}", now.lines.len() % 300, now.lines.len()),
                    _ => {
                        let number = random.usize(..2_500);
                        format!("owner-{}/name-{number}", number % 300)
                    }
                };
                match random.u8(..20) {
                    0 if day > 0 => _ = now.lines.remove(&id.parse::<RepoRef>().unwrap()),
                    _ => now.insert(line(&id, i64::from(day), &random.u16(..).to_string())),
                }
            }
            let at = START + time::Duration::days(day.into());
            file = add(&file, &between(&before, &now), at).into_bytes();
            if day == 0 {
                // The first time, a reader takes the catalogue.
                reader = now
                    .lines
                    .iter()
                    .map(|(id, l)| (id.clone(), l.digest.clone()))
                    .collect();
                seen = Some(at);
                continue;
            }
            let head = &file[..file.len().min(100_000)];
            let news: Vec<_> = std::str::from_utf8(head)
                .unwrap()
                .lines()
                .skip(1)
                .map(|line| line.split(',').collect::<Vec<_>>())
                .take_while(|fields| {
                    seen.is_none_or(|seen| {
                        OffsetDateTime::parse(fields[0], &Rfc3339).unwrap() > seen
                    })
                })
                .collect();
            for fields in news.iter().rev() {
                let id: RepoRef = fields[1].parse().unwrap();
                match now.lines.get(&id).map(|line| line.digest.clone()) {
                    Some(digest) => _ = reader.insert(id, digest),
                    None => _ = reader.remove(&id),
                }
            }
            seen = Some(at);
        }
        let listing: BTreeMap<_, _> = now
            .lines
            .iter()
            .map(|(id, l)| (id.clone(), l.digest.clone()))
            .collect();
        assert!(reader == listing);
    }
}
