//! The producer's modules against real files and real sockets.
#![expect(
    clippy::unwrap_used,
    reason = "a test that finds something missing should fail at that line"
)]

mod bucket;
mod cache;
mod cancel;
mod catalog;
mod check;
mod crash;
mod dead;
mod distributed;
mod exits;
mod failures;
mod faults;
mod feed;
mod fleet;
mod full_disk;
mod hostile;
mod index;
mod limits;
mod log_lines;
mod logs;
mod metrics;
mod observe;
mod on_broker;
mod readme;
mod renewal;
mod rights;
mod run;
mod settings;
mod signals;
mod slow_names;
mod status;
mod traces;
mod unchanged;
mod verify;
mod workers;
