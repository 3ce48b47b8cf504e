//! Counts tokens like OpenAI's 4o models (`o200k_base`).

/// Counts the tokens of `text`. Special tokens are ordinary text.
pub(super) fn count(text: &str) -> u64 {
    o200k::count(text)
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
