//! Counts tokens as OpenAI's models of the 4o family do (`o200k_base`).

use std::hash::BuildHasher;

use foldhash::fast::RandomState;

/// The number of tokens of `text`, in which special tokens are ordinary text.
///
/// The table is built into the program and unpacked at first use: 50 ms and 68 MB, once a process.
/// Words come again and again, so the counts of recent ones are remembered: that takes a third off
/// the time of a usual digest, and half off that of a very large one. Most of what remains is the
/// splitting of the text into words.
pub(super) fn count(text: &str) -> u64 {
    let tokenizer = bpe_openai::o200k_base();
    let mut remembered = Remembered::for_text(text);
    let count = |word: &str| tokenizer.bpe.count(word.as_bytes()) as u64;
    let words = tokenizer.split(text);
    words
        .map(|word| match packed(word) {
            Some(packed) => remembered.get_or(packed, || count(word)),
            None => count(word),
        })
        .sum()
}

/// The counts of recent words: one for each place, the last one that fell there.
struct Remembered {
    hash: RandomState,
    /// A power of two of them. An empty place has a key that no word packs to.
    places: Vec<(u128, u64)>,
}

impl Remembered {
    /// With as many places as make up for the time to clear them: 4 MB at most.
    fn for_text(text: &str) -> Self {
        let places = (text.len() / 64).next_power_of_two().clamp(1 << 6, 1 << 17);
        Self {
            hash: RandomState::default(),
            places: vec![(u128::MAX, 0); places],
        }
    }

    fn get_or(&mut self, key: u128, count: impl FnOnce() -> u64) -> u64 {
        let at = self.hash.hash_one(key) as usize & (self.places.len() - 1);
        let place = &mut self.places[at];
        if place.0 != key {
            *place = (key, count());
        }
        place.1
    }
}

/// A word and its length in one number; `None` for one of more than 15 bytes, which are few.
fn packed(word: &str) -> Option<u128> {
    let mut bytes = [0; 16];
    bytes
        .get_mut(..word.len())?
        .copy_from_slice(word.as_bytes());
    // A word of 16 bytes would lose its last one to this.
    (word.len() < 16).then(|| {
        bytes[15] = word.len() as u8;
        u128::from_le_bytes(bytes)
    })
}

/// The number of tokens of `tree` and `content` behind each other, without putting them there: no
/// match of o200k_base's splitting expression goes from a newline on to the `=` of a separator.
pub(super) fn count_both(tree: &str, content: &str) -> u64 {
    if content.is_empty() || (tree.ends_with('\n') && content.starts_with('=')) {
        return count(tree) + count(content);
    }
    count(&[tree, content].concat())
}

/// The figure as gitingest prints it: `123`, `1.2k`, `1.2M`.
pub(super) fn label(tokens: u64) -> String {
    // Division and rounding as in Python: of the nearest double, to even.
    if tokens >= 1_000_000 {
        format!("{:.1}M", tokens as f64 / 1e6)
    } else if tokens >= 1_000 {
        format!("{:.1}k", tokens as f64 / 1e3)
    } else {
        tokens.to_string()
    }
}

/// The last place in `text` where it can be cut in two so that the tokens of the parts add up to
/// those of the whole, whatever comes after it: between a newline and an ASCII letter, which no
/// match of o200k_base's splitting expression spans. 0 if there is none.
pub(super) fn last_seam(text: &str) -> usize {
    let is_seam = |pair: &[u8]| pair[0] == b'\n' && pair[1].is_ascii_alphabetic();
    text.as_bytes()
        .windows(2)
        .rposition(is_seam)
        .map_or(0, |i| i + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shortened_as_gitingest_does() {
        for (tokens, expected) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1.0k"),
            (1_250, "1.2k"),
            (1_350, "1.4k"),
            (99_949, "99.9k"),
            (999_950, "1000.0k"),
            (1_000_000, "1.0M"),
            (1_250_000, "1.2M"),
        ] {
            assert_eq!(label(tokens), expected);
        }
    }

    #[test]
    fn words_that_come_again_count_as_the_tokenizer_counts_them() {
        let text = "fn main() { println!(\"Größe 日本 😀\"); }\r\n\t  x_y2 = 12345;\n".repeat(50);
        assert_eq!(
            count(&text),
            bpe_openai::o200k_base().count(text.as_str()) as u64
        );
    }

    #[test]
    fn special_tokens_are_text() {
        assert_eq!(count("hello"), 1);
        assert!(count("<|endoftext|>") > 1);
    }

    #[test]
    fn tokens_of_the_parts_add_up_at_a_seam() {
        let text =
            "  fn a() {\n\n\n    b;//\r\n}\n/\nx\t \n \nabc\n\n\nzz's ä\u{2028}\nq\n===\n日本\nE";
        let mut end = text.len();
        loop {
            let seam = last_seam(&text[..end]);
            assert_eq!(
                count(&text[..seam]) + count(&text[seam..]),
                count(text),
                "{seam}"
            );
            if seam == 0 {
                break;
            }
            end = seam;
        }
    }
}
