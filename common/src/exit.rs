//! Exit codes, from `sysexits.h` where it has one.

use std::io::Write;
use std::process::ExitCode;

use tracing::error;

use crate::fault::Fault;

/// Done. A run: closed, and no more failed than `--max-failures` allows.
pub const OK: u8 = 0;
/// A fault of the program itself.
pub const INTERNAL: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// The run closed, but more repositories failed than `--max-failures` allows, or jobs were cancelled.
pub const TOO_MANY_FAILED: u8 = 3;
/// An audit found something.
pub const FOUND: u8 = 4;
/// The feed is no feed, is empty, or has no usable entry (`EX_DATAERR`).
pub const BAD_FEED: u8 = 65;
/// Feed, store, broker or disk cannot be used, for longer than `--patience` (`EX_UNAVAILABLE`).
pub const UNAVAILABLE: u8 = 69;
/// The run did not close (`EX_SOFTWARE`).
pub const NOT_CLOSED: u8 = 70;
/// Another producer is running (`EX_TEMPFAIL`).
pub const BUSY: u8 = 75;
/// SIGINT left work undone.
pub const INTERRUPTED: u8 = 130;
/// SIGTERM left work undone.
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

impl From<Fault> for ExitError {
    /// A fault that nobody else handles means that something cannot be used.
    fn from(fault: Fault) -> Self {
        Self::new(UNAVAILABLE, fault)
    }
}

impl ExitError {
    /// Ends the program with `code` after printing `message`.
    pub fn new(code: u8, message: impl std::fmt::Display) -> Self {
        Self {
            code,
            message: format!("{message:#}"),
        }
    }
}

/// Returns the code of an [`ExitError`] anywhere in the error's chain; [`UNAVAILABLE`] for a
/// [`Fault`], [`INTERNAL`] for anything else.
pub fn code_of(error: &anyhow::Error) -> u8 {
    let code = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<ExitError>() {
        Some(exit) => Some(exit.code),
        None => cause.is::<Fault>().then_some(UNAVAILABLE),
    };
    error.chain().find_map(code).unwrap_or(INTERNAL)
}

/// Prints on standard error why a program ends, and returns its exit code. `programs` logs it too:
/// a program that collects the log does not see standard error.
pub fn fail(error: &anyhow::Error, programs: bool) -> ExitCode {
    let exit_code = code_of(error);
    if programs {
        error!(operation = "exit", exit_code, "{error:#}");
    }
    writeln!(std::io::stderr(), "error: {error:#}").ok();
    ExitCode::from(exit_code)
}
