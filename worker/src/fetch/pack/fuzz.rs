//! A pack is read alike however it comes, costs no more than its limits, and gives what was written.

use std::collections::BTreeMap;

use ::bytes::Bytes;
use sha1::{Digest, Sha1};
use tempfile::TempDir;

use super::gauge::PackGauge;
use super::packs::{Kind, Mode, PackWriter as Writer, deflated, tree, varint};
use super::*;
use crate::fetch::answer::TokenRefusal;
use crate::fetch::policy::FetchWay;

/// Most objects of a script.
const OBJECTS: u32 = 40;

/// Hears of progress, and does not care.
pub(super) struct Nobody;

impl ProgressSink for Nobody {
    fn way(&self, _: FetchWay, _: &str) {}
    fn received(&self, _: u64) {}
    fn alive(&self) {}
    fn token_refused(&self, _: TokenRefusal) {}
    fn token_used_up(&self, _: std::time::Duration) {}
}

/// Four bytes say what the rest is, how it is cut, how much of it stays in memory, and which limits hold.
pub(in crate::fetch) fn pack(input: &[u8]) {
    let mut script = Script(input);
    let (kind, cut, in_memory) = (script.byte() % 4, script.byte(), script.byte());
    let limits = limits(script.byte());
    let made = match kind {
        0 => Made::bytes(&mut script, |bytes| bytes.to_vec()),
        1 => Made::bytes(&mut script, with_checksum),
        _ => Made::script(&mut script, limits.filter),
    };
    let large = PackLimits {
        in_memory: 64 << 20,
        ..limits
    };
    let small = PackLimits {
        in_memory: usize::from(in_memory) * 4,
        ..limits
    };
    let whole = made.read(usize::MAX, large);
    let pieces = made.read(usize::from(cut).max(1), small);
    assert_eq!(seen(&whole, &made), seen(&pieces, &made));
    let why = match whole {
        Ok(pack) => {
            for size in [usize::MAX, usize::from(cut).max(1)] {
                check_gauge(&made.pack, size, limits);
            }
            return check(&pack, &made);
        }
        Err(Failure::Fault(fault)) => fault.message,
        Err(Failure::Surprise(why)) => why,
    };
    assert!(!why.contains(char::is_control), "{why:?}");
    assert!(!made.is_sound || limits.inflated < 1 << 20, "{why}");
}

/// The usual ones, for small packs; or such as a small pack is over.
fn limits(choice: u8) -> PackLimits {
    // As with the usual ones, a delta that is passed over for its size makes what is filtered.
    let usual = PackLimits::filtered_at([1000, 16, 200, 600][usize::from(choice % 4)]);
    if choice % 4 < 3 {
        return usual;
    }
    PackLimits {
        objects: 30,
        inflated: 4000,
        delta: 800,
        tree: 200,
        commit: 100,
        bases: 600,
        ..usual
    }
}

/// Numbers and bytes of the input; zeros behind its end.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Returns some bytes, or few of them many times.
    fn content(&mut self) -> Vec<u8> {
        let length = usize::from(self.byte());
        match length {
            0..128 => self.take(length).to_vec(),
            _ => self.take(length % 8).repeat(length),
        }
    }

    fn choose<'k>(&mut self, known: &'k [Known]) -> Option<&'k Known> {
        let at = usize::from(self.byte());
        (!known.is_empty()).then(|| &known[at % known.len()])
    }

    /// Returns a delta that fits `base`, and its result.
    fn delta(&mut self, base: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut commands, mut result) = (Vec::new(), Vec::new());
        for _ in 0..self.byte() % 6 {
            let command = self.byte();
            if command < 0x80 || base.is_empty() {
                let new = self.take(usize::from(command % 0x80).max(1));
                if !new.is_empty() {
                    commands.push(new.len() as u8);
                    commands.extend_from_slice(new);
                    result.extend_from_slice(new);
                }
                continue;
            }
            let offset = (usize::from(command) << 3 | usize::from(self.byte())) % base.len();
            let length = (1 + usize::from(self.byte())).min(base.len() - offset);
            commands.extend_from_slice(&[
                0x97,
                offset as u8,
                (offset >> 8) as u8,
                (offset >> 16) as u8,
            ]);
            commands.push(length as u8);
            // What takes two bytes is written in two.
            if let high @ 1.. = length >> 8 {
                let at = commands.len() - 5;
                commands[at] |= 0x20;
                commands.push(high as u8);
            }
            result.extend_from_slice(&base[offset..offset + length]);
        }
        let sizes = [varint(base.len() as u64), varint(result.len() as u64)].concat();
        ([sizes, commands].concat(), result)
    }
}

