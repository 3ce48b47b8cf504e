//! The digest: a repository as one text, in gitingest's format.
//!
//! The text is `summary + "\n\n" + tree + "\n" + content`. Its head is byte for byte the summary
//! that gitingest 0.3.1 prints, its rest what `gitingest -o FILE` writes, but for the deviations
//! below. The work is divided: [`write`](fn@write) runs in a slot, next to the source, and makes
//! tree and content; [`assemble`] runs in the worker itself, which counts tokens with a table that
//! takes long to load, and puts the parts together.
//!
//! # Where this differs from gitingest
//! What gitingest leaves to chance is decided here:
//! - Patterns count in the order defaults, root `.gitignore`, nested ones in path order, then
//!   `.gitingestignore` files; the last match wins. gitingest keeps them in a set, so that with a
//!   `!` line the hash seed decides.
//! - Names that differ only in case are in the order of their bytes, not in the file system's.
//! - The limits of files and bytes apply in output order, symbolic links included, and a line
//!   below `Files analyzed` says so (`Limit reached: …`). gitingest applies them in the file
//!   system's order and says nothing. Limits of depth and of a single file's size are deterministic
//!   in gitingest and as silent here as there.
//!
//! Objects are read raw, nothing is checked out:
//! - `.gitattributes` have no effect (`ident`, `working-tree-encoding`, `eol`, filters).
//! - An entry that git would refuse to check out is left out: an empty name, `.`, `..`, `.git` in
//!   any case, a name with a slash or longer than 255 bytes, a second entry of one name, a link
//!   whose target is empty or longer than 4,095 bytes.
//! - Bytes of names that are not UTF-8 become U+FFFD, and so do lone surrogates in notebooks;
//!   gitingest fails when it writes its output.
//! - An ignore file that is a symbolic link is not read, since nothing is followed.
//!
//! What would end gitingest does not end the digest:
//! - A line of an ignore file that pathspec refuses is passed over, and so is an ignore file that
//!   is not UTF-8.
//! - Ignore files count up to 5,000 files of at most 512 KiB each and 16 MiB together, and up to
//!   50,000 patterns, 500 of them with wildcards in a directory's name. Patterns over 4,096 bytes
//!   match nothing. One million tree entries are looked at, and a like amount of matching is done;
//!   beyond that the rest of the repository is left out. Both are said below `Files analyzed`.
//! - A repository without a commit has a digest with `Files analyzed: 0` and no `Commit` line.
//! - A notebook that is not JSON is reported with its path in the repository, where gitingest names
//!   its own random temporary path. How deep JSON may nest is fixed, at what is usual for Python.
//!
//! The text is cut at a limit that gitingest does not have, and then the tokens are those of tree
//! and content as far as they are in the text.

mod body;
mod gather;
mod ignore;
mod json;
mod notebook;
mod pattern;
mod tokens;
mod tree;
mod walk;

use std::ops::ControlFlow;

use common::fault::Fault;
use serde::{Deserialize, Serialize};

use crate::source::{ObjectId, Source};
use walk::{Listing, NodeKind, Trees};

/// What a text ends with that was cut.
pub const CUT_NOTICE: &str = "\n\n[... Summary truncated at 512KB limit ...]";

/// The line above and below a file's header.
const SEPARATOR: &str = "================================================";

/// How much of a repository goes into its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Largest file that is shown, in bytes; a larger one is left out without a word.
    pub max_file_bytes: u64,
    /// Most files and symbolic links.
    pub max_files: u64,
    /// Most bytes of all files together, before anything is cut.
    pub max_total_bytes: u64,
    /// How many directories deep a file may lie below the root.
    pub max_depth: usize,
    /// Longest text in bytes, [`CUT_NOTICE`] not counted.
    pub max_text_bytes: Option<u64>,
}

impl Default for Limits {
    /// Files up to 512 KiB, as the reference system has it, and 524,288 bytes of text.
    fn default() -> Self {
        Self {
            max_file_bytes: 512 << 10,
            max_files: 10_000,
            max_total_bytes: 500 << 20,
            max_depth: 20,
            max_text_bytes: Some(512 << 10),
        }
    }
}

