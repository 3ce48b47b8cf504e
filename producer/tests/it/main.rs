//! The producer's modules against real files and real sockets.
#![expect(
    clippy::unwrap_used,
    reason = "a test that finds something missing should fail at that line"
)]

mod cache;
mod feed;
mod fleet;
mod logs;
mod run;
