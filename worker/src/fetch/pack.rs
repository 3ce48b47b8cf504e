//! A [`Source`] made of a server's pack, read in one pass, without a repository on disk.
//!
//! The pack stays as it came, compressed, in memory or in a file. Each object is inflated once to learn
//! its name; those that a digest asks for are inflated again. The reader is this project's own since
//! every size is checked before it is paid for, which gix-pack has no place for: it inflates an object
//! before anyone sees its size.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use common::fault::Fault;
use flate2::Decompress;

use self::bytes::PackBytes;
use self::limits::{Budget, Failure, PackLimits};
use self::stream::{
    Entry, EntryKind, NO_BASE, OVERHEAD, Pieces, Scanned, check_size, damaged, object_name,
};
use super::http::ProgressSink;
use crate::source::{self, Head, ObjectId, Source, TreeEntry, tree_entries};

pub(super) mod limits;

pub(super) mod gauge;

mod bytes;

mod delta;

mod stream;

// Fuzzing knows no dependencies of tests.
#[cfg(fuzzing)]
#[path = "../../../common/testing/src/packs.rs"]
#[expect(dead_code, reason = "tests use more of it")]
mod packs;
#[cfg(all(test, not(fuzzing)))]
use testing::packs;

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

/// Most bytes of inflated bases of deltas that are kept for the next object.
const CACHED_BASES: usize = 16 << 20;
/// The name of the blob without bytes, which no filter leaves out.
const EMPTY_BLOB: ObjectId = ObjectId([
    0xe6, 0x9d, 0xe2, 0x9b, 0xb2, 0xd1, 0xd6, 0x43, 0x4b, 0x8b, 0x29, 0xae, 0x77, 0x5a, 0xd8, 0xc2,
    0xe4, 0x8c, 0x53, 0x91,
]);

/// The objects of a pack, read at one commit. A blob that is not there is one that the server
/// filtered out.
pub(super) struct Pack {
    head: Option<Head>,
    bytes: PackBytes,
    entries: Vec<Entry>,
    /// Entries with a name, in its order.
    order: Vec<u32>,
    trees: HashMap<u32, Rc<[u8]>>,
    limits: PackLimits,
    sink: Arc<dyn ProgressSink>,
    reading: RefCell<Reading>,
}

/// What reading objects needs.
struct Reading {
    inflater: Decompress,
    budget: Budget,
    bases: HashMap<u32, Rc<[u8]>>,
    cached: usize,
}

impl Pack {
    /// Makes a source without a commit.
    pub(super) fn empty(limits: PackLimits, sink: Arc<dyn ProgressSink>) -> Self {
        let scanned = Scanned {
            bytes: PackBytes::new(limits.in_memory, PathBuf::new()),
            entries: Vec::new(),
            trees: Vec::new(),
            named_bases: Vec::new(),
        };
        Self::new(scanned, limits, sink)
    }

    /// Reads a pack. `path` is where a large one goes.
    pub(super) fn read(
        pieces: &mut Pieces<'_>,
        limits: PackLimits,
        path: PathBuf,
        sink: Arc<dyn ProgressSink>,
    ) -> Result<Self, Failure> {
        let scanned = stream::scan(pieces, &limits, path)?;
        let mut named_bases = scanned.named_bases;
        named_bases.sort_unstable();
        let scanned = Scanned {
            named_bases: Vec::new(),
            ..scanned
        };
        let mut pack = Self::new(scanned, limits, sink);
        pack.resolve(&named_bases)?;
        let named = |kind| !matches!(kind, EntryKind::Delta | EntryKind::PassedOver);
        let entries = &pack.entries;
        let mut order: Vec<u32> = (0..entries.len() as u32)
            .filter(|at| named(entries[*at as usize].kind))
            .collect();
        order.sort_unstable_by_key(|at| entries[*at as usize].id);
        pack.order = order;
        Ok(pack)
    }

