#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! In reading order: [`run`] goes from the [`feed`] through the [`cache`] (with its [index](cache::index)) to
//! [`publish`] and [`follow`], and [`report`]s; one process also stores its [`progress`]. Its [`engine`] is one process or a fleet, and the
//! [`watchdog`] looks after what is followed; it asks workers by [`roll_call`], as does [`token_warning`]. [`status`] shows how far a run has got, [`observe`]
//! serves the same as metrics, [`dead`] handles dead letters, and [`cancel`] ends a run whose jobs wait. [`check`] and
//! [`settings`] are for before a run. [`terminal`] draws.

pub mod run;

pub mod feed;

pub mod cache;

pub mod publish;

pub mod follow;

pub mod report;

pub mod progress;

pub mod engine;

pub mod watchdog;

pub mod roll_call;

pub mod token_warning;

pub mod folder_lock;

pub mod withdrawals;

pub mod catalog;

pub mod closing;

pub mod unchanged;

pub mod bucket;

pub mod verify;

pub mod status;

pub mod observe;

pub mod dead;

pub mod cancel;

pub mod terminal;

pub mod check;

pub mod settings;

pub mod cli;
