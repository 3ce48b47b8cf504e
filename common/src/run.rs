//! A run: its documents in the store, and the fold of its records.

pub mod documents;

pub mod view;
