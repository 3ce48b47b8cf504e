//! The producer.
fn main() {}
