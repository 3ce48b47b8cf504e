//! Slots: places where one job at a time is worked on, each in a child process of its own.
//!
//! Untrusted input is parsed in the child ([`child`]): the same binary, without secrets but for the
//! token of the host that it fetches from, limited in address space, file size and CPU time, and
//! confined to its job's folder and its host ([`confine`]).
//! [`slots`] starts it, watches its progress, kills it with all its descendants at a limit, and
//! removes what it leaves.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use common::fault::Fault;
use common::text::seconds_within;

use crate::digest::Facts;

pub mod slots;

pub mod protocol;

mod decoder;

pub mod child;

pub mod confine;

mod scratch;

pub mod token;

/// Address space beyond the pack, which libgit2 maps: programs, threads' stacks, one file of the
/// repository, the digest. The largest of 29 real repositories needs 128 MiB.
const ADDRESS_SPACE: u64 = 512 << 20;

/// Options of slots.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Slots")]
pub struct SlotConfig {
    /// Repositories worked on at the same time [default: 2 × cores]
    #[arg(long, env = "CONCURRENCY", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: Option<u16>,
    /// Longest time for one repository; over it the repository fails as too_large.
    #[arg(long, env = "TIMEOUT", value_name = "DURATION", default_value = "5m", value_parser = seconds_within("1s", "1d"))]
    pub timeout: u64,
    /// Longest time without progress (at least 1,000 bytes); then the attempt is given up.
    #[arg(long, env = "STALL", value_name = "DURATION", default_value = "1m", value_parser = seconds_within("1s", "1d"))]
    pub stall: u64,
    /// Folder for fetched repositories, removed after each job [default: the system's temporary folder]
    #[arg(long, env = "SCRATCH", value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Not on the command line.
    #[arg(skip)]
    pub child: ChildConfig,
}

/// A slot's child: its program and limits. Only tests change the default.
#[derive(Clone, Debug)]
pub struct ChildConfig {
    /// The program, which calls [`child::main_if_slot`].
    pub program: PathBuf,
    /// Address space beyond the byte budget of a fetch.
    pub address_space: u64,
    /// Largest file; by default what a pack within the byte budget needs.
    pub file_bytes: Option<u64>,
}

impl Default for ChildConfig {
    /// This program, even if its file has been replaced since it started.
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            address_space: ADDRESS_SPACE,
            file_bytes: None,
        }
    }
}

impl SlotConfig {
    /// Returns `--concurrency` or its default.
    pub fn slots(&self) -> u16 {
        self.concurrency.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            u16::try_from(2 * cores).unwrap_or(u16::MAX)
        })
    }
}

/// What a slot came to.
#[derive(Debug)]
pub enum SlotResult {
    /// The parts of a digest.
    Digest(Box<SlotOutput>),
    /// HEAD is the known commit; nothing was fetched.
    Unmoved {
        /// Bytes received over the network: the refs.
        fetched_bytes: u64,
        /// As [`SlotOutput::renamed_to`].
        renamed_to: Option<String>,
    },
}

/// The parts of a digest, made by a slot.
#[derive(Debug)]
pub struct SlotOutput {
    /// For the summary.
    pub facts: Facts,
    /// The tree's text.
    pub tree: String,
    /// The contents' text.
    pub content: String,
    /// Bytes received over the network.
    pub fetched_bytes: u64,
    /// Where the host said that the repository is now, if that is another path.
    pub renamed_to: Option<String>,
    /// How long the fetch took.
    pub fetch: Duration,
    /// How long the digest took.
    pub digest: Duration,
}

/// Why a slot made nothing.
#[derive(Debug)]
pub enum SlotError {
    /// The job's fault, or the machine's.
    Fault(Fault),
    /// The caller cancelled it.
    Stopped,
}

impl From<Fault> for SlotError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}