/// An object that was written.
struct Known {
    at: u64,
    kind: EntryKind,
    id: ObjectId,
    bytes: Vec<u8>,
}

/// A pack, and what is known of it.
struct Made {
    pack: Vec<u8>,
    commit: ObjectId,
    known: Vec<Known>,
    /// Whether it can be read, unless that takes too much.
    is_sound: bool,
}

impl Made {
    /// Takes a commit's name and the bytes of a pack.
    fn bytes(script: &mut Script<'_>, made: impl FnOnce(&[u8]) -> Vec<u8>) -> Self {
        let mut commit = [0; 20];
        let name = script.take(20);
        commit[..name.len()].copy_from_slice(name);
        Self {
            pack: made(script.0),
            commit: ObjectId(commit),
            known: Vec::new(),
            is_sound: false,
        }
    }

    /// Writes a pack with a commit of one of its trees.
    fn script(script: &mut Script<'_>, filter: u64) -> Self {
        let mut writer = Writer::default();
        let mut known: Vec<Known> = Vec::new();
        let mut is_sound = true;
        while !script.0.is_empty() && writer.count < OBJECTS {
            match script.byte() % 9 {
                0 | 1 => known.push(whole(&mut writer, EntryKind::Blob, script.content())),
                2 | 3 => {
                    let bytes = tree_of_known(script, &known);
                    known.push(whole(&mut writer, EntryKind::Tree, bytes));
                }
                4 => {
                    use EntryKind::{Commit, Tag, Tree};
                    let kind = [Commit, Tag, Tree][usize::from(script.byte() % 3)];
                    known.push(whole(&mut writer, kind, script.content()));
                }
                5 | 6 => {
                    let by_name = script.byte() % 2 == 1;
                    let Some(base) = script.choose(&known) else {
                        continue;
                    };
                    is_sound &= !is_filtered(base, filter);
                    let (delta, bytes) = script.delta(&base.bytes);
                    let at = if by_name {
                        let at = writer.position();
                        writer.named_delta(base.id.0, &delta);
                        at
                    } else {
                        writer.delta(base.at, &delta)
                    };
                    let (kind, id) = (base.kind, object_name(base.kind, &bytes));
                    known.push(Known {
                        at,
                        kind,
                        id,
                        bytes,
                    });
                }
                7 => {
                    // The base comes after its delta.
                    let base = script.content();
                    let (delta, bytes) = script.delta(&base);
                    let (kind, at) = (EntryKind::Blob, writer.position());
                    writer.named_delta(object_name(kind, &base).0, &delta);
                    let id = object_name(kind, &bytes);
                    known.push(Known {
                        at,
                        kind,
                        id,
                        bytes,
                    });
                    let base = whole(&mut writer, kind, base);
                    is_sound &= !is_filtered(&base, filter);
                    known.push(base);
                }
                _ => {
                    is_sound = false;
                    lie(script, &mut writer);
                }
            }
        }
        let trees: Vec<_> = known
            .iter()
            .filter(|known| known.kind == EntryKind::Tree)
            .collect();
        let root = trees.last().map(|tree| tree.id);
        let root = root.unwrap_or_else(|| ObjectId(writer.tree::<&str>(&[])));
        let commit = ObjectId(writer.commit(root.0));
        is_sound = is_sound && is_complete(&known, root, filter);
        Self {
            pack: writer.finish(),
            commit,
            known,
            is_sound,
        }
    }

