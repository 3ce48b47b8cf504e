//! The files that a digest shows, in its order.
//!
//! Time and memory are bounded whatever the trees hold: a budget of tree entries and of matching work,
//! no recursion, and a cache of trees of fixed size, for trees that contain another a billion times.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::vec::IntoIter;

use common::fault::Fault;
use common::text::thousands;

use super::DigestLimits;
use super::ignore::rules::{ActiveRules, RuleMatch, Rules};
use crate::source::{EntryKind, ObjectId, Source, TreeEntry};

/// Most tree entries that one walk visits; a tree visited twice counts twice.
pub(super) const MAX_ENTRIES: u64 = 1_000_000;
/// Most elementary steps of matching names against patterns.
const MAX_STEPS: u64 = 200_000_000;
/// Most entries in the cache of trees.
const MAX_CACHED_ENTRIES: usize = 250_000;
/// Longest name in a file system, in bytes.
const NAME_MAX: usize = 255;
/// Longest target of a symbolic link, in bytes.
pub(super) const TARGET_MAX: u64 = 4095;
/// Sizes that are read at once.
const SIZES_BATCH: usize = 1024;

/// What the digest shows: directories, each followed by its contents. The first is the root.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) nodes: Vec<Node>,
    /// Files and symbolic links.
    pub(super) files: u64,
    /// A sentence for each limit that was reached.
    pub(super) notices: Vec<String>,
}

/// A line of the tree.
#[derive(Debug)]
pub(super) struct Node {
    /// The index of its directory among the nodes; the root's own for the root.
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
    /// `target` is the last component of the link's target; read when the tree is rendered.
    Symlink {
        blob: ObjectId,
        target: Option<String>,
    },
}

impl Listing {
    /// Returns an empty root.
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

    /// Returns a node's path from the root.
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

/// The trees of a source, each in the digest's order.
pub(super) struct Trees<'a> {
    source: &'a dyn Source,
    cache: HashMap<ObjectId, Rc<[CheckoutEntry]>>,
    cached: usize,
}

/// An entry of a tree that git would check out.
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

    /// Returns the entries of `tree`, in the digest's order.
    pub(super) fn get(&mut self, tree: ObjectId) -> Result<Rc<[CheckoutEntry]>, Fault> {
        if let Some(entries) = self.cache.get(&tree) {
            return Ok(Rc::clone(entries));
        }
        let entries: Rc<[CheckoutEntry]> = sorted(self.source.entries(tree)?).into();
        // An empty tree takes room in the cache too.
        let weight = entries.len() + 1;
        if self.cached + weight <= MAX_CACHED_ENTRIES {
            self.cached += weight;
            self.cache.insert(tree, Rc::clone(&entries));
        }
        Ok(entries)
    }
}

