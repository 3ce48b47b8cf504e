//! The worker's parts, tested together.

mod hostile_trees;
mod parity;