    fn read(&self, size: usize, limits: PackLimits) -> Result<Pack, Failure> {
        thread_local! {
            static FOLDER: TempDir = tempfile::tempdir().expect("a temporary folder");
        }
        let path = FOLDER.with(|folder| folder.path().join("pack"));
        let mut rest = Bytes::copy_from_slice(&self.pack);
        let mut pieces = || Ok((!rest.is_empty()).then(|| rest.split_to(size.min(rest.len()))));
        let pack = Pack::read(&mut pieces, limits, path.clone(), Arc::new(Nobody));
        // The open file outlives its name.
        assert!(!path.exists());
        pack?.at(self.commit)
    }
}

fn with_checksum(bytes: &[u8]) -> Vec<u8> {
    let (count, body) = bytes.split_first().unwrap_or((&0, &[]));
    let mut pack = [&b"PACK\0\0\0\x02\0\0\0"[..], &[*count], body].concat();
    pack.extend(Sha1::digest(&pack));
    pack
}

fn whole(writer: &mut Writer, kind: EntryKind, bytes: Vec<u8>) -> Known {
    let number = match kind {
        EntryKind::Commit => Kind::Commit,
        EntryKind::Tree => Kind::Tree,
        EntryKind::Tag => Kind::Tag,
        _ => Kind::Blob,
    };
    let (at, id) = writer.object(number, &bytes);
    Known {
        at,
        kind,
        id: ObjectId(id),
        bytes,
    }
}

/// Whether a whole blob is passed over, so that it cannot be the base of a delta.
fn is_filtered(known: &Known, filter: u64) -> bool {
    known.kind == EntryKind::Blob && known.bytes.len() as u64 >= filter
}

/// Writes an object that is not what its header says.
fn lie(script: &mut Script<'_>, writer: &mut Writer) {
    let kind = script.byte() % 8;
    let size = u64::from(script.byte()) << (script.byte() % 64);
    let content = script.content();
    let base = match kind {
        6 => {
            let length = usize::from(script.byte() % 4);
            script.take(length)
        }
        7 => script.take(20),
        _ => &[],
    };
    let mut body = deflated(&content);
    if script.byte() < 0x40 {
        body.truncate(usize::from(script.byte()));
    }
    writer.raw(kind, size, &[base, &body]);
}

/// Returns a tree of what is known, and a little of what is not.
fn tree_of_known(script: &mut Script<'_>, known: &[Known]) -> Vec<u8> {
    use Mode::{Directory, File, Submodule, Symlink};
    let mut entries = Vec::new();
    for _ in 0..script.byte() % 8 {
        let kind = script.byte();
        let length = usize::from(script.byte() % 8);
        let name = script.take(length);
        let found = match kind / 8 {
            0 => None,
            _ => script.choose(known),
        };
        let id = found.map_or(ObjectId([kind; 20]), |known| known.id);
        let kind = match (kind % 8, found.map(|known| known.kind)) {
            (0, _) => Submodule,
            (1, _) => Symlink,
            (2, _) | (_, Some(EntryKind::Tree)) => Directory,
            _ => File,
        };
        let name: Vec<u8> = name.iter().copied().filter(|byte| *byte != 0).collect();
        entries.push((kind, name, id.0));
    }
    tree(&entries)
}

/// Whether all is there below a tree that a server which filters would send.
fn is_complete(known: &[Known], root: ObjectId, filter: u64) -> bool {
    let by_name: BTreeMap<ObjectId, &Known> = known.iter().map(|known| (known.id, known)).collect();
    let blobs = known.iter().filter(|known| known.kind == EntryKind::Blob);
    let (filtered, shown): (Vec<_>, Vec<_>) = blobs.partition(|known| is_filtered(known, filter));
    let mut missing = HashSet::new();
    let mut seen = HashSet::new();
    let mut open = vec![root];
    while let Some(tree) = open.pop() {
        if !seen.insert(tree) {
            continue;
        }
        let bytes = match by_name.get(&tree) {
            Some(known) if known.kind == EntryKind::Tree => &known.bytes[..],
            // The empty one, which is written last.
            None if known.iter().all(|known| known.kind != EntryKind::Tree) => &[],
            _ => return false,
        };
        for entry in tree_entries(bytes) {
            let Some(entry) = entry else {
                return false;
            };
            let found = by_name.get(&entry.id);
            match (entry.kind, found.map(|known| known.kind)) {
                (source::EntryKind::Submodule, _) => {}
                (source::EntryKind::Directory, _) => open.push(entry.id),
                (_, Some(EntryKind::Blob))
                    if !is_filtered(found.expect("it was found"), filter) => {}
                (source::EntryKind::File, None | Some(EntryKind::Blob))
                    if entry.id != EMPTY_BLOB =>
                {
                    missing.insert(entry.id);
                }
                _ => return false,
            }
        }
    }
    missing.is_empty()
        || (!shown.is_empty() && (filtered.is_empty() || missing.len() <= filtered.len()))
}

