//! Jupyter notebooks, shown as the Python scripts that gitingest makes of them.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod json;
pub(super) mod script;
