//! Gets a repository's objects. The only place that knows git2.

pub mod objects;
