//! The worker's parts, tested together.

// `cfg(test)` tells clippy that all of a module is test code.
#[cfg(test)]
mod fixture;

#[cfg(test)]
mod digest_command;

#[cfg(test)]
mod fetch;

#[cfg(test)]
mod fetch_ways;

#[cfg(test)]
mod slots;

#[cfg(test)]
mod walls;

#[cfg(test)]
mod consume;

#[cfg(test)]
mod health;

#[cfg(test)]
mod hostile_trees;

#[cfg(test)]
mod hostile_packs;

#[cfg(test)]
mod parity;
