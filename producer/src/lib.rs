//! Reads the feed, checks the cache, hands out jobs, follows them to the end; or does the whole
//! job in one process.
//!
//! One run, in reading order: [`run`] goes from the [`feed`] by the [`cache`] (which
//! saves itself most questions by the [`index`]) to [`publish`]ing and
//! [`follow`]ing, and [`report`]s. [`embedded`] puts broker and worker into the same process.
//! [`status`] tells how far a run has got, [`observe`] shows the same as metrics, and [`dead`] is about the jobs that were given up.

pub mod run;

pub mod feed;

pub mod cache;

pub mod index;

pub mod publish;

pub mod follow;

pub mod report;

pub mod embedded;

pub mod fleet;

pub mod status;

pub mod observe;

pub mod dead;

pub mod cli;
