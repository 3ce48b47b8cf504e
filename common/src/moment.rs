//! Moments at which a test has this process killed.
//!
//! What must hold whatever dies and whenever is shown by dying there: `REPOFLEET_KILL_AT=after-put:3`
//! in a program's environment has it killed by SIGKILL when it reaches that moment for the third
//! time. Programs that are not built for tests (feature `testing`) know nothing of it.

/// Moments, in the order in which a job meets them.
pub const ALL: [&str; 8] = [
    "after-manifest",
    "mid-publish",
    "before-fetch",
    "during-fetch",
    "before-put",
    "after-put",
    "after-outcome",
    "after-retry-publish",
];

/// Says that the process has come to `moment`.
#[cfg(not(feature = "testing"))]
#[inline]
pub fn reached(_moment: &str) {}

/// Says that the process has come to `moment`; it may not survive that.
#[cfg(feature = "testing")]
pub fn reached(moment: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static PLAN: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let plan = std::env::var("REPOFLEET_KILL_AT").ok()?;
        let (moment, time) = plan.split_once(':').unwrap_or((&plan, "1"));
        assert!(ALL.contains(&moment), "REPOFLEET_KILL_AT: no such moment");
        Some((moment.to_owned(), time.parse().expect("a number")))
    });
    static REACHED: AtomicU64 = AtomicU64::new(0);

    debug_assert!(ALL.contains(&moment), "{moment}");
    let Some((planned, time)) = &*PLAN else {
        return;
    };
    if planned == moment && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == *time {
        let this = rustix::process::getpid();
        _ = rustix::process::kill_process(this, rustix::process::Signal::KILL);
    }
}
