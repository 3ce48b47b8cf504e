//! Counts a word's tokens: those that are left when no two neighbours are a token together. Of all pairs
//! that are, the one of the lowest rank is merged first, and of equals the first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::table::{self, LONGEST, Rank};

/// Bytes up to which searching all pairs is quicker than keeping them in order.
const SHORT: usize = 64;
/// No rank: the pair is not a token, or there is no pair.
const NONE: Rank = Rank::MAX;

/// Counts the tokens of one of the words of a text.
pub fn count_word(word: &str) -> u64 {
    let word = word.as_bytes();
    if rank(word) != NONE {
        return 1;
    }
    let tokens = match word.len() {
        0..=SHORT => short(word),
        _ => long(word),
    };
    tokens as u64
}

fn rank(bytes: &[u8]) -> Rank {
    if bytes.len() > LONGEST {
        return NONE;
    }
    table::rank(bytes).unwrap_or(NONE)
}

/// Merges in time that is square to the length, without any allocation.
fn short(word: &[u8]) -> usize {
    // Where each part begins, and the rank of the pair that begins there.
    let mut starts = [0_u8; SHORT + 1];
    let mut ranks = [NONE; SHORT];
    let mut parts = word.len();
    for (at, start) in starts.iter_mut().enumerate().take(parts + 1) {
        *start = at as u8;
    }
    for (rank_of, pair) in ranks.iter_mut().zip(word.windows(2)) {
        *rank_of = rank(pair);
    }
    loop {
        let pairs = ranks[..parts].iter().enumerate();
        let Some((first, lowest)) = pairs.min_by_key(|(_, rank)| **rank) else {
            return parts;
        };
        if *lowest == NONE {
            return parts;
        }
        starts.copy_within(first + 2..=parts, first + 1);
        ranks.copy_within(first + 1..parts, first);
        parts -= 1;
        let pair = |at: usize| match starts[..=parts].get(at + 2) {
            Some(end) => rank(&word[starts[at].into()..(*end).into()]),
            None => NONE,
        };
        ranks[first] = pair(first);
        if let Some(before) = first.checked_sub(1) {
            ranks[before] = pair(before);
        }
    }
}

/// Merges in time that is hardly more than linear: each pair is kept by its rank and place.
fn long(word: &[u8]) -> usize {
    let mut parts = Parts::new(word);
    let mut left = word.len();
    while let Some(Reverse(key)) = parts.pairs.pop() {
        let (rank, first) = ((key >> 32) as Rank, key as u32 as usize);
        // Otherwise one of its parts has been merged since.
        if parts.ranks[first] == rank {
            parts.merge(first);
            left -= 1;
        }
    }
    left
}

/// The parts of a long word. A part is known by its first byte.
struct Parts<'a> {
    word: &'a [u8],
    /// Where the part ends, and the next begins.
    ends: Vec<u32>,
    /// Where the part before begins.
    before: Vec<u32>,
    /// Rank of the pair that begins with the part.
    ranks: Vec<Rank>,
    /// Pairs to merge, as rank and place in one number: the lowest comes first.
    pairs: BinaryHeap<Reverse<u64>>,
}

impl<'a> Parts<'a> {
    fn new(word: &'a [u8]) -> Self {
        let length = u32::try_from(word.len()).expect("a word is shorter than 4 GB");
        let mut ranks: Vec<Rank> = word.windows(2).map(rank).collect();
        ranks.push(NONE);
        let pairs = ranks.iter().enumerate();
        let pairs = pairs.filter(|(_, rank)| **rank != NONE);
        let pairs = pairs.map(|(at, rank)| Reverse(key(*rank, at))).collect();
        Self {
            word,
            ends: (1..=length).collect(),
            before: (0..length).map(|at| at.saturating_sub(1)).collect(),
            ranks,
            pairs,
        }
    }

    /// Merges the part that begins at `first` with the next.
    fn merge(&mut self, first: usize) {
        let second = self.ends[first] as usize;
        let end = self.ends[second];
        self.ends[first] = end;
        self.ranks[second] = NONE;
        if let Some(before) = self.before.get_mut(end as usize) {
            *before = first as u32;
        }
        self.look(first);
        if first > 0 {
            self.look(self.before[first] as usize);
        }
    }

    /// Finds out what the pair is that begins at `first`.
    fn look(&mut self, first: usize) {
        let second = self.ends[first] as usize;
        let end = self.ends.get(second);
        let rank = end.map_or(NONE, |end| rank(&self.word[first..*end as usize]));
        self.ranks[first] = rank;
        if rank != NONE {
            self.pairs.push(Reverse(key(rank, first)));
        }
    }
}

fn key(rank: Rank, first: usize) -> u64 {
    u64::from(rank) << 32 | first as u64
}
