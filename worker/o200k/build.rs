//! Makes the tables: the vocabulary from bpe-openai's, the classes of characters from the same
//! regex-syntax that bpe-openai's splitting expression is compiled with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

use regex_syntax::hir::{Class, HirKind};

#[path = "src/layout.rs"]
mod layout;

use layout::{
    BLOCK, ID_BITS, LINE_END, LOWER, MARK, NUMBER, SLOTS, SPACE, SYMBOL, UNCASED, UPPER, hash,
};

/// The classes, as the splitting expression spells them.
const CLASSES: [(u8, &str); 7] = [
    (UPPER, r"[\p{Lu}\p{Lt}]"),
    (LOWER, r"\p{Ll}"),
    (UNCASED, r"[\p{Lm}\p{Lo}]"),
    (MARK, r"\p{M}"),
    (NUMBER, r"\p{N}"),
    (SPACE, r"[\s--\r\n]"),
    (LINE_END, r"[\r\n]"),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/layout.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    vocabulary(&out);
    classes(&out);
}

/// Writes all tokens in the order of their ranks, where each begins, and an index by hash.
fn vocabulary(out: &Path) {
    let bpe = &bpe_openai::o200k_base().bpe;
    let tokens = u32::try_from(bpe.num_tokens()).expect("ranks are of 32 bits");
    assert!(
        tokens < 1 << ID_BITS,
        "a slot has no room for the last rank"
    );
    let mut bytes = Vec::new();
    let mut offsets = Vec::new();
    let mut index = vec![0_u32; SLOTS];
    for rank in 0..tokens {
        let token = bpe.token_bytes(rank);
        offsets.push(bytes.len() as u32);
        bytes.extend_from_slice(token);
        let hash = hash(token);
        let mut at = hash.slot;
        while index[at] != 0 {
            at = (at + 1) % SLOTS;
        }
        index[at] = hash.tag << ID_BITS | (rank + 1);
    }
    offsets.push(bytes.len() as u32);
    write(out, "vocabulary", &bytes);
    write(out, "offsets", &little_endian(&offsets));
    write(out, "index", &little_endian(&index));
}

/// Writes the class of every character in two stages: which block a character's block is equal to,
/// and the blocks.
fn classes(out: &Path) {
    let mut class_of = vec![SYMBOL; 0x11_0000];
    for (class, expression) in CLASSES {
        let hir = regex_syntax::parse(expression).expect("it is an expression");
        let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else {
            panic!("{expression} is no class of characters");
        };
        for range in ranges.ranges() {
            class_of[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    let mut blocks: Vec<u8> = Vec::new();
    let mut known = HashMap::new();
    let mut stage: Vec<u8> = Vec::new();
    for block in class_of.chunks(BLOCK) {
        let number = *known.entry(block).or_insert_with(|| {
            blocks.extend_from_slice(block);
            blocks.len() / BLOCK - 1
        });
        stage.push(u8::try_from(number).expect("few blocks differ"));
    }
    write(out, "stage", &stage);
    write(out, "blocks", &blocks);
}

fn little_endian(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn write(out: &Path, name: &str, bytes: &[u8]) {
    fs::write(out.join(name), bytes).expect("cargo's own folder can be written");
}