impl Limits {
    /// gitingest's own: files up to 10 MiB, and the text is never cut.
    pub fn gitingest() -> Self {
        Self {
            max_file_bytes: 10 << 20,
            max_text_bytes: None,
            ..Self::default()
        }
    }
}

/// What the digest says it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// gitingest's remote form: `Repository: owner/name`, in lower case, and a `Commit` line.
    Repository {
        /// The account.
        owner: String,
        /// The repository's name below it.
        name: String,
    },
    /// gitingest's local form: `Directory: slug`, without a commit.
    Directory {
        /// The path, as gitingest shows it: without slashes at its ends.
        slug: String,
    },
}

impl Subject {
    /// What the tree calls its root.
    fn root_name(&self) -> String {
        match self {
            Self::Repository { owner, name } => format!("{owner}-{name}").to_lowercase(),
            Self::Directory { slug } => {
                let name = slug.rsplit('/').next().unwrap_or_default();
                name.to_owned()
            }
        }
    }
}

/// A stretch of the text that [`write`](fn@write) makes. All of the tree comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The directory structure.
    Tree,
    /// The files.
    Content,
}

/// What [`assemble`] needs for the summary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// What the digest is about.
    pub subject: Subject,
    /// The commit's name in hexadecimal; `None` for a repository without one.
    pub commit: Option<String>,
    /// Files and symbolic links in the tree.
    pub files: u64,
    /// A sentence for each limit that left something out.
    pub notices: Vec<String>,
}

impl Facts {
    /// gitingest's summary.
    fn summary(&self, token_label: &str) -> String {
        let mut summary = match &self.subject {
            Subject::Repository { owner, name } => {
                let mut line = format!("Repository: {owner}/{name}\n").to_lowercase();
                line.replace_range(..1, "R");
                if let Some(commit) = &self.commit {
                    line.push_str(&format!("Commit: {commit}\n"));
                }
                line
            }
            Subject::Directory { slug } => format!("Directory: {slug}\n"),
        };
        summary.push_str(&format!("Files analyzed: {}\n", self.files));
        for notice in &self.notices {
            summary.push_str(notice);
            summary.push('\n');
        }
        summary.push_str(&format!("\nEstimated tokens: {token_label}"));
        summary
    }
}

/// Makes the tree and the content of what `source` holds and hands them to `emit` in pieces.
///
/// With [`Limits::max_text_bytes`] it stops as soon as there is more than [`assemble`] can use, and
/// reads no blob that it cannot show. Nothing in the source is followed or executed.
///
/// # Errors
/// Those of `source` and of `emit`. Nothing that a repository holds is an error.
pub fn write(
    source: &dyn Source,
    subject: &Subject,
    limits: &Limits,
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
    let (rules, notice) = gather::rules(source, &mut trees, head.tree, limits.max_depth)?;
    let mut listing = walk::walk(source, &mut trees, head.tree, &root_name, &rules, limits)?;
    drop(trees);
    facts.files = listing.files;
    facts.notices.append(&mut listing.notices);
    facts.notices.extend(notice);

    let tree = tree::render(source, &mut listing, limits.max_text_bytes)?;
    emit(Part::Tree, &tree)?;
    // No label is shorter than one digit, so this is the least that comes before the content.
    let before = facts.summary("0").len() as u64 + 2 + tree.len() as u64 + 1;
    let mut content = Content {
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
struct Content<'a> {
    listing: &'a Listing,
    /// The node to be written next.
    next: usize,
    /// How many more bytes can be used; `None` without a limit.
    room: Option<u64>,
    emit: &'a mut dyn FnMut(Part, &str) -> Result<(), Fault>,
}

impl Content<'_> {
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

/// A finished digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// What is stored.
    pub text: String,
    /// Whether it was cut, and so ends with [`CUT_NOTICE`].
    pub truncated: bool,
    /// How many tokens its tree and content have, as far as they are in the text.
    pub tokens: u64,
}

