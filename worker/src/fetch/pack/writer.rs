//! Writes packs: as git does, or as nobody should.

use flate2::{Compress, Compression, FlushCompress};
use sha1::{Digest, Sha1};

use super::stream::{EntryKind, object_name};
use crate::fetch::answer::TokenRefusal;
use crate::fetch::http::ProgressSink;
use crate::fetch::policy::FetchWay;
use crate::source::{self, ObjectId};

/// Hears of progress, and does not care.
pub(super) struct Nobody;

impl ProgressSink for Nobody {
    fn way(&self, _: FetchWay, _: &str) {}
    fn received(&self, _: u64) {}
    fn alive(&self) {}
    fn token_refused(&self, _: TokenRefusal) {}
    fn token_used_up(&self, _: std::time::Duration) {}
}

/// Writes a pack.
#[derive(Default)]
pub(super) struct Writer {
    pub(super) body: Vec<u8>,
    pub(super) count: u32,
}

impl Writer {
    /// Writes a header that claims `size`, and `rest`. Returns where it is.
    pub(super) fn raw(&mut self, kind: u8, mut size: u64, rest: &[&[u8]]) -> u64 {
        let start = 12 + self.body.len() as u64;
        let mut byte = kind << 4 | (size & 0x0f) as u8;
        size >>= 4;
        while size > 0 {
            self.body.push(byte | 0x80);
            byte = (size & 0x7f) as u8;
            size >>= 7;
        }
        self.body.push(byte);
        self.body.extend(rest.concat());
        self.count += 1;
        start
    }

    pub(super) fn object(&mut self, kind: EntryKind, bytes: &[u8]) -> (u64, ObjectId) {
        let number = match kind {
            EntryKind::Commit => 1,
            EntryKind::Tree => 2,
            EntryKind::Tag => 4,
            _ => 3,
        };
        let start = self.raw(number, bytes.len() as u64, &[&deflated(bytes)]);
        (start, object_name(kind, bytes))
    }

    #[cfg(test)]
    pub(super) fn blob(&mut self, bytes: &[u8]) -> ObjectId {
        self.object(EntryKind::Blob, bytes).1
    }

    pub(super) fn tree<N: AsRef<[u8]>>(
        &mut self,
        entries: &[(source::EntryKind, N, ObjectId)],
    ) -> ObjectId {
        self.object(EntryKind::Tree, &tree(entries)).1
    }

    pub(super) fn commit(&mut self, tree: ObjectId) -> ObjectId {
        let text = format!("tree {tree}\nauthor x <x> 1 +0000\n\nx\n");
        self.object(EntryKind::Commit, text.as_bytes()).1
    }

    /// Writes a delta on the object at `base`.
    pub(super) fn delta(&mut self, base: u64, delta: &[u8]) -> u64 {
        let mut back = 12 + self.body.len() as u64 - base;
        let mut offset = vec![(back & 0x7f) as u8];
        while back > 0x7f {
            back = (back >> 7) - 1;
            offset.push((back & 0x7f) as u8 | 0x80);
        }
        offset.reverse();
        self.raw(6, delta.len() as u64, &[&offset, &deflated(delta)])
    }

    pub(super) fn named_delta(&mut self, base: ObjectId, delta: &[u8]) {
        self.raw(7, delta.len() as u64, &[&base.0, &deflated(delta)]);
    }

    pub(super) fn finish(&self) -> Vec<u8> {
        self.claiming(self.count)
    }

    pub(super) fn claiming(&self, count: u32) -> Vec<u8> {
        let head = [&b"PACK\0\0\0\x02"[..], &count.to_be_bytes()].concat();
        let mut pack = [head, self.body.clone()].concat();
        pack.extend(Sha1::digest(&pack));
        pack
    }
}

pub(super) fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 100);
    let mut deflater = Compress::new(Compression::default(), true);
    deflater
        .compress_vec(bytes, &mut out, FlushCompress::Finish)
        .expect("there is room");
    out
}

pub(super) fn tree<N: AsRef<[u8]>>(entries: &[(source::EntryKind, N, ObjectId)]) -> Vec<u8> {
    let mut tree = Vec::new();
    for (kind, name, id) in entries {
        let mode = match kind {
            source::EntryKind::File => "100644 ",
            source::EntryKind::Symlink => "120000 ",
            source::EntryKind::Directory => "40000 ",
            source::EntryKind::Submodule => "160000 ",
        };
        tree.extend_from_slice(mode.as_bytes());
        tree.extend_from_slice(name.as_ref());
        tree.push(0);
        tree.extend_from_slice(&id.0);
    }
    tree
}

pub(super) fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A delta that appends `new` to a base of `base` bytes.
#[cfg(test)]
pub(super) fn appending(base: usize, new: &[u8]) -> Vec<u8> {
    let [low, high, ..] = base.to_le_bytes();
    let sizes = [varint(base as u64), varint((base + new.len()) as u64)].concat();
    [&sizes[..], &[0xb0, low, high, new.len() as u8][..], new].concat()
}