    /// Sets HEAD to `commit`, all of which must be there, except for blobs beyond the filter.
    pub(super) fn at(self, commit: ObjectId) -> Result<Self, Failure> {
        let passed_over = self.count(EntryKind::PassedOver);
        let has_blobs = self.count(EntryKind::Blob) > 0;
        let mut filtered = HashSet::new();
        let tree = self.visit_trees(commit, &mut |entry| {
            let is_there = match self.named(entry.id) {
                Some(at) => self.entry(at).kind == EntryKind::Blob,
                // No blob came: it understood another filter.
                None if !has_blobs => false,
                // No filter leaves these out.
                None if entry.kind == source::EntryKind::Symlink || entry.id == EMPTY_BLOB => false,
                // It did not filter, so nothing may be missing.
                None if passed_over > 0 => {
                    filtered.insert(entry.id);
                    filtered.len() <= passed_over
                }
                None => true,
            };
            is_there
                .then_some(())
                .ok_or_else(|| missing("blob", entry.id))
        })?;
        let head = Some(Head { commit, tree });
        Ok(Self { head, ..self })
    }

    /// Sets HEAD to `commit`, all of whose trees must be there, and no blobs. These are visited.
    pub(super) fn at_trees(
        self,
        commit: ObjectId,
        visit: &mut dyn FnMut(ObjectId),
    ) -> Result<Self, Failure> {
        if self.count(EntryKind::Blob) + self.count(EntryKind::PassedOver) > 0 {
            return Err(Failure::Surprise("it sends files unasked".to_owned()));
        }
        let tree = self.visit_trees(commit, &mut |entry| {
            visit(entry.id);
            Ok(())
        })?;
        let head = Some(Head { commit, tree });
        Ok(Self { head, ..self })
    }

    /// Returns those of `blobs` that did not come.
    pub(super) fn lacking(&self, blobs: impl IntoIterator<Item = ObjectId>) -> Vec<ObjectId> {
        let blobs = blobs.into_iter();
        blobs
            .filter(|blob| self.find(*blob, EntryKind::Blob).is_none())
            .collect()
    }

    fn new(scanned: Scanned, limits: PackLimits, sink: Arc<dyn ProgressSink>) -> Self {
        let trees = scanned.trees.into_iter();
        Self {
            head: None,
            bytes: scanned.bytes,
            entries: scanned.entries,
            order: Vec::new(),
            trees: trees.map(|(at, tree)| (at, tree.into())).collect(),
            limits,
            sink,
            reading: RefCell::new(Reading {
                inflater: Decompress::new(true),
                budget: Budget::new(limits.inflated),
                bases: HashMap::new(),
                cached: 0,
            }),
        }
    }

    fn entry(&self, at: u32) -> &Entry {
        &self.entries[at as usize]
    }

    /// Inflates what the pack stores for an entry: an object, or a delta.
    fn stored(&self, inflater: &mut Decompress, at: u32) -> Result<Vec<u8>, Fault> {
        let entry = self.entry(at);
        self.bytes
            .inflate(inflater, entry.data(), entry.stored as usize)
    }

    /// Gives each delta the kind and name of its result. `named_bases` is sorted.
    fn resolve(&mut self, named_bases: &[(ObjectId, u32)]) -> Result<(), Failure> {
        let mut children: Vec<(u32, u32)> = Vec::new();
        for (at, entry) in self.entries.iter().enumerate() {
            if entry.base != NO_BASE {
                children.push((entry.base, at as u32));
            }
        }
        children.sort_unstable();
        let children = Children {
            by_entry: &children,
            by_name: named_bases,
        };
        let mut inflater = Decompress::new(true);
        for root in 0..self.entries.len() as u32 {
            let kind = self.entry(root).kind;
            if !matches!(kind, EntryKind::Delta | EntryKind::PassedOver)
                && self.entry(root).base == NO_BASE
            {
                self.resolve_below(root, &children, &mut inflater)?;
            }
        }
        match self.entries.iter().any(|e| e.kind == EntryKind::Delta) {
            true => Err(damaged("a delta's base is missing")),
            false => Ok(()),
        }
    }

