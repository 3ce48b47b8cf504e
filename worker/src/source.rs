//! What a digest is made from: HEAD's trees, and blobs on request.
//!
//! A digest knows nothing of packs, scratch repositories or networks. Today's only source is a
//! repository on disk (`fetch::objects`); a partial fetch, which gets blobs when they are
//! asked for, can stand behind the same trait.

use std::fmt;
use std::ops::ControlFlow;

use common::fault::Fault;

/// The name of a git object (SHA-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(pub [u8; 20]);

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What HEAD points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The commit.
    pub commit: ObjectId,
    /// Its root tree.
    pub tree: ObjectId,
}

/// What a tree's entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A blob that a checkout writes as a file.
    File,
    /// A blob that holds the target of a symbolic link. Never followed.
    Symlink,
    /// Another tree.
    Directory,
    /// A commit of another repository. Never fetched.
    Submodule,
}

/// An entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeEntry {
    /// The raw name. Any bytes but NUL: a hostile tree may hold `..`, slashes or newlines.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// What it holds.
    pub id: ObjectId,
}

/// Gives out what HEAD holds. Every method may do IO.
pub trait Source {
    /// HEAD's commit; `None` for a repository without one.
    fn head(&self) -> Result<Option<Head>, Fault>;

    /// The entries of one tree, in the order in which the tree has them.
    fn entries(&self, tree: ObjectId) -> Result<Vec<TreeEntry>, Fault>;

    /// The sizes of `blobs` in bytes, in their order, without reading what they hold.
    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault>;

    /// Reads `blobs` in their order and hands each to `visit` with its place in `blobs`, until
    /// `visit` breaks. Never holds more than one of them whole.
    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault>;
}
