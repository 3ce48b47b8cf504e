//! Writes a source's tree and content.

use std::ops::ControlFlow;

use common::fault::Fault;

use super::directory::Trees;
use super::ignore::files;
use super::walk::{self, Listing, NodeKind};
use super::{DigestLimits, Facts, Part, Subject, body, tree};
use crate::source::{ObjectId, Source};

/// The line above and below a file's header.
const SEPARATOR: &str = "================================================";
/// Most files that are read at once: each time may be a request to a host.
const MOST_FILES: usize = 4096;
/// See [`ContentWriter::batch`].
const LARGEST_SHARE: u64 = 16;

/// Writes the tree and content of `source` to `emit`, in pieces.
///
/// With [`DigestLimits::max_text_bytes`] it stops once [`assemble`](super::assemble::assemble) can
/// use no more, and reads no blob that cannot be shown. Nothing in the source is followed or
/// executed.
///
/// # Errors
/// Those of `source` and of `emit`. Nothing that a repository holds is an error.
pub fn write(
    source: &dyn Source,
    subject: &Subject,
    limits: &DigestLimits,
    emit: &mut dyn FnMut(Part, &str) -> Result<(), Fault>,
) -> Result<Facts, Fault> {
    let mut facts = Facts {
        subject: subject.clone(),
        commit: None,
        files: 0,
        notices: Vec::new(),
    };
    let root_name = subject.root_name();
    let Some(head) = source.head()? else {
        let tree = tree::render(source, &mut Listing::empty(&root_name), None)?;
        emit(Part::Tree, &tree)?;
        return Ok(facts);
    };
    facts.commit = Some(head.commit.to_string());

    let mut trees = Trees::new(source);
    let (rules, notice) = files::rules(source, &mut trees, head.tree, limits.max_depth)?;
    trees.renew();
    let mut listing = walk::walk(source, &mut trees, head.tree, &root_name, &rules, limits)?;
    drop(trees);
    facts.files = listing.files;
    facts.notices.append(&mut listing.notices);
    facts.notices.extend(notice);

    let tree = tree::render(source, &mut listing, limits.max_text_bytes)?;
    emit(Part::Tree, &tree)?;
    // The shortest token label is one digit.
    let before = (facts.summary("0").len() + "\n\n".len() + tree.len() + "\n".len()) as u64;
    let mut content = ContentWriter {
        listing: &listing,
        next: 1,
        separation: "",
        // One byte more than fits, to show that the text is cut.
        room: limits
            .max_text_bytes
            .map(|max| (max + 1).saturating_sub(before)),
        emit,
    };
    content.write(source)?;
    Ok(facts)
}

/// Returns the size above which [`write()`] reads no file, ignore file or link.
pub fn largest_blob(limits: &DigestLimits) -> u64 {
    limits
        .max_file_bytes
        .max(files::MAX_FILE_BYTES)
        .max(walk::TARGET_MAX)
}

/// Writes files one after the other while there is room.
struct ContentWriter<'a> {
    listing: &'a Listing,
    /// The next node to write.
    next: usize,
    /// Between the node before and the next one.
    separation: &'static str,
    /// Bytes that can still be used; `None` without a limit.
    room: Option<u64>,
    emit: &'a mut dyn FnMut(Part, &str) -> Result<(), Fault>,
}

impl ContentWriter<'_> {
    fn write(&mut self, source: &dyn Source) -> Result<(), Fault> {
        let mut open = self.write_up_to_body()?;
        let mut share = 1;
        while let Some(first) = open {
            let mut failed = None;
            let batch = self.batch(first, share);
            share = (2 * share).min(LARGEST_SHARE);
            source.read(&batch, &mut |_, bytes| {
                match self
                    .write_body(bytes)
                    .and_then(|()| self.write_up_to_body())
                {
                    Ok(next) => open = next,
                    Err(fault) => failed = Some(fault),
                }
                if open.is_some() && failed.is_none() {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })?;
            failed.map_or(Ok(()), Err)?;
        }
        Ok(())
    }

    /// Returns the blobs, from the file at `first` on, that fill the room if each body is a `share`th
    /// of its blob. If bodies turn out shorter, another batch follows.
    fn batch(&self, first: usize, share: u64) -> Vec<ObjectId> {
        let mut expected = 0;
        let files = self.listing.nodes[first..]
            .iter()
            .filter_map(|node| match node.kind {
                NodeKind::File { blob, size } => Some((blob, size)),
                NodeKind::Directory | NodeKind::Symlink { .. } => None,
            });
        let needed = files.take_while(|(_, size)| {
            let is_needed = self.room.is_none_or(|room| expected < room);
            expected += size / share + 2 * SEPARATOR.len() as u64;
            is_needed
        });
        needed.map(|(blob, _)| blob).take(MOST_FILES).collect()
    }

    /// Writes links, and the header of the next file. Returns that file's node if there is room for
    /// its body.
    fn write_up_to_body(&mut self) -> Result<Option<usize>, Fault> {
        while self.room != Some(0) && self.next < self.listing.nodes.len() {
            let at = self.next;
            let kind = &self.listing.nodes[at].kind;
            let title = match kind {
                NodeKind::Directory => {
                    self.next += 1;
                    continue;
                }
                NodeKind::File { .. } => format!("FILE: {}", self.listing.path(at)),
                NodeKind::Symlink { target, .. } => {
                    let target = target.as_deref().unwrap_or_default();
                    format!("SYMLINK: {} -> {target}", self.listing.path(at))
                }
            };
            let separation = std::mem::replace(&mut self.separation, "\n");
            self.emit(&format!("{separation}{SEPARATOR}\n{title}\n{SEPARATOR}\n"))?;
            if matches!(kind, NodeKind::File { .. }) {
                return Ok((self.room != Some(0)).then_some(at));
            }
            self.emit("\n\n")?;
            self.next += 1;
        }
        Ok(None)
    }

    /// Writes the body of the file whose header was written last.
    fn write_body(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let mut body = String::with_capacity(bytes.len() + 2);
        body::push(&self.listing.path(self.next), bytes, &mut body);
        body.push_str("\n\n");
        self.next += 1;
        self.emit(&body)
    }

    /// Emits as much of `text` as can be used.
    fn emit(&mut self, text: &str) -> Result<(), Fault> {
        let mut end = text.len();
        if let Some(room) = &mut self.room {
            end = text.ceil_char_boundary(usize::try_from(*room).unwrap_or(usize::MAX));
            *room = room.saturating_sub(end as u64);
        }
        if end == 0 {
            return Ok(());
        }
        (self.emit)(Part::Content, &text[..end])
    }
}
