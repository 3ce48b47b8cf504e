//! The one pass over a pack as it comes: where each object is, and the names of those that are whole.

use std::path::PathBuf;

use bytes::{Buf, Bytes};
use common::fault::Fault;
use flate2::{Decompress, FlushDecompress, Status};
use sha1::{Digest, Sha1};

use super::bytes::PackBytes;
use super::delta;
use super::limits::{Budget, Failure, PackLimits};
use crate::source::ObjectId;

/// Bytes that are inflated at a time.
const PIECE: usize = 64 * 1024;
/// Trees up to this many bytes together are kept inflated: each is read at least twice.
const KEPT_TREES: usize = 32 << 20;
/// Bytes that an object takes in memory besides its own.
pub(super) const OVERHEAD: usize = 100;
/// The base of an object that is no delta.
pub(super) const NO_BASE: u32 = u32::MAX;

/// Yields the next piece of a pack; `None` at its end.
pub(crate) type Pieces<'a> = dyn FnMut() -> Result<Option<Bytes>, Failure> + 'a;

/// What is known of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    Commit,
    Tree,
    Blob,
    Tag,
    /// A delta that is not resolved yet.
    Delta,
    /// A blob that no digest shows. It has no name.
    PassedOver,
}

impl EntryKind {
    /// Returns the kind of an object by its number in a pack; `None` for a delta, or an unknown one.
    pub(super) fn of(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Commit),
            2 => Some(Self::Tree),
            3 => Some(Self::Blob),
            4 => Some(Self::Tag),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Tree => "tree",
            Self::Blob => "blob",
            Self::Tag => "tag",
            Self::Delta | Self::PassedOver => "",
        }
    }
}

/// An object in a pack.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: ObjectId,
    pub(super) kind: EntryKind,
    /// Bytes of the header before the zlib stream.
    header: u8,
    /// The entry that a delta is based on, or [`NO_BASE`].
    pub(super) base: u32,
    /// Where the header is in the pack.
    start: u64,
    /// Bytes of the object.
    pub(super) size: u32,
    /// Bytes in the zlib stream: the object, or the delta.
    pub(super) stored: u32,
}

impl Entry {
    /// Returns where the zlib stream is in the pack.
    pub(super) fn data(&self) -> u64 {
        self.start + u64::from(self.header)
    }
}

/// A pack after the pass.
pub(super) struct Scanned {
    pub(super) bytes: PackBytes,
    pub(super) entries: Vec<Entry>,
    /// Inflated trees, by entry.
    pub(super) trees: Vec<(u32, Vec<u8>)>,
    /// Deltas whose base is named: the base and the entry.
    pub(super) named_bases: Vec<(ObjectId, u32)>,
}

/// Computes an object's name.
///
/// With plain SHA-1, which this machine has instructions for; detecting collisions takes three times as
/// long. Names only tell damage from what was sent: no object is shared between repositories, and
/// nothing is trusted for its name. The one who could place a colliding object is the one who could
/// place any other.
pub(super) fn object_name(kind: EntryKind, bytes: &[u8]) -> ObjectId {
    let mut name = start_name(kind, bytes.len() as u64);
    name.update(bytes);
    ObjectId(name.finalize().into())
}

fn start_name(kind: EntryKind, size: u64) -> Sha1 {
    Sha1::new_with_prefix(format!("{} {size}\0", kind.name()))
}

/// Fails if an object of this kind and size is more than anyone needs.
pub(super) fn check_size(kind: EntryKind, size: u64, limits: &PackLimits) -> Result<(), Fault> {
    let most = match kind {
        EntryKind::Commit | EntryKind::Tag => limits.commit,
        EntryKind::Tree => limits.tree,
        EntryKind::Blob | EntryKind::Delta | EntryKind::PassedOver => return Ok(()),
    };
    if size > most {
        let kind = kind.name();
        return Err(Fault::too_large(format!(
            "a {kind} has {size} bytes, more than {most}"
        )));
    }
    Ok(())
}

/// Reads a pack to its end.
pub(super) fn scan(
    pieces: &mut Pieces<'_>,
    limits: &PackLimits,
    path: PathBuf,
) -> Result<Scanned, Failure> {
    let mut scan = Scan {
        pieces,
        limits,
        piece: Bytes::new(),
        checksum: Sha1::new(),
        inflater: Decompress::new(true),
        inflated: vec![0; PIECE].into(),
        budget: Budget::new(limits.inflated),
        kept_trees: 0,
        pack: Scanned {
            bytes: PackBytes::new(limits.in_memory, path),
            entries: Vec::new(),
            trees: Vec::new(),
            named_bases: Vec::new(),
        },
    };
    let count = scan.pack_header()?;
    // A number that anyone can write down.
    scan.pack.entries.reserve_exact(count.min(1 << 16) as usize);
    for _ in 0..count {
        scan.entry()?;
    }
    scan.trailer()?;
    scan.pack.bytes.finish()?;
    Ok(scan.pack)
}

