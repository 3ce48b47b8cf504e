//! The progress bar, and log lines that do not tear it.

use std::io::{self, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{USUAL_WIDTH, ignore_closed, size_of};

/// The bar gets no shorter for a message that does not fit beside it.
const SHORTEST: usize = 10;

/// A progress bar on stderr; never drawn if that is no terminal. Clones are the same bar.
#[derive(Clone, Debug)]
pub struct Bar(ProgressBar, Target);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Stderr,
    /// None, or one that is set already.
    Other,
}

impl Bar {
    /// A bar on this process's terminal.
    pub fn on_terminal() -> Self {
        Self(ProgressBar::hidden(), Target::Stderr)
    }

    /// A bar that is never drawn.
    pub fn hidden() -> Self {
        Self(ProgressBar::hidden(), Target::Other)
    }

    /// Lets `writer` write to the terminal without tearing the bar. For the log: give the
    /// subscriber `move || bar.writer(io::stdout())`.
    pub fn writer<W: Write>(&self, writer: W) -> BarWriter<W> {
        BarWriter {
            bar: self.0.clone(),
            writer,
            pending: Vec::new(),
        }
    }

    /// Shows the bar. Not earlier: a bar with a target draws itself after each log line.
    pub fn show(&self) {
        if self.1 == Target::Stderr {
            self.0.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    /// Whether anybody sees it.
    pub fn is_drawn(&self) -> bool {
        !self.0.is_hidden()
    }

    /// Moves it. It takes what the message leaves of the line.
    pub fn set(&self, done: u64, total: u64, message: String) {
        let columns = size_of(io::stderr()).map_or(USUAL_WIDTH, |(columns, _)| columns);
        let length = columns.saturating_sub(message.chars().count() + 1);
        let template = format!("{{bar:{}}} {{wide_msg}}", length.max(SHORTEST));
        let style = ProgressStyle::with_template(&template);
        self.0
            .set_style(style.expect("the template is one of indicatif's"));
        self.0.set_length(total);
        self.0.set_position(done);
        self.0.set_message(message);
    }

    /// Takes it away.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }

    /// A bar on another terminal.
    #[cfg(test)]
    pub(crate) fn on(terminal: impl indicatif::TermLike + 'static) -> Self {
        let target = ProgressDrawTarget::term_like(Box::new(terminal));
        Self(
            ProgressBar::with_draw_target(Some(0), target),
            Target::Other,
        )
    }
}

/// Writes whole lines while the bar is hidden. The rest of a line is written when the writer is
/// flushed or dropped. A closed pipe swallows what is written.
#[derive(Debug)]
pub struct BarWriter<W: Write> {
    bar: ProgressBar,
    writer: W,
    /// The beginning of a line: if it were written at once, the bar would tear the line.
    pending: Vec<u8>,
}

impl<W: Write> BarWriter<W> {
    fn write_pending(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        ignore_closed(self.bar.suspend(|| {
            self.writer.write_all(&pending)?;
            self.writer.flush()
        }))
    }
}

impl<W: Write> Write for BarWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.ends_with(b"\n") {
            self.write_pending()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_pending()?;
        ignore_closed(self.writer.flush())
    }
}

impl<W: Write> Drop for BarWriter<W> {
    fn drop(&mut self) {
        // Nobody is left to report an error to.
        _ = self.write_pending();
    }
}