    /// Resolves all deltas that are based on `root`, or on one of them.
    fn resolve_below(
        &mut self,
        root: u32,
        children: &Children<'_>,
        inflater: &mut Decompress,
    ) -> Result<(), Failure> {
        /// An object, and the deltas based on it that are still to be resolved.
        struct Base {
            at: u32,
            bytes: Vec<u8>,
            children: std::vec::IntoIter<u32>,
        }
        let below = children.of(root, self.entry(root).id);
        if below.is_empty() {
            return Ok(());
        }
        let kind = self.entry(root).kind;
        let bytes = self.stored(inflater, root)?;
        let mut live = bytes.len();
        let mut bases = vec![Base {
            at: root,
            bytes,
            children: below.into_iter(),
        }];
        while let Some(base) = bases.last_mut() {
            let Some(child) = base.children.next() else {
                live -= base.bytes.len();
                bases.pop();
                continue;
            };
            // A name may be there twice, and its deltas then come twice.
            if self.entries[child as usize].kind != EntryKind::Delta {
                continue;
            }
            self.sink.alive();
            let delta = self.stored(inflater, child)?;
            let size = self.entry(child).size;
            let bytes = delta::apply(&base.bytes, &delta, size as usize);
            let bytes = bytes.ok_or_else(|| damaged("a delta does not fit its base"))?;
            drop(delta);
            check_size(kind, size.into(), &self.limits)?;
            let id = object_name(kind, &bytes);
            let is_filtered = kind == EntryKind::Blob && u64::from(size) >= self.limits.filter;
            let entry = &mut self.entries[child as usize];
            entry.base = base.at;
            entry.id = id;
            entry.kind = if is_filtered {
                EntryKind::PassedOver
            } else {
                kind
            };
            if base.children.as_slice().is_empty() {
                live -= base.bytes.len();
                bases.pop();
            }
            let below = children.of(child, id);
            if !below.is_empty() {
                live += bytes.len();
                if live > self.limits.bases {
                    return Err(Failure::Fault(Fault::too_large(format!(
                        "resolving deltas takes {live} bytes, more than {}",
                        self.limits.bases
                    ))));
                }
                bases.push(Base {
                    at: child,
                    bytes,
                    children: below.into_iter(),
                });
            }
        }
        Ok(())
    }

