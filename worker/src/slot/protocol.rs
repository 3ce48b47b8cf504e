//! What a slot and its child say to each other.

use common::fault::Fault;
use serde::{Deserialize, Serialize};

use crate::digest::{DigestLimits, Facts, Part, Subject};
use crate::fetch::answer::TokenRefusal;
use crate::fetch::policy::{FetchPolicy, FetchWay};
use crate::slot::confine::Wall;
use crate::source::ObjectId;

/// The first argument that makes a binary a slot's child. The second is its job's folder.
pub const ARGUMENT: &str = "slot";
/// Longest piece of text in one frame, in bytes.
pub(super) const MAX_PIECE: usize = 1 << 20;

/// A child's job: JSON on its standard input, up to the end.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChildRequest {
    pub(super) url: String,
    pub(super) subject: Subject,
    /// If HEAD is this commit, nothing is to be fetched.
    pub(super) known: Option<ObjectId>,
    pub(super) limits: DigestLimits,
    pub(super) policy: FetchPolicy,
    /// The process that the child dies with.
    pub(super) parent: i32,
    pub(super) address_space: u64,
    pub(super) file_bytes: u64,
    pub(super) cpu_seconds: u64,
    /// Those that are to stand around the child.
    pub(super) walls: Vec<Wall>,
}

/// A child's message: a line of JSON on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Frame {
    Progress {
        fetched_bytes: u64,
    },
    /// The host refused the token.
    TokenRefused {
        why: TokenRefusal,
    },
    /// The host said that the token's limit is used up for so long.
    TokenUsedUp {
        seconds: u64,
    },
    /// How the repository is fetched, and why if it is a fallback.
    Way {
        way: FetchWay,
        why: String,
    },
    /// The repository can be read.
    Fetched {
        fetched_bytes: u64,
        millis: u64,
        renamed_to: Option<String>,
    },
    /// The text follows the line.
    Text {
        part: Part,
        bytes: usize,
    },
    Done {
        facts: Facts,
        millis: u64,
    },
    /// HEAD is the known commit. The last frame.
    Unmoved {
        fetched_bytes: u64,
        renamed_to: Option<String>,
    },
    Failed(Fault),
}
