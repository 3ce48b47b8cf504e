//! What must hold for anything that a host sends. `common/testing/fuzz` looks for inputs for which it does
//! not; its seeds are replayed here.

/// Reads an answer in git's packets; the first byte says how it is cut.
pub fn packets(input: &[u8]) {
    super::wire::fuzz::packets(input);
}

/// Reads a pack: one that a script writes, or bytes as they are.
pub fn pack(input: &[u8]) {
    super::pack::fuzz::pack(input);
}

/// Reads a tree object.
pub fn tree(input: &[u8]) {
    super::objects::fuzz::tree(input);
}

/// Classifies an answer: `STATUS`, lines of headers, an empty line and a body.
pub fn answer(input: &[u8]) {
    super::answer::fuzz::answer(input);
}

#[cfg(test)]
mod tests {
    use testing::seeds::replay;

    #[test]
    fn packets_hold() {
        replay("packets", super::packets);
    }

    #[test]
    fn packs_hold() {
        replay("pack", super::pack);
    }

    #[test]
    fn trees_hold() {
        replay("tree", super::tree);
    }

    #[test]
    fn answers_hold() {
        replay("answer", super::answer);
    }
}
