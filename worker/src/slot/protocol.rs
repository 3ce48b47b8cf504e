//! What a slot and its child say to each other.

use std::path::PathBuf;

use common::fault::Fault;
use serde::{Deserialize, Serialize};

use crate::digest::{DigestLimits, Facts, Part, Subject};
use crate::fetch::policy::FetchPolicy;

/// The first argument that makes a binary a slot's child.
pub const ARGUMENT: &str = "slot";
/// Longest line of the child's that is read.
pub(super) const MAX_LINE: u64 = 1 << 20;
/// Longest piece of text in one frame.
pub(super) const MAX_PIECE: usize = 1 << 20;

/// What a child is to do: one JSON line on its standard input.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ChildRequest {
    pub(super) url: String,
    pub(super) subject: Subject,
    pub(super) limits: DigestLimits,
    pub(super) policy: FetchPolicy,
    pub(super) scratch: PathBuf,
    /// The child ends when this process does.
    pub(super) parent: i32,
    pub(super) address_space: u64,
    pub(super) file_bytes: u64,
    pub(super) cpu_seconds: u64,
}

/// What a child says: JSON lines on its standard output, each `Text` followed by that many bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Frame {
    /// It got on.
    Progress {
        fetched_bytes: u64,
    },
    /// The repository is there to be read.
    Fetched {
        fetched_bytes: u64,
        millis: u64,
    },
    Text {
        part: Part,
        bytes: usize,
    },
    Done {
        facts: Facts,
        millis: u64,
    },
    Failed(Fault),
}