struct Scan<'a, 'p> {
    pieces: &'a mut Pieces<'p>,
    limits: &'a PackLimits,
    /// What is not read yet of the last piece.
    piece: Bytes,
    checksum: Sha1,
    inflater: Decompress,
    inflated: Box<[u8]>,
    budget: Budget,
    kept_trees: usize,
    pack: Scanned,
}

/// An object's header in the pack.
struct Header {
    kind: u8,
    size: u64,
}

impl Scan<'_, '_> {
    fn pack_header(&mut self) -> Result<u32, Failure> {
        let header: [u8; 12] = self.take()?;
        let [b'P', b'A', b'C', b'K', 0, 0, 0, 2 | 3, count @ ..] = header else {
            return Err(Failure::Surprise(
                "it sent something that is not a pack".to_owned(),
            ));
        };
        let count = u32::from_be_bytes(count);
        self.limits.check_count(count)?;
        Ok(count)
    }

    fn entry(&mut self) -> Result<(), Failure> {
        let start = self.pack.bytes.len();
        let header = self.header()?;
        self.budget.spend(header.size)?;
        let kind = match (EntryKind::of(header.kind), header.kind) {
            (Some(kind), _) => kind,
            (None, 6 | 7) => return self.delta(start, &header),
            (None, _) => return Err(damaged("an object of an unknown kind")),
        };
        check_size(kind, header.size, self.limits)?;
        let is_shown = kind != EntryKind::Blob || header.size < self.limits.filter;
        let (Ok(size), true) = (u32::try_from(header.size), is_shown) else {
            let entry = self.new_entry(start, EntryKind::PassedOver)?;
            self.inflate(header.size, &mut |_| {})?;
            self.pack.entries.push(entry);
            return Ok(());
        };
        let mut entry = self.new_entry(start, kind)?;
        (entry.size, entry.stored) = (size, size);
        let mut name = start_name(kind, header.size);
        let weight = size as usize + OVERHEAD;
        let is_kept = kind == EntryKind::Tree && self.kept_trees + weight <= KEPT_TREES;
        if is_kept {
            let mut tree = Vec::with_capacity(size as usize);
            self.inflate(header.size, &mut |bytes| tree.extend_from_slice(bytes))?;
            name.update(&tree);
            self.kept_trees += weight;
            self.pack.trees.push((self.index(), tree));
        } else {
            self.inflate(header.size, &mut |bytes| name.update(bytes))?;
        }
        entry.id = ObjectId(name.finalize().into());
        self.pack.entries.push(entry);
        Ok(())
    }

    /// Reads a delta, whose kind and name are those of its result and not known yet.
    fn delta(&mut self, start: u64, header: &Header) -> Result<(), Failure> {
        let mut base = NO_BASE;
        if header.kind == 6 {
            let back = self.offset()?;
            let at = start.checked_sub(back);
            let at = at.and_then(|at| {
                self.pack
                    .entries
                    .binary_search_by_key(&at, |e| e.start)
                    .ok()
            });
            let at = at.ok_or_else(|| damaged("a delta without a base"))?;
            base = u32::try_from(at).unwrap_or(NO_BASE);
        } else {
            let id = ObjectId(self.take()?);
            self.pack.named_bases.push((id, self.index()));
        }
        let mut entry = self.new_entry(start, EntryKind::Delta)?;
        entry.base = base;
        let mut head = Vec::with_capacity(delta::HEAD);
        self.inflate(header.size, &mut |bytes| {
            let missing = delta::HEAD - head.len();
            head.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        })?;
        let sizes = delta::sizes(&mut head.as_slice());
        let (_, size) = sizes.ok_or_else(|| damaged("a delta without sizes"))?;
        self.budget.spend(size)?;
        let most = self.limits.delta;
        // As the filter's limit is far below, this is a large file of a server that did not filter.
        match (u32::try_from(size), u32::try_from(header.size)) {
            (Ok(result), Ok(stored)) if size <= most && header.size <= most => {
                (entry.size, entry.stored) = (result, stored);
            }
            _ => entry.kind = EntryKind::PassedOver,
        }
        self.pack.entries.push(entry);
        Ok(())
    }

