//! Trying again, with growing pauses.
//!
//! The only user of `backoff`, which its author no longer maintains (RUSTSEC-2025-0012): were it
//! to go, this file is what would change.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use backoff::ExponentialBackoffBuilder;
use backoff::backoff::Backoff;
use tracing::warn;

/// How often and when to try again.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The pauses between attempts; one more attempt than there are pauses.
    pub pauses: Vec<Duration>,
}

impl Policy {
    /// Three attempts in all; the pauses before the second and third are 1 s and 2 s.
    ///
    /// The predecessor speaks of "3 attempts, 1/2/4 s": its 4 s pause is never used, since no
    /// attempt follows it.
    pub fn three_attempts() -> Self {
        Self {
            pauses: vec![Duration::from_secs(1), Duration::from_secs(2)],
        }
    }
}

/// What became of one attempt that failed.
#[derive(Debug)]
pub enum Attempt<E> {
    /// Another attempt may help.
    Again(E),
    /// No attempt will help.
    Final(E),
}

/// Calls `operation` until it succeeds, fails for good, or the policy has no pause left. Each
/// failure that is tried again is logged with `what`.
///
/// # Errors
/// The last attempt's.
pub async fn retry<T, E, F, Fut>(policy: &Policy, what: &str, mut operation: F) -> Result<T, E>
where
    E: fmt::Display,
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, Attempt<E>>>,
{
    let attempts = policy.pauses.len() + 1;
    let mut attempt = 0;
    let pauses = Pauses {
        all: policy.pauses.clone(),
        next: 0,
    };
    let operation = || {
        let future = operation();
        async {
            future.await.map_err(|failed| match failed {
                Attempt::Again(error) => backoff::Error::transient(error),
                Attempt::Final(error) => backoff::Error::permanent(error),
            })
        }
    };
    backoff::future::retry_notify(pauses, operation, |error: E, pause: Duration| {
        attempt += 1;
        warn!(
            operation = "retry",
            attempt,
            attempts,
            pause_seconds = pause.as_secs_f64(),
            "{what} failed (attempt {attempt} of {attempts}), trying again in {} s: {error:#}",
            pause.as_secs_f64()
        );
    })
    .await
}

/// Pauses that double from `first` to `longest`, for ever, each made up to a third shorter or
/// longer by chance, so that a fleet does not come back all at once.
pub fn pauses(first: Duration, longest: Duration) -> impl Iterator<Item = Duration> + Send {
    let mut pauses = ExponentialBackoffBuilder::new()
        .with_initial_interval(first)
        .with_max_interval(longest)
        .with_multiplier(2.0)
        .with_randomization_factor(1.0 / 3.0)
        .with_max_elapsed_time(None)
        .build();
    std::iter::from_fn(move || pauses.next_backoff())
}

/// A fixed list of pauses, as `backoff` wants it.
struct Pauses {
    all: Vec<Duration>,
    next: usize,
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.next = 0;
    }

    fn next_backoff(&mut self) -> Option<Duration> {
        let pause = self.all.get(self.next).copied();
        self.next += 1;
        pause
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    async fn count(
        outcomes: &[Result<u32, Attempt<&'static str>>],
    ) -> (Result<u32, &'static str>, u32) {
        let policy = Policy {
            pauses: vec![Duration::ZERO; 2],
        };
        let calls = AtomicU32::new(0);
        let result = retry(&policy, "it", || {
            let call = calls.fetch_add(1, Ordering::SeqCst) as usize;
            let outcome = match &outcomes[call] {
                Ok(n) => Ok(*n),
                Err(Attempt::Again(e)) => Err(Attempt::Again(*e)),
                Err(Attempt::Final(e)) => Err(Attempt::Final(*e)),
            };
            async move { outcome }
        })
        .await;
        (result, calls.into_inner())
    }

    #[test]
    fn pauses_grow_to_the_longest_and_never_end() {
        let third = |millis: u64| millis / 3 + 1;
        let pauses = pauses(Duration::from_millis(300), Duration::from_secs(3));
        for (pause, expected) in pauses.zip([300, 600, 1200, 2400, 3000, 3000, 3000]) {
            let millis = u64::try_from(pause.as_millis()).unwrap();
            assert!(millis.abs_diff(expected) <= third(expected), "{pause:?}");
        }
    }

    #[tokio::test]
    async fn tries_until_success_the_last_pause_or_a_final_failure() {
        use Attempt::{Again, Final};
        assert_eq!(count(&[Ok(7)]).await, (Ok(7), 1));
        assert_eq!(
            count(&[Err(Again("a")), Err(Again("b")), Ok(7)]).await,
            (Ok(7), 3)
        );
        assert_eq!(
            count(&[Err(Again("a")), Err(Again("b")), Err(Again("c")), Ok(7)]).await,
            (Err("c"), 3)
        );
        assert_eq!(
            count(&[Err(Again("a")), Err(Final("b")), Ok(7)]).await,
            (Err("b"), 2)
        );
    }
}
