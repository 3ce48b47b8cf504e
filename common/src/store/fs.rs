//! The store in a directory.
//!
//! `gitingest/{owner}/{name}/summary.txt` is the text, a plain file for `grep` and `cat`. Beside it
//! `summary.meta.json` lists, newest first, the records of the last two texts: metadata, length and
//! hashes. A reader takes the record that fits the text it sees. The writer first puts the new record
//! in front and then renames the new text into place: whatever dies in between, a text has its own
//! record. Writers of one repository, in this process or another, take turns by a lock on its folder.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use rustix::fs::Access;
use serde::{Deserialize, Serialize};

use super::{
    DIGESTS, Digest, DigestMeta, DigestStore, DocumentKey, Expected, Found, Listed, MAX_TEXT_BYTES,
    PROBE_BYTES, Put, Renewal, SharedStore, Version, WITHDRAWN,
};
use crate::fault::Fault;
use crate::ids::RepoRef;
use crate::text::sha256;

/// How much of a text is read to tell it from its predecessor: its first lines name the commit.
const HEAD_BYTES: usize = 4096;
/// How often a reader looks again if a writer was so quick that text and records don't fit.
const LOOKS: u32 = 5;

const TEXT: &str = "summary.txt";
const RECORDS: &str = "summary.meta.json";

/// A [`DigestStore`] in a directory, which the first write creates.
#[derive(Clone, Debug)]
pub struct FsStore {
    root: PathBuf,
    /// Where its digests are.
    shelf: &'static str,
    /// Device and number of the root, once it was seen.
    seen: Arc<OnceLock<(u64, u64)>>,
}

/// What `summary.meta.json` holds for one text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    #[serde(flatten)]
    meta: DigestMeta,
    /// Of the text's first [`HEAD_BYTES`] bytes.
    head_sha256: String,
}

impl Record {
    fn new(meta: &DigestMeta, text: &str) -> Self {
        let text = text.as_bytes();
        Self {
            meta: DigestMeta {
                bytes: text.len() as u64,
                sha256: Some(sha256(text)),
                ..meta.clone()
            },
            head_sha256: sha256(&text[..text.len().min(HEAD_BYTES)]),
        }
    }

    fn describes(&self, text: &[u8]) -> bool {
        self.meta.sha256 == Some(sha256(text))
    }

    fn version(&self) -> Version {
        let record = serde_json::to_vec(self).expect("a record has only strings and numbers");
        Version(sha256(&record))
    }
}

impl FsStore {
    /// Opens the store in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            shelf: DIGESTS,
            seen: Arc::default(),
        }
    }

    fn shelf(&self) -> PathBuf {
        self.root.join(self.shelf)
    }

    fn folder(&self, repo: &RepoRef) -> PathBuf {
        self.shelf().join(repo.owner()).join(repo.name())
    }

    /// Runs blocking work on a thread of its own.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let (root, seen) = (self.root.clone(), Arc::clone(&self.seen));
        let work = move || {
            check_root(&root, &seen)?;
            work(&root)
        };
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|panic| Err(Fault::infra(format!("store thread: {panic}"))))
    }
}

#[async_trait]
impl DigestStore for FsStore {
    async fn head(&self, repo: &RepoRef) -> Result<Found, Fault> {
        let folder = self.folder(repo);
        self.blocking(move |_| Ok(look(&folder)?.found())).await
    }

    async fn get(&self, repo: &RepoRef) -> Result<Option<Digest>, Fault> {
        let folder = self.folder(repo);
        self.blocking(move |_| {
            for _ in 0..LOOKS {
                let Found::Stored { meta, version } = look(&folder)?.found() else {
                    return Ok(None);
                };
                let Some(text) = read_optional(&folder.join(TEXT))? else {
                    continue;
                };
                // The text may have been replaced between the two looks.
                let records = records(&folder)?;
                let same = |r: &Record| r.version() == version && r.describes(&text);
                if records.iter().any(same)
                    && let Ok(text) = String::from_utf8(text)
                {
                    return Ok(Some(Digest { text, meta }));
                }
            }
            Ok(None)
        })
        .await
    }

