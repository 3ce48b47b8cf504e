//! The worker's parts, tested together.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of tests fail like tests; .clippy.toml only reaches the tests themselves"
)]

mod fixture;

mod fetch;

mod slots;

mod consume;

mod hostile_trees;

mod parity;
