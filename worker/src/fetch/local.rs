//! Where a repository on this machine keeps what is read of it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Longest file that is read to find out, in bytes.
const MAX_BYTES: u64 = 64 * 1024;
/// How often an object folder may borrow from another that borrows, as in libgit2 and git.
const MAX_DEPTH: usize = 5;

/// Returns what libgit2 reads of the repository at `path`: git's files and folders, not its working
/// tree. They may be elsewhere, of the repository that a worktree belongs to or that it borrows objects
/// from. Some may not exist.
pub fn places(path: &Path) -> Vec<PathBuf> {
    let dot_git = path.join(".git");
    let git = match pointer(&dot_git, b"gitdir:") {
        Some(elsewhere) => path.join(elsewhere),
        None if dot_git.is_dir() => dot_git.clone(),
        None => path.to_owned(),
    };
    let common = match pointer(&git.join("commondir"), b"") {
        Some(elsewhere) => git.join(elsewhere),
        None => git.clone(),
    };
    let mut objects = vec![common.join("objects")];
    let mut borrowed = objects.clone();
    for _ in 0..MAX_DEPTH {
        borrowed = borrowed.iter().flat_map(|from| alternates(from)).collect();
        objects.extend_from_slice(&borrowed);
    }
    let mut places = included(&common);
    // Some may be links: `git new-workdir` makes such.
    places.extend(["config", "packed-refs", "refs"].map(|part| common.join(part)));
    places.append(&mut objects);
    places.extend([dot_git, git, common]);
    places
}

/// Returns the path that follows `mark` in a file of one line.
fn pointer(file: &Path, mark: &[u8]) -> Option<PathBuf> {
    let text = read(file).ok()?;
    let path = text.strip_prefix(mark)?.trim_ascii();
    (!path.is_empty()).then(|| to_path(path))
}

/// Returns the files that the configuration in a folder includes.
fn included(folder: &Path) -> Vec<PathBuf> {
    let text = read(&folder.join("config")).unwrap_or_default();
    let value = |line: &[u8]| {
        let equals = line.iter().position(|byte| *byte == b'=')?;
        let (key, value) = line.split_at(equals);
        let value = value[1..].trim_ascii();
        let value = value.strip_prefix(b"\"").unwrap_or(value);
        let value = value.strip_suffix(b"\"").unwrap_or(value);
        let is_path = key.trim_ascii().eq_ignore_ascii_case(b"path");
        (is_path && !value.is_empty()).then(|| folder.join(to_path(value)))
    };
    text.split(|byte| *byte == b'\n')
        .filter_map(value)
        .collect()
}

/// Returns the object folders that the one at `objects` borrows from.
fn alternates(objects: &Path) -> Vec<PathBuf> {
    let text = read(&objects.join("info/alternates")).unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        .map(|line| objects.join(to_path(line)))
        .collect()
}

fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(file)?.take(MAX_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

fn to_path(bytes: &[u8]) -> PathBuf {
    std::ffi::OsString::from_vec(bytes.to_vec()).into()
}
