//! Reads what a child sends, and believes no more of it than necessary.
//!
//! The child parses untrusted input, so its word is untrusted too: it may spoil its own
//! repository's digest, and nothing else.

use std::fmt;
use std::io;
use std::time::Duration;

use common::fault::{Fault, FaultKind};
use common::telemetry::traces::Span;
use common::text::printable;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::ChildStdout;

use super::protocol::{ChildRequest, Frame, MAX_PIECE};
use super::{SlotOutput, SlotResult};
use crate::digest::Part;
use crate::fetch::answer::TokenRefusal;
use crate::fetch::policy::FetchWay;

/// Longest line read from a child, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// Longest message of a fault, in characters. It goes to logs and into the run's summary.
const MAX_MESSAGE: usize = 1000;
/// Longest pause that a host may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// What a host said of the child's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenNews {
    Refused(TokenRefusal),
    /// For this long.
    UsedUp(Duration),
}

/// Collects a child's frames into its output.
pub(super) struct FrameDecoder<'a> {
    input: BufReader<ChildStdout>,
    tree: String,
    content: String,
    /// The way that the child named last, and why.
    way: Option<(FetchWay, String)>,
    fetched_bytes: u64,
    max_fetched_bytes: u64,
    renamed_to: Option<String>,
    token_news: Option<TokenNews>,
    /// Whether the child was told a commit, without which it cannot find HEAD unmoved.
    knows_commit: bool,
    /// How long the fetch took, once it is done.
    fetch: Option<Duration>,
    /// Bytes of text that the child may still send; `None` without a limit.
    room: Option<u64>,
    /// The span of the slot, and of what the child is at.
    span: &'a Span,
    pub(super) phase: Span,
}

impl<'a> FrameDecoder<'a> {
    pub(super) fn new(input: ChildStdout, request: &ChildRequest, span: &'a Span) -> Self {
        let max_text_bytes = request.limits.max_text_bytes;
        Self {
            input: BufReader::new(input),
            tree: String::new(),
            content: String::new(),
            way: None,
            fetched_bytes: 0,
            max_fetched_bytes: request.policy.max_bytes,
            renamed_to: None,
            token_news: None,
            knows_commit: request.known.is_some(),
            fetch: None,
            // Tree and content may each exceed the limit by one piece.
            room: max_text_bytes.map(|max| 2 * (max + MAX_PIECE as u64)),
            span,
            phase: span.child("fetch"),
        }
    }

