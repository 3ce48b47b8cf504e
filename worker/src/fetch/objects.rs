//! A [`Source`] that reads a repository on disk through libgit2, and libgit2's errors.

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use common::fault::Fault;
use git2::{Config, ErrorClass, ErrorCode, ObjectType, Odb, Oid, Repository, RepositoryOpenFlags};
use rustix::io::Errno;

use crate::disk;
use crate::fetch::answer;
use crate::fetch::http::ProgressSink;
use crate::fetch::pack::limits::MAX_TREE;
use crate::source::{Head, ObjectId, Source};

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

/// The objects of a repository on disk, read at one commit.
pub struct Objects {
    repository: Repository,
    head: Option<Head>,
    sink: Option<Arc<dyn ProgressSink>>,
    /// The path of a partial clone, which lacks objects.
    partial: Option<PathBuf>,
}

impl Objects {
    /// Opens the repository at `path`, bare or not, at its HEAD.
    ///
    /// # Errors
    /// [`FaultKind::Gone`](common::fault::FaultKind::Gone) if there is none,
    /// [`FaultKind::Refused`](common::fault::FaultKind::Refused) if it cannot be opened, and those of
    /// [`Self::new`].
    pub fn open(path: &Path) -> Result<Self, Fault> {
        let flags = RepositoryOpenFlags::NO_SEARCH;
        let ceilings: [&Path; 0] = [];
        let repository = Repository::open_ext(path, flags, ceilings).map_err(|error| {
            let message = format!("cannot open {}: {}", path.display(), error.message());
            match (error.code(), error.class()) {
                (ErrorCode::NotFound, _) => Fault::gone(message),
                (_, ErrorClass::Repository) if has_extension(path, "partialclone") => {
                    partial_clone(path)
                }
                (_, ErrorClass::Repository) if has_extension(path, "objectformat") => {
                    answer::sha256()
                }
                _ => Fault::refused(message),
            }
        })?;
        let is_partial = is_promised(&repository);
        let commit = match repository.head() {
            Ok(head) => {
                let commit = head.peel_to_commit();
                Some(commit.map_err(|error| unreadable("HEAD", &error))?.id())
            }
            Err(error) if is_no_head(&error) => match local_refs(&repository) {
                refs if refs.is_empty() => None,
                refs => return Err(unborn_head(&repository, &refs)),
            },
            Err(error) => return Err(unreadable("HEAD", &error)),
        };
        let objects = Self::new(repository, commit.map(object_id))?;
        Ok(Self {
            partial: is_partial.then(|| path.to_owned()),
            ..objects
        })
    }

    /// Reads an open repository at `commit`; `None` if it has none.
    ///
    /// # Errors
    /// Like every method here: [`FaultKind::Transient`](common::fault::FaultKind::Transient) for an
    /// object that is missing or damaged, since the transfer may have damaged it, and
    /// [`FaultKind::Killed`](common::fault::FaultKind::Killed) if memory runs out.
    pub fn new(repository: Repository, commit: Option<ObjectId>) -> Result<Self, Fault> {
        let head = commit.map(|commit| {
            let found = repository.find_commit(oid(commit));
            let found = found.map_err(|error| unreadable(commit, &error))?;
            Ok(Head {
                commit,
                tree: object_id(found.tree_id()),
            })
        });
        let head = head.transpose()?;
        Ok(Self {
            repository,
            head,
            sink: None,
            partial: None,
        })
    }

    /// Reports all reading as progress: a large repository may be read for long before there is text.
    #[must_use]
    pub fn report_to(mut self, sink: Arc<dyn ProgressSink>) -> Self {
        self.sink = Some(sink);
        self
    }

    fn alive(&self) {
        if let Some(sink) = &self.sink {
            sink.alive();
        }
    }

