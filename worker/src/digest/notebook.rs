//! Jupyter notebooks, shown as the Python scripts that gitingest makes of them.

mod json;
pub(super) mod script;
