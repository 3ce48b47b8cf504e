//! Packs, good and hostile, written object by object.

use flate2::{Compress, Compression, FlushCompress};
use sha1::{Digest, Sha1};

/// The name of an object.
pub type Id = [u8; 20];

/// The kind of an object.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Its number in a pack is 1.
    Commit = 1,
    /// 2
    Tree,
    /// 3
    Blob,
    /// 4
    Tag,
}

/// The mode of an entry in a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A plain file.
    File,
    /// A symbolic link.
    Symlink,
    /// A directory.
    Directory,
    /// A commit of another repository.
    Submodule,
}

/// Writes a pack.
#[derive(Clone, Debug, Default)]
pub struct PackWriter {
    body: Vec<u8>,
    /// Objects so far.
    pub count: u32,
}

impl PackWriter {
    /// Returns where the next object will be.
    pub fn position(&self) -> u64 {
        12 + self.body.len() as u64
    }

    /// Writes a header of this kind that claims `size`, and `rest`. Returns where it is.
    pub fn raw(&mut self, kind: u8, mut size: u64, rest: &[&[u8]]) -> u64 {
        let start = self.position();
        let mut byte = kind << 4 | (size & 0x0f) as u8;
        size >>= 4;
        while size > 0 {
            self.body.push(byte | 0x80);
            byte = (size & 0x7f) as u8;
            size >>= 7;
        }
        self.body.push(byte);
        rest.iter().for_each(|bytes| self.body.extend(*bytes));
        self.count += 1;
        start
    }

    /// Writes an object. Returns where it is, and its name.
    pub fn object(&mut self, kind: Kind, bytes: &[u8]) -> (u64, Id) {
        let start = self.raw(kind as u8, bytes.len() as u64, &[&deflated(bytes)]);
        (start, object_name(kind, bytes))
    }

    /// Writes a blob.
    pub fn blob(&mut self, bytes: &[u8]) -> Id {
        self.object(Kind::Blob, bytes).1
    }

    /// Writes a tree.
    pub fn tree<N: AsRef<[u8]>>(&mut self, entries: &[(Mode, N, Id)]) -> Id {
        self.object(Kind::Tree, &tree(entries)).1
    }

    /// Writes a commit.
    pub fn commit(&mut self, tree: Id) -> Id {
        let who = "x <x> 1 +0000";
        let text = format!("tree {}\nauthor {who}\ncommitter {who}\n\nx\n", hex(tree));
        self.object(Kind::Commit, text.as_bytes()).1
    }

    /// Writes a delta on the object at `base`. Returns where it is.
    pub fn delta(&mut self, base: u64, delta: &[u8]) -> u64 {
        let mut back = self.position() - base;
        let mut offset = vec![(back & 0x7f) as u8];
        while back > 0x7f {
            back = (back >> 7) - 1;
            offset.push((back & 0x7f) as u8 | 0x80);
        }
        offset.reverse();
        self.raw(6, delta.len() as u64, &[&offset, &deflated(delta)])
    }

    /// Writes a delta on the object of this name.
    pub fn named_delta(&mut self, base: Id, delta: &[u8]) {
        self.raw(7, delta.len() as u64, &[&base, &deflated(delta)]);
    }

    /// Writes a blob of `count` MiB of zeros, in next to no time.
    pub fn zeros(&mut self, count: usize) {
        let mut deflater = Compress::new(Compression::best(), false);
        let mut piece = Vec::with_capacity(1 << 16);
        // Ends at a byte, so that it can be repeated.
        deflater
            .compress_vec(&vec![0; 1 << 20], &mut piece, FlushCompress::Full)
            .expect("deflating needs memory alone");
        let sum = ((((count << 20) % 65_521) << 16) | 1) as u32;
        let stream = [
            &b"\x78\x01"[..],
            &piece.repeat(count),
            b"\x03\0",
            &sum.to_be_bytes(),
        ];
        self.raw(3, (count as u64) << 20, &stream);
    }

