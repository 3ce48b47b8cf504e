//! Puts the parts of a digest together, and cuts the text to its limit.

use super::{CUT_NOTICE, Facts, tokens};

/// A finished digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DigestText {
    /// The text to store.
    pub text: String,
    /// Whether the text was cut; it then ends with [`CUT_NOTICE`].
    pub truncated: bool,
    /// Tokens of tree and content, as far as they are in the text.
    pub tokens: u64,
}

/// Puts `tree` and `content`, as [`write`](super::write::write) emitted them, below their summary.
///
/// A text longer than `max_text_bytes` is cut there, at the last character boundary, and
/// [`CUT_NOTICE`] added. The summary's token count is that of what remains. The count takes room
/// itself: one digit is reserved first, then more as long as it needs more. More digits mean less
/// text, so the final count may be shorter; the text then ends as many bytes before the limit.
pub fn assemble(
    facts: &Facts,
    tree: &str,
    content: &str,
    max_text_bytes: Option<u64>,
) -> DigestText {
    let max = max_text_bytes.map_or(usize::MAX, |max| usize::try_from(max).unwrap_or(usize::MAX));
    let frame = facts.summary("").len() + "\n\n".len();
    let whole = frame + tree.len() + "\n".len() + content.len();
    if whole < max {
        let tokens = tokens::count_both(tree, content);
        let label = tokens::label(tokens);
        if whole + label.len() <= max {
            let text = [&facts.summary(&label), "\n\n", tree, "\n", content].concat();
            return DigestText {
                text,
                truncated: false,
                tokens,
            };
        }
    }

    let mut visible = Visible {
        tree,
        content,
        room: max.saturating_sub(frame),
        counted: None,
    };
    let mut digits = 1;
    let tokens = loop {
        let tokens = visible.tokens(digits);
        let needed = tokens::label(tokens).len();
        if needed <= digits {
            break tokens;
        }
        digits = needed;
    };
    let (tree, content) = visible.parts(digits);
    let summary = facts.summary(&tokens::label(tokens));
    let mut text = [&summary, "\n\n", tree].concat();
    if let Some(content) = content {
        text.push('\n');
        text.push_str(content);
    }
    // Only needed if the limit is shorter than a summary.
    text.truncate(text.floor_char_boundary(max));
    text.push_str(CUT_NOTICE);
    DigestText {
        text,
        truncated: true,
        tokens,
    }
}

/// The visible part of tree and content, depending on the room that the token count takes.
struct Visible<'a> {
    tree: &'a str,
    content: &'a str,
    /// Bytes for token count, tree and content.
    room: usize,
    /// A place in tree and content, and the number of tokens before it.
    counted: Option<(usize, u64)>,
}

impl<'a> Visible<'a> {
    /// Returns the visible parts if the count has so many digits; no content if the cut falls into
    /// the tree or right behind it.
    fn parts(&self, digits: usize) -> (&'a str, Option<&'a str>) {
        let room = self.room.saturating_sub(digits);
        match room.checked_sub(self.tree.len() + 1) {
            Some(room) => {
                let end = self.content.floor_char_boundary(room);
                (self.tree, Some(&self.content[..end]))
            }
            None => (&self.tree[..self.tree.floor_char_boundary(room)], None),
        }
    }

    fn tokens(&mut self, digits: usize) -> u64 {
        let (tree, content) = self.parts(digits);
        let text = [tree, content.unwrap_or_default()].concat();
        // Rounds differ only in their last bytes; the rest is counted once.
        let (seam, before) = *self.counted.get_or_insert_with(|| {
            let end = text.floor_char_boundary(text.len().saturating_sub(64));
            let seam = tokens::last_seam(&text[..end]);
            (seam, tokens::count(&text[..seam]))
        });
        before + tokens::count(&text[seam..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::tests::facts;

    /// Whatever the limit, the text stays within it, is the head of the whole but for the figure,
    /// and the figure is that of what is shown.
    #[test]
    fn a_cut_text_is_consistent_at_every_limit() {
        let facts = facts();
        let tree = "Directory structure:\n└── owner-name/\n    └── größe.txt\n";
        let content = "word ä 日本 ".repeat(420);
        let whole = assemble(&facts, tree, &content, None);
        assert!(!whole.truncated);
        let body = format!("{tree}\n{content}");
        for max in (0..whole.text.len()).filter(|max| max % 7 < 2 || *max < 300) {
            let cut = assemble(&facts, tree, &content, Some(max as u64));
            assert!(cut.truncated);
            let text = cut.text.strip_suffix(CUT_NOTICE).unwrap();
            assert!(text.len() <= max && text.len() + 8 > max, "{max}");
            let summary = format!("{}\n\n", facts.summary(&tokens::label(cut.tokens)));
            let Some(shown) = text.strip_prefix(&summary) else {
                assert!(max < summary.len() + 8, "{max}");
                continue;
            };
            assert!(body.starts_with(shown), "{max}");
            let (tree, content) = shown.split_at(shown.len().min(tree.len()));
            let shown = [tree, content.strip_prefix('\n').unwrap_or_default()].concat();
            assert_eq!(cut.tokens, tokens::count(&shown), "{max}");
        }
        for max in [whole.text.len(), whole.text.len() + 1] {
            assert_eq!(assemble(&facts, tree, &content, Some(max as u64)), whole);
        }
    }

    #[test]
    fn figures_that_grow_by_a_digit_at_the_cut_settle() {
        let facts = facts();
        let tree = "t\n";
        let content = "a b ".repeat(2_000);
        // Around 1,000 tokens the figure grows from three digits to four characters.
        for max in 2_050..2_250 {
            let cut = assemble(&facts, tree, &content, Some(max));
            let text = cut.text.strip_suffix(CUT_NOTICE).unwrap();
            assert!(text.len() as u64 <= max && text.len() as u64 + 2 > max);
            assert!(text.contains(&format!(
                "Estimated tokens: {}\n",
                tokens::label(cut.tokens)
            )));
        }
    }
}