/// Drops what git would not check out, and sorts the rest.
fn sorted(entries: Vec<TreeEntry>) -> Vec<CheckoutEntry> {
    let mut seen = HashSet::with_capacity(entries.len());
    let kept = entries.iter().map(|entry| {
        let name = entry.name.as_slice();
        usable(name) && seen.insert(name)
    });
    let kept: Vec<bool> = kept.collect();
    drop(seen);
    // A tree may have a million entries: no name is kept twice, unless it has capital letters.
    let mut keyed = Vec::with_capacity(entries.len());
    for (entry, _) in entries.into_iter().zip(kept).filter(|(_, kept)| *kept) {
        let lower = String::from_utf8_lossy(&entry.name).to_lowercase();
        let group = group(entry.kind, &lower);
        let lower = (lower.as_bytes() != entry.name).then_some(lower);
        keyed.push((group, lower, entry));
    }
    keyed.sort_unstable_by(|(group, lower, entry), (other_group, other_lower, other)| {
        fn text<'a>(lower: &'a Option<String>, entry: &'a TreeEntry) -> &'a [u8] {
            lower
                .as_ref()
                .map_or(entry.name.as_slice(), String::as_bytes)
        }
        let by_group = group.cmp(other_group);
        let by_text = || text(lower, entry).cmp(text(other_lower, other));
        by_group
            .then_with(by_text)
            .then_with(|| entry.name.cmp(&other.name))
    });
    let named = keyed.into_iter().map(|(_, _, entry)| CheckoutEntry {
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
    let dot = u8::from(lower.starts_with('.'));
    match kind {
        EntryKind::File if lower == "readme" || lower.starts_with("readme.") => 0,
        EntryKind::File => 1 + dot,
        EntryKind::Symlink | EntryKind::Directory | EntryKind::Submodule => 3 + dot,
    }
}

/// Lists what the digest shows of `tree`.
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
        listing: Listing::empty(root_name),
        path: String::new(),
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
    listing: Listing,
    /// The path of the innermost open directory.
    path: String,
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
    path_len: usize,
    rules: ActiveRules<'a>,
    entries: Rc<[CheckoutEntry]>,
    /// The entries still to be taken.
    children: IntoIter<Child>,
    /// The sizes of the next blobs among them.
    sizes: IntoIter<u64>,
}

/// An entry that is not ignored.
struct Child {
    entry: usize,
    verdict: RuleMatch,
}

impl<'a> Walk<'a, '_> {
    fn run(mut self, tree: ObjectId) -> Result<Listing, Fault> {
        let mut open = vec![self.enter(0, tree, self.rules.root())?];
        while !self.reached.files {
            let depth = open.len();
            let Some(directory) = open.last_mut() else {
                break;
            };
            if let Some(child) = directory.children.next() {
                let deeper = self.take(directory, &child, depth)?;
                open.extend(deeper);
            } else {
                self.leave(directory.node);
                open.pop();
                self.path
                    .truncate(open.last().map_or(0, |parent| parent.path_len));
            }
        }
        for directory in open.iter().rev() {
            self.leave(directory.node);
        }
        self.listing.notices = self.notices();
        Ok(self.listing)
    }

    /// Judges the entries of the directory at `self.path`.
    fn enter(
        &mut self,
        node: usize,
        tree: ObjectId,
        rules: ActiveRules<'a>,
    ) -> Result<OpenDirectory<'a>, Fault> {
        let entries = match self.is_exhausted() {
            true => Rc::default(),
            false => self.trees.get(tree)?,
        };
        let mut children = Vec::new();
        let path_len = self.path.len();
        if path_len > 0 {
            self.path.push('/');
        }
        let prefix = self.path.len();
        for (i, entry) in entries.iter().enumerate() {
            if self.is_exhausted() {
                break;
            }
            self.visited += 1;
            self.path.push_str(&entry.name);
            let verdict = self
                .rules
                .judge(&rules, &self.path, &entry.name, &mut self.steps);
            self.path.truncate(prefix);
            if !verdict.ignored {
                children.push(Child { entry: i, verdict });
            }
        }
        self.path.truncate(path_len);
        Ok(OpenDirectory {
            node,
            path_len,
            rules,
            entries,
            children: children.into_iter(),
            sizes: Vec::new().into_iter(),
        })
    }

    fn is_exhausted(&mut self) -> bool {
        self.reached.work |= self.visited >= MAX_ENTRIES || self.steps >= MAX_STEPS;
        self.reached.work
    }

    /// Takes a child of `open` into the listing. Returns it if it is a directory to go on in;
    /// `depth` is its depth.
    fn take(
        &mut self,
        open: &mut OpenDirectory<'a>,
        child: &Child,
        depth: usize,
    ) -> Result<Option<OpenDirectory<'a>>, Fault> {
        let entries = Rc::clone(&open.entries);
        let entry = &entries[child.entry];
        let blob = entry.id;
        match entry.kind {
            EntryKind::Submodule => {}
            EntryKind::Directory if child.verdict.pruned || depth > self.limits.max_depth => {}
            EntryKind::Directory => {
                let node = self.push(open.node, &entry.name, NodeKind::Directory);
                if open.path_len > 0 {
                    self.path.push('/');
                }
                self.path.push_str(&entry.name);
                let rules = open
                    .rules
                    .child(self.rules, &self.path, &entry.name, child.verdict);
                return self.enter(node, entry.id, rules).map(Some);
            }
            EntryKind::File => {
                let size = self.size(open, blob)?;
                if size <= self.limits.max_file_bytes && self.admits(size) {
                    self.push(open.node, &entry.name, NodeKind::File { blob, size });
                }
            }
            EntryKind::Symlink => {
                let size = self.size(open, blob)?;
                if (1..=TARGET_MAX).contains(&size) && self.admits(0) {
                    let target = None;
                    self.push(open.node, &entry.name, NodeKind::Symlink { blob, target });
                }
            }
        }
        Ok(None)
    }

    /// Returns the size of the next blob, and reads those of the following ones with it.
    fn size(&self, open: &mut OpenDirectory<'_>, blob: ObjectId) -> Result<u64, Fault> {
        if let Some(size) = open.sizes.next() {
            return Ok(size);
        }
        let following = open.children.as_slice().iter();
        let following = following.map(|child| &open.entries[child.entry]);
        let blobs = following.filter(|e| matches!(e.kind, EntryKind::File | EntryKind::Symlink));
        let batch: Vec<ObjectId> = std::iter::once(blob)
            .chain(blobs.map(|entry| entry.id))
            .take(SIZES_BATCH)
            .collect();
        open.sizes = self.source.sizes(&batch)?.into_iter();
        let size = open.sizes.next();
        size.ok_or_else(|| Fault::transient(format!("the size of {blob} is missing")))
    }

    /// Counts a file of `size` bytes if the limits allow it.
    fn admits(&mut self, size: u64) -> bool {
        if self.listing.files >= self.limits.max_files {
            self.reached.files = true;
            return false;
        }
        if self.bytes + size > self.limits.max_total_bytes {
            self.reached.bytes = true;
            return false;
        }
        self.listing.files += 1;
        self.bytes += size;
        true
    }

    fn push(&mut self, parent: usize, name: &str, kind: NodeKind) -> usize {
        self.listing.nodes.push(Node {
            parent,
            name: name.to_owned(),
            kind,
        });
        self.listing.nodes.len() - 1
    }

    /// Removes a directory that turned out to hold nothing.
    fn leave(&mut self, node: usize) {
        if node != 0 && self.listing.nodes.len() == node + 1 {
            self.listing.nodes.pop();
        }
    }

    fn notices(&self) -> Vec<String> {
        let (files, bytes) = (self.limits.max_files, self.limits.max_total_bytes);
        let rest = "the rest of the repository is left out";
        let over = "files that would exceed it are left out";
        let limits = [
            (self.reached.files, files, "files", rest),
            (self.reached.bytes, bytes, "bytes of files", over),
            (self.reached.work, self.visited, "tree entries", rest),
        ];
        let reached = limits.into_iter().filter(|(reached, ..)| *reached);
        let notice = |(_, limit, what, how): (_, _, _, _)| {
            format!("Limit reached: {} {what}; {how}", thousands(limit))
        };
        reached.map(notice).collect()
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
