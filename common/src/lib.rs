#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! In reading order: [`ids`] and [`job`] say what to do, [`fault`] and [`outcome`] what became of
//! it, [`run`] adds outcomes up to a run. [`broker`] carries jobs and remembers outcomes; [`store`]
//! keeps digests. The rest serves all of them.

pub mod ids;

pub mod job;

pub mod fault;

pub mod outcome;

pub mod run;

pub mod broker;

pub mod store;

pub mod text;

pub mod retry;

pub mod tls;

pub mod telemetry;

pub mod shutdown;

pub mod exit;

pub mod process;

pub mod secrets;

pub mod cli;

pub mod failpoint;
