//! What a digest is made from: HEAD's trees, and blobs on request.
//!
//! A digest knows nothing of packs, scratch repositories or networks. Sources are a repository on disk
//! (`fetch::objects`) and a server's pack (`fetch::pack`).

use std::fmt;
use std::ops::ControlFlow;

use common::fault::Fault;

/// The name of a git object (SHA-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(pub [u8; 20]);

impl ObjectId {
    /// Parses forty hexadecimal digits.
    pub fn from_hex(digits: &[u8]) -> Option<Self> {
        let (pairs, []) = digits.as_chunks::<2>() else {
            return None;
        };
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let mut id = [0; 20];
        if pairs.len() != id.len() {
            return None;
        }
        for (byte, [high, low]) in id.iter_mut().zip(pairs) {
            *byte = u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()?;
        }
        Some(Self(id))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// HEAD's commit and its root tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The commit.
    pub commit: ObjectId,
    /// Its root tree.
    pub tree: ObjectId,
}

/// The kind of a tree's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A blob that a checkout writes to a file.
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
    /// Raw bytes without NUL. A hostile tree may hold `..`, slashes or newlines.
    pub name: Vec<u8>,
    /// Its kind.
    pub kind: EntryKind,
    /// Its object.
    pub id: ObjectId,
}

/// Reads what HEAD holds. Every method may do IO.
pub trait Source {
    /// Returns HEAD; `None` for a repository without commits.
    fn head(&self) -> Result<Option<Head>, Fault>;

    /// Returns the entries of a tree, in its order.
    fn entries(&self, tree: ObjectId) -> Result<Vec<TreeEntry>, Fault>;

    /// Returns the sizes of `blobs` in bytes, without reading them. A source may lack blobs that are
    /// larger than any that a digest reads, and give that limit as their size.
    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault>;

    /// Reads `blobs` in order, one at a time, and calls `visit` with each and its index until
    /// `visit` breaks.
    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault>;
}
