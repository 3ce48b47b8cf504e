//! Writes a source's tree and content.

use std::ops::ControlFlow;

use common::fault::Fault;

use super::ignore::files;
use super::walk::{self, Listing, NodeKind, Trees};
use super::{DigestLimits, Facts, Part, Subject, body, tree};
use crate::source::{ObjectId, Source};

/// The line above and below a file's header.
const SEPARATOR: &str = "================================================";

/// Makes the tree and the content of what `source` holds and hands them to `emit` in pieces.
///
/// With [`DigestLimits::max_text_bytes`] it stops as soon as there is more than [`assemble`](super::assemble::assemble) can use, and
/// reads no blob that it cannot show. Nothing in the source is followed or executed.
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
    let mut listing = walk::walk(source, &mut trees, head.tree, &root_name, &rules, limits)?;
    drop(trees);
    facts.files = listing.files;
    facts.notices.append(&mut listing.notices);
    facts.notices.extend(notice);

    let tree = tree::render(source, &mut listing, limits.max_text_bytes)?;
    emit(Part::Tree, &tree)?;
    // No label is shorter than one digit, so this is the least that comes before the content.
    let before = facts.summary("0").len() as u64 + 2 + tree.len() as u64 + 1;
    let mut content = ContentWriter {
        listing: &listing,
        next: 1,
        // One byte more than fits, so that what is cut is seen to be cut.
        room: limits
            .max_text_bytes
            .map(|max| (max + 1).saturating_sub(before)),
        emit,
    };
    content.write(source)?;
    Ok(facts)
}

/// Writes the files below each other, as far as there is room.
struct ContentWriter<'a> {
    listing: &'a Listing,
    /// The node to be written next.
    next: usize,
    /// How many more bytes can be used; `None` without a limit.
    room: Option<u64>,
    emit: &'a mut dyn FnMut(Part, &str) -> Result<(), Fault>,
}

impl ContentWriter<'_> {
    fn write(&mut self, source: &dyn Source) -> Result<(), Fault> {
        let mut open = self.up_to_body()?;
        while let Some(first) = open {
            let mut failed = None;
            source.read(&self.batch(first), &mut |_, bytes| {
                match self.body(bytes).and_then(|()| self.up_to_body()) {
                    Ok(next) => open = next,
                    Err(fault) => failed = Some(fault),
                }
                if open.is_some() && failed.is_none() {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })?;
            if let Some(fault) = failed {
                return Err(fault);
            }
        }
        Ok(())
    }

    /// The blobs of the file at `first` and those after it that will be needed if each takes as
    /// much room as it is long. If they turn out to take less, there is another batch.
    fn batch(&self, first: usize) -> Vec<ObjectId> {
        let mut expected = 0;
        let files = self.listing.nodes[first..]
            .iter()
            .filter_map(|node| match node.kind {
                NodeKind::File { blob, size } => Some((blob, size)),
                NodeKind::Directory | NodeKind::Symlink { .. } => None,
            });
        let needed = files.take_while(|(_, size)| {
            let is_needed = self.room.is_none_or(|room| expected < room);
            expected += size + 2 * SEPARATOR.len() as u64;
            is_needed
        });
        needed.map(|(blob, _)| blob).collect()
    }

    /// Writes links, and the header of the next file. Gives that file's node if there is room for
    /// its body.
    fn up_to_body(&mut self) -> Result<Option<usize>, Fault> {
        while self.next < self.listing.nodes.len() {
            let at = self.next;
            let path = self.listing.path(at);
            let separation = if at == self.first() { "" } else { "\n" };
            match &self.listing.nodes[at].kind {
                NodeKind::Directory => {}
                NodeKind::File { .. } => {
                    self.emit(&format!(
                        "{separation}{SEPARATOR}\nFILE: {path}\n{SEPARATOR}\n"
                    ))?;
                    return Ok((self.room != Some(0)).then_some(at));
                }
                NodeKind::Symlink { target, .. } => {
                    let target = target.as_deref().unwrap_or_default();
                    self.emit(&format!(
                        "{separation}{SEPARATOR}\nSYMLINK: {path} -> {target}\n{SEPARATOR}\n\n\n"
                    ))?;
                }
            }
            self.next += 1;
            if self.room == Some(0) {
                break;
            }
        }
        Ok(None)
    }

    /// The first node that is not a directory.
    fn first(&self) -> usize {
        let is_directory = |node: &walk::Node| matches!(node.kind, NodeKind::Directory);
        self.listing
            .nodes
            .iter()
            .take_while(|node| is_directory(node))
            .count()
    }

    /// Writes the body of the file whose header was written last.
    fn body(&mut self, bytes: &[u8]) -> Result<(), Fault> {
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
