//! What a digest is made from: HEAD's trees, and blobs on request.
//!
//! A digest knows nothing of packs, scratch repositories or networks. Sources are a repository on disk
//! (`fetch::objects`) and a server's pack (`fetch::pack`).

use std::fmt;
use std::ops::ControlFlow;
use std::rc::Rc;

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

/// An entry of a tree, in the tree's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeEntry<'a> {
    /// Raw bytes without NUL. A hostile tree may hold `..`, slashes or newlines.
    pub name: &'a [u8],
    /// Its kind.
    pub kind: EntryKind,
    /// Its object.
    pub id: ObjectId,
}

/// Yields the entries of a tree object; `None` where it is damaged, and nothing after that.
pub fn tree_entries(mut bytes: &[u8]) -> impl Iterator<Item = Option<TreeEntry<'_>>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let entry = tree_entry(&mut bytes);
        if entry.is_none() {
            bytes = &[];
        }
        Some(entry)
    })
}

fn tree_entry<'a>(bytes: &mut &'a [u8]) -> Option<TreeEntry<'a>> {
    let all = *bytes;
    let space = all.iter().position(|byte| *byte == b' ')?;
    let kind = entry_kind(&all[..space])?;
    let rest = &all[space + 1..];
    let end = rest.iter().position(|byte| *byte == 0)?;
    let (id, after) = rest[end + 1..].split_first_chunk()?;
    *bytes = after;
    Some(TreeEntry {
        name: &rest[..end],
        kind,
        id: ObjectId(*id),
    })
}

/// Reads a mode as git does: by the type's bits alone, and an unknown type is a submodule.
fn entry_kind(mode: &[u8]) -> Option<EntryKind> {
    let digit = |mode: u32, byte: &u8| {
        let digit = char::from(*byte).to_digit(8)?;
        mode.checked_mul(8)?.checked_add(digit)
    };
    let mode = mode
        .iter()
        .try_fold(0, digit)
        .filter(|_| !mode.is_empty())?;
    Some(match mode & 0o170_000 {
        0o100_000 => EntryKind::File,
        0o120_000 => EntryKind::Symlink,
        0o040_000 => EntryKind::Directory,
        _ => EntryKind::Submodule,
    })
}

/// Reads what HEAD holds. Every method may do IO.
pub trait Source {
    /// Returns HEAD; `None` for a repository without commits.
    fn head(&self) -> Result<Option<Head>, Fault>;

    /// Returns a tree object's bytes, for [`tree_entries`]. They are as many as the source allows.
    fn tree(&self, tree: ObjectId) -> Result<Rc<[u8]>, Fault>;

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

    #[test]
    fn trees_are_read_whatever_their_names() {
        let id = [7; 20];
        let mut bytes = Vec::new();
        for (mode, name) in [
            ("100644", "a"),
            ("100755", "../b"),
            ("100664", ""),
            ("120000", "\n"),
            ("40000", ".git"),
            ("040000", "c"),
            ("160000", "d"),
            ("0", "e"),
        ] {
            bytes.extend_from_slice(format!("{mode} {name}\0").as_bytes());
            bytes.extend_from_slice(&id);
        }
        let kinds = |bytes: &[u8]| {
            let entries = tree_entries(bytes).collect::<Option<Vec<_>>>()?;
            Some(entries.iter().map(|entry| entry.kind).collect::<Vec<_>>())
        };
        use EntryKind::{Directory, File, Submodule, Symlink};
        let expected = [
            File, File, File, Symlink, Directory, Directory, Submodule, Submodule,
        ];
        assert_eq!(kinds(&bytes).unwrap(), expected);
        assert_eq!(kinds(&bytes[..bytes.len() - 1]), None);
        assert_eq!(kinds(b"100644 a"), None);
        for mode in ["", "1x0644", "+100644", "100648", "100000100644"] {
            let tree = [mode.as_bytes(), b" a\0", &id].concat();
            assert_eq!(kinds(&tree), None, "{mode}");
        }
        assert_eq!(kinds(b"").unwrap(), []);
    }
}