    async fn put(
        &self,
        repo: &RepoRef,
        digest: &Digest,
        expected: &Expected,
    ) -> Result<Put, Fault> {
        let folder = self.folder(repo);
        let record = Record::new(&digest.meta, &digest.text);
        let (text, expected) = (digest.text.clone(), expected.clone());
        self.blocking(move |_| {
            make_folder(&folder)?;
            let directory = locked(&folder)?;
            let look = look(&folder)?;
            if look.found().expected() != expected {
                return Ok(Put::Conflict);
            }
            let version = record.version();
            let records: Vec<_> = [Some(record), look.record].into_iter().flatten().collect();
            let records = serde_json::to_vec_pretty(&records).map_err(Fault::infra)?;
            // Both reach the disk before either is renamed: a full disk then leaves all as it was.
            let text = Pending::write(&folder, TEXT, text.as_bytes())?;
            let records = Pending::write(&folder, RECORDS, &records)?;
            records.put_in_place(&directory)?;
            text.put_in_place(&directory)?;
            Ok(Put::Stored(version))
        })
        .await
    }

    async fn renew(
        &self,
        repo: &RepoRef,
        meta: &DigestMeta,
        version: &Version,
    ) -> Result<Renewal, Fault> {
        let folder = self.folder(repo);
        let (meta, version) = (meta.clone(), version.clone());
        self.blocking(move |_| {
            if !folder.is_dir() {
                return Ok(Renewal::Conflict);
            }
            let directory = locked(&folder)?;
            let Some(record) = look(&folder)?.record.filter(|r| r.version() == version) else {
                return Ok(Renewal::Conflict);
            };
            // A look compares no more than length and beginning.
            let text = read_optional(&folder.join(TEXT))?;
            if !text.is_some_and(|text| record.describes(&text)) {
                return Ok(Renewal::Torn);
            }
            let record = Record {
                meta: DigestMeta {
                    bytes: record.meta.bytes,
                    sha256: record.meta.sha256.clone(),
                    ..meta
                },
                ..record
            };
            let version = record.version();
            let records = serde_json::to_vec_pretty(&[record]).map_err(Fault::infra)?;
            Pending::write(&folder, RECORDS, &records)?.put_in_place(&directory)?;
            Ok(Renewal::Renewed(version))
        })
        .await
    }

