//! Counts tokens like OpenAI's 4o models (`o200k_base`).

use std::hash::BuildHasher;

use foldhash::fast::RandomState;

/// Counts the tokens of `text`. Special tokens are ordinary text.
///
/// The table is built in and unpacked at first use: 50 ms and 68 MB, once a process. Counts of recent
/// words are cached, which takes a third off the time of a usual digest. Most of the rest is
/// splitting the text into words.
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

/// Counts of recent words: one for each place, of the last word that hashed to it.
struct Remembered {
    hash: RandomState,
    /// A power of two. An empty place has a key that no word packs to.
    places: Vec<(u128, u64)>,
}

impl Remembered {
    /// Sized so that clearing the places does not cost more than they save: 4 MB at most.
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

/// Packs a word and its length into a number; `None` for the few words of more than 15 bytes.
fn packed(word: &str) -> Option<u128> {
    let mut bytes = [0; 16];
    bytes[..15]
        .get_mut(..word.len())?
        .copy_from_slice(word.as_bytes());
    bytes[15] = word.len() as u8;
    Some(u128::from_le_bytes(bytes))
}

/// Counts the tokens of `tree` followed by `content`, without concatenating them if possible: no match of
/// o200k_base's splitting expression spans a newline and the `=` of a separator.
pub(super) fn count_both(tree: &str, content: &str) -> u64 {
    if content.is_empty() || (tree.ends_with('\n') && content.starts_with('=')) {
        return count(tree) + count(content);
    }
    count(&[tree, content].concat())
}

/// Returns the count as gitingest prints it: `123`, `1.2k`, `1.2M`.
pub(super) fn label(tokens: u64) -> String {
    // Divides and rounds as Python does: the nearest double, to even.
    if tokens >= 1_000_000 {
        format!("{:.1}M", tokens as f64 / 1e6)
    } else if tokens >= 1_000 {
        format!("{:.1}k", tokens as f64 / 1e3)
    } else {
        tokens.to_string()
    }
}

/// Returns the last place where `text` can be split without changing the number of tokens, whatever
/// follows: between a newline and an ASCII letter, which no match of o200k_base's splitting expression
/// spans. 0 if there is none.
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
