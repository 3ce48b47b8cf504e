#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! In reading order: [`run`] is a worker of a fleet. [`consume`] takes a delivery, [`job`] makes one
//! attempt at it in one of the [`slot`]s, where [`fetch`] makes a [`source`] of the repository and
//! [`digest`] its text; [`verdict`] decides what to record and how to settle. [`infra_gate`],
//! [`host_throttle`] and [`host_rate`] decide when jobs may start.

pub mod consume;

pub mod verdict;

pub mod infra_gate;

pub mod host_throttle;

pub mod host_rate;

mod backlog;

mod notices;

pub mod metrics;

pub mod resolver;

pub mod job;

pub mod slot;

pub mod fetch;

pub mod source;

mod disk;

pub mod digest;

pub mod run;

pub mod health;

pub mod cli;