    fn list(&self, prefix: &str) -> BoxStream<'_, Result<Listed, Fault>> {
        let (shelf, prefix) = (self.shelf(), prefix.to_owned());
        let listed = self.blocking(move |_| {
            let mut listed = Vec::new();
            for owner in names(&shelf)? {
                for name in names(&shelf.join(&owner))? {
                    // Other files are not ours.
                    let Ok(repo) = RepoRef::new(&owner, &name) else {
                        continue;
                    };
                    if format!("{repo}/").starts_with(&prefix) {
                        let folder = shelf.join(&owner).join(&name);
                        listed.extend(listed_of(&folder, repo)?);
                    }
                }
            }
            Ok(listed)
        });
        stream::once(listed)
            .map_ok(|listed| stream::iter(listed.into_iter().map(Ok)))
            .try_flatten()
            .boxed()
    }

    async fn owners(&self) -> Result<Vec<String>, Fault> {
        let shelf = self.shelf();
        self.blocking(move |_| names(&shelf)).await
    }

    async fn strays(&self) -> Result<Vec<String>, Fault> {
        let (shelf, name) = (self.shelf(), self.shelf);
        self.blocking(move |_| {
            let mut strays = Vec::new();
            for owner in names(&shelf)? {
                let repositories = names(&shelf.join(&owner))?;
                if repositories.is_empty() && !shelf.join(&owner).is_dir() {
                    strays.push(format!("{name}/{owner}"));
                }
                for repository in repositories {
                    let key = format!("{name}/{owner}/{repository}");
                    if RepoRef::new(&owner, &repository).is_err() {
                        strays.push(key);
                        continue;
                    }
                    let files = names(&shelf.join(&owner).join(&repository))?;
                    let known = |file: &String| {
                        let file = file
                            .strip_prefix('.')
                            .and_then(|f| f.strip_suffix(".tmp"))
                            .unwrap_or(file);
                        file == TEXT || file == RECORDS
                    };
                    let others = files.into_iter().filter(|file| !known(file));
                    strays.extend(others.map(|file| format!("{key}/{file}")));
                }
            }
            Ok(strays)
        })
        .await
    }

    async fn remove(&self, repo: &RepoRef, version: &Version) -> Result<bool, Fault> {
        let (folder, version) = (self.folder(repo), version.clone());
        self.blocking(move |_| {
            if !folder.is_dir() {
                return Ok(false);
            }
            let directory = locked(&folder)?;
            if look(&folder)?.found().expected() != Expected::Version(version) {
                return Ok(false);
            }
            // The folder stays: another writer may be waiting for its lock.
            for name in [TEXT, RECORDS] {
                let path = folder.join(name);
                match fs::remove_file(&path) {
                    Err(e) if e.kind() != ErrorKind::NotFound => {
                        return Err(fault("remove", &path, &e));
                    }
                    _ => {}
                }
            }
            directory
                .sync_all()
                .map_err(|e| fault("sync", &folder, &e))?;
            Ok(true)
        })
        .await
    }

    fn withdrawn(&self) -> SharedStore {
        Arc::new(Self {
            shelf: WITHDRAWN,
            ..self.clone()
        })
    }

    async fn write_document(
        &self,
        key: &DocumentKey,
        content: &[u8],
        expected: Option<&Expected>,
    ) -> Result<Put, Fault> {
        let (key, content, expected) = (key.to_string(), content.to_vec(), expected.cloned());
        self.blocking(move |root| {
            let path = root.join(key);
            let folder = path.parent().expect("a document's key has folders");
            let name = path.file_name().expect("a document's key has a name");
            make_folder(folder)?;
            let directory = locked(folder)?;
            if let Some(expected) = expected {
                let now = read_up_to(&path, u64::MAX).map_err(|e| fault("read", &path, &e))?;
                let now = now.map(|(_, now)| Version(sha256(&now)));
                let now = now.map_or(Expected::Absent, Expected::Version);
                if now != expected {
                    return Ok(Put::Conflict);
                }
            }
            Pending::write(folder, &name.to_string_lossy(), &content)?.put_in_place(&directory)?;
            Ok(Put::Stored(Version(sha256(&content))))
        })
        .await
    }

    async fn read_document(&self, key: &DocumentKey) -> Result<Option<(Vec<u8>, Version)>, Fault> {
        let key = key.clone();
        self.blocking(move |root| {
            let path = root.join(key.to_string());
            let max_bytes = key.max_bytes();
            let read = read_up_to(&path, max_bytes).map_err(|e| fault("read", &path, &e))?;
            match read {
                Some((bytes, _)) if bytes > max_bytes => {
                    Err(key.too_large(&root.display().to_string()))
                }
                Some((_, content)) => {
                    let version = Version(sha256(&content));
                    Ok(Some((content, version)))
                }
                None => Ok(None),
            }
        })
        .await
    }

    async fn reachable(&self) -> Result<(), Fault> {
        self.blocking(|root| match fs::read_dir(root) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound => can_be_made(root),
            Err(e) => Err(fault("list", root, &e)),
        })
        .await
    }

    async fn probe(&self) -> Result<(), Fault> {
        let shelf = self.shelf();
        self.blocking(move |root| {
            make_folder(root)?;
            // Where digests go, if there are any: a folder may be of another disk or owner.
            let place = if shelf.is_dir() { &shelf } else { root };
            // As large as a digest may be: a disk needs room for one more. Never renamed into place:
            // dropping it removes it, and the next probe overwrites what a killed process left.
            Pending::write(place, "probe", &vec![0; PROBE_BYTES])?;
            Ok(())
        })
        .await
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn location(&self) -> String {
        self.root.display().to_string()
    }
}

/// Checks that a store that was there still is. A disk that was unmounted leaves an empty folder, or
/// none, and what is written there is lost to all readers.
fn check_root(root: &Path, seen: &OnceLock<(u64, u64)>) -> Result<(), Fault> {
    let found = match fs::metadata(root) {
        Ok(metadata) => {
            let found = (metadata.dev(), metadata.ino());
            // One in which nothing was written yet may be removed and made anew.
            if [DIGESTS, "runs"]
                .iter()
                .any(|name| root.join(name).is_dir())
            {
                seen.get_or_init(|| found);
            }
            seen.get().is_none_or(|seen| *seen == found).then_some(())
        }
        Err(e) if e.kind() == ErrorKind::NotFound => seen.get().is_none().then_some(()),
        Err(e) => return Err(fault("read", root, &e)),
    };
    found.ok_or_else(|| {
        Fault::infra(format!(
            "store: {} is not the folder that it was: is it unmounted? mount it again, or start anew",
            root.display()
        ))
    })
}

