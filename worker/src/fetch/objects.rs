//! A [`Source`] that reads a repository on disk through libgit2.

use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;

use common::fault::Fault;
use git2::{ErrorCode, ObjectType, Odb, Oid, Repository, RepositoryOpenFlags};

use crate::source::{EntryKind, Head, ObjectId, Source, TreeEntry};

/// Largest tree that is read, in bytes. GitHub refuses to show one of a tenth of this.
const MAX_TREE_BYTES: usize = 64 << 20;

/// The objects of a repository on disk, and the commit that its HEAD names.
pub struct Objects {
    repository: Repository,
    head: Option<Head>,
}

impl Objects {
    /// Opens the repository at `path`, bare or not, at its HEAD.
    ///
    /// # Errors
    /// [`FaultKind::Gone`](common::fault::FaultKind::Gone) if there is none; else as [`Self::new`].
    pub fn open(path: &Path) -> Result<Self, Fault> {
        let flags = RepositoryOpenFlags::NO_SEARCH;
        let none: [&Path; 0] = [];
        let repository = Repository::open_ext(path, flags, none).map_err(|error| {
            let message = format!("cannot open {}: {}", path.display(), error.message());
            match error.code() {
                ErrorCode::NotFound => Fault::gone(message),
                _ => Fault::refused(message),
            }
        })?;
        let commit = match repository.head() {
            Ok(reference) => Some(
                reference
                    .peel_to_commit()
                    .map_err(|error| fault("HEAD", &error))?
                    .id(),
            ),
            Err(error) if is_no_head(&error) => None,
            Err(error) => return Err(fault("HEAD", &error)),
        };
        Self::new(repository, commit.map(object_id))
    }

    /// Takes an open repository, to be read at `commit`; `None` stands for an empty one.
    ///
    /// # Errors
    /// [`FaultKind::Transient`](common::fault::FaultKind::Transient) if the commit is missing or
    /// damaged, as every method for what it reads: objects that do not decode look like a transfer
    /// that went wrong. [`FaultKind::Killed`](common::fault::FaultKind::Killed) for want of memory.
    pub fn new(repository: Repository, commit: Option<ObjectId>) -> Result<Self, Fault> {
        let head = commit.map(|commit| {
            let found = repository.find_commit(oid(commit));
            let found = found.map_err(|error| fault(commit, &error))?;
            Ok(Head {
                commit,
                tree: object_id(found.tree_id()),
            })
        });
        let head = head.transpose()?;
        Ok(Self { repository, head })
    }

    fn odb(&self) -> Result<Odb<'_>, Fault> {
        self.repository
            .odb()
            .map_err(|error| fault("object database", &error))
    }
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects")
            .field("path", &self.repository.path())
            .field("head", &self.head)
            .finish()
    }
}

impl Source for Objects {
    fn head(&self) -> Result<Option<Head>, Fault> {
        Ok(self.head)
    }

    /// Reads the tree's bytes itself: libgit2 refuses whole trees for a name that git would merely
    /// not check out.
    fn entries(&self, tree: ObjectId) -> Result<Vec<TreeEntry>, Fault> {
        let odb = self.odb()?;
        let (size, kind) = odb
            .read_header(oid(tree))
            .map_err(|error| fault(tree, &error))?;
        if kind != ObjectType::Tree {
            return Err(Fault::transient(format!("{tree} is a {kind}, not a tree")));
        }
        if size > MAX_TREE_BYTES {
            return Err(Fault::too_large(format!(
                "tree {tree} has {size} bytes, more than {MAX_TREE_BYTES}"
            )));
        }
        let object = odb.read(oid(tree)).map_err(|error| fault(tree, &error))?;
        parse_tree(object.data()).ok_or_else(|| Fault::transient(format!("tree {tree} is damaged")))
    }

    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault> {
        let odb = self.odb()?;
        let size = |blob: &ObjectId| {
            let header = odb.read_header(oid(*blob));
            let (size, kind) = header.map_err(|error| fault(blob, &error))?;
            check_blob(*blob, kind)?;
            Ok(size as u64)
        };
        blobs.iter().map(size).collect()
    }

    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault> {
        let odb = self.odb()?;
        for (i, blob) in blobs.iter().enumerate() {
            let object = odb.read(oid(*blob)).map_err(|error| fault(blob, &error))?;
            check_blob(*blob, object.kind())?;
            if visit(i, object.data()).is_break() {
                break;
            }
        }
        Ok(())
    }
}

fn check_blob(blob: ObjectId, kind: ObjectType) -> Result<(), Fault> {
    if kind == ObjectType::Blob {
        Ok(())
    } else {
        Err(Fault::transient(format!("{blob} is a {kind}, not a blob")))
    }
}

/// The entries of a tree object; `None` if its bytes are not those of one.
fn parse_tree(mut bytes: &[u8]) -> Option<Vec<TreeEntry>> {
    let mut entries = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|byte| *byte == b' ')?;
        let kind = entry_kind(&bytes[..space])?;
        bytes = &bytes[space + 1..];
        let end = bytes.iter().position(|byte| *byte == 0)?;
        let name = bytes[..end].to_vec();
        bytes = &bytes[end + 1..];
        let (id, rest) = bytes.split_first_chunk()?;
        let id = ObjectId(*id);
        bytes = rest;
        entries.push(TreeEntry { name, kind, id });
    }
    Some(entries)
}

/// As git reads modes: by the type's bits alone, and what has none of them is a submodule.
fn entry_kind(mode: &[u8]) -> Option<EntryKind> {
    let mode = std::str::from_utf8(mode).ok()?;
    let mode = u32::from_str_radix(mode, 8).ok()?;
    Some(match mode & 0o170_000 {
        0o100_000 => EntryKind::File,
        0o120_000 => EntryKind::Symlink,
        0o040_000 => EntryKind::Directory,
        _ => EntryKind::Submodule,
    })
}

fn is_no_head(error: &git2::Error) -> bool {
    matches!(error.code(), ErrorCode::UnbornBranch | ErrorCode::NotFound)
}

fn fault(what: impl fmt::Display, error: &git2::Error) -> Fault {
    super::fault(format_args!("cannot read {what}"), error)
}

fn oid(id: ObjectId) -> Oid {
    Oid::from_bytes(&id.0).expect("an object's name has twenty bytes")
}

pub(super) fn object_id(oid: Oid) -> ObjectId {
    let mut id = [0; 20];
    id.copy_from_slice(oid.as_bytes());
    ObjectId(id)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let kinds: Vec<EntryKind> = parse_tree(&bytes).unwrap().iter().map(|e| e.kind).collect();
        use EntryKind::{Directory, File, Submodule, Symlink};
        assert_eq!(
            kinds,
            [
                File, File, File, Symlink, Directory, Directory, Submodule, Submodule
            ]
        );
        assert!(parse_tree(&bytes[..bytes.len() - 1]).is_none());
        assert!(parse_tree(b"100644 a").is_none());
        assert!(parse_tree(b"1x0644 a\0").is_none());
        assert_eq!(parse_tree(b""), Some(Vec::new()));
    }
}
