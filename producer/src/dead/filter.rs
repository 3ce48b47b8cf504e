//! The filter options of `producer dead`.

use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use common::broker::DeadLetter;
use common::fault::FaultKind;
use common::ids::{JobKey, RunId};
use common::job::Job;
use common::text::parse_duration;
use globset::{GlobBuilder, GlobMatcher};
use strum::VariantArray;
use time::OffsetDateTime;

use crate::status::parse_run;

/// Which dead letters are meant. All conditions must hold.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Filter")]
pub struct LetterFilter {
    /// Only letters of this failure class; repeatable. `killed`: given up by the broker; `poison`: an
    /// undecodable message.
    #[arg(long, value_name = "CLASS", value_parser = class_parser())]
    class: Vec<FaultKind>,
    /// Only letters whose owner matches, such as `alphagov` or `nhs*`; letter case is ignored.
    #[arg(long, value_name = "GLOB", value_parser = parse_owner)]
    owner: Option<GlobMatcher>,
    /// Only letters of this run.
    #[arg(long, value_name = "RUN", value_parser = parse_run)]
    run: Option<RunId>,
    /// Only letters whose job was queued longer ago than this: 90s, 15m, 2h, 3d.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    older_than: Option<Duration>,
    /// Only letters whose job was queued more recently than this.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    newer_than: Option<Duration>,
    /// At most this many, from the head of the queue.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
}

impl LetterFilter {
    /// Whether the letter fits, apart from its class. A value that it does not name fits no condition.
    pub(super) fn fits(&self, letter: &DeadLetter, now: OffsetDateTime) -> bool {
        let said = said(letter);
        let owner = said.as_ref().map(|(_, key)| key.repo.owner());
        let age = letter.at.map(|at| now - at);
        fits(&self.owner, owner, |glob, owner| glob.is_match(owner))
            && fits(&self.run, said.as_ref(), |run, (said, _)| run == said)
            && fits(&self.older_than, age, |limit, age| age > *limit)
            && fits(&self.newer_than, age, |limit, age| age < *limit)
    }

    /// Whether a letter of this class fits; `None` is an unknown class.
    pub(super) fn takes_class(&self, class: Option<FaultKind>) -> bool {
        self.class.is_empty() || class.is_some_and(|class| self.class.contains(&class))
    }

    /// Whether the class matters, which only the ledger knows.
    pub(super) fn asks_for_class(&self) -> bool {
        !self.class.is_empty()
    }

    /// How many letters at most.
    pub(super) fn limit(&self) -> usize {
        let limit = self.limit.and_then(|limit| usize::try_from(limit).ok());
        limit.unwrap_or(usize::MAX)
    }
}

fn fits<C, V>(condition: &Option<C>, value: Option<V>, holds: impl Fn(&C, V) -> bool) -> bool {
    match (condition, value) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(condition), Some(value)) => holds(condition, value),
    }
}

/// Returns a letter's run, repository and push: its job's, or those that its id names.
pub(super) fn said(letter: &DeadLetter) -> Option<(RunId, JobKey)> {
    match &letter.job {
        Ok(job) => Some((job.run.clone(), job.key())),
        Err(_) => Job::parse_id(&letter.id),
    }
}

fn class_parser() -> impl TypedValueParser<Value = FaultKind> {
    let names = FaultKind::VARIANTS.iter().map(|kind| kind.as_ref());
    PossibleValuesParser::new(names).try_map(|name| name.parse::<FaultKind>())
}

fn parse_owner(text: &str) -> Result<GlobMatcher, globset::Error> {
    let glob = GlobBuilder::new(text).case_insensitive(true).build()?;
    Ok(glob.compile_matcher())
}

#[cfg(test)]
mod tests {
    use common::broker::{Receipt, Settlement};
    use common::fault::Fault;

    use super::*;

    #[derive(Debug)]
    struct Nowhere;

    #[async_trait::async_trait]
    impl Receipt for Nowhere {
        async fn settle(self: Box<Self>, _: Settlement) -> Result<(), Fault> {
            Ok(())
        }
    }

    #[test]
    fn what_a_letter_does_not_say_fits_no_condition() {
        let now = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(10_000_000);
        let letter = |id: &str, seconds: Option<u64>| {
            let at = seconds.map(|seconds| now - Duration::from_secs(seconds));
            let why = Err(String::new());
            DeadLetter::new(id.to_owned(), why, Vec::new(), 0, at, Box::new(Nowhere))
        };
        let all = LetterFilter::default();
        let owner = |glob: &str| LetterFilter {
            owner: Some(parse_owner(glob).unwrap()),
            ..LetterFilter::default()
        };
        let run = LetterFilter {
            run: Some(parse_run("run-1").unwrap()),
            ..LetterFilter::default()
        };
        let old = LetterFilter {
            older_than: Some(Duration::from_secs(60)),
            ..LetterFilter::default()
        };
        let new = LetterFilter {
            newer_than: Some(Duration::from_secs(60)),
            ..LetterFilter::default()
        };
        for (filter, id, age, expected) in [
            (&all, "", None, true),
            (
                &owner("nhs*"),
                "run-1/NHSdigital/a@2026-01-01T00:00:00Z",
                None,
                true,
            ),
            (
                &owner("nhs"),
                "run-1/NHSdigital/a@2026-01-01T00:00:00Z",
                None,
                false,
            ),
            (&owner("*"), "no id", None, false),
            (&run, "run-1/a/b@2026-01-01T00:00:00Z", None, true),
            (&run, "run-2/a/b@2026-01-01T00:00:00Z", None, false),
            (&run, "", None, false),
            (&old, "", Some(61), true),
            (&old, "", Some(60), false),
            (&old, "", None, false),
            (&new, "", Some(59), true),
            (&new, "", Some(60), false),
            (&new, "", None, false),
        ] {
            let fits = filter.fits(&letter(id, age), now);
            assert_eq!(fits, expected, "{filter:?} {id:?} {age:?}");
        }
    }

    #[test]
    fn a_class_that_is_not_known_fits_where_none_is_asked_for() {
        let killed = LetterFilter {
            class: vec![FaultKind::Killed],
            ..LetterFilter::default()
        };
        assert!(LetterFilter::default().takes_class(None));
        assert!(killed.takes_class(Some(FaultKind::Killed)));
        assert!(!killed.takes_class(Some(FaultKind::Poison)));
        assert!(!killed.takes_class(None));
    }
}
