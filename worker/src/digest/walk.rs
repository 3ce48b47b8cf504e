//! Which files a digest shows, in the order in which it shows them.
//!
//! Bounded in time and memory whatever the trees hold: a budget of tree entries and of matching
//! work, no recursion, and a cache of trees of fixed size, so that a tree that is its own
//! grandchildren a billion times over is read once.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use common::fault::Fault;
use common::text::thousands;

use super::DigestLimits;
use super::ignore::rules::{ActiveRules, RuleMatch, Rules};
use crate::source::{EntryKind, ObjectId, Source, TreeEntry};

/// Most tree entries that one walk looks at, by path: a tree seen twice counts twice.
pub(super) const MAX_ENTRIES: u64 = 1_000_000;
/// Most elementary steps of matching names against patterns.
const MAX_STEPS: u64 = 200_000_000;
/// Most entries of trees that are kept for when the tree comes up again.
const MAX_CACHED_ENTRIES: usize = 250_000;
/// Longest name that a file system takes, in bytes.
const NAME_MAX: usize = 255;
/// Longest target that a symbolic link can have, in bytes.
const TARGET_MAX: u64 = 4095;
/// How many sizes are asked for at once.
const SIZES_BATCH: usize = 1024;

/// What the digest shows: directories, each followed by what is in it. The first is the root.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) nodes: Vec<Node>,
    /// Files and symbolic links.
    pub(super) files: u64,
    /// A sentence for each limit that left something out.
    pub(super) notices: Vec<String>,
}

/// A line of the tree.
#[derive(Debug)]
pub(super) struct Node {
    /// The place of its directory among the nodes; the root's own for the root.
    pub(super) parent: usize,
    pub(super) name: String,
    pub(super) kind: NodeKind,
}

/// What a [`Node`] is.
#[derive(Debug)]
pub(super) enum NodeKind {
    Directory,
    File {
        blob: ObjectId,
        size: u64,
    },
    /// The last component of the link's target is known once the tree's text is written.
    Symlink {
        blob: ObjectId,
        target: Option<String>,
    },
}

impl Listing {
    /// A root with nothing in it.
    pub(super) fn empty(root_name: &str) -> Self {
        Self {
            nodes: vec![Node {
                parent: 0,
                name: root_name.to_owned(),
                kind: NodeKind::Directory,
            }],
            files: 0,
            notices: Vec::new(),
        }
    }

    /// The path of a node from the root, with slashes.
    pub(super) fn path(&self, mut node: usize) -> String {
        let mut names = Vec::new();
        while node != 0 {
            names.push(self.nodes[node].name.as_str());
            node = self.nodes[node].parent;
        }
        names.reverse();
        names.join("/")
    }
}

/// The trees of a source, each sorted as the digest shows it.
pub(super) struct Trees<'a> {
    source: &'a dyn Source,
    cache: HashMap<ObjectId, Rc<[CheckoutEntry]>>,
    cached: usize,
}

/// An entry of a tree that a checkout could write.
#[derive(Debug)]
pub(super) struct CheckoutEntry {
    /// With U+FFFD for bytes that are not UTF-8.
    pub(super) name: String,
    pub(super) kind: EntryKind,
    pub(super) id: ObjectId,
}

impl<'a> Trees<'a> {
    pub(super) fn new(source: &'a dyn Source) -> Self {
        Self {
            source,
            cache: HashMap::new(),
            cached: 0,
        }
    }

    /// The entries of `tree`, in output order.
    pub(super) fn get(&mut self, tree: ObjectId) -> Result<Rc<[CheckoutEntry]>, Fault> {
        if let Some(entries) = self.cache.get(&tree) {
            return Ok(Rc::clone(entries));
        }
        let entries: Rc<[CheckoutEntry]> = sorted(self.source.entries(tree)?).into();
        // An empty tree takes room in the cache, too.
        let weight = entries.len() + 1;
        if self.cached + weight <= MAX_CACHED_ENTRIES {
            self.cached += weight;
            self.cache.insert(tree, Rc::clone(&entries));
        }
        Ok(entries)
    }
}

