//! Takes a job, fetches and digests its repository in a slot, stores the digest.
//!
//! [`run`] is a worker of a fleet. One job, in reading order: [`consume`] takes its delivery and settles it, [`job`] does the work
//! in one of the [`slot`]s, where [`fetch`] makes a [`source`] of its repository and [`digest`] the
//! text of that.

pub mod consume;

mod hosts;

pub mod job;

pub mod slot;

pub mod fetch;

pub mod source;

pub mod digest;

pub mod run;

pub mod health;

pub mod cli;
