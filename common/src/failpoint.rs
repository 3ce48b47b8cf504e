//! Labelled places at which a test kills the process.
//!
//! Tests crash there to show that a crash anywhere is safe: with
//! `REPOFLEET_FAILPOINT=after-put:3` in its environment, a program sends itself SIGKILL the third
//! time it reaches `after-put`. Only builds with the feature `failpoints` do so; in all others the
//! calls compile to nothing.

/// All failpoints, in the order in which a job reaches them.
pub const ALL: [&str; 10] = [
    "after-manifest",
    "mid-publish",
    "before-fetch",
    "during-fetch",
    "before-put",
    "after-put",
    "after-outcome",
    "after-retry-publish",
    "after-put-back",
    "after-cancel",
];

/// Does nothing in this build.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn hit(_name: &str) {}

/// Marks the failpoint `name`; kills the process if the plan says so.
#[cfg(feature = "failpoints")]
pub fn hit(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static PLAN: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let plan = std::env::var("REPOFLEET_FAILPOINT").ok()?;
        let (name, time) = plan.split_once(':').unwrap_or((&plan, "1"));
        assert!(
            ALL.contains(&name),
            "REPOFLEET_FAILPOINT: unknown failpoint"
        );
        Some((name.to_owned(), time.parse().expect("a number")))
    });
    static REACHED: AtomicU64 = AtomicU64::new(0);

    debug_assert!(ALL.contains(&name), "{name}");
    let Some((planned, time)) = &*PLAN else {
        return;
    };
    if planned == name && REACHED.fetch_add(1, Ordering::SeqCst) + 1 == *time {
        let this = rustix::process::getpid();
        _ = rustix::process::kill_process(this, rustix::process::Signal::KILL);
    }
}
