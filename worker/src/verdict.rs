//! From how an attempt at a job ended to what to record, settle and pause: a pure function.

use std::time::Duration;

use common::broker::Settlement;
use common::fault::{Fault, FaultKind};
use common::outcome::Outcome;

use crate::host_throttle::THROTTLE_PAUSE;
use crate::metrics::HandedBack;

/// Attempts after the first one at a job that fails with a transient fault: after 1, 2 and 4 s.
pub const RETRIES: u32 = 3;
/// How often a job waits for a host that asks for it (429, Retry-After) before it fails as
/// `throttled`.
pub const WAITS: u32 = 15;
/// The same for a bare 403, which most likely concerns this repository alone, and for good: GitHub
/// answers so for what its staff disabled.
pub const BARE_WAITS: u32 = 2;
/// The n-th pause is at least 2ⁿ s, up to this, however short the host's own wish.
const LONGEST_FLOOR: Duration = Duration::from_secs(32);
/// How often a job may fail on a machine that is then found well before it fails as `infra`: a
/// repository larger than the scratch disk must not stop all others for ever.
const INFRA_FAILURES: u32 = 4;
/// How often a job is handed back whose attempts use up the broker's loan and fail on the machine.
const HELD_AND_FAILED: u32 = 2;
/// The pause of a job that was held as long as the broker's loan allows.
const HELD_TOO_LONG: Duration = Duration::from_secs(60);
/// The pause of a job that was handed back untried.
const HANDED_BACK: Duration = Duration::from_secs(1);

/// What is known of a job apart from its last attempt.
#[derive(Clone, Copy, Debug)]
pub struct State {
    /// [`Delivery::attempt`](common::broker::Delivery::attempt).
    pub attempt: u32,
    /// [`Delivery::waits`](common::broker::Delivery::waits).
    pub waits: u32,
    /// [`Delivery::returns`](common::broker::Delivery::returns).
    pub returns: u32,
    /// How often it failed on a machine that was then found well.
    pub infra_failures: u32,
    /// 1 or a little more: stretches a host's pause, so that its jobs don't come back all at once.
    pub stretch: f64,
}

/// How far a worker got with a job.
#[derive(Debug)]
pub enum Progress {
    /// To an outcome.
    Done(Outcome),
    /// An attempt failed.
    Failed(Fault),
    /// Nowhere: it came back unsettled too often, with whatever worker had it.
    KillsWorkers(Fault),
    /// Its host may not be asked yet, for this reason, and others need its place.
    HostBusy(HandedBack),
    /// Its host has rate-limited everybody for too long to wait for it.
    HostGivenUp(Fault),
    /// It was held as long as the broker's loan allows. The fault is that of its last attempt, if
    /// most of the time went into attempts.
    HeldTooLong(Option<Fault>),
    /// Another job is to be worked on alone.
    MadeWay,
    /// The worker stops.
    Stopping,
}

impl Progress {
    /// Why the job goes back although nothing is wrong with it.
    pub fn handed_back(&self) -> Option<HandedBack> {
        match self {
            Self::HostBusy(why) => Some(*why),
            Self::HeldTooLong(_) => Some(HandedBack::Infra),
            Self::MadeWay => Some(HandedBack::Suspect),
            Self::Stopping => Some(HandedBack::Stopping),
            Self::Done(_) | Self::Failed(_) | Self::KillsWorkers(_) | Self::HostGivenUp(_) => None,
        }
    }

    /// What went wrong with the job or its host.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Failed(fault)
            | Self::KillsWorkers(fault)
            | Self::HostGivenUp(fault)
            | Self::HeldTooLong(Some(fault)) => Some(fault),
            _ => None,
        }
    }
}

/// What to do about a job, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Pause its host, or everything.
    pub pause: Option<Pause>,
    /// Record its outcome.
    pub record: Option<Outcome>,
    /// Settle its delivery; `None`: keep it, and try again after the pause.
    pub settle: Option<Settlement>,
}

/// What starts no job for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// The job's host.
    Host {
        /// For how long.
        pause: Duration,
        /// The host asked for it; otherwise this may be about the one repository.
        asked: bool,
    },
    /// The whole worker, until machine and store are well.
    Machine,
}

