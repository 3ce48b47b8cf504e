//! Hosts that rate-limit, and for how long each is paused. Metrics and records read this too.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use common::ids::RepoRef;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::Instant;

/// How long to pause a host that rate-limits without saying for how long. After it the fleet asks with one
/// job, so this is how often a host that goes on is bothered, and how late its end is noticed.
pub const THROTTLE_PAUSE: Duration = Duration::from_secs(30);
/// How long the first job after a pause may go without a refusal until others may ask too: it may be a
/// large repository.
const PROBE: Duration = Duration::from_secs(10);
/// How long a host may rate-limit everybody before its jobs fail without asking it; after each
/// pause one of them still asks. The run then ends, and the next one tries again.
const HOST_PATIENCE: Duration = Duration::from_secs(3600);
/// How many repositories a host must refuse without a reason, one after another, until that counts
/// against the host. Two that it disabled are often neighbours in a feed.
const SUSPICION: u32 = 3;
/// What a host did that long ago says nothing any more: workers outlive runs.
const STALE: Duration = Duration::from_secs(600);

/// Most hosts that are known when one more is heard of by another worker's word.
const MAX_HEARD: usize = 256;

/// See the module. Knows only hosts that have rate-limited somebody.
///
/// After a pause one job asks first; the others wait until the host has served somebody.
#[derive(Debug, Default)]
pub struct HostThrottle {
    hosts: watch::Sender<HashMap<String, Host>>,
}

/// What is known of a host.
#[derive(Debug, Default)]
pub struct Host {
    /// The last one, with nobody served since its end.
    pause: Option<Pause>,
    /// When a job began to ask after it.
    probed: Option<Instant>,
    /// When it first rate-limited somebody, with nobody served since.
    refusing_since: Option<Instant>,
    /// When it last did.
    refused: Option<Instant>,
    /// Repositories that it refused without a reason. A repeat says nothing new about the host.
    barred: HashSet<RepoRef>,
    /// How many of them it refused with nobody served since.
    suspicion: u32,
}

#[derive(Clone, Copy, Debug)]
struct Pause {
    until: Instant,
    /// The same as Unix time, for other processes.
    until_millis: i64,
}

impl Host {
    fn is_stale(&self, now: Instant) -> bool {
        let last = self.pause.map(|pause| pause.until).max(self.refused);
        last.is_none_or(|last| now.saturating_duration_since(last) > STALE)
    }

    fn forget_if_stale(&mut self, now: Instant) {
        if self.is_stale(now) {
            self.pause = None;
            self.refusing_since = None;
            self.suspicion = 0;
            self.barred.clear();
        }
    }

    fn permit(&mut self, now: Instant) -> HostPermit {
        let Some(pause) = self.pause else {
            return HostPermit::Granted;
        };
        let left = pause.until.saturating_duration_since(now);
        if left > Duration::ZERO {
            let refusing = self.refusing_since.map(|since| now.duration_since(since));
            return match refusing {
                Some(refusing) if refusing >= HOST_PATIENCE => HostPermit::GiveUp(refusing),
                _ => HostPermit::Wait(left),
            };
        }
        let next = self
            .probed
            .map(|probed| (probed + PROBE).saturating_duration_since(now));
        match next {
            None | Some(Duration::ZERO) => {
                self.probed = Some(now);
                HostPermit::Probe
            }
            Some(left) => HostPermit::Wait(left),
        }
    }

    /// Whether a refusal of `repo` without a reason is about the host.
    fn suspects(&mut self, repo: &RepoRef) -> bool {
        let new = self.barred.insert(repo.clone());
        self.suspicion += u32::from(new);
        new && self.suspicion >= SUSPICION
    }

    /// Pauses for `pause` from `now` on; returns whether that is longer than it was going to be.
    fn pause(&mut self, pause: Duration, now: Instant) -> bool {
        let until = now + pause;
        let longer = self.pause.is_none_or(|known| known.until < until);
        if longer {
            let until_millis = (OffsetDateTime::now_utc() + pause).unix_timestamp_nanos();
            self.pause = Some(Pause {
                until,
                until_millis: i64::try_from(until_millis / 1_000_000).unwrap_or(i64::MAX),
            });
        }
        longer
    }
}

/// Whether a host may be asked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostPermit {
    /// Yes.
    Granted,
    /// Yes, by this job first; [`HostThrottle::probed`] is to be called when it has asked.
    Probe,
    /// Not before this much time has passed.
    Wait(Duration),
    /// No; and it has rate-limited everybody for this long, so don't wait for it.
    GiveUp(Duration),
}

impl HostThrottle {
    /// Whether `host` may be asked `now`.
    pub fn permit(&self, host: &str, now: Instant) -> HostPermit {
        let mut permit = HostPermit::Granted;
        self.hosts.send_if_modified(|hosts| {
            if let Some(known) = hosts.get_mut(host) {
                permit = known.permit(now);
            }
            false
        });
        permit
    }

