//! The worker's parts, tested together.

mod fixture;

mod fetch;

mod slots;

mod consume;

mod hostile_trees;

mod parity;
