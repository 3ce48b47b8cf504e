//! What a terminal shows: a progress bar below the log, a page drawn again and again, tables.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

pub mod bar;

pub mod page;

pub mod table;

/// Columns of a terminal that does not say how many it has.
const USUAL_WIDTH: usize = 100;

/// Returns columns and rows of standard output; `None` if it is no terminal.
pub fn size() -> Option<(usize, usize)> {
    size_of(io::stdout())
}

fn size_of(stream: impl IsTerminal + AsFd) -> Option<(usize, usize)> {
    if !stream.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(stream).ok();
    let size = size.filter(|size| size.ws_col > 0 && size.ws_row > 0);
    Some(size.map_or((USUAL_WIDTH, usize::MAX), |size| {
        (size.ws_col.into(), size.ws_row.into())
    }))
}

/// Returns the columns to write for; no limit if standard output is no terminal.
pub fn width() -> usize {
    size().map_or(usize::MAX, |(columns, _)| columns)
}

/// Writes to standard output.
///
/// # Errors
/// If that fails, a closed pipe included.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Whether the reader of a pipe has gone, as after `| head`: it has seen enough.
pub fn is_closed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

/// Makes writing to a closed pipe a success.
pub fn ignore_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if is_closed(&error) => Ok(()),
        written => written,
    }
}