    /// Notes that a job that had [`HostPermit::Probe`] has asked, or will not.
    pub fn probed(&self, host: &str) {
        self.hosts.send_if_modified(|hosts| {
            let known = hosts.get_mut(host);
            known.is_some_and(|known| known.probed.take().is_some())
        });
    }

    /// Notes that `host` refused `repo`; returns whether the whole host is paused now.
    ///
    /// If the host `asked` for a pause, it is. If not, it refused without a reason, which may concern
    /// this repository alone. That it did so to several repositories, and served nobody in between,
    /// concerns the host.
    pub fn rate_limited(
        &self,
        host: &str,
        repo: &RepoRef,
        asked: bool,
        pause: Duration,
        now: Instant,
    ) -> bool {
        self.update(host, now, |known| {
            known.refused = Some(now);
            known.refusing_since.get_or_insert(now);
            let concerns_host = asked || known.suspects(repo);
            if concerns_host {
                known.pause(pause, now);
            }
            concerns_host
        })
    }

    /// Pauses `host` because it rate-limited another worker; returns whether that is longer than
    /// it was going to be paused.
    pub fn heard(&self, host: &str, pause: Duration, now: Instant) -> bool {
        pause > Duration::ZERO
            && self.has_room(host, now)
            && self.update(host, now, |known| known.pause(pause, now))
    }

    /// Whether `host` is known, or one more may be.
    fn has_room(&self, host: &str, now: Instant) -> bool {
        let mut has_room = true;
        self.hosts.send_if_modified(|hosts| {
            if hosts.len() >= MAX_HEARD && !hosts.contains_key(host) {
                hosts.retain(|_, known| !known.is_stale(now));
                has_room = hosts.len() < MAX_HEARD;
            }
            false
        });
        has_room
    }

    /// Notes that `host` answered without limiting anybody, such as that a repository is gone.
    pub fn answered(&self, host: &str) {
        self.hosts.send_if_modified(|hosts| {
            if let Some(known) = hosts.get_mut(host) {
                known.refusing_since = None;
                known.suspicion = 0;
            }
            // Whether it serves anybody is not known by that.
            false
        });
    }

    /// Notes that `host` served somebody.
    pub fn served(&self, host: &str, now: Instant) {
        self.answered(host);
        self.hosts.send_if_modified(|hosts| {
            let over = |known: &mut Host| known.pause.take_if(|pause| pause.until <= now);
            hosts.get_mut(host).and_then(over).is_some()
        });
    }

    /// Hosts that are paused `now`, each with the Unix time in milliseconds of its pause's end.
    pub fn paused(&self, now: Instant) -> BTreeMap<String, i64> {
        let hosts = self.hosts.borrow();
        let paused = hosts.iter().filter_map(|(host, known)| {
            let pause = known.pause.filter(|pause| pause.until > now)?;
            Some((host.clone(), pause.until_millis))
        });
        paused.collect()
    }

    /// When the next pause ends.
    pub fn next_end(&self, now: Instant) -> Option<Instant> {
        let hosts = self.hosts.borrow();
        let ends = hosts.values().filter_map(|known| Some(known.pause?.until));
        ends.filter(|until| *until > now).min()
    }

    /// Changes when a pause begins or is extended, and when those who wait after one may ask.
    pub fn watch(&self) -> watch::Receiver<HashMap<String, Host>> {
        self.hosts.subscribe()
    }

    /// Updates what is known of `host`; `update` returns whether its pause has changed.
    fn update(&self, host: &str, now: Instant, update: impl FnOnce(&mut Host) -> bool) -> bool {
        self.hosts.send_if_modified(|hosts| {
            let known = hosts.entry(host.to_owned()).or_default();
            known.forget_if_stale(now);
            update(known)
        })
    }
}

