//! Exit codes, from `sysexits.h` where it has one.

use std::io::Write;
use std::process::ExitCode;

use tracing::error;

/// The run closed; failed repositories included. Also: stopped by SIGTERM as asked.
pub const OK: u8 = 0;
/// A fault of the program itself.
pub const INTERNAL: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// The feed is not what a feed must be (`EX_DATAERR`).
pub const BAD_FEED: u8 = 65;
/// Feed, store or broker cannot be reached (`EX_UNAVAILABLE`).
pub const UNAVAILABLE: u8 = 69;
/// The run did not close (`EX_SOFTWARE`).
pub const NOT_CLOSED: u8 = 70;
/// Another producer is running (`EX_TEMPFAIL`).
pub const BUSY: u8 = 75;
/// Stopped by SIGINT.
pub const INTERRUPTED: u8 = 130;
/// Stopped by SIGTERM, with nothing to show for it.
pub const TERMINATED: u8 = 143;

/// An error that says with which code the program ends.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ExitError {
    /// One of this module's codes.
    pub code: u8,
    /// What happened and what to do, for a person.
    pub message: String,
}

impl ExitError {
    /// Ends with `code` after printing `message`.
    pub fn new(code: u8, message: impl std::fmt::Display) -> Self {
        Self {
            code,
            message: format!("{message:#}"),
        }
    }
}

/// The code for an error: that of an [`ExitError`] anywhere in its chain, else [`INTERNAL`].
pub fn code_of(error: &anyhow::Error) -> u8 {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<ExitError>())
        .map_or(INTERNAL, |exit| exit.code)
}

/// Says on standard error why a program ends, and gives its exit code. Also in the log, where that is for `programs`:
/// whoever reads one does not see standard error.
pub fn fail(error: &anyhow::Error, programs: bool) -> ExitCode {
    let exit_code = code_of(error);
    if programs {
        error!(operation = "exit", exit_code, "{error:#}");
    }
    writeln!(std::io::stderr(), "error: {error:#}").ok();
    ExitCode::from(exit_code)
}
