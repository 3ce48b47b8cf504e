//! The terminal, as a page that is drawn again and again.

use std::io::{self, IsTerminal, Write};

use super::page::{Line, Look, text};

/// Columns where nobody says how many there are.
const USUAL_WIDTH: usize = 100;

/// Columns and rows of standard output; `None` where it is no terminal.
pub fn size() -> Option<(usize, usize)> {
    let stdout = io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(stdout).ok();
    let size = size.filter(|size| size.ws_col > 0 && size.ws_row > 0);
    Some(size.map_or((USUAL_WIDTH, usize::MAX), |size| {
        (size.ws_col.into(), size.ws_row.into())
    }))
}

/// Columns to write for: those of the terminal, or as many as it takes.
pub fn width() -> usize {
    size().map_or(usize::MAX, |(columns, _)| columns)
}

/// The terminal's other screen. Dropped, the first one is back, with the last page on it.
#[derive(Debug)]
pub struct Screen {
    last: Vec<Line>,
    colours: bool,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// Where it cannot be written to.
    pub fn open() -> io::Result<Self> {
        let mut stdout = io::stdout().lock();
        // The other screen, no cursor, and no second line for what is too long for one.
        write!(stdout, "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J")?;
        stdout.flush()?;
        Ok(Self {
            last: Vec::new(),
            colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        })
    }

    /// Draws a page over the one before, as far as there are rows for it.
    ///
    /// # Errors
    /// Where the terminal cannot be written to.
    pub fn draw(&mut self, page: Vec<Line>, rows: usize) -> io::Result<()> {
        let mut picture = String::from("\x1b[H");
        let shown = rows.min(page.len());
        for (row, line) in page.iter().take(shown).enumerate() {
            if row > 0 {
                picture.push_str("\r\n");
            }
            // Before the text: after a line that is as wide as the terminal, the cursor stands on
            // its last character.
            picture.push_str(if row + 1 < shown { "\x1b[K" } else { "\x1b[J" });
            picture.push_str(&self.styled(line));
        }
        self.last = page;
        // In one piece, so that nobody sees half of it.
        let mut stdout = io::stdout().lock();
        stdout.write_all(picture.as_bytes())?;
        stdout.flush()
    }

    fn styled(&self, line: &Line) -> String {
        let code = match line.look {
            Look::Plain => return line.text.clone(),
            Look::Title => "1",
            Look::Good => "1;32",
            Look::Bad => "1;31",
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
        // A terminal that is gone needs nothing.
        _ = write!(stdout, "\x1b[?7h\x1b[?25h\x1b[?1049l{last}");
        _ = stdout.flush();
    }
}