    /// Returns the index of the next entry.
    fn index(&self) -> u32 {
        u32::try_from(self.pack.entries.len()).unwrap_or(NO_BASE)
    }

    /// Makes an entry whose zlib stream begins here.
    fn new_entry(&self, start: u64, kind: EntryKind) -> Result<Entry, Failure> {
        let header = u8::try_from(self.pack.bytes.len() - start);
        Ok(Entry {
            id: ObjectId([0; 20]),
            kind,
            header: header.map_err(|_| damaged("an object with a long header"))?,
            base: NO_BASE,
            start,
            size: 0,
            stored: 0,
        })
    }

    fn header(&mut self) -> Result<Header, Failure> {
        let [first] = self.take()?;
        let mut size = u64::from(first & 0x0f);
        let mut more = first >= 0x80;
        let mut shift = 4;
        while more {
            let [byte] = self.take()?;
            if shift > 56 {
                return Err(damaged("an object's size is out of range"));
            }
            size |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            more = byte >= 0x80;
        }
        Ok(Header {
            kind: first >> 4 & 7,
            size,
        })
    }

    /// Reads how far before a delta its base begins.
    fn offset(&mut self) -> Result<u64, Failure> {
        let mut offset = 0_u64;
        for _ in 0..9 {
            let [byte] = self.take()?;
            offset = offset << 7 | u64::from(byte & 0x7f);
            if byte < 0x80 {
                return Ok(offset);
            }
            offset += 1;
        }
        Err(damaged("a base's offset is out of range"))
    }

    /// Inflates the zlib stream that begins here. It must have `size` bytes.
    fn inflate(&mut self, size: u64, sink: &mut dyn FnMut(&[u8])) -> Result<(), Failure> {
        self.inflater.reset(true);
        let mut is_full = false;
        loop {
            if self.piece.is_empty() && !is_full {
                self.fill()?;
            }
            let before = (self.inflater.total_in(), self.inflater.total_out());
            let flush = FlushDecompress::None;
            let status = self
                .inflater
                .decompress(&self.piece, &mut self.inflated, flush);
            let status = status.map_err(|_| damaged("an object cannot be inflated"))?;
            let (read, total) = (self.inflater.total_in(), self.inflater.total_out());
            let written = usize::try_from(total - before.1).unwrap_or(usize::MAX);
            if total > size {
                return Err(damaged("an object is longer than its size"));
            }
            sink(&self.inflated[..written]);
            self.consume(usize::try_from(read - before.0).unwrap_or(usize::MAX))?;
            if status == Status::StreamEnd {
                break;
            }
            if (read, total) == before && !self.piece.is_empty() {
                return Err(damaged("an object cannot be inflated"));
            }
            is_full = written == self.inflated.len();
        }
        if self.inflater.total_out() != size {
            return Err(damaged("an object is shorter than its size"));
        }
        Ok(())
    }

    /// Compares the pack with its checksum.
    fn trailer(&mut self) -> Result<(), Failure> {
        let expected: [u8; 20] = std::mem::take(&mut self.checksum).finalize().into();
        if self.take::<20>()? != expected {
            return Err(damaged("its checksum is wrong"));
        }
        while self.piece.is_empty() {
            match (self.pieces)()? {
                Some(piece) => self.piece = piece,
                None => return Ok(()),
            }
        }
        Err(damaged("more follows its checksum"))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Failure> {
        let mut taken = [0; N];
        let mut at = 0;
        while at < N {
            if self.piece.is_empty() {
                self.fill()?;
            }
            let count = self.piece.len().min(N - at);
            taken[at..at + count].copy_from_slice(&self.piece[..count]);
            self.consume(count)?;
            at += count;
        }
        Ok(taken)
    }

    fn consume(&mut self, count: usize) -> Result<(), Failure> {
        let bytes = &self.piece[..count];
        self.checksum.update(bytes);
        self.pack.bytes.push(bytes)?;
        self.piece.advance(count);
        Ok(())
    }

    fn fill(&mut self) -> Result<(), Failure> {
        while self.piece.is_empty() {
            let piece = (self.pieces)()?;
            self.piece = piece.ok_or_else(|| Fault::transient("the server's pack ended early"))?;
        }
        Ok(())
    }
}

pub(super) fn damaged(what: &str) -> Failure {
    Failure::Surprise(format!("its pack is damaged: {what}"))
}