/// Decides what to do about a job.
pub fn verdict(state: &State, progress: &Progress) -> Verdict {
    match progress {
        Progress::Done(outcome) => Verdict::end(*outcome),
        Progress::Failed(fault) => failed(state, fault),
        Progress::KillsWorkers(fault) => Verdict::dead_letter(fault),
        Progress::HostGivenUp(fault) => Verdict::end(Outcome::Failed(fault.kind)),
        Progress::HeldTooLong(Some(fault)) if state.waits >= HELD_AND_FAILED => {
            Verdict::end(Outcome::Failed(fault.kind))
        }
        Progress::HeldTooLong(Some(_)) => Verdict::wait(state, HELD_TOO_LONG),
        Progress::HeldTooLong(None) => Verdict::untried(state, HELD_TOO_LONG),
        Progress::HostBusy(_) | Progress::MadeWay | Progress::Stopping => {
            Verdict::untried(state, HANDED_BACK)
        }
    }
}

/// The table of failure classes.
fn failed(state: &State, fault: &Fault) -> Verdict {
    let asked = fault.retry_after.is_some();
    match fault.kind {
        FaultKind::Transient if state.attempt < RETRIES => Verdict::retry(state),
        FaultKind::Killed if state.attempt == 0 => Verdict::retry(state),
        FaultKind::Throttled if state.waits < if asked { WAITS } else { BARE_WAITS } => {
            let floor = Duration::from_secs(1 << state.waits.min(16)).min(LONGEST_FLOOR);
            let pause = fault.retry_after.unwrap_or(THROTTLE_PAUSE).max(floor);
            let pause = pause.mul_f64(state.stretch);
            // Workers know of a host's pause, and a job waits wherever it is.
            let after = if asked { HANDED_BACK } else { pause };
            Verdict {
                pause: Some(Pause::Host { pause, asked }),
                ..Verdict::wait(state, after)
            }
        }
        FaultKind::Infra if state.infra_failures < INFRA_FAILURES => Verdict {
            pause: Some(Pause::Machine),
            record: None,
            settle: None,
        },
        FaultKind::Poison => Verdict::dead_letter(fault),
        FaultKind::Transient
        | FaultKind::Killed
        | FaultKind::Throttled
        | FaultKind::Infra
        | FaultKind::Gone
        | FaultKind::Refused
        | FaultKind::TooLarge
        | FaultKind::InvalidEntry
        | FaultKind::Cancelled => Verdict::end(Outcome::Failed(fault.kind)),
    }
}

impl Verdict {
    fn end(outcome: Outcome) -> Self {
        Self {
            pause: None,
            record: Some(outcome),
            settle: Some(Settlement::Done),
        }
    }

    fn dead_letter(fault: &Fault) -> Self {
        Self {
            settle: Some(Settlement::Dead),
            ..Self::end(Outcome::Failed(fault.kind))
        }
    }

    fn again(after: Duration, attempt: u32, waits: u32, returns: u32) -> Self {
        Self {
            pause: None,
            record: None,
            settle: Some(Settlement::Again {
                after,
                attempt,
                waits,
                returns,
            }),
        }
    }

    /// After 1, 2, 4 s, counted as an attempt.
    fn retry(state: &State) -> Self {
        let after = Duration::from_secs(1 << state.attempt.min(RETRIES - 1));
        Self::again(after, state.attempt + 1, state.waits, 0)
    }

    /// Counted as a wait.
    fn wait(state: &State, after: Duration) -> Self {
        Self::again(after, state.attempt, state.waits + 1, 0)
    }

