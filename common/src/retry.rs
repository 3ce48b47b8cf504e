//! Retries with growing pauses.
//!
//! Nothing else uses `backoff`, which is no longer maintained (RUSTSEC-2025-0012).

use std::fmt;
use std::future::Future;
use std::time::Duration;

use backoff::ExponentialBackoffBuilder;
use backoff::backoff::Backoff;
use tracing::warn;

/// How often and when to retry.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The pauses between attempts; one more attempt than there are pauses.
    pub pauses: Vec<Duration>,
}

impl Policy {
    /// Returns a policy of three attempts, 1 s and 2 s apart.
    ///
    /// The predecessor's "3 attempts, 1/2/4 s" is the same: no attempt follows its pause of 4 s.
    pub fn three_attempts() -> Self {
        Self {
            pauses: vec![Duration::from_secs(1), Duration::from_secs(2)],
        }
    }
}

/// A failed attempt.
#[derive(Debug)]
pub enum Attempt<E> {
    /// Another attempt may help.
    Again(E),
    /// No attempt will help.
    Final(E),
}

/// Calls `operation` until it succeeds, fails for good, or the policy has no pause left. Logs each
/// failure that is followed by another attempt, with `what`.
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
    let mut pauses = (1..).zip(&policy.pauses);
    loop {
        let error = match operation().await {
            Ok(value) => return Ok(value),
            Err(Attempt::Final(error)) => return Err(error),
            Err(Attempt::Again(error)) => error,
        };
        let Some((attempt, pause)) = pauses.next() else {
            return Err(error);
        };
        let pause_seconds = pause.as_secs_f64();
        warn!(
            operation = "retry",
            attempt,
            attempts,
            pause_seconds,
            "{what} failed (attempt {attempt} of {attempts}), trying again in {pause_seconds} s: {error:#}",
        );
        tokio::time::sleep(*pause).await;
    }
}

/// Returns endless pauses that double from `first` to `longest`, each randomly up to a third shorter
/// or longer, which keeps a fleet from coming back all at once.
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
