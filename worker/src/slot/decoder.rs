//! Reads what a child says, and believes it no further than it has to.

use std::io;
use std::time::Duration;

use common::fault::{Fault, FaultKind};

use super::SlotOutput;
use super::protocol::{Frame, MAX_PIECE};
use crate::digest::Part;

/// Longest text of a fault, in characters: it goes to logs and into the run's summary.
const MAX_MESSAGE: usize = 1000;
/// The longest pause that a host may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// A digest while its frames come in.
///
/// The child parses what strangers wrote, so what it says is checked as a stranger's word: it may
/// spoil its own repository's digest, and nothing else.
#[derive(Default)]
pub(super) struct FrameDecoder {
    tree: String,
    content: String,
    fetched_bytes: u64,
    max_fetched_bytes: u64,
    /// How long the fetch took, once it is done.
    fetch: Option<Duration>,
    /// What a child may send of text at most.
    room: Option<u64>,
}

/// A frame with the text that came after it.
pub(super) type Framed = (Frame, Vec<u8>);

impl FrameDecoder {
    pub(super) fn new(max_fetched_bytes: u64, max_text_bytes: Option<u64>) -> Self {
        Self {
            max_fetched_bytes,
            // Each of the two parts may run over the limit by one piece.
            room: max_text_bytes.map(|max| 2 * (max + MAX_PIECE as u64)),
            ..Self::default()
        }
    }

    /// `Some` with the end, once it has come.
    pub(super) fn take(
        &mut self,
        (frame, text): Framed,
    ) -> io::Result<Option<Result<SlotOutput, Fault>>> {
        match frame {
            Frame::Progress { fetched_bytes } => self.fetched(fetched_bytes)?,
            Frame::Fetched {
                fetched_bytes,
                millis,
            } => {
                self.fetched(fetched_bytes)?;
                self.fetch = Some(Duration::from_millis(millis));
            }
            Frame::Text { part, .. } => {
                if let Some(room) = &mut self.room {
                    *room = room
                        .checked_sub(text.len() as u64)
                        .ok_or_else(|| invalid("more text than it may send"))?;
                }
                let text = String::from_utf8(text).map_err(invalid)?;
                match part {
                    Part::Tree => self.tree.push_str(&text),
                    Part::Content => self.content.push_str(&text),
                }
            }
            Frame::Done { facts, millis } => {
                let is_name =
                    |id: &String| id.len() == 40 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
                if !facts.commit.as_ref().is_none_or(is_name) {
                    return Err(invalid("a commit with no commit's name"));
                }
                let made = std::mem::take(self);
                return Ok(Some(Ok(SlotOutput {
                    facts,
                    tree: made.tree,
                    content: made.content,
                    fetched_bytes: made.fetched_bytes,
                    fetch: made.fetch.unwrap_or_default(),
                    digest: Duration::from_millis(millis),
                })));
            }
            Frame::Failed(fault) => return Ok(Some(Err(checked(&fault)?))),
        }
        Ok(None)
    }

    fn fetched(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.max_fetched_bytes {
            return Err(invalid("more bytes fetched than it may"));
        }
        self.fetched_bytes = bytes;
        Ok(())
    }
}

impl std::fmt::Display for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let phase = match self.fetch {
            Some(_) => "digesting",
            None => "fetching",
        };
        write!(f, "{phase}, {} bytes fetched", self.fetched_bytes)
    }
}

/// A child's fault, if it is one that a child can meet.
fn checked(fault: &Fault) -> io::Result<Fault> {
    match fault.kind {
        FaultKind::Poison | FaultKind::InvalidEntry => {
            Err(invalid("a fault that is not for it to find"))
        }
        kind => {
            let mut checked = Fault::new(kind, printable(&fault.message));
            checked.retry_after = fault.retry_after.map(|pause| pause.min(MAX_RETRY_AFTER));
            Ok(checked)
        }
    }
}

/// Without what would command a terminal, and not endless: servers choose parts of these texts.
pub(super) fn printable(text: &str) -> String {
    let visible = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let text = text.trim().chars().map(visible);
    text.take(MAX_MESSAGE).collect()
}

pub(super) fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
