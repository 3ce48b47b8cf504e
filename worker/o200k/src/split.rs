//! Splits text into the words that are encoded each by itself.
//!
//! The expression that this stands for, `\s+(?!\S)` meaning all but the last of some white space:
//!
//! ```text
//! [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?
//! |[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?
//! |\p{N}{1,3}
//! | ?[^\s\p{L}\p{N}]+[\r\n/]*
//! |\s*[\r\n]+
//! |\s+(?!\S)
//! |\s+
//! ```
//!
//! No character is looked at more than a few times: what one alternative leaves of a run after a
//! second look, the next word takes as a whole.

use crate::layout::{BLOCK, LINE_END, LOWER, MARK, NUMBER, SPACE, SYMBOL, UNCASED, UPPER};

static STAGE: &[u8; 0x11_0000 / BLOCK] = include_bytes!(concat!(env!("OUT_DIR"), "/stage"));
static BLOCKS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/blocks"));

/// Returns the words of `text`, which are the whole of it.
pub fn words(text: &str) -> Words<'_> {
    Words { text, at: 0 }
}

/// The words of a text.
#[derive(Clone, Debug)]
pub struct Words<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let start = self.at;
        if start == self.text.len() {
            return None;
        }
        self.at = self.end();
        Some(&self.text[start..self.at])
    }
}

impl Words<'_> {
    /// Returns where the word ends that begins here.
    fn end(&self) -> usize {
        let (class, length) = self.class(self.at);
        let next = self.at + length;
        if let Some(end) = self.letters(class, next) {
            return end + contraction(&self.text.as_bytes()[end..]);
        }
        if class == NUMBER {
            return self.run_of(next, NUMBER, 2);
        }
        let symbols = if self.text.as_bytes()[self.at] == b' ' {
            next
        } else {
            self.at
        };
        let end = self.run(symbols, SYMBOL | MARK);
        if end > symbols {
            let rest = &self.text.as_bytes()[end..];
            let line_ends = rest.iter().take_while(|byte| b"\r\n/".contains(byte));
            return end + line_ends.count();
        }
        self.white_space()
    }

    /// Returns where letters end that begin here, or at `next` behind one other character; `None` if
    /// there are none.
    fn letters(&self, class: u8, next: usize) -> Option<usize> {
        let is_prefix = class & (MARK | SPACE | SYMBOL) != 0;
        let is_letter = class & (UPPER | LOWER | UNCASED | MARK) != 0;
        let upper_case = |from| Some(self.run(from, UPPER)).filter(|end| *end > from);
        let behind = is_prefix.then_some(next);
        let here = is_letter.then_some(self.at);
        // The first alternative with and without a prefix, then the second.
        (behind.and_then(|from| self.lower_case(from)))
            .or_else(|| here.and_then(|from| self.lower_case(from)))
            .or_else(|| behind.and_then(upper_case))
            .or_else(|| here.and_then(upper_case))
    }

    /// Returns where letters of which the last is not of upper case end.
    fn lower_case(&self, from: usize) -> Option<usize> {
        let mut at = from;
        let mut end = None;
        loop {
            let (class, length) = self.class(at);
            match class {
                UPPER => at += length,
                UNCASED | MARK => {
                    at += length;
                    end = Some(at);
                }
                LOWER => return Some(self.run(at + length, LOWER | UNCASED | MARK)),
                // The expression goes back to the last one that is of either case.
                _ => return end,
            }
        }
    }

    /// Returns where white space that begins here ends: with its last line end, or with the text, or
    /// before its last character, which goes with the next word.
    fn white_space(&self) -> usize {
        let mut at = self.at;
        let mut last = at;
        let mut line_end = None;
        loop {
            let (class, length) = self.class(at);
            if class & (SPACE | LINE_END) == 0 {
                break;
            }
            last = at;
            at += length;
            if class == LINE_END {
                line_end = Some(at);
            }
        }
        let before_last = (at < self.text.len() && last > self.at).then_some(last);
        line_end.or(before_last).unwrap_or(at)
    }

    fn run(&self, from: usize, classes: u8) -> usize {
        self.run_of(from, classes, usize::MAX)
    }

    /// Returns where at most so many characters of the classes end.
    fn run_of(&self, from: usize, classes: u8, most: usize) -> usize {
        let mut at = from;
        for _ in 0..most {
            let (class, length) = self.class(at);
            if class & classes == 0 {
                break;
            }
            at += length;
        }
        at
    }

    /// Returns a character's class and length; none at the end of the text.
    fn class(&self, at: usize) -> (u8, usize) {
        match self.text.as_bytes().get(at) {
            None => (0, 0),
            // The first block is the first one that was written.
            Some(&byte) if byte < 0x80 => (BLOCKS[usize::from(byte)], 1),
            Some(_) => {
                let character = self.text[at..].chars().next().unwrap_or_default();
                let code = character as usize;
                let block = usize::from(STAGE[code / BLOCK]);
                (BLOCKS[block * BLOCK + code % BLOCK], character.len_utf8())
            }
        }
    }
}

/// Returns the length of `'s`, `'t`, `'re`, `'ve`, `'m`, `'ll` or `'d` in either case.
fn contraction(rest: &[u8]) -> usize {
    if rest.first() != Some(&b'\'') {
        return 0;
    }
    let lower = |at: usize| rest.get(at).map_or(0, u8::to_ascii_lowercase);
    match (lower(1), lower(2)) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        // The last is ſ, an s whose upper case is S.
        (b'r' | b'v', b'e') | (b'l', b'l') | (0xc5, 0xbf) => 3,
        _ => 0,
    }
}