    /// Visits each file and link of `commit`, all of whose trees must be there, and returns the root
    /// tree.
    fn visit_trees(
        &self,
        commit: ObjectId,
        visit: &mut dyn FnMut(TreeEntry<'_>) -> Result<(), Failure>,
    ) -> Result<ObjectId, Failure> {
        let found = self.find(commit, EntryKind::Commit);
        let bytes = self.object(found.ok_or_else(|| missing("commit", commit))?)?;
        let root = tree_of(&bytes).ok_or_else(|| damaged("the commit names no tree"))?;
        let find_tree = |tree| {
            let found = self.find(tree, EntryKind::Tree);
            found.ok_or_else(|| missing("tree", tree))
        };
        let mut count = 0;
        let mut seen = HashSet::new();
        let mut open = vec![find_tree(root)?];
        while let Some(tree) = open.pop() {
            self.sink.alive();
            for entry in tree_entries(&self.object(tree)?) {
                let entry = entry.ok_or_else(|| damaged("a tree cannot be read"))?;
                count += 1;
                self.limits.check_tree_entries(count)?;
                match entry.kind {
                    source::EntryKind::Submodule => {}
                    source::EntryKind::Directory => {
                        let below = find_tree(entry.id)?;
                        if seen.insert(below) {
                            open.push(below);
                        }
                    }
                    source::EntryKind::File | source::EntryKind::Symlink => visit(entry)?,
                }
            }
        }
        Ok(root)
    }

    fn count(&self, kind: EntryKind) -> usize {
        self.entries
            .iter()
            .filter(|entry| entry.kind == kind)
            .count()
    }

    /// Returns the entry of an object.
    fn named(&self, id: ObjectId) -> Option<u32> {
        let key = |at: &u32| self.entry(*at).id;
        let found = self.order.binary_search_by_key(&id, key);
        Some(self.order[found.ok()?])
    }

    /// Returns the entry of an object of this kind.
    fn find(&self, id: ObjectId, kind: EntryKind) -> Option<u32> {
        let at = self.named(id)?;
        (self.entry(at).kind == kind).then_some(at)
    }

    /// Returns an object's bytes.
    fn object(&self, at: u32) -> Result<Rc<[u8]>, Fault> {
        let mut reading = self.reading.borrow_mut();
        let reading = &mut *reading;
        let mut deltas = Vec::new();
        let mut base = at;
        let mut bytes = loop {
            if let Some(known) = self.trees.get(&base).or_else(|| reading.bases.get(&base)) {
                break Rc::clone(known);
            }
            let entry = self.entry(base);
            if entry.base == NO_BASE {
                reading.budget.spend(entry.size.into())?;
                break self.stored(&mut reading.inflater, base)?.into();
            }
            deltas.push(base);
            base = entry.base;
        };
        if !deltas.is_empty() {
            reading.keep(base, &bytes);
        }
        while let Some(next) = deltas.pop() {
            let entry = self.entry(next);
            reading
                .budget
                .spend(u64::from(entry.size) + u64::from(entry.stored))?;
            let delta = self.stored(&mut reading.inflater, next)?;
            let result = delta::apply(&bytes, &delta, entry.size as usize);
            let result = result.ok_or_else(|| Fault::infra("a pack changed while it was read"))?;
            bytes = result.into();
            reading.keep(next, &bytes);
        }
        Ok(bytes)
    }
}

impl Reading {
    /// Keeps an object for the next ones that are based on it.
    fn keep(&mut self, at: u32, bytes: &Rc<[u8]>) {
        let weight = bytes.len() + OVERHEAD;
        if self.cached + weight > CACHED_BASES {
            self.bases.clear();
            self.cached = 0;
        }
        if weight <= CACHED_BASES / 4 && self.bases.insert(at, Rc::clone(bytes)).is_none() {
            self.cached += weight;
        }
    }
}

/// The deltas based on each object.
struct Children<'a> {
    by_entry: &'a [(u32, u32)],
    by_name: &'a [(ObjectId, u32)],
}

impl Children<'_> {
    fn of(&self, at: u32, id: ObjectId) -> Vec<u32> {
        let from = self.by_entry.partition_point(|(base, _)| *base < at);
        let by_entry = self.by_entry[from..].iter();
        let mut children: Vec<u32> = by_entry
            .take_while(|(base, _)| *base == at)
            .map(|(_, child)| *child)
            .collect();
        if !self.by_name.is_empty() {
            let from = self.by_name.partition_point(|(base, _)| *base < id);
            let by_name = self.by_name[from..].iter();
            children.extend(
                by_name
                    .take_while(|(base, _)| *base == id)
                    .map(|(_, at)| *at),
            );
        }
        children
    }
}

pub(super) fn missing(what: &str, id: ObjectId) -> Failure {
    Failure::Surprise(format!("its pack lacks {what} {id}"))
}

/// Returns the tree that a commit names in its first line.
fn tree_of(commit: &[u8]) -> Option<ObjectId> {
    let line = commit.strip_prefix(b"tree ")?.get(..41)?;
    let id = line.strip_suffix(b"\n")?;
    ObjectId::parse(std::str::from_utf8(id).ok()?)
}

impl fmt::Debug for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pack")
            .field("head", &self.head)
            .field("objects", &self.entries.len())
            .finish_non_exhaustive()
    }
}

impl Source for Pack {
    fn head(&self) -> Result<Option<Head>, Fault> {
        Ok(self.head)
    }

