//! Counts tokens as OpenAI's models of the 4o family do (`o200k_base`).

use std::collections::HashMap;

use foldhash::fast::RandomState;

/// Most words whose counts are remembered: two megabytes.
const REMEMBERED: usize = 1 << 16;

/// The number of tokens of `text`, in which special tokens are ordinary text.
///
/// The table is built into the program and unpacked at first use: 50 ms and 68 MB, once a process.
/// Each word that comes again is counted only once: that takes a third off the time of a usual
/// digest, and half off that of a very large one. What remains is splitting the text into words.
pub(super) fn count(text: &str) -> u64 {
    let tokenizer = bpe_openai::o200k_base();
    // Most words are shorter than the standard library's hash takes to set up.
    let mut remembered: HashMap<u128, u64, RandomState> = HashMap::default();
    let count = |word: &str| tokenizer.bpe.count(word.as_bytes()) as u64;
    tokenizer
        .split(text)
        .map(|word| {
            let Some(packed) = packed(word) else {
                return count(word);
            };
            if let Some(known) = remembered.get(&packed) {
                return *known;
            }
            let tokens = count(word);
            if remembered.len() < REMEMBERED {
                remembered.insert(packed, tokens);
            }
            tokens
        })
        .sum()
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
