#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! In reading order: [`run`] is a worker of a fleet. [`consume`] takes a delivery and settles it,
//! [`job`] does the work in one of the [`slot`]s, where [`fetch`] makes a [`source`] of the
//! repository and [`digest`] its text.

pub mod consume;

pub mod verdict;

pub mod infra_gate;

pub mod host_throttle;

mod notices;

pub mod metrics;

pub mod resolver;

pub mod job;

pub mod slot;

pub mod fetch;

pub mod source;

pub mod digest;

pub mod run;

pub mod health;

pub mod cli;
