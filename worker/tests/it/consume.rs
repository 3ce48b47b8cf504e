//! Consume.