    /// Not counted. A job that may have killed its worker stays a suspect.
    fn untried(state: &State, after: Duration) -> Self {
        Self::again(after, state.attempt, state.waits, state.returns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn state(attempt: u32, waits: u32) -> State {
        State {
            attempt,
            waits,
            returns: 2,
            infra_failures: 0,
            stretch: 1.0,
        }
    }

    fn failed(kind: FaultKind) -> Verdict {
        Verdict::end(Outcome::Failed(kind))
    }

    fn retry(seconds: u32, attempt: u32, waits: u32) -> Verdict {
        Verdict::again(SECOND * seconds, attempt, waits, 0)
    }

    fn host(seconds: u32, asked: bool, waits: u32) -> Verdict {
        let pause = SECOND * seconds;
        let after = if asked { HANDED_BACK } else { pause };
        Verdict {
            pause: Some(Pause::Host { pause, asked }),
            ..Verdict::again(after, 0, waits, 0)
        }
    }

    #[test]
    fn each_class_of_failure_has_its_verdict() {
        use FaultKind::{
            Gone, Infra, InvalidEntry, Killed, Poison, Refused, Throttled, TooLarge, Transient,
        };
        let poison = Verdict {
            settle: Some(Settlement::Dead),
            ..failed(Poison)
        };
        let keep = Verdict {
            pause: Some(Pause::Machine),
            record: None,
            settle: None,
        };
        for (kind, retry_after, attempt, waits, expected) in [
            (Transient, None, 0, 0, retry(1, 1, 0)),
            (Transient, None, 1, 0, retry(2, 2, 0)),
            (Transient, None, 2, 9, retry(4, 3, 9)),
            (Transient, None, 3, 0, failed(Transient)),
            (Throttled, None, 0, 0, host(30, false, 1)),
            (Throttled, None, 0, 1, host(30, false, 2)),
            (Throttled, None, 0, 2, failed(Throttled)),
            (Throttled, Some(7), 0, 0, host(7, true, 1)),
            (Throttled, Some(0), 0, 0, host(1, true, 1)),
            (Throttled, Some(0), 0, 3, host(8, true, 4)),
            (Throttled, Some(7), 0, 14, host(32, true, 15)),
            (Throttled, Some(7), 0, 15, failed(Throttled)),
            (Gone, None, 0, 0, failed(Gone)),
            (Refused, None, 0, 0, failed(Refused)),
            (TooLarge, None, 0, 0, failed(TooLarge)),
            (Killed, None, 0, 0, retry(1, 1, 0)),
            (Killed, None, 1, 0, failed(Killed)),
            (Poison, None, 0, 0, poison),
            (Infra, None, 3, 15, keep),
            (InvalidEntry, None, 0, 0, failed(InvalidEntry)),
        ] {
            let mut fault = Fault::new(kind, "why");
            fault.retry_after = retry_after.map(|seconds| SECOND * seconds);
            let verdict = verdict(&state(attempt, waits), &Progress::Failed(fault));
            assert_eq!(verdict, expected, "{kind} {attempt} {waits}");
        }
    }

    #[test]
    fn a_job_that_comes_back_too_often_is_dead_lettered() {
        let fault = Fault::killed("why");
        let expected = Verdict::dead_letter(&fault);
        let progress = Progress::KillsWorkers(fault);
        assert_eq!(verdict(&state(0, 0), &progress), expected);
        assert_eq!(expected.record, Some(Outcome::Failed(FaultKind::Killed)));
        assert_eq!(expected.settle, Some(Settlement::Dead));
    }

    #[test]
    fn a_job_that_alone_fails_on_a_machine_that_is_well_ends() {
        for (infra_failures, expected) in [(3, None), (4, Some(Outcome::Failed(FaultKind::Infra)))]
        {
            let state = State {
                infra_failures,
                ..state(0, 0)
            };
            let progress = Progress::Failed(Fault::infra("why"));
            assert_eq!(verdict(&state, &progress).record, expected);
        }
    }

    #[test]
    fn what_is_handed_back_untried_is_not_charged_and_stays_a_suspect() {
        for (progress, seconds, why) in [
            (Progress::HostBusy(HandedBack::Host), 1, HandedBack::Host),
            (Progress::HostBusy(HandedBack::Rate), 1, HandedBack::Rate),
            (Progress::HeldTooLong(None), 60, HandedBack::Infra),
            (Progress::MadeWay, 1, HandedBack::Suspect),
            (Progress::Stopping, 1, HandedBack::Stopping),
        ] {
            let expected = Verdict::again(SECOND * seconds, 1, 1, 2);
            assert_eq!(verdict(&state(1, 1), &progress), expected, "{progress:?}");
            assert_eq!(progress.handed_back(), Some(why));
        }
    }

    #[test]
    fn attempts_that_use_up_the_loan_and_fail_are_repeated_twice() {
        let progress = || Progress::HeldTooLong(Some(Fault::infra("why")));
        for waits in 0..2 {
            let expected = retry(60, 0, waits + 1);
            assert_eq!(verdict(&state(0, waits), &progress()), expected);
        }
        let expected = failed(FaultKind::Infra);
        assert_eq!(verdict(&state(0, 2), &progress()), expected);
    }

    #[test]
    fn an_outcome_and_a_host_given_up_end_a_job() {
        for outcome in [
            Outcome::Processed,
            Outcome::Unmoved,
            Outcome::Unchanged,
            Outcome::Superseded,
        ] {
            let verdict = verdict(&state(3, 15), &Progress::Done(outcome));
            assert_eq!(verdict, Verdict::end(outcome));
        }
        let progress = Progress::HostGivenUp(Fault::throttled("why", None));
        let expected = failed(FaultKind::Throttled);
        assert_eq!(verdict(&state(0, 0), &progress), expected);
    }
}