    fn odb(&self) -> Result<Odb<'_>, Fault> {
        let odb = self.repository.odb();
        odb.map_err(|error| unreadable("object database", &error))
    }

    /// Classifies an object that cannot be read.
    fn unreadable(&self, what: impl fmt::Display, error: &git2::Error) -> Fault {
        match &self.partial {
            Some(path) if error.code() == ErrorCode::NotFound => partial_clone(path),
            _ => unreadable(what, error),
        }
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

    /// Returns the tree as it is: libgit2 rejects a whole tree for a name that git merely would not
    /// check out.
    fn tree(&self, tree: ObjectId) -> Result<Rc<[u8]>, Fault> {
        self.alive();
        let odb = self.odb()?;
        let header = odb.read_header(oid(tree));
        let (size, kind) = header.map_err(|error| self.unreadable(tree, &error))?;
        if kind != ObjectType::Tree {
            return Err(Fault::transient(format!("{tree} is a {kind}, not a tree")));
        }
        if size as u64 > MAX_TREE {
            return Err(Fault::too_large(format!(
                "tree {tree} has {size} bytes, more than {MAX_TREE}"
            )));
        }
        let object = odb.read(oid(tree));
        let object = object.map_err(|error| self.unreadable(tree, &error))?;
        Ok(object.data().into())
    }

    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault> {
        self.alive();
        let odb = self.odb()?;
        let size = |blob: &ObjectId| {
            let header = odb.read_header(oid(*blob));
            let (size, kind) = header.map_err(|error| self.unreadable(blob, &error))?;
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
            let object = odb.read(oid(*blob));
            let object = object.map_err(|error| self.unreadable(blob, &error))?;
            check_blob(*blob, object.kind())?;
            self.alive();
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

fn is_no_head(error: &git2::Error) -> bool {
    matches!(error.code(), ErrorCode::UnbornBranch | ErrorCode::NotFound)
}

/// Returns the branches of a repository on disk; all its refs if it has none.
fn local_refs(repository: &Repository) -> Vec<String> {
    let names = |glob: &str| -> Vec<String> {
        let references = repository.references_glob(glob);
        let references = references.into_iter().flatten().flatten();
        references
            .filter_map(|reference| reference.name().ok().map(str::to_owned))
            .collect()
    };
    match names("refs/heads/*") {
        branches if branches.is_empty() => names("refs/*"),
        branches => branches,
    }
}

fn unborn_head(repository: &Repository, refs: &[String]) -> Fault {
    let head = repository.find_reference("HEAD").ok();
    let branch = head.as_ref().and_then(|head| head.symbolic_target().ok()?);
    answer::unborn_head(branch, refs)
}

fn partial_clone(path: &Path) -> Fault {
    let path = path.display();
    Fault::gone(format!(
        "{path} is a partial clone, which lacks objects; clone it without --filter"
    ))
}

/// Whether a remote of this repository promises the objects that it lacks.
fn is_promised(repository: &Repository) -> bool {
    let Ok(config) = repository.config() else {
        return false;
    };
    let entries = config.entries(Some("remote\\..*\\.promisor"));
    let mut promised = false;
    if let Ok(entries) = entries {
        _ = entries.for_each(|entry| {
            promised |= !entry.has_value() || entry.value_bytes() == b"true";
        });
    }
    promised
}

/// Whether the configuration of a repository that cannot be opened names this extension.
fn has_extension(path: &Path, name: &str) -> bool {
    let places = [path.join(".git/config"), path.join("config")];
    let mut configs = places.iter().filter_map(|place| Config::open(place).ok());
    configs.any(|config| config.get_entry(&format!("extensions.{name}")).is_ok())
}

fn unreadable(what: impl fmt::Display, error: &git2::Error) -> Fault {
    fault(format_args!("cannot read {what}"), error)
}

/// Classifies an error of libgit2 itself. Those of the network are classified by their session; what a
/// host says never counts against this machine.
pub(super) fn fault(what: impl fmt::Display, error: &git2::Error) -> Fault {
    let message = format!("{what}: {}", error.message());
    if error.class() == ErrorClass::Net {
        return Fault::transient(message);
    }
    let no_memory = (error.class() == ErrorClass::NoMemory).then_some(Errno::NOMEM);
    let errno = system_error(error.message()).or(no_memory);
    let refusal = errno.map(|errno| disk::refusal(&message, errno));
    match (refusal, error.class()) {
        (Some(Some(refusal)), _) => refusal,
        (None, ErrorClass::Os | ErrorClass::Filesystem) => Fault::infra(message),
        // Includes a pack that was cut or damaged in transfer; another copy may be whole.
        _ => Fault::transient(message),
    }
}

/// Whether libgit2 found no room on a disk.
pub(super) fn is_no_room(error: &git2::Error) -> bool {
    let system = system_error(error.message());
    matches!(system, Some(Errno::NOSPC | Errno::DQUOT))
}

/// Returns the system's error that a message of libgit2 names, or `BADMSG` for a damaged pack.
///
/// libgit2 passes these on only as text: `errno` is overwritten before it returns, and its classes
/// depend on where it met the error, not on which it was.
fn system_error(message: &str) -> Option<Errno> {
    let known = [
        ("No space left on device", Errno::NOSPC),
        ("Disk quota exceeded", Errno::DQUOT),
        ("File too large", Errno::FBIG),
        ("Cannot allocate memory", Errno::NOMEM),
        ("Too many open files", Errno::MFILE),
        ("invalid packfile", Errno::BADMSG),
    ];
    let found = known.into_iter().find(|(text, _)| message.contains(text));
    found.map(|(_, errno)| errno)
}

fn oid(id: ObjectId) -> Oid {
    Oid::from_bytes(&id.0).expect("an object id has twenty bytes")
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
    fn a_system_error_is_told_from_a_damaged_pack() {
        use common::fault::FaultKind::{Infra, Killed, TooLarge, Transient};
        for (class, text, kind) in [
            (
                ErrorClass::Os,
                "failed to write chunk: No space left on device",
                Infra,
            ),
            (ErrorClass::Odb, "cannot write: Disk quota exceeded", Infra),
            (
                ErrorClass::Indexer,
                "cannot extend: File too large",
                TooLarge,
            ),
            (
                ErrorClass::Os,
                "failed to mmap. Could not map: Cannot allocate memory",
                Killed,
            ),
            (ErrorClass::NoMemory, "out of memory", Killed),
            (
                ErrorClass::Os,
                "failed to open: Too many open files",
                Killed,
            ),
            (
                ErrorClass::Filesystem,
                "failed to open: Permission denied",
                Infra,
            ),
            (ErrorClass::Os, "invalid packfile 'x.pack'", Transient),
            (ErrorClass::Zlib, "failed to inflate", Transient),
            (ErrorClass::Net, "the server said: not now", Transient),
            (
                ErrorClass::Net,
                "remote error: No space left on device",
                Transient,
            ),
            (
                ErrorClass::Net,
                "remote error: Cannot allocate memory",
                Transient,
            ),
        ] {
            let error = git2::Error::new(ErrorCode::GenericError, class, text);
            let fault = fault("git", &error);
            assert_eq!(fault.kind, kind, "{text}");
            assert!(fault.message.contains(text), "{fault}");
        }
    }
}