/// Puts `tree` and `content`, as [`write`](fn@write) emitted them, below their summary.
///
/// A text longer than `max_text_bytes` is cut there, at the last character boundary, and
/// [`CUT_NOTICE`] added. The summary's token count is that of what remains. Since the figure takes
/// room itself, room is kept for one digit first, and for more as long as the figure needs more. It
/// may come out shorter in the end, since more room for it means less text; then the text ends
/// before the limit by as much.
pub fn assemble(facts: &Facts, tree: &str, content: &str, max_text_bytes: Option<u64>) -> Text {
    let max = max_text_bytes.map_or(usize::MAX, |max| usize::try_from(max).unwrap_or(usize::MAX));
    let frame = facts.summary("").len() + "\n\n".len();
    let whole = frame + tree.len() + "\n".len() + content.len();
    if whole < max {
        let tokens = tokens::count_both(tree, content);
        let label = tokens::label(tokens);
        if whole + label.len() <= max {
            let text = [&facts.summary(&label), "\n\n", tree, "\n", content].concat();
            return Text {
                text,
                truncated: false,
                tokens,
            };
        }
    }

    let mut visible = Visible::new(tree, content, max.saturating_sub(frame));
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
    // Only a limit shorter than a summary comes to this.
    text.truncate(text.floor_char_boundary(max));
    text.push_str(CUT_NOTICE);
    Text {
        text,
        truncated: true,
        tokens,
    }
}

/// What of tree and content is seen, by how much room the token figure takes.
struct Visible<'a> {
    tree: &'a str,
    content: &'a str,
    /// Bytes for figure, tree and content.
    room: usize,
    /// A place in tree and content up to which the tokens have been counted, and their number.
    counted: Option<(usize, u64)>,
}

impl<'a> Visible<'a> {
    fn new(tree: &'a str, content: &'a str, room: usize) -> Self {
        Self {
            tree,
            content,
            room,
            counted: None,
        }
    }

    /// The parts that are seen if the figure has so many digits; `None` where the cut falls into
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
        // Rounds differ in their last few bytes only; the rest is counted once.
        let (seam, before) = *self.counted.get_or_insert_with(|| {
            let seam = tokens::last_seam(
                &text[..text.floor_char_boundary(text.len() - text.len().min(64))],
            );
            (seam, tokens::count(&text[..seam]))
        });
        before + tokens::count(&text[seam..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            subject: Subject::Repository {
                owner: "Owner".to_owned(),
                name: "Name".to_owned(),
            },
            commit: Some("c".repeat(40)),
            files: 12_345,
            notices: Vec::new(),
        }
    }

    #[test]
    fn the_summary_is_gitingests() {
        let commit = "c".repeat(40);
        let mut facts = facts();
        assert_eq!(
            facts.summary("1.2k"),
            format!(
                "Repository: owner/name\nCommit: {commit}\nFiles analyzed: 12345\n\n\
                 Estimated tokens: 1.2k"
            )
        );
        facts.notices = vec![
            "Limit reached: one".to_owned(),
            "Limit reached: two".to_owned(),
        ];
        facts.subject = Subject::Directory {
            slug: "a/b".to_owned(),
        };
        assert_eq!(
            facts.summary("7"),
            "Directory: a/b\nFiles analyzed: 12345\nLimit reached: one\nLimit reached: two\n\n\
             Estimated tokens: 7"
        );
        assert_eq!(facts.subject.root_name(), "b");
    }

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

    #[test]
    fn facts_and_limits_travel_as_json() {
        let facts = facts();
        let json = serde_json::to_string(&facts).unwrap();
        assert_eq!(serde_json::from_str::<Facts>(&json).unwrap(), facts);
        for limits in [Limits::default(), Limits::gitingest()] {
            let json = serde_json::to_string(&limits).unwrap();
            assert_eq!(serde_json::from_str::<Limits>(&json).unwrap(), limits);
        }
    }
}
