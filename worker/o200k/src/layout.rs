//! What the tables look like, for the build script that writes them and the modules that read them.

/// Slots of the index, 2.6 for each token. A slot is 0, or a hash's tag above a rank plus one.
pub(crate) const SLOTS: usize = 1 << 19;
/// Bits of a slot for the rank.
pub(crate) const ID_BITS: u32 = 18;
/// Characters of a block.
pub(crate) const BLOCK: usize = 256;

/// Uppercase and titlecase letters.
pub(crate) const UPPER: u8 = 1;
/// Lowercase letters.
pub(crate) const LOWER: u8 = 1 << 1;
/// Letters without case.
pub(crate) const UNCASED: u8 = 1 << 2;
/// Combining marks.
pub(crate) const MARK: u8 = 1 << 3;
/// Digits and other numbers.
pub(crate) const NUMBER: u8 = 1 << 4;
/// White space other than line ends.
pub(crate) const SPACE: u8 = 1 << 5;
/// Carriage return and line feed.
pub(crate) const LINE_END: u8 = 1 << 6;
/// All other characters.
pub(crate) const SYMBOL: u8 = 1 << 7;

/// Where to look for a token.
pub(crate) struct Hash {
    /// The first slot.
    pub(crate) slot: usize,
    /// What tells most other tokens of the same slot.
    pub(crate) tag: u32,
}

/// Hashes a token's bytes. Anybody can find tokens that collide, but not add one: how long a search may
/// take was settled when the index was made.
pub(crate) fn hash(bytes: &[u8]) -> Hash {
    let mut state = bytes.len() as u64;
    let mut rest = bytes;
    while let Some((first, more)) = rest.split_first_chunk() {
        state = mix(state ^ u64::from_le_bytes(*first));
        rest = more;
    }
    // The last bytes, some of them a second time: without a copy of a length that is not known.
    let last = match (bytes.last_chunk(), bytes.first_chunk(), bytes.last_chunk()) {
        (Some(last), ..) => u64::from_le_bytes(*last),
        (None, Some(first), Some(last)) => {
            u64::from(u32::from_le_bytes(*first)) << 32 | u64::from(u32::from_le_bytes(*last))
        }
        _ => bytes
            .iter()
            .fold(0, |last, &byte| last << 8 | u64::from(byte)),
    };
    state = mix(state ^ last);
    Hash {
        slot: state as usize % SLOTS,
        tag: (state >> (32 + ID_BITS)) as u32,
    }
}

/// The two halves of a product, folded.
fn mix(state: u64) -> u64 {
    let product = u128::from(state ^ 0x2d35_8dcc_aa6c_78a5) * 0x8bb8_4b93_962e_acc9;
    product as u64 ^ (product >> 64) as u64
}