/// Opens a folder for its only writer: the lock is given back when the file is closed,
/// however that happens.
fn locked(folder: &Path) -> Result<File, Fault> {
    let directory = File::open(folder).map_err(|e| fault("open", folder, &e))?;
    directory.lock().map_err(|e| fault("lock", folder, &e))?;
    Ok(directory)
}

/// What is in a repository's folder.
struct Look {
    /// Identifies the text by its length and head; `None` without a text.
    seen: Option<String>,
    /// The record that fits the text.
    record: Option<Record>,
    /// Whether there are records, of whatever text.
    has_records: bool,
}

impl Look {
    fn found(&self) -> Found {
        match (&self.seen, &self.record) {
            (None, _) => Found::Absent,
            (Some(_), Some(record)) => Found::Stored {
                meta: record.meta.clone(),
                version: record.version(),
            },
            (Some(seen), None) => Found::Unreadable {
                torn: self.has_records,
                version: Version(format!("unreadable-{seen}")),
                why: format!("{RECORDS} has no record of this {TEXT}"),
            },
        }
    }
}

fn look(folder: &Path) -> Result<Look, Fault> {
    let path = folder.join(TEXT);
    let mut look = Look {
        seen: None,
        record: None,
        has_records: false,
    };
    for _ in 0..LOOKS {
        let Some((bytes, head)) =
            read_up_to(&path, HEAD_BYTES as u64).map_err(|e| fault("read", &path, &e))?
        else {
            return Ok(Look {
                seen: None,
                record: None,
                has_records: false,
            });
        };
        let head_sha256 = sha256(&head);
        let fits = |r: &Record| r.meta.bytes == bytes && r.head_sha256 == head_sha256;
        let records = records(folder)?;
        look.has_records = !records.is_empty();
        let mut fitting: Vec<_> = records.into_iter().filter(fits).collect();
        if fitting.len() > 1 && fitting[0].meta.sha256 != fitting[1].meta.sha256 {
            // The same length and head, yet different: only the whole text can tell.
            let whole = read_optional(&path)?.unwrap_or_default();
            fitting.retain(|r| r.describes(&whole));
        }
        look.seen = Some(format!("{bytes}-{head_sha256}"));
        if !fitting.is_empty() {
            look.record = Some(fitting.swap_remove(0));
            break;
        }
    }
    Ok(look)
}

/// Reads what a listing shows of a repository; `None` if there is nothing.
fn listed_of(folder: &Path, repo: RepoRef) -> Result<Option<Listed>, Fault> {
    let path = folder.join(TEXT);
    let metadata = match fs::metadata(&path) {
        Ok(metadata) => metadata,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(fault("read", &path, &e)),
    };
    let Expected::Version(version) = look(folder)?.found().expected() else {
        return Ok(None);
    };
    Ok(Some(Listed {
        repo,
        etag: version.0,
        modified_millis: metadata.mtime() * 1000 + metadata.mtime_nsec() / 1_000_000,
        bytes: metadata.len(),
    }))
}

/// Reads the length of a file and no more than its first `limit` bytes; `None` if it does not exist.
fn read_up_to(path: &Path, limit: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let bytes = file.metadata()?.len();
    let mut beginning = Vec::new();
    file.take(limit).read_to_end(&mut beginning)?;
    Ok(Some((bytes, beginning)))
}

/// Reads the records beside a text; none if they are absent or unreadable.
fn records(folder: &Path) -> Result<Vec<Record>, Fault> {
    let content = read_optional(&folder.join(RECORDS))?.unwrap_or_default();
    Ok(serde_json::from_slice(&content).unwrap_or_default())
}

/// Reads a file, up to the length that a text may have; `None` if it does not exist.
fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, Fault> {
    let read = read_up_to(path, MAX_TEXT_BYTES).map_err(|e| fault("read", path, &e))?;
    Ok(read.map(|(_, content)| content))
}

/// Lists the names in a folder; none if it does not exist.
fn names(folder: &Path) -> Result<Vec<String>, Fault> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(fault("list", folder, &e)),
    };
    entries
        .filter_map(|entry| match entry {
            Ok(entry) => entry.file_name().into_string().ok().map(Ok),
            Err(e) => Some(Err(fault("list", folder, &e))),
        })
        .collect()
}

