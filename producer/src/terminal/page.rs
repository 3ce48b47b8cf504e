//! Pages of short lines, and the screen that they are drawn on.

use std::io::{self, Write};

use common::text::printable;

/// How a line is emphasised on a terminal with colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Not at all.
    Plain,
    /// To be seen first.
    Title,
    /// All is well.
    Good,
    /// Something is not.
    Bad,
}

/// A line of a page, without control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What it says.
    pub text: String,
    /// How it looks.
    pub tone: Tone,
}

/// A page under construction, of lines of limited width.
#[derive(Debug)]
pub struct Page {
    lines: Vec<Line>,
    width: usize,
}

impl Page {
    /// An empty page, `width` characters wide.
    pub fn new(width: usize) -> Self {
        let lines = Vec::new();
        Self { lines, width }
    }

    /// The page's width in characters.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The finished page.
    pub fn into_lines(self) -> Vec<Line> {
        self.lines
    }

    /// Adds a line, cut at the page's width.
    pub fn add(&mut self, tone: Tone, text: &str) {
        let text = cut(&printable(text), self.width);
        self.lines.push(Line { text, tone });
    }

    /// Adds a name and its value.
    pub fn row(&mut self, name: &str, value: &str) {
        self.add(Tone::Plain, format!("  {name:<22}{value}").trim_end());
    }

    /// Adds a sentence on as many lines as it needs: what to do stands at its end.
    pub fn sentence(&mut self, tone: Tone, text: &str) {
        const INDENT: &str = "      ";
        let text = printable(text);
        let mut line = String::new();
        for word in text.split(' ') {
            let longer = line.chars().count() + 1 + word.chars().count();
            if longer > self.width && line.trim() != "" {
                self.add(tone, &line);
                line = INDENT.to_owned() + word;
            } else {
                line += if line.is_empty() { "" } else { " " };
                line += word;
            }
        }
        self.add(tone, &line);
    }
}

/// Returns a page as text.
pub fn text(lines: &[Line]) -> String {
    lines.iter().map(|line| line.text.clone() + "\n").collect()
}

/// Returns the text, cut with an ellipsis if it is wider than `width` characters.
pub fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(width.saturating_sub(1)).collect();
    if width > 0 {
        cut.push('…');
    }
    cut
}

/// The terminal's alternate screen. Dropping it brings the first one back, with the last page on it.
#[derive(Debug)]
pub struct Screen {
    last: Vec<Line>,
    colours: bool,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// If it cannot be written to.
    pub fn open() -> io::Result<Self> {
        let mut stdout = io::stdout().lock();
        // The alternate screen, no cursor, no line wrap.
        write!(stdout, "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J")?;
        stdout.flush()?;
        Ok(Self {
            last: Vec::new(),
            colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        })
    }

    /// Draws a page over the one before, cut at `rows`.
    ///
    /// # Errors
    /// If the terminal cannot be written to.
    pub fn draw(&mut self, page: Vec<Line>, rows: usize) -> io::Result<()> {
        let mut picture = String::from("\x1b[H");
        let shown = rows.min(page.len());
        for (row, line) in page.iter().take(shown).enumerate() {
            if row > 0 {
                picture.push_str("\r\n");
            }
            // Erase before the text: after a line of full width the cursor is on its last character.
            picture.push_str(if row + 1 < shown { "\x1b[K" } else { "\x1b[J" });
            picture.push_str(&self.styled(line));
        }
        self.last = page;
        // In one write, so that no half of a page is seen.
        let mut stdout = io::stdout().lock();
        stdout.write_all(picture.as_bytes())?;
        stdout.flush()
    }

    fn styled(&self, line: &Line) -> String {
        let code = match line.tone {
            Tone::Plain => return line.text.clone(),
            Tone::Title => "1",
            Tone::Good => "1;32",
            Tone::Bad => "1;31",
        };
        match self.colours {
            true => format!("\x1b[{code}m{}\x1b[0m", line.text),
            false => line.text.clone(),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut stdout = io::stdout().lock();
        let last = text(&self.last);
        // The terminal may be gone.
        _ = write!(stdout, "\x1b[?7h\x1b[?25h\x1b[?1049l{last}");
        _ = stdout.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_is_shown() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "ab…");
    }
}