/// Drops what a checkout could not write and sorts the rest.
fn sorted(mut entries: Vec<TreeEntry>) -> Vec<CheckoutEntry> {
    let mut seen = HashSet::with_capacity(entries.len());
    let kept: Vec<bool> = entries
        .iter()
        .map(|entry| usable(&entry.name) && seen.insert(entry.name.as_slice()))
        .collect();
    let mut kept = kept.into_iter();
    entries.retain(|_| kept.next() == Some(true));
    entries.sort_by_cached_key(|entry| {
        let lower = String::from_utf8_lossy(&entry.name).to_lowercase();
        (group(entry.kind, &lower), lower, entry.name.clone())
    });
    let named = entries.into_iter().map(|entry| CheckoutEntry {
        name: String::from_utf8(entry.name)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()),
        kind: entry.kind,
        id: entry.id,
    });
    named.collect()
}

/// Whether git would check out an entry of this name.
fn usable(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= NAME_MAX
        && !name.contains(&b'/')
        && !name.eq_ignore_ascii_case(b".git")
}

/// READMEs, files, dot-files, directories and links, dot-directories and dot-links.
fn group(kind: EntryKind, lower: &str) -> u8 {
    let dot = lower.starts_with('.');
    match kind {
        EntryKind::File if lower == "readme" || lower.starts_with("readme.") => 0,
        EntryKind::File if !dot => 1,
        EntryKind::File => 2,
        EntryKind::Symlink | EntryKind::Directory | EntryKind::Submodule if !dot => 3,
        EntryKind::Symlink | EntryKind::Directory | EntryKind::Submodule => 4,
    }
}

/// Lists what is below `tree`.
pub(super) fn walk(
    source: &dyn Source,
    trees: &mut Trees<'_>,
    tree: ObjectId,
    root_name: &str,
    rules: &Rules,
    limits: &DigestLimits,
) -> Result<Listing, Fault> {
    let walk = Walk {
        source,
        trees,
        rules,
        limits,
        nodes: Listing::empty(root_name).nodes,
        path: String::new(),
        files: 0,
        bytes: 0,
        visited: 0,
        steps: 0,
        reached: LimitsReached::default(),
    };
    walk.run(tree)
}

struct Walk<'a, 't> {
    source: &'a dyn Source,
    trees: &'a mut Trees<'t>,
    rules: &'a Rules,
    limits: &'a DigestLimits,
    nodes: Vec<Node>,
    /// Of the directory that the walk is in.
    path: String,
    files: u64,
    bytes: u64,
    visited: u64,
    steps: u64,
    reached: LimitsReached,
}

/// Which limits left something out.
#[derive(Default)]
struct LimitsReached {
    files: bool,
    bytes: bool,
    work: bool,
}

/// A directory that the walk is in.
struct OpenDirectory<'a> {
    node: usize,
    depth: usize,
    path_len: usize,
    place: ActiveRules<'a>,
    entries: Rc<[CheckoutEntry]>,
    children: Vec<Child>,
    next: usize,
    /// Up to where the sizes of `children` are known.
    sized: usize,
}

/// An entry that is not ignored.
struct Child {
    entry: usize,
    verdict: RuleMatch,
    size: u64,
}