/// Returns what a reader sees: why there is nothing to read, or all that is known and all trees.
fn seen(pack: &Result<Pack, Failure>, made: &Made) -> String {
    let pack = match pack {
        Ok(pack) => pack,
        // Of several things that are wrong, how it comes decides which is met first.
        Err(Failure::Fault(fault)) => return format!("{:?}", fault.kind),
        Err(Failure::Surprise(_)) => return String::new(),
    };
    let mut seen = format!("{:?}", pack.head());
    for known in &made.known {
        let id = known.id;
        let mut content = None;
        let read = pack.read(&[id], &mut |_, bytes| {
            content = Some(bytes.to_vec());
            ControlFlow::Break(())
        });
        let facts = (pack.tree(id), pack.sizes(&[id]), content, read);
        seen += &format!("{id}: {facts:?}\n");
    }
    seen
}

/// Fails if somebody who follows a pack finds that it costs more than its reader was charged.
fn check_gauge(pack: &[u8], size: usize, limits: PackLimits) {
    let mut gauge = PackGauge::new(PackLimits {
        // Larger deltas are passed over by the reader.
        delta: u64::MAX,
        chains: u64::MAX,
        ..limits
    });
    let end = pack.chunks(size).try_for_each(|piece| gauge.push(piece));
    assert!(end.is_ok(), "{end:?}");
}

/// Fails unless all that a pack has is what its name says, within the limits, and what was written.
fn check(pack: &Pack, made: &Made) {
    let limits = &pack.limits;
    let named = pack.order.iter().map(|at| (*at, pack.entry(*at)));
    let mut total = 0;
    for (at, entry) in named {
        total += u64::from(entry.size);
        assert!(check_size(entry.kind, entry.size.into(), limits).is_ok());
        assert!(entry.kind != EntryKind::Blob || u64::from(entry.size) < limits.filter);
        // Reading all may be more than is allowed.
        if let Ok(bytes) = pack.object(at) {
            assert_eq!(object_name(entry.kind, &bytes), entry.id);
            assert_eq!(bytes.len(), entry.size as usize);
        }
    }
    assert!(total <= limits.inflated);
    assert!(pack.entries.len() <= limits.objects as usize);

    let Ok(Some(head)) = pack.head() else {
        panic!("a pack that is read has a commit");
    };
    assert_eq!(head.commit, made.commit);
    let mut open = vec![head.tree];
    let mut trees = HashSet::new();
    while let Some(tree) = open.pop() {
        let Ok(entries) = pack.tree(tree) else {
            assert!(limits.inflated < 1 << 20);
            break;
        };
        for entry in tree_entries(&entries) {
            let entry = entry.expect("it was read before");
            let is_there = pack.find(entry.id, EntryKind::Blob).is_some();
            match entry.kind {
                source::EntryKind::Directory if trees.insert(entry.id) => open.push(entry.id),
                source::EntryKind::Directory | source::EntryKind::Submodule => {}
                source::EntryKind::Symlink => assert!(is_there),
                source::EntryKind::File => {
                    let size = pack.sizes(&[entry.id]).expect("sizes are known")[0];
                    assert_eq!(size < limits.filter, is_there);
                }
            }
        }
    }
    for known in made.known.iter().filter(|_| made.is_sound) {
        assert!(pack.find(known.id, known.kind).is_some() != is_filtered(known, limits.filter));
    }
}