    /// Takes in one frame; returns the result with the last one. Useless once dropped half-way.
    pub(super) async fn next(&mut self) -> io::Result<Option<Result<SlotResult, Fault>>> {
        let mut line = Vec::new();
        let mut input = (&mut self.input).take(MAX_LINE);
        input.read_until(b'\n', &mut line).await?;
        if line.pop() != Some(b'\n') {
            return Err(match input.limit() {
                0 => invalid("a longer line than allowed"),
                _ => io::ErrorKind::UnexpectedEof.into(),
            });
        }
        match serde_json::from_slice(&line)? {
            Frame::Progress { fetched_bytes } => self.fetched(fetched_bytes)?,
            Frame::TokenRefused { why } => self.token_news = Some(TokenNews::Refused(why)),
            Frame::TokenUsedUp { seconds } => {
                let rest = Duration::from_secs(seconds).min(MAX_RETRY_AFTER);
                self.token_news = Some(TokenNews::UsedUp(rest));
            }
            Frame::Way { way, why } => {
                self.phase
                    .set("repofleet.fetch_way", way.as_ref().to_owned());
                self.way = Some((way, shown(&why)));
            }
            Frame::Fetched {
                fetched_bytes,
                millis,
                renamed_to,
            } => {
                if self.fetch.is_some() {
                    return Err(invalid("it fetched a second time"));
                }
                self.fetched(fetched_bytes)?;
                self.renamed_to = renamed_to.as_deref().map(shown);
                let took = Duration::from_millis(millis);
                self.fetch = Some(took);
                self.phase.set("repofleet.fetched_bytes", fetched_bytes);
                self.phase.lasted(took);
                // One ends before the other begins.
                drop(std::mem::take(&mut self.phase));
                self.phase = self.span.child("digest");
            }
            Frame::Text { part, bytes } => self.text(part, bytes).await?,
            Frame::Done { facts, millis } => {
                let is_hash =
                    |id: &String| id.len() == 40 && id.bytes().all(|b| b.is_ascii_hexdigit());
                if !facts.commit.as_ref().is_none_or(is_hash) {
                    return Err(invalid("the commit is no commit hash"));
                }
                return Ok(Some(Ok(SlotResult::Digest(Box::new(SlotOutput {
                    facts,
                    tree: std::mem::take(&mut self.tree),
                    content: std::mem::take(&mut self.content),
                    fetched_bytes: self.fetched_bytes,
                    renamed_to: self.renamed_to.take(),
                    fetch: self.fetch.unwrap_or_default(),
                    digest: Duration::from_millis(millis),
                })))));
            }
            Frame::Unmoved {
                fetched_bytes,
                renamed_to,
            } => {
                self.fetched(fetched_bytes)?;
                if !self.knows_commit {
                    return Err(invalid("HEAD is unmoved, though no commit was known"));
                }
                return Ok(Some(Ok(SlotResult::Unmoved {
                    fetched_bytes,
                    renamed_to: renamed_to.as_deref().map(shown),
                })));
            }
            Frame::Failed(fault) => return checked(fault).map(|fault| Some(Err(fault))),
        }
        Ok(None)
    }

    /// Takes what the last frame said about the token.
    pub(super) fn token_news(&mut self) -> Option<TokenNews> {
        self.token_news.take()
    }

    /// Returns how the repository was fetched, and why if it was a fallback; `None` if it is local, or
    /// failed without one.
    pub(super) fn way(&self) -> Option<(FetchWay, &str)> {
        self.way.as_ref().map(|(way, why)| (*way, why.as_str()))
    }

    fn fetched(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.max_fetched_bytes {
            return Err(invalid("more bytes fetched than allowed"));
        }
        self.fetched_bytes = bytes;
        Ok(())
    }

    async fn text(&mut self, part: Part, bytes: usize) -> io::Result<()> {
        if bytes > MAX_PIECE {
            return Err(invalid("a longer piece of text than allowed"));
        }
        if let Some(room) = &mut self.room {
            let left = room.checked_sub(bytes as u64);
            *room = left.ok_or_else(|| invalid("more text than allowed"))?;
        }
        let mut text = vec![0; bytes];
        self.input.read_exact(&mut text).await?;
        let text = std::str::from_utf8(&text).map_err(invalid)?;
        match part {
            Part::Tree => self.tree.push_str(text),
            Part::Content => self.content.push_str(text),
        }
        Ok(())
    }
}

/// How far the child has got.
impl fmt::Display for FrameDecoder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.fetch {
            Some(_) => "digesting",
            None => "fetching",
        };
        write!(f, "{phase}, {} bytes fetched", self.fetched_bytes)
    }
}

/// Accepts a child's fault if a child can meet it.
fn checked(mut fault: Fault) -> io::Result<Fault> {
    if matches!(
        fault.kind,
        FaultKind::Poison | FaultKind::InvalidEntry | FaultKind::Cancelled
    ) {
        return Err(invalid("a class of failure that a slot cannot meet"));
    }
    fault.message = shown(&fault.message);
    fault.unresolved = fault.unresolved.as_deref().map(shown);
    fault.retry_after = fault.retry_after.map(|pause| pause.min(MAX_RETRY_AFTER));
    Ok(fault)
}

/// Cuts the text and escapes control characters: servers choose parts of it.
pub(super) fn shown(text: &str) -> String {
    printable(&text.trim().chars().take(MAX_MESSAGE).collect::<String>())
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