    /// Writes bytes that are no object.
    pub fn garbage(&mut self, bytes: &[u8]) {
        self.body.extend(bytes);
    }

    /// Returns the pack.
    pub fn finish(&self) -> Vec<u8> {
        self.claiming(self.count)
    }

    /// Returns the pack with another number of objects in its header.
    pub fn claiming(&self, count: u32) -> Vec<u8> {
        let mut pack = [&b"PACK\0\0\0\x02"[..], &count.to_be_bytes(), &self.body].concat();
        pack.extend(Sha1::digest(&pack));
        pack
    }
}

/// Returns the name of an object.
pub fn object_name(kind: Kind, bytes: &[u8]) -> Id {
    let kind = match kind {
        Kind::Commit => "commit",
        Kind::Tree => "tree",
        Kind::Blob => "blob",
        Kind::Tag => "tag",
    };
    let mut name = Sha1::new_with_prefix(format!("{kind} {}\0", bytes.len()));
    name.update(bytes);
    name.finalize().into()
}

/// Returns a name as it is written.
pub fn hex(id: Id) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns a tree object.
pub fn tree<N: AsRef<[u8]>>(entries: &[(Mode, N, Id)]) -> Vec<u8> {
    let mut tree = Vec::new();
    for (mode, name, id) in entries {
        tree.extend(match mode {
            Mode::File => b"100644 ".as_slice(),
            Mode::Symlink => b"120000 ",
            Mode::Directory => b"40000 ",
            Mode::Submodule => b"160000 ",
        });
        tree.extend(name.as_ref());
        tree.push(0);
        tree.extend(id);
    }
    tree
}

/// Returns a zlib stream of these bytes.
pub fn deflated(bytes: &[u8]) -> Vec<u8> {
    if bytes.len() < 100 {
        return stored(bytes);
    }
    let mut out = Vec::with_capacity(bytes.len() / 1000 + 1000);
    let mut deflater = Compress::new(Compression::default(), true);
    loop {
        let input = &bytes[deflater.total_in() as usize..];
        let status = deflater.compress_vec(input, &mut out, FlushCompress::Finish);
        if status.expect("deflating needs memory alone") == flate2::Status::StreamEnd {
            return out;
        }
        out.reserve(out.capacity());
    }
}

/// Returns a zlib stream that does not deflate its few bytes, which takes no time.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let (mut low, mut high) = (1, 0);
    for byte in bytes {
        low += u32::from(*byte);
        high += low;
    }
    let sum = ((high % 65_521) << 16) | low;
    let length = bytes.len() as u16;
    let head = [length.to_le_bytes(), (!length).to_le_bytes()].concat();
    [b"\x78\x01\x01", &head[..], bytes, &sum.to_be_bytes()].concat()
}

/// Returns a number as the head of a delta has it.
pub fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// Returns a delta that appends `new`, of up to 127 bytes, to a base of less than 16 MiB.
pub fn appending(base: usize, new: &[u8]) -> Vec<u8> {
    let [low, middle, high, ..] = base.to_le_bytes();
    let sizes = [varint(base as u64), varint((base + new.len()) as u64)].concat();
    [
        &sizes[..],
        &[0xf0, low, middle, high, new.len() as u8][..],
        new,
    ]
    .concat()
}

/// Returns a delta that makes `size` bytes, and its number, of a base of 64 KiB.
pub fn repeating(size: usize, number: u32) -> Vec<u8> {
    let mut delta = [varint(1 << 16), varint(size as u64)].concat();
    // Copies of 64 KiB from the start.
    delta.extend(std::iter::repeat_n(0x80, (size - 4) >> 16));
    let rest = (size - 4) & 0xffff;
    delta.extend([0xb0, rest as u8, (rest >> 8) as u8, 4]);
    delta.extend(number.to_be_bytes());
    delta
}
