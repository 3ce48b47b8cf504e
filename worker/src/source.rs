//! What a digest is made from: HEAD's trees, and blobs on request.
//!
//! A digest knows nothing of packs, scratch repositories or networks. Sources are a repository on disk
//! (`fetch::objects`) and a server's pack (`fetch::pack`).

use std::fmt;
use std::ops::ControlFlow;

use common::fault::Fault;
use serde::{Deserialize, Serialize};

/// The name of a git object (SHA-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectId(pub [u8; 20]);

impl ObjectId {
    /// Parses forty hexadecimal digits, as [`Display`](fmt::Display) writes them.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 40 {
            return None;
        }
        let mut id = [0; 20];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit: u8| char::from(digit).to_digit(16);
            *byte = u8::try_from(16 * digit(pair[0])? + digit(pair[1])?).ok()?;
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
    /// larger than any that a digest reads, and give a size above that limit for them.
    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault>;

    /// Reads `blobs` in order, one at a time, and calls `visit` with each and its index until
    /// `visit` breaks.
    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_id_is_forty_hexadecimal_digits() {
        let text = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(ObjectId::parse(text).unwrap().to_string(), text);
        assert_eq!(ObjectId::parse(&text.to_uppercase()), ObjectId::parse(text));
        for text in [
            "",
            &text[1..],
            &text.replace('0', "g"),
            &text.replace("01", "€"),
        ] {
            assert_eq!(ObjectId::parse(text), None, "{text}");
        }
    }
}