/// 1 to 1.25: stretches a pause, so that those who wait for the same host don't come back all at
/// once.
pub fn stretch() -> f64 {
    1.0 + fastrand::f64() / 4.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn repo(name: &str) -> RepoRef {
        RepoRef::new("owner", name).unwrap()
    }

    #[test]
    fn a_host_that_asks_is_paused_as_long_as_it_asks() {
        let (hosts, start) = (HostThrottle::default(), Instant::now());
        assert!(hosts.rate_limited("a", &repo("x"), true, MINUTE, start));
        assert!(hosts.rate_limited("a", &repo("y"), true, MINUTE / 2, start));
        assert_eq!(
            hosts.permit("a", start + MINUTE / 3),
            HostPermit::Wait(MINUTE * 2 / 3)
        );
        assert_eq!(hosts.permit("a", start + MINUTE), HostPermit::Probe);
        assert_eq!(hosts.permit("b", start), HostPermit::Granted);
    }

    #[test]
    fn hearsay_is_bounded_and_what_happened_here_is_not() {
        let (hosts, start) = (HostThrottle::default(), Instant::now());
        let heard = (0..2000).filter(|n| hosts.heard(&format!("host-{n}"), MINUTE, start));
        assert_eq!(heard.count(), MAX_HEARD);
        assert!(hosts.heard("host-3", MINUTE * 2, start), "known");
        assert!(hosts.rate_limited("real", &repo("x"), true, MINUTE, start));
        assert_eq!(hosts.permit("real", start), HostPermit::Wait(MINUTE));
        let later = start + MINUTE * 2 + STALE;
        assert!(
            hosts.heard("another", MINUTE, later),
            "all but host-3 are stale"
        );
    }

    #[test]
    fn after_a_pause_one_job_asks_first() {
        let (hosts, start) = (HostThrottle::default(), Instant::now());
        let (end, second) = (start + MINUTE, Duration::from_secs(1));
        hosts.heard("a", MINUTE, start);
        assert_eq!(hosts.permit("a", end), HostPermit::Probe);
        assert_eq!(
            hosts.permit("a", end + second),
            HostPermit::Wait(PROBE - second)
        );
        // It has not been refused for long.
        assert_eq!(hosts.permit("a", end + PROBE), HostPermit::Probe);
        // It could not tell.
        hosts.probed("a");
        assert_eq!(hosts.permit("a", end + PROBE), HostPermit::Probe);
        hosts.rate_limited("a", &repo("x"), true, MINUTE, end + PROBE);
        hosts.probed("a");
        assert_eq!(hosts.permit("a", end + PROBE), HostPermit::Wait(MINUTE));

        let end = end + PROBE + MINUTE;
        assert_eq!(hosts.permit("a", end), HostPermit::Probe);
        let mut changes = hosts.watch();
        changes.mark_unchanged();
        hosts.answered("a");
        assert_eq!(hosts.permit("a", end), HostPermit::Wait(PROBE));
        hosts.served("a", end);
        assert!(changes.has_changed().unwrap(), "those who wait are woken");
        for _ in 0..2 {
            assert_eq!(hosts.permit("a", end), HostPermit::Granted);
        }
    }

    #[test]
    fn what_another_worker_met_counts_as_well() {
        let (hosts, now) = (HostThrottle::default(), Instant::now());
        assert!(hosts.heard("a", MINUTE, now));
        assert!(!hosts.heard("a", MINUTE / 2, now));
        assert!(!hosts.heard("b", Duration::ZERO, now));
        assert_eq!(hosts.permit("a", now), HostPermit::Wait(MINUTE));
        assert_eq!(hosts.permit("b", now), HostPermit::Granted);
    }

    #[test]
    fn what_an_earlier_run_met_does_not_count_against_the_next() {
        let (hosts, start) = (HostThrottle::default(), Instant::now());
        hosts.rate_limited("a", &repo("disabled"), false, MINUTE, start);
        let later = start + HOST_PATIENCE * 2;
        assert!(hosts.heard("a", MINUTE, later));
        assert_eq!(hosts.permit("a", later), HostPermit::Wait(MINUTE));
    }

    #[test]
    fn bare_refusals_count_against_a_host_only_if_several_come_with_nobody_served_in_between() {
        let (hosts, now) = (HostThrottle::default(), Instant::now());
        let refuses = |name: &str| hosts.rate_limited("a", &repo(name), false, MINUTE, now);
        for name in ["u", "v", "u", "v", "v"] {
            assert!(!refuses(name), "{name}: a repeat says nothing new");
        }
        hosts.answered("a");
        for name in ["u", "w", "x", "u", "w"] {
            assert!(!refuses(name), "{name}: somebody was served since u and v");
        }
        assert_eq!(hosts.permit("a", now), HostPermit::Granted);
        assert!(refuses("y"));
        assert_eq!(hosts.permit("a", now), HostPermit::Wait(MINUTE));
        assert!(!refuses("y"));
        assert!(refuses("z"), "it still serves nobody");
    }

    #[test]
    fn a_host_that_rate_limits_everybody_for_an_hour_is_not_waited_for() {
        let (hosts, start) = (HostThrottle::default(), Instant::now());
        for minute in 0..=60 {
            let now = start + MINUTE * minute;
            let first = [HostPermit::Granted, HostPermit::Probe][usize::from(minute > 0)];
            assert_eq!(hosts.permit("a", now), first, "one asks after each pause");
            hosts.rate_limited("a", &repo("x"), true, MINUTE, now);
            hosts.probed("a");
        }
        let now = start + HOST_PATIENCE;
        assert_eq!(hosts.permit("a", now), HostPermit::GiveUp(HOST_PATIENCE));
        hosts.served("a", now);
        assert_eq!(hosts.permit("a", now), HostPermit::Wait(MINUTE));
    }

    #[test]
    fn a_pause_is_listed_until_it_ends() {
        let (hosts, start) = (HostThrottle::default(), Instant::now());
        hosts.heard("a", MINUTE, start);
        hosts.heard("a", MINUTE / 2, start);
        hosts.heard("b", MINUTE * 2, start);
        let paused = |now| hosts.paused(now).into_keys().collect::<Vec<_>>();
        assert_eq!(paused(start), ["a", "b"]);
        assert_eq!(hosts.next_end(start), Some(start + MINUTE));
        assert_eq!(paused(start + MINUTE), ["b"]);
        assert_eq!(hosts.next_end(start + MINUTE * 2), None);
    }
}