/// Creates a folder and its parents so that they survive a crash.
///
/// # Errors
/// [`FaultKind::Infra`](crate::fault::FaultKind::Infra) if it cannot be created.
pub fn make_folder(folder: &Path) -> Result<(), Fault> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    make_folder(parent)?;
    match fs::create_dir(folder) {
        Ok(()) => {}
        // Another process was quicker.
        Err(e) if e.kind() == ErrorKind::AlreadyExists && folder.is_dir() => {}
        Err(e) => return Err(fault("create", folder, &e)),
    }
    let parent_file = File::open(parent).map_err(|e| fault("open", parent, &e))?;
    parent_file
        .sync_all()
        .map_err(|e| fault("sync", parent, &e))
}

/// Checks that [`make_folder`] may create a folder that does not exist.
fn can_be_made(folder: &Path) -> Result<(), Fault> {
    let above = folder.ancestors().skip(1).map(|above| {
        if above.as_os_str().is_empty() {
            Path::new(".")
        } else {
            above
        }
    });
    let parent = { above }.find(|above| above.exists());
    let parent = parent.unwrap_or(Path::new("/"));
    rustix::fs::access(parent, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|e| fault("make a folder in", parent, &e.into()))
}

/// A file written under a temporary name; removed again unless renamed into place.
struct Pending {
    from: PathBuf,
    to: PathBuf,
}

impl Pending {
    fn write(folder: &Path, name: &str, content: &[u8]) -> Result<Self, Fault> {
        let pending = Self {
            // Always the same, so that the next writer overwrites what a crash left behind.
            from: folder.join(format!(".{name}.tmp")),
            to: folder.join(name),
        };
        let write = || {
            let mut file = File::create(&pending.from)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(|e| fault("write", &pending.from, &e))?;
        Ok(pending)
    }

    fn put_in_place(self, directory: &File) -> Result<(), Fault> {
        fs::rename(&self.from, &self.to).map_err(|e| fault("rename into", &self.to, &e))?;
        directory
            .sync_all()
            .map_err(|e| fault("sync the folder of", &self.to, &e))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Gone already if it was renamed into place.
        fs::remove_file(&self.from).ok();
    }
}

/// Names the file and the remedy.
fn fault(verb: &str, path: &Path, error: &io::Error) -> Fault {
    let remedy = match error.kind() {
        ErrorKind::PermissionDenied => {
            "; give this user the right to, or choose another folder with --store"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; make room, or choose another folder with --store"
        }
        ErrorKind::ReadOnlyFilesystem | ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            "; choose another folder with --store"
        }
        _ => "",
    };
    Fault::infra(format!(
        "store: cannot {verb} {}: {error}{remedy}",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_that_was_unmounted_is_no_store() {
        let above = tempfile::tempdir().unwrap();
        let (root, elsewhere) = (above.path().join("root"), above.path().join("elsewhere"));
        let store = FsStore::new(&root);
        store
            .put_document(&DocumentKey::Latest, b"{}")
            .await
            .unwrap();
        store.reachable().await.unwrap();
        fs::rename(&root, &elsewhere).unwrap();
        let gone = store.put_document(&DocumentKey::Latest, b"{}").await;
        assert!(gone.unwrap_err().message.contains("unmounted"));
        assert!(!root.exists(), "it is not made anew");
        fs::create_dir(&root).unwrap();
        let empty = store.probe().await;
        assert!(empty.unwrap_err().message.contains("unmounted"));
        assert_eq!(names(&root).unwrap(), [""; 0]);
        fs::remove_dir(&root).unwrap();
        fs::rename(&elsewhere, &root).unwrap();
        store
            .put_document(&DocumentKey::Latest, b"{}")
            .await
            .unwrap();
    }

    /// A file that nobody removes would take the room of a digest, and another after each crash.
    #[tokio::test]
    async fn a_probe_takes_away_what_one_that_was_killed_left() {
        let root = tempfile::tempdir().unwrap();
        let left = root.path().join(".probe.tmp");
        fs::write(&left, vec![0; 700_000]).unwrap();
        FsStore::new(root.path()).probe().await.unwrap();
        let names = names(root.path()).unwrap();
        assert!(names.is_empty(), "{names:?}");
    }
}
