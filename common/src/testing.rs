//! What the tests of every member share. Behind the feature `testing`.

pub mod repositories;
