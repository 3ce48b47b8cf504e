//! The vocabulary: all tokens by rank, and an index by their bytes.

use crate::layout::{ID_BITS, SLOTS, hash};

/// A token's place in the vocabulary. The pair whose token has the lowest one is merged first.
pub type Rank = u32;

/// Bytes of the longest token.
pub const LONGEST: usize = 128;

static VOCABULARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vocabulary"));
static OFFSETS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/offsets"));
static INDEX: &[u8; SLOTS * 4] = include_bytes!(concat!(env!("OUT_DIR"), "/index"));

/// Returns the rank of a token, if these bytes are one.
pub fn rank(bytes: &[u8]) -> Option<Rank> {
    let hash = hash(bytes);
    let mut at = hash.slot;
    loop {
        let slot = number(INDEX, at);
        if slot == 0 {
            return None;
        }
        if slot >> ID_BITS == hash.tag {
            let rank = slot % (1 << ID_BITS) - 1;
            if token(rank) == bytes {
                return Some(rank);
            }
        }
        at = (at + 1) % SLOTS;
    }
}

fn token(rank: Rank) -> &'static [u8] {
    let at = rank as usize;
    &VOCABULARY[number(OFFSETS, at) as usize..number(OFFSETS, at + 1) as usize]
}

fn number(table: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(table.as_chunks().0[at])
}