    fn tree(&self, tree: ObjectId) -> Result<Rc<[u8]>, Fault> {
        self.sink.alive();
        let found = self.find(tree, EntryKind::Tree);
        self.object(
            found.ok_or_else(|| {
                Fault::transient(format!("{tree} is not a tree of this repository"))
            })?,
        )
    }

    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault> {
        self.sink.alive();
        let size = |blob: &ObjectId| match self.find(*blob, EntryKind::Blob) {
            Some(at) => self.entry(at).size.into(),
            None => self.limits.filter,
        };
        Ok(blobs.iter().map(size).collect())
    }

    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault> {
        for (i, blob) in blobs.iter().enumerate() {
            let found = self.find(*blob, EntryKind::Blob);
            let bytes = self.object(found.ok_or_else(|| {
                Fault::transient(format!("{blob} is not a blob of this repository"))
            })?)?;
            self.sink.alive();
            if visit(i, &bytes).is_break() {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ::bytes::Bytes;
    use common::fault::FaultKind;
    use sha1::{Digest, Sha1};

    use super::fuzz::Nobody;
    use super::packs::Mode::{Directory, File, Symlink};
    use super::packs::{
        Id, Kind, Mode, PackWriter as Writer, appending, object_name, tree, varint,
    };
    use super::*;

    fn limits() -> PackLimits {
        PackLimits::filtered_at(1000)
    }

    fn read_with(
        pack: &[u8],
        size: usize,
        commit: Id,
        limits: PackLimits,
    ) -> Result<Pack, Failure> {
        let folder = tempfile::tempdir().unwrap();
        let mut rest = Bytes::copy_from_slice(pack);
        let mut pieces = || Ok((!rest.is_empty()).then(|| rest.split_to(size.min(rest.len()))));
        // The open file outlives its name.
        let path = folder.path().join("pack");
        Pack::read(&mut pieces, limits, path, Arc::new(Nobody))?.at(ObjectId(commit))
    }

    fn read(pack: &[u8], commit: Id) -> Result<Pack, Failure> {
        read_with(pack, 4096, commit, limits())
    }

    fn surprise(result: Result<Pack, Failure>) -> String {
        match result {
            Err(Failure::Surprise(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    fn too_large(result: Result<Pack, Failure>) -> String {
        match result {
            Err(Failure::Fault(fault)) if fault.kind == FaultKind::TooLarge => fault.message,
            other => panic!("{other:?}"),
        }
    }

    fn content(pack: &Pack, blob: Id) -> Vec<u8> {
        let blob = ObjectId(blob);
        let mut content = Vec::new();
        pack.read(&[blob], &mut |_, bytes| {
            content.extend_from_slice(bytes);
            ControlFlow::Continue(())
        })
        .unwrap();
        content
    }

    type Blobs = Vec<(Id, Vec<u8>)>;

    /// A pack with deltas of both kinds in chains, bases after their deltas, an empty blob and a large
    /// one; and its commit and blobs.
    fn sample() -> (Vec<u8>, Id, Blobs) {
        let mut writer = Writer::default();
        let base = b"the base of several others, ".repeat(10);
        let name = |bytes: &[u8]| object_name(Kind::Blob, bytes);
        let named = [&base[..], b"by name"].concat();
        writer.named_delta(name(&base), &appending(base.len(), b"by name"));
        let (at, _) = writer.object(Kind::Blob, &base);
        let first = [&base[..], b"first"].concat();
        let first_at = writer.delta(at, &appending(base.len(), b"first"));
        let second = [&first[..], b"second"].concat();
        writer.delta(first_at, &appending(first.len(), b"second"));
        let third = [&first[..], b"third"].concat();
        writer.delta(first_at, &appending(first.len(), b"third"));
        let far = [&named[..], b"far"].concat();
        writer.named_delta(name(&named), &appending(named.len(), b"far"));
        let empty = writer.blob(b"");
        let large = writer.blob(&[7; 1000]);
        let blobs = [base, named, first, second, third, far, Vec::new()];
        let blobs: Blobs = blobs.map(|bytes| (name(&bytes), bytes)).into();
        let mut entries = vec![(Symlink, "link", empty), (File, "large", large)];
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        entries.extend(
            blobs
                .iter()
                .zip(names)
                .map(|((id, _), name)| (File, name, *id)),
        );
        let below = writer.tree(&entries);
        // The root is a delta of the other.
        let more = tree(&[(Directory, "x", below)]);
        let bytes = tree(&entries);
        writer.named_delta(below, &appending(bytes.len(), &more));
        let root = object_name(Kind::Tree, &[bytes, more].concat());
        let commit = writer.commit(root);
        (writer.finish(), commit, blobs)
    }

    #[test]
    fn a_pack_is_read_however_it_is_cut_and_wherever_it_is_kept() {
        let (bytes, commit, blobs) = sample();
        for size in [1, 2, 3, 7, 50, 1 << 20] {
            for in_memory in [0, 100, 1 << 20] {
                let limits = PackLimits {
                    in_memory,
                    ..limits()
                };
                let pack = read_with(&bytes, size, commit, limits).unwrap();
                let head = pack.head().unwrap().unwrap();
                assert_eq!(head.commit.0, commit);
                let root = pack.tree(head.tree).unwrap();
                let entries = tree_entries(&root).collect::<Option<Vec<_>>>().unwrap();
                assert_eq!(entries.len(), 10);
                let below = pack.tree(entries[9].id).unwrap();
                assert_eq!(
                    tree_entries(&below).flatten().collect::<Vec<_>>(),
                    entries[..9]
                );
                for (id, bytes) in &blobs {
                    assert_eq!(content(&pack, *id), *bytes);
                    assert_eq!(pack.sizes(&[ObjectId(*id)]).unwrap(), [bytes.len() as u64]);
                }
                assert_eq!(pack.sizes(&[entries[1].id]).unwrap(), [1000]);
                assert!(pack.read(&[entries[1].id], &mut |_, _| panic!()).is_err());
                assert!(pack.tree(ObjectId(blobs[0].0)).is_err());
            }
        }
    }

    #[test]
    fn a_cut_pack_is_transient_and_a_damaged_one_surprises() {
        let (bytes, commit, _) = sample();
        for end in 0..bytes.len() {
            match read(&bytes[..end], commit) {
                Err(Failure::Fault(fault)) => assert_eq!(fault.kind, FaultKind::Transient),
                other => panic!("{end}: {other:?}"),
            }
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0xff;
            assert!(read(&damaged, commit).is_err(), "{at}");
            // What has the right checksum is looked into, and may even make sense.
            let end = bytes.len() - 20;
            let checksum = Sha1::digest(&damaged[..end]);
            damaged[end..].copy_from_slice(&checksum);
            if let Ok(pack) = read(&damaged, commit) {
                let head = pack.head().unwrap().unwrap();
                assert_eq!(tree_entries(&pack.tree(head.tree).unwrap()).count(), 10);
            }
        }
        let more = [&bytes[..], b"x"].concat();
        assert!(surprise(read(&more, commit)).contains("follows"));
    }

    #[test]
    fn sizes_are_checked_before_they_are_paid_for() {
        let commit = [1; 20];
        // The pack ends with these headers: reading on would fail differently.
        for (kind, size, part) in [
            (1, (1 << 20) + 1, "a commit has 1048577 bytes"),
            (4, (1 << 20) + 1, "a tag has 1048577 bytes"),
            (2, (16 << 20) + 1, "a tree has 16777217 bytes"),
            (3, (4 << 30) + 1, "4294967297 bytes or more"),
            (3, u64::MAX >> 8, "bytes or more"),
            (6, (4 << 30) + 1, "4294967297 bytes or more"),
        ] {
            let mut writer = Writer::default();
            writer.raw(kind, size, &[]);
            let why = too_large(read(&writer.finish(), commit));
            assert!(why.contains(part), "{why}");
        }
        let why = too_large(read(&Writer::default().claiming(2_000_001), commit));
        assert!(why.contains("2000001 objects"), "{why}");
        // So is a number that does not fit.
        let mut writer = Writer::default();
        writer.garbage(&[0xff; 12]);
        assert!(surprise(read(&writer.claiming(1), commit)).contains("out of range"));
    }

    #[test]
    fn thousands_of_large_deltas_are_not_resolved() {
        let mut writer = Writer::default();
        let (base, _) = writer.object(Kind::Tree, b"");
        let delta = [varint(0), varint(64 << 20), vec![0x80]].concat();
        for _ in 0..2000 {
            writer.delta(base, &delta);
        }
        let why = too_large(read(&writer.finish(), [1; 20]));
        assert!(why.contains("over 4294967296"), "{why}");
    }

    #[test]
    fn deltas_bases_do_not_pile_up() {
        let limits = PackLimits {
            bases: 5000,
            ..limits()
        };
        let pack = |is_chain: bool| {
            let mut writer = Writer::default();
            let (mut at, blob) = writer.object(Kind::Blob, &[b'x'; 600]);
            for i in 0..100 {
                let next = writer.delta(at, &appending(600 + i, b"y"));
                if !is_chain {
                    writer.delta(at, &appending(600 + i, b"z"));
                }
                at = next;
            }
            let root = writer.tree(&[(File, "a", blob)]);
            let commit = writer.commit(root);
            read_with(&writer.finish(), 4096, commit, limits)
        };
        // Of a chain, only two are needed at a time.
        let pack_of_chain = pack(true).unwrap();
        let last = [&[b'x'; 600][..], &[b'y'; 100]].concat();
        assert_eq!(
            content(&pack_of_chain, object_name(Kind::Blob, &last)),
            last
        );
        let why = too_large(pack(false));
        assert!(why.contains("more than 5000"), "{why}");
    }

    #[test]
    fn what_no_filter_leaves_out_must_be_there() {
        let elsewhere = object_name(Kind::Blob, b"elsewhere");
        let sent = |writer: &mut Writer, entries: &[(Mode, &str, Id)]| {
            let root = writer.tree(entries);
            let commit = writer.commit(root);
            read(&writer.finish(), commit)
        };
        // A file that did not come was too large.
        let mut writer = Writer::default();
        let blob = writer.blob(b"x");
        let files = [(File, "a", blob), (File, "b", elsewhere)];
        let pack = sent(&mut writer, &files).unwrap();
        assert_eq!(
            pack.sizes(&[blob, elsewhere].map(ObjectId)).unwrap(),
            [1, 1000]
        );

        for other in [
            (Directory, "b", elsewhere),
            (Symlink, "b", elsewhere),
            (File, "b", EMPTY_BLOB.0),
        ] {
            let mut writer = Writer::default();
            let blob = writer.blob(b"x");
            let why = surprise(sent(&mut writer, &[(File, "a", blob), other]));
            assert!(why.contains("its pack lacks"), "{why}");
        }
        // No blob at all: it understood another filter.
        surprise(sent(&mut Writer::default(), &[(File, "b", elsewhere)]));
        // A large one came, so it does not filter.
        let mut writer = Writer::default();
        let (blob, large) = (writer.blob(b"x"), writer.blob(&[7; 1000]));
        let mut files = vec![(File, "a", blob), (File, "b", large)];
        sent(&mut writer, &files).unwrap();
        files.push((File, "c", elsewhere));
        surprise(sent(&mut writer, &files));

        let why = surprise(read(&writer.finish(), [1; 20]));
        assert!(why.contains("lacks commit 0101"), "{why}");
        let mut writer = Writer::default();
        writer.named_delta(elsewhere, &appending(9, b"x"));
        let why = surprise(read(&writer.finish(), elsewhere));
        assert!(why.contains("base is missing"), "{why}");
    }

    #[test]
    fn repeated_names_do_not_multiply_deltas() {
        let mut writer = Writer::default();
        let mut blob = EMPTY_BLOB.0;
        for _ in 0..300 {
            blob = writer.blob(b"the same");
        }
        for i in 0..300_u32 {
            writer.named_delta(blob, &appending(8, &i.to_be_bytes()));
        }
        let root = writer.tree(&[(File, "a", blob)]);
        let commit = writer.commit(root);
        let pack = read(&writer.finish(), commit).unwrap();
        let last = [&b"the same"[..], &299_u32.to_be_bytes()].concat();
        assert_eq!(content(&pack, object_name(Kind::Blob, &last)), last);
    }
}
