//! Hosts that want to be left alone, and for how long.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use common::ids::RepoRef;

/// How long a host may turn everybody away before its jobs fail without asking it; one of them
/// still asks after each pause. A run then ends, and the next one tries again.
const HOST_PATIENCE: Duration = Duration::from_secs(3600);

/// What was met of a host that long ago, with nothing since, says nothing any more: workers outlive
/// runs.
const STALE: Duration = Duration::from_secs(600);

/// What is known of the hosts that one worker fetches from. Empty for hosts that are well.
#[derive(Debug, Default)]
pub(crate) struct Hosts {
    hosts: HashMap<String, Host>,
}

#[derive(Debug, Default)]
struct Host {
    /// Left alone until then.
    until: Option<Instant>,
    /// When it first turned somebody away, with nobody let in since.
    turning_away_since: Option<Instant>,
    /// When it last did.
    turned_away: Option<Instant>,
    /// The repository that it turned away without saying why.
    suspect: Option<RepoRef>,
}

impl Host {
    fn forget_if_stale(&mut self, now: Instant) {
        let last = self.until.max(self.turned_away);
        if last.is_none_or(|last| now.saturating_duration_since(last) > STALE) {
            self.turning_away_since = None;
            self.suspect = None;
        }
    }
}

/// Whether a host may be asked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Yes.
    Go,
    /// Not before this long from now.
    Wait(Duration),
    /// No, and it has turned everybody away for this long: do not wait for it.
    GiveUp(Duration),
}

impl Hosts {
    /// Whether `host` may be asked `now`.
    pub(crate) fn turn(&self, host: &str, now: Instant) -> Turn {
        let Some(known) = self.hosts.get(host) else {
            return Turn::Go;
        };
        let left = known
            .until
            .and_then(|until| until.checked_duration_since(now));
        let since = known.turning_away_since;
        let turning_away = since.map_or(Duration::ZERO, |since| now.duration_since(since));
        match left {
            None | Some(Duration::ZERO) => Turn::Go,
            Some(_) if turning_away >= HOST_PATIENCE => Turn::GiveUp(turning_away),
            Some(left) => Turn::Wait(left),
        }
    }

    /// Takes note that `host` turned `repo` away; `true` if the whole host is left alone for
    /// `pause` now.
    ///
    /// Where the host said that it wants to be left alone (`asked`), it is. Where it did not, a
    /// bare 403, that may be about this repository only: GitHub answers so for those that its
    /// staff disabled. Two different ones in a row are about the host.
    pub(crate) fn turned_away(
        &mut self,
        host: &str,
        repo: &RepoRef,
        asked: bool,
        pause: Duration,
        now: Instant,
    ) -> bool {
        let known = self.hosts.entry(host.to_owned()).or_default();
        known.forget_if_stale(now);
        known.turned_away = Some(now);
        known.turning_away_since.get_or_insert(now);
        let suspect = known.suspect.replace(repo.clone());
        if !asked && suspect.is_none_or(|suspect| suspect == *repo) {
            return false;
        }
        let until = now + pause;
        known.until = Some(known.until.map_or(until, |known| known.max(until)));
        true
    }

    /// Takes note of what another worker met: `host` is left alone for `pause`. `true` if that is
    /// longer than it was going to be anyway.
    pub(crate) fn heard(&mut self, host: &str, pause: Duration, now: Instant) -> bool {
        let until = now + pause;
        let known = self.hosts.entry(host.to_owned()).or_default();
        known.forget_if_stale(now);
        let longer = pause > Duration::ZERO && known.until.is_none_or(|known| known < until);
        if longer {
            known.until = Some(until);
        }
        longer
    }

    /// Takes note that `host` gave a proper answer, be it that a repository is gone.
    pub(crate) fn answered(&mut self, host: &str) {
        if let Some(known) = self.hosts.get_mut(host) {
            known.turning_away_since = None;
            known.suspect = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn repo(name: &str) -> RepoRef {
        RepoRef::new("owner", name).unwrap()
    }

    #[test]
    fn a_host_that_asks_is_left_alone_as_long_as_it_asks() {
        let (mut hosts, start) = (Hosts::default(), Instant::now());
        assert!(hosts.turned_away("a", &repo("x"), true, MINUTE, start));
        assert!(hosts.turned_away("a", &repo("y"), true, MINUTE / 2, start));
        assert_eq!(
            hosts.turn("a", start + MINUTE / 3),
            Turn::Wait(MINUTE * 2 / 3)
        );
        assert_eq!(hosts.turn("a", start + MINUTE), Turn::Go);
        assert_eq!(hosts.turn("b", start), Turn::Go);
    }

    #[test]
    fn what_another_worker_met_counts_as_well() {
        let (mut hosts, now) = (Hosts::default(), Instant::now());
        assert!(hosts.heard("a", MINUTE, now));
        assert!(!hosts.heard("a", MINUTE / 2, now));
        assert!(!hosts.heard("b", Duration::ZERO, now));
        assert_eq!(hosts.turn("a", now), Turn::Wait(MINUTE));
        assert_eq!(hosts.turn("b", now), Turn::Go);
    }

    #[test]
    fn what_an_earlier_run_met_does_not_count_against_the_next() {
        let (mut hosts, start) = (Hosts::default(), Instant::now());
        hosts.turned_away("a", &repo("disabled"), false, MINUTE, start);
        let later = start + HOST_PATIENCE * 2;
        assert!(hosts.heard("a", MINUTE, later));
        assert_eq!(hosts.turn("a", later), Turn::Wait(MINUTE));
    }

    #[test]
    fn one_repository_turned_away_without_a_word_is_its_own_affair() {
        let (mut hosts, now) = (Hosts::default(), Instant::now());
        assert!(!hosts.turned_away("a", &repo("x"), false, MINUTE, now));
        assert!(!hosts.turned_away("a", &repo("x"), false, MINUTE, now));
        assert_eq!(hosts.turn("a", now), Turn::Go);
        hosts.answered("a");
        assert!(!hosts.turned_away("a", &repo("y"), false, MINUTE, now));
        assert!(hosts.turned_away("a", &repo("x"), false, MINUTE, now));
        assert_eq!(hosts.turn("a", now), Turn::Wait(MINUTE));
    }

    #[test]
    fn a_host_that_turns_everybody_away_for_an_hour_is_not_waited_for() {
        let (mut hosts, start) = (Hosts::default(), Instant::now());
        for minute in 0..=60 {
            let now = start + MINUTE * minute;
            assert_eq!(hosts.turn("a", now), Turn::Go, "one asks after each pause");
            hosts.turned_away("a", &repo("x"), true, MINUTE, now);
        }
        let now = start + HOST_PATIENCE;
        assert_eq!(hosts.turn("a", now), Turn::GiveUp(HOST_PATIENCE));
        hosts.answered("a");
        assert_eq!(hosts.turn("a", now), Turn::Wait(MINUTE));
    }
}