impl<'a> Walk<'a, '_> {
    fn run(mut self, tree: ObjectId) -> Result<Listing, Fault> {
        let root = self.enter(0, 0, tree, self.rules.root())?;
        let mut frames = vec![root];
        while let Some(frame) = frames.last_mut() {
            if self.reached.files {
                break;
            }
            if frame.next == frame.children.len() {
                let node = frame.node;
                frames.pop();
                self.leave(node);
                self.path
                    .truncate(frames.last().map_or(0, |frame| frame.path_len));
                continue;
            }
            if let Some(deeper) = self.step(frame)? {
                frames.push(deeper);
            }
        }
        while let Some(frame) = frames.pop() {
            self.leave(frame.node);
        }
        let notices = self.notices();
        Ok(Listing {
            nodes: self.nodes,
            files: self.files,
            notices,
        })
    }

    /// Judges the entries of a directory, whose path is in `self.path`.
    fn enter(
        &mut self,
        node: usize,
        depth: usize,
        tree: ObjectId,
        place: ActiveRules<'a>,
    ) -> Result<OpenDirectory<'a>, Fault> {
        let mut children = Vec::new();
        let path_len = self.path.len();
        let exhausted = self.visited >= MAX_ENTRIES || self.steps >= MAX_STEPS;
        let entries: Rc<[CheckoutEntry]> = if exhausted {
            Rc::default()
        } else {
            self.trees.get(tree)?
        };
        self.reached.work |= exhausted;
        if path_len > 0 {
            self.path.push('/');
        }
        let prefix = self.path.len();
        for (i, entry) in entries.iter().enumerate() {
            if self.visited >= MAX_ENTRIES || self.steps >= MAX_STEPS {
                self.reached.work = true;
                break;
            }
            self.visited += 1;
            self.path.push_str(&entry.name);
            let verdict = self
                .rules
                .judge(&place, &self.path, &entry.name, &mut self.steps);
            self.path.truncate(prefix);
            if !verdict.ignored {
                children.push(Child {
                    entry: i,
                    verdict,
                    size: 0,
                });
            }
        }
        self.path.truncate(path_len);
        Ok(OpenDirectory {
            node,
            depth,
            path_len,
            place,
            entries,
            children,
            next: 0,
            sized: 0,
        })
    }

    /// Takes the next child of `frame`; gives the directory to go on in, if it is one.
    fn step(&mut self, frame: &mut OpenDirectory<'a>) -> Result<Option<OpenDirectory<'a>>, Fault> {
        let at = frame.next;
        frame.next += 1;
        let entry = &frame.entries[frame.children[at].entry];
        match entry.kind {
            EntryKind::Submodule => {}
            EntryKind::Directory => {
                let Child { verdict, .. } = frame.children[at];
                if verdict.pruned || frame.depth + 1 > self.limits.max_depth {
                    return Ok(None);
                }
                let node = self.push(frame.node, &entry.name, NodeKind::Directory);
                if frame.path_len > 0 {
                    self.path.push('/');
                }
                self.path.push_str(&entry.name);
                let place = frame
                    .place
                    .child(self.rules, &self.path, &entry.name, verdict);
                return self.enter(node, frame.depth + 1, entry.id, place).map(Some);
            }
            EntryKind::File | EntryKind::Symlink => {
                let blob = entry.id;
                self.measure(frame, at)?;
                let entry = &frame.entries[frame.children[at].entry];
                let size = frame.children[at].size;
                if entry.kind == EntryKind::File {
                    if size <= self.limits.max_file_bytes && self.admits(size) {
                        self.push(frame.node, &entry.name, NodeKind::File { blob, size });
                    }
                } else if (1..=TARGET_MAX).contains(&size) && self.admits(0) {
                    let target = None;
                    self.push(frame.node, &entry.name, NodeKind::Symlink { blob, target });
                }
            }
        }
        Ok(None)
    }

    /// Makes the size of the child at `at` known, and those of the next ones with it.
    fn measure(&self, frame: &mut OpenDirectory<'_>, at: usize) -> Result<(), Fault> {
        if at < frame.sized {
            return Ok(());
        }
        let mut wanted = Vec::new();
        let mut ids = Vec::new();
        for (i, child) in frame.children.iter().enumerate().skip(at) {
            let entry = &frame.entries[child.entry];
            if matches!(entry.kind, EntryKind::File | EntryKind::Symlink) {
                wanted.push(i);
                ids.push(entry.id);
            }
            frame.sized = i + 1;
            if ids.len() == SIZES_BATCH {
                break;
            }
        }
        for (i, size) in wanted.into_iter().zip(self.source.sizes(&ids)?) {
            frame.children[i].size = size;
        }
        Ok(())
    }

    /// Counts a file of `size` bytes in, if the limits allow it.
    fn admits(&mut self, size: u64) -> bool {
        if self.files >= self.limits.max_files {
            self.reached.files = true;
            return false;
        }
        if self.bytes + size > self.limits.max_total_bytes {
            self.reached.bytes = true;
            return false;
        }
        self.files += 1;
        self.bytes += size;
        true
    }

    fn push(&mut self, parent: usize, name: &str, kind: NodeKind) -> usize {
        self.nodes.push(Node {
            parent,
            name: name.to_owned(),
            kind,
        });
        self.nodes.len() - 1
    }

    /// Takes a directory back that turned out to hold nothing.
    fn leave(&mut self, node: usize) {
        if node != 0 && self.nodes.len() == node + 1 {
            self.nodes.pop();
        }
    }

    fn notices(&self) -> Vec<String> {
        let mut notices = Vec::new();
        if self.reached.files {
            notices.push(format!(
                "Limit reached: {} files; the rest of the repository is left out",
                thousands(self.limits.max_files)
            ));
        }
        if self.reached.bytes {
            notices.push(format!(
                "Limit reached: {} bytes of files; files that would exceed it are left out",
                thousands(self.limits.max_total_bytes)
            ));
        }
        if self.reached.work {
            notices.push(format!(
                "Limit reached: {} tree entries; the rest of the repository is left out",
                thousands(self.visited)
            ));
        }
        notices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: EntryKind, name: &str) -> TreeEntry {
        TreeEntry {
            name: name.as_bytes().to_vec(),
            kind,
            id: ObjectId([0; 20]),
        }
    }

    #[test]
    fn files_come_before_directories_and_links_and_dots_after_the_rest_of_their_kind() {
        use EntryKind::{Directory, File, Submodule, Symlink};
        let entries = vec![
            entry(File, ".a"),
            entry(File, "B.txt"),
            entry(File, "_u.txt"),
            entry(File, "a.txt"),
            entry(File, "ReadMe"),
            entry(File, "README.md"),
            entry(File, "readmes"),
            entry(Symlink, "README.link"),
            entry(Symlink, ".link"),
            entry(Directory, "Dir"),
            entry(Directory, ".dir"),
            entry(Submodule, "module"),
        ];
        let names: Vec<String> = sorted(entries).into_iter().map(|e| e.name).collect();
        assert_eq!(
            names,
            [
                "ReadMe",
                "README.md",
                "_u.txt",
                "a.txt",
                "B.txt",
                "readmes",
                ".a",
                "Dir",
                "module",
                "README.link",
                ".dir",
                ".link",
            ]
        );
    }

    #[test]
    fn names_that_only_case_tells_apart_are_sorted_raw() {
        let entries = ["b", "B", "a"].map(|name| entry(EntryKind::File, name));
        let names: Vec<String> = sorted(entries.to_vec())
            .into_iter()
            .map(|e| e.name)
            .collect();
        assert_eq!(names, ["a", "B", "b"]);
    }

    #[test]
    fn what_a_checkout_would_refuse_is_dropped() {
        let long = "x".repeat(256);
        for name in ["", ".", "..", ".git", ".GIT", "a/b", "/", long.as_str()] {
            assert!(!usable(name.as_bytes()), "{name:?}");
        }
        let twice = vec![
            entry(EntryKind::File, "a"),
            entry(EntryKind::Directory, "a"),
        ];
        assert_eq!(sorted(twice).len(), 1);
    }
}
