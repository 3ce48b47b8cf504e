//! Git repositories with something odd about them, built with the git command line.
//!
//! Each is a bare repository `ROOT/{owner}/{name}.git` with one commit on `main`. Author and date are
//! fixed: the same contents give the same commit everywhere. The machine's configuration is not read.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::packs::{self, Mode};

/// The time of every commit, in seconds since 1970.
const COMMIT_TIME: u64 = 1_700_000_000;

/// Builds a repository with one commit.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    /// Input of git fast-import.
    changes: Vec<u8>,
}

impl Builder {
    /// Starts with an empty commit.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file. `path` may hold any bytes but NUL.
    #[must_use]
    pub fn file(self, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        self.blob("100644", path.as_ref(), content.as_ref())
    }

    /// Adds an executable file.
    #[must_use]
    pub fn executable(self, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        self.blob("100755", path.as_ref(), content.as_ref())
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.blob("120000", path.as_ref(), target.as_ref())
    }

    /// Adds a submodule at a commit that does not exist.
    #[must_use]
    pub fn submodule(mut self, path: impl AsRef<[u8]>) -> Self {
        let commit = "1".repeat(40);
        self.changes
            .extend_from_slice(format!("M 160000 {commit} ").as_bytes());
        self.path(path.as_ref());
        self
    }

    fn blob(mut self, mode: &str, path: &[u8], content: &[u8]) -> Self {
        self.changes
            .extend_from_slice(format!("M {mode} inline ").as_bytes());
        self.path(path);
        self.changes
            .extend_from_slice(format!("data {}\n", content.len()).as_bytes());
        self.changes.extend_from_slice(content);
        self.changes.push(b'\n');
        self
    }

    /// Quotes every byte but letters and digits in octal, which fast-import always accepts.
    fn path(&mut self, path: &[u8]) {
        self.changes.push(b'"');
        for byte in path {
            if byte.is_ascii_alphanumeric() {
                self.changes.push(*byte);
            } else {
                self.changes
                    .extend_from_slice(format!("\\{byte:03o}").as_bytes());
            }
        }
        self.changes.extend_from_slice(b"\"\n");
    }

    /// Writes the repository and returns its path.
    ///
    /// # Panics
    /// If git is missing or fails.
    pub fn build(&self, root: &Path, owner: &str, name: &str) -> PathBuf {
        let path = empty(root, owner, name);
        let mut stream = format!(
            "commit refs/heads/main\n\
             committer Fixture <fixture@example.org> {COMMIT_TIME} +0000\n\
             data 7\nFixture\n"
        )
        .into_bytes();
        stream.extend_from_slice(&self.changes);
        stream.extend_from_slice(b"\ndone\n");
        git(&path, ["fast-import", "--quiet", "--done"], &stream);
        path
    }
}

/// Makes a repository without commits.
///
/// # Panics
/// If git is missing or fails.
pub fn empty(root: &Path, owner: &str, name: &str) -> PathBuf {
    let path = root.join(owner).join(format!("{name}.git"));
    fs::create_dir_all(&path).expect("the fixtures' directory can be written");
    git(
        &path,
        ["init", "--quiet", "--bare", "--initial-branch=main"],
        b"",
    );
    path
}

/// A repository of raw trees, which may hold names that git would refuse.
#[derive(Debug)]
pub struct Raw {
    path: PathBuf,
}

impl Raw {
    /// Makes an empty repository to write objects into.
    ///
    /// # Panics
    /// Like all methods, if git is missing or fails.
    pub fn new(root: &Path, owner: &str, name: &str) -> Self {
        Self {
            path: empty(root, owner, name),
        }
    }

    /// Writes a blob and returns its id.
    pub fn blob(&self, content: &[u8]) -> String {
        git(&self.path, ["hash-object", "-w", "--stdin"], content)
    }

    /// Writes a tree of exactly these entries, in this order, and returns its id.
    pub fn tree<N: AsRef<[u8]>>(&self, entries: &[(Mode, N, &str)]) -> String {
        let entries = entries.iter().map(|(mode, name, id)| {
            let byte = |at| u8::from_str_radix(&id[2 * at..][..2], 16);
            let id = std::array::from_fn(|at| byte(at).expect("a name is hexadecimal"));
            (*mode, name, id)
        });
        let tree = packs::tree(&entries.collect::<Vec<_>>());
        let arguments = ["hash-object", "--literally", "-t", "tree", "-w", "--stdin"];
        git(&self.path, arguments, &tree)
    }

    /// Commits a tree to `main` and returns the repository's path.
    pub fn commit(self, tree: &str) -> PathBuf {
        let commit = git(&self.path, ["commit-tree", "-m", "Fixture", tree], b"");
        git(&self.path, ["update-ref", "refs/heads/main", &commit], b"");
        self.path
    }
}

