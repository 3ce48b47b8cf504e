//! Which paths a digest leaves out: gitingest's defaults, and the repository's ignore files.

pub(super) mod files;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod pattern;
pub(super) mod rules;
