//! A budget of fetches a second for each host, shared by the fleet: each worker takes its part of it, by the
//! number of workers that the broker sees.
//!
//! Workers don't talk about it: a worker that dies takes nothing with it, and no message is late.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use tokio::time::Instant;

/// How late a fetch may be without those after it being later too.
const SLACK: Duration = Duration::from_millis(200);
/// How long a worker that is not alone waits with its first fetch. The others count it by then, see
/// [`crate::backlog::FRESH`].
const SETTLING: Duration = Duration::from_secs(3);
/// Hosts that are remembered before those that may be asked at once are forgotten.
const MANY: usize = 100;

/// Option of the budget.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct HostRateConfig {
    /// Most fetches that begin in a second, from one host, by all workers together [default: no limit]
    ///
    /// Also less than one, such as 0.5. Give the same to every worker: each takes its part, by the number
    /// of workers that are connected.
    #[arg(long, env = "HOST_RATE", value_name = "N", value_parser = rate, help_heading = "Fetching")]
    pub host_rate: Option<f64>,
}

fn rate(text: &str) -> Result<f64, &'static str> {
    let rate = text.parse().ok();
    rate.filter(|rate| (0.001..=10_000.0).contains(rate))
        .ok_or("expected fetches a second, such as 5 or 0.5")
}

/// See the module.
#[derive(Debug)]
pub struct HostRate {
    /// The whole fleet's.
    rate: f64,
    started: Instant,
    /// When the next fetch from a host may begin.
    next: Mutex<HashMap<String, Instant>>,
}

impl HostRate {
    /// For a worker of a fleet that begins at most `rate` fetches a second from one host.
    pub fn new(rate: f64, now: Instant) -> Self {
        Self {
            rate,
            started: now,
            next: Mutex::default(),
        }
    }

    /// Lets a fetch from `host` begin `now`, in a fleet of `workers`.
    ///
    /// # Errors
    /// How long it has to wait, if nobody comes before it.
    pub fn begin(&self, host: &str, workers: u64, now: Instant) -> Result<(), Duration> {
        let workers = workers.max(1);
        let interval = Duration::from_secs_f64(workers as f64 / self.rate);
        let first = match workers {
            1 => self.started,
            _ => self.started + SETTLING,
        };
        let mut all = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let next = all.get(host).copied().unwrap_or(first);
        if next > now {
            return Err(next - now);
        }
        if all.len() >= MANY {
            all.retain(|_, next| *next > now);
        }
        let late = (now - next).min(SLACK).min(interval);
        all.insert(host.to_owned(), now - late + interval);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// When `count` fetches from a host begin, asked for as soon as they may.
    fn begun(rate: &HostRate, workers: u64, mut now: Instant, count: usize) -> Vec<Instant> {
        let mut begun = Vec::new();
        while begun.len() < count {
            match rate.begin("a", workers, now) {
                Ok(()) => begun.push(now),
                // As late as a timer.
                Err(wait) => now += wait + Duration::from_millis(3),
            }
        }
        begun
    }

    #[test]
    fn fetches_are_spaced_by_the_workers_part() {
        for (workers, seconds) in [(1, 100.0 / 4.0), (40, 40.0 * 100.0 / 4.0)] {
            let start = Instant::now();
            let rate = HostRate::new(4.0, start);
            let begun = begun(&rate, workers, start + SETTLING, 101);
            let took = (begun[100] - begun[0]).as_secs_f64();
            let slack = SLACK.as_secs_f64();
            let expected = seconds - slack..seconds + slack;
            assert!(expected.contains(&took), "{workers}: {took}");
            let closest = begun
                .windows(2)
                .map(|pair| pair[1] - pair[0])
                .min()
                .unwrap();
            assert!(
                closest.as_secs_f64() > workers as f64 / 4.0 - 0.21,
                "{closest:?}"
            );
        }
    }

    #[test]
    fn what_was_not_used_is_not_made_up_for() {
        let start = Instant::now();
        let rate = HostRate::new(1.0, start);
        assert_eq!(rate.begin("a", 1, start + 100 * SECOND), Ok(()));
        let wait = rate.begin("a", 1, start + 100 * SECOND).unwrap_err();
        assert_eq!(wait, SECOND - SLACK);
        // Each host has a budget of its own.
        assert_eq!(rate.begin("b", 1, start + 100 * SECOND), Ok(()));
    }

    #[test]
    fn a_worker_that_joins_others_waits_until_they_know() {
        let start = Instant::now();
        let rate = HostRate::new(1000.0, start);
        assert_eq!(rate.begin("a", 2, start), Err(SETTLING));
        assert_eq!(rate.begin("a", 1, start), Ok(()));
    }

    #[test]
    fn hosts_that_may_be_asked_are_forgotten() {
        let start = Instant::now();
        let rate = HostRate::new(1.0, start);
        for host in 0..10 * MANY {
            let now = start + SECOND * u32::try_from(host).unwrap();
            assert_eq!(rate.begin(&host.to_string(), 1, now), Ok(()));
        }
        assert!(rate.next.lock().unwrap().len() <= MANY);
    }

    #[test]
    fn a_rate_is_a_number_of_fetches() {
        assert_eq!(rate("5"), Ok(5.0));
        assert_eq!(rate("0.5"), Ok(0.5));
        for text in ["0", "-1", "", "5/s", "NaN", "inf"] {
            assert!(rate(text).is_err(), "{text}");
        }
    }
}