/// Makes twelve objects that expand to `10^10` paths: each of ten trees holds the next one ten times,
/// the last holds `leaf`.
///
/// # Panics
/// If git is missing or fails.
pub fn git_bomb(root: &Path, owner: &str, name: &str, leaf: BombLeaf) -> PathBuf {
    let raw = Raw::new(root, owner, name);
    let names: Vec<String> = (0..10).map(|i| format!("d{i}")).collect();
    let mut tree = match leaf {
        BombLeaf::Nothing => raw.tree::<&str>(&[]),
        BombLeaf::File(file, content) => {
            let blob = raw.blob(content);
            raw.tree(&[(Mode::File, file, &blob)])
        }
    };
    for _ in 0..10 {
        let entries: Vec<_> = names
            .iter()
            .map(|name| (Mode::Directory, name, tree.as_str()))
            .collect();
        tree = raw.tree(&entries);
    }
    raw.commit(&tree)
}

/// The end of every path of a [`git_bomb`].
#[derive(Clone, Copy, Debug)]
pub enum BombLeaf {
    /// An empty tree.
    Nothing,
    /// A file with this name and content.
    File(&'static str, &'static [u8]),
}

/// Makes a file below `depth` nested directories.
///
/// # Panics
/// If git is missing or fails.
pub fn nested_directories(root: &Path, owner: &str, name: &str, depth: usize) -> PathBuf {
    let mut path = "d/".repeat(depth);
    path.push_str("file.txt");
    // With fast-import, which does not recurse like other commands.
    Builder::new()
        .file("top.txt", "top\n")
        .file(path, "deep\n")
        .build(root, owner, name)
}

/// Makes `count` small files of the same content in one directory.
///
/// # Panics
/// If git is missing or fails.
pub fn many_files(root: &Path, owner: &str, name: &str, count: usize) -> PathBuf {
    let raw = Raw::new(root, owner, name);
    let blob = raw.blob(b"x\n");
    let names: Vec<String> = (0..count).map(|i| format!("f{i:06}.txt")).collect();
    let entries: Vec<_> = names
        .iter()
        .map(|name| (Mode::File, name, blob.as_str()))
        .collect();
    let tree = raw.tree(&entries);
    raw.commit(&tree)
}

/// Makes names that git refuses to check out or that lead out of a checkout, odd names that are allowed,
/// and a link to `/etc/passwd`.
///
/// # Panics
/// If git is missing or fails.
pub fn hostile_names(root: &Path, owner: &str, name: &str) -> PathBuf {
    let raw = Raw::new(root, owner, name);
    let blob = raw.blob(b"text\n");
    let link = raw.blob(b"/etc/passwd");
    let empty_link = raw.blob(b"");
    let long_link = raw.blob(&[b'x'; 5000]);
    let long = [b'l'; 256];
    let below = raw.tree(&[(Mode::File, "inside", &blob)]);
    let tree = raw.tree(&[
        (Mode::File, &b"../escape"[..], &blob),
        (Mode::File, b"", &blob),
        (Mode::File, b".", &blob),
        (Mode::File, b"..", &blob),
        (Mode::File, b".GIT", &blob),
        (Mode::File, b"/etc/cron.d/x", &blob),
        (Mode::File, b"a\nb", &blob),
        (Mode::File, b"bell\x07\x1b[31m", &blob),
        (Mode::File, b"latin-\xe9", &blob),
        (Mode::File, b"twice", &blob),
        (Mode::File, b"twice", &link),
        (Mode::File, &long, &blob),
        (Mode::Symlink, b"empty-link", &empty_link),
        (Mode::Symlink, b"long-link", &long_link),
        (Mode::Symlink, b"passwd", &link),
        (Mode::Directory, b"..", &below),
        (Mode::Directory, b".git", &below),
        (Mode::Directory, b"twice", &below),
        (Mode::Directory, b"x/y", &below),
        (Mode::Directory, b"z", &below),
    ]);
    raw.commit(&tree)
}

/// Runs git in `directory` without the machine's configuration, and returns its output.
///
/// # Panics
/// If git is missing or fails.
fn git<S: AsRef<OsStr>>(
    directory: &Path,
    arguments: impl IntoIterator<Item = S>,
    input: &[u8],
) -> String {
    let mut command = Command::new("git");
    command
        .current_dir(directory)
        .args(arguments)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null");
    for role in ["AUTHOR", "COMMITTER"] {
        command
            .env(format!("GIT_{role}_NAME"), "Fixture")
            .env(format!("GIT_{role}_EMAIL"), "fixture@example.org")
            .env(format!("GIT_{role}_DATE"), format!("{COMMIT_TIME} +0000"));
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("git can be started; install it with the system's package manager");
    // Every command here reads all its input before it prints.
    child
        .stdin
        .take()
        .expect("stdin is a pipe")
        .write_all(input)
        .expect("git reads its input");
    let output = child.wait_with_output().expect("git ends");
    assert!(
        output.status.success(),
        "git failed in {}",
        directory.display()
    );
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}
