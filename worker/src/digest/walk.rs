//! The files that a digest shows, in its order.
//!
//! Time and memory are bounded whatever the trees hold: budgets of tree entries, of their bytes and of
//! matching work, and no recursion.

use std::rc::Rc;
use std::vec::IntoIter;

use common::fault::Fault;
use common::text::thousands;

use super::DigestLimits;
use super::directory::{Directory, Trees};
use super::ignore::rules::{ActiveRules, RuleMatch, Rules};
use crate::source::{EntryKind, ObjectId, Source};

/// Most tree entries that one walk visits; a tree visited twice counts twice.
pub(super) const MAX_ENTRIES: u64 = 1_000_000;
/// Most elementary steps of matching names against patterns.
const MAX_STEPS: u64 = 200_000_000;
/// Longest target of a symbolic link, in bytes.
pub(super) const TARGET_MAX: u64 = 4095;
/// Fewest sizes that are asked for at once, if there are as many: each time may be a request to a host.
const FEWEST_SIZES: usize = 1024;
/// Most sizes that are asked for at once.
const MOST_SIZES: usize = 16 << 10;

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
        unsized_nodes: Vec::new(),
        settled: 1,
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
    /// Files and links in the listing that may have to go, since their sizes are not known yet.
    unsized_nodes: Vec<Unsized>,
    /// The node behind the last file or link that stays.
    settled: usize,
}

/// A file or link whose size is not known yet.
struct Unsized {
    node: usize,
    blob: ObjectId,
    /// Whether the budget was used up when it was met.
    exhausted: bool,
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
    directory: Rc<Directory>,
    /// The entries still to be taken.
    children: IntoIter<Child>,
}

/// An entry that is not ignored.
struct Child {
    entry: usize,
    verdict: RuleMatch,
}

impl<'a> Walk<'a, '_> {
    fn run(mut self, tree: ObjectId) -> Result<Listing, Fault> {
        let mut open = vec![self.enter(0, tree, self.rules.root())?];
        loop {
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
            if self.unsized_nodes.len() >= self.sizes_at_once() {
                self.settle(&mut open)?;
            }
            if self.reached.files {
                open.clear();
            }
        }
        self.settle(&mut [])?;
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
        let directory = match self.is_exhausted() {
            true => Rc::default(),
            false => self.trees.get(tree)?,
        };
        self.visited += directory.unusable as u64;
        let mut children = Vec::new();
        let path_len = self.path.len();
        if path_len > 0 {
            self.path.push('/');
        }
        let prefix = self.path.len();
        for (i, entry) in directory.entries().enumerate() {
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
            directory,
            children: children.into_iter(),
        })
    }

    fn is_exhausted(&mut self) -> bool {
        let exhausted = self.visited >= MAX_ENTRIES || self.steps >= MAX_STEPS;
        self.reached.work |= exhausted || self.trees.is_exhausted();
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
        let directory = Rc::clone(&open.directory);
        let entry = directory.entry(child.entry);
        let (name, blob) = (&*entry.name, entry.id);
        match entry.kind {
            EntryKind::Submodule => {}
            EntryKind::Directory if child.verdict.pruned || depth > self.limits.max_depth => {}
            EntryKind::Directory => {
                let node = self.push(open.node, name, NodeKind::Directory);
                if open.path_len > 0 {
                    self.path.push('/');
                }
                self.path.push_str(name);
                let rules = open
                    .rules
                    .child(self.rules, &self.path, name, child.verdict);
                return self.enter(node, entry.id, rules).map(Some);
            }
            EntryKind::File => {
                self.push_unsized(open.node, name, NodeKind::File { blob, size: 0 }, blob);
            }
            EntryKind::Symlink => {
                let kind = NodeKind::Symlink { blob, target: None };
                self.push_unsized(open.node, name, kind, blob);
            }
        }
        Ok(None)
    }

    fn push_unsized(&mut self, parent: usize, name: &str, kind: NodeKind, blob: ObjectId) {
        let node = self.push(parent, name, kind);
        self.unsized_nodes.push(Unsized {
            node,
            blob,
            exhausted: self.reached.work,
        });
    }

    /// Returns how many sizes are asked for at once: as many as the listing has room for files, and one
    /// that shows that there are more.
    fn sizes_at_once(&self) -> usize {
        let room = self.limits.max_files.saturating_sub(self.listing.files);
        let room = usize::try_from(room).unwrap_or(MOST_SIZES);
        room.saturating_add(1).clamp(FEWEST_SIZES, MOST_SIZES)
    }

    /// Finds out the sizes that are not known yet, and removes what the limits do not admit.
    fn settle(&mut self, mut open: &mut [OpenDirectory<'_>]) -> Result<(), Fault> {
        let pending = std::mem::take(&mut self.unsized_nodes);
        let blobs: Vec<ObjectId> = pending.iter().map(|file| file.blob).collect();
        let sizes = match blobs.is_empty() {
            true => Vec::new(),
            false => self.source.sizes(&blobs)?,
        };
        if sizes.len() != blobs.len() {
            return Err(Fault::transient("the sizes of some files are missing"));
        }
        let from = self.settled;
        let mut stays = vec![false; self.listing.nodes.len() - from];
        for (file, actual) in pending.iter().zip(sizes) {
            let admitted = match &mut self.listing.nodes[file.node].kind {
                NodeKind::Directory => true,
                NodeKind::File { size, .. } => {
                    *size = actual;
                    actual <= self.limits.max_file_bytes && self.admits(actual)
                }
                NodeKind::Symlink { .. } => (1..=TARGET_MAX).contains(&actual) && self.admits(0),
            };
            stays[file.node - from] = admitted;
            if self.reached.files {
                // The walk ends here, and what lies behind was not met.
                self.reached.work = file.exhausted;
                self.listing.nodes.truncate(file.node);
                stays.truncate(file.node - from);
                open = &mut [];
                break;
            }
        }
        self.remove(stays, open);
        Ok(())
    }

    /// Removes the nodes behind the settled ones that do not stay, except directories that are open or
    /// hold something.
    fn remove(&mut self, mut stays: Vec<bool>, open: &mut [OpenDirectory<'_>]) {
        let from = self.settled;
        for (i, node) in self.listing.nodes[from..].iter().enumerate().rev() {
            if stays[i] && node.parent >= from {
                stays[node.parent - from] = true;
            }
        }
        let files_end = stays.iter().rposition(|stays| *stays);
        for directory in open.iter() {
            if directory.node >= from {
                stays[directory.node - from] = true;
            }
        }
        // Where each node goes.
        let mut next = from;
        let places: Vec<usize> = stays
            .iter()
            .map(|stays| {
                next += usize::from(*stays);
                next - usize::from(*stays)
            })
            .collect();
        let place = |node: &mut usize| {
            if *node >= from {
                *node = places[*node - from];
            }
        };
        let moved = self.listing.nodes.drain(from..).zip(stays);
        let mut moved: Vec<Node> = moved
            .filter(|(_, stays)| *stays)
            .map(|(node, _)| node)
            .collect();
        moved.iter_mut().for_each(|node| place(&mut node.parent));
        open.iter_mut()
            .for_each(|directory| place(&mut directory.node));
        self.listing.nodes.extend(moved);
        if let Some(end) = files_end {
            self.settled = places[end] + 1;
        }
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
