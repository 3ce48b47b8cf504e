//! The directory structure, as lines.

use std::ops::ControlFlow;

use common::fault::Fault;

use super::walk::{Listing, NodeKind};
use crate::source::{ObjectId, Source};

/// How many links are looked up at once.
const LINKS_BATCH: usize = 256;

/// The tree's text, until it is longer than `max_bytes`. Looks up where the links in it point.
pub(super) fn render(
    source: &dyn Source,
    listing: &mut Listing,
    max_bytes: Option<u64>,
) -> Result<String, Fault> {
    let max = max_bytes.map_or(usize::MAX, |max| usize::try_from(max).unwrap_or(usize::MAX));
    let mut last_child = vec![0; listing.nodes.len()];
    for (i, node) in listing.nodes.iter().enumerate() {
        last_child[node.parent] = i;
    }

    let mut text = "Directory structure:\n".to_owned();
    // What stands before the lines of each open directory's children.
    let mut open: Vec<(usize, String)> = Vec::new();
    for i in 0..listing.nodes.len() {
        if text.len() > max {
            break;
        }
        if matches!(
            listing.nodes[i].kind,
            NodeKind::Symlink { target: None, .. }
        ) {
            look_up_links(source, listing, i)?;
        }
        let node = &listing.nodes[i];
        let is_root = i == 0;
        while !is_root
            && open
                .last()
                .is_some_and(|(parent, _)| *parent != node.parent)
        {
            open.pop();
        }
        let prefix = open.last().map_or("", |(_, prefix)| prefix.as_str());
        let is_last = is_root || last_child[node.parent] == i;
        text.push_str(prefix);
        text.push_str(if is_last { "└── " } else { "├── " });
        text.push_str(&node.name);
        match &node.kind {
            NodeKind::File { .. } => {}
            NodeKind::Symlink { target, .. } => {
                text.push_str(" -> ");
                text.push_str(target.as_deref().unwrap_or_default());
            }
            NodeKind::Directory => {
                text.push('/');
                let below = if is_last { "    " } else { "│   " };
                open.push((i, format!("{prefix}{below}")));
            }
        }
        text.push('\n');
    }
    Ok(text)
}

/// Reads the targets of the next links, from the node at `from` on.
fn look_up_links(source: &dyn Source, listing: &mut Listing, from: usize) -> Result<(), Fault> {
    let links = listing.nodes.iter().enumerate().skip(from);
    let links = links.filter_map(|(i, node)| match node.kind {
        NodeKind::Symlink { blob, .. } => Some((i, blob)),
        NodeKind::Directory | NodeKind::File { .. } => None,
    });
    let (places, blobs): (Vec<usize>, Vec<ObjectId>) = links.take(LINKS_BATCH).unzip();
    source.read(&blobs, &mut |i, bytes| {
        if let NodeKind::Symlink { target, .. } = &mut listing.nodes[places[i]].kind {
            *target = Some(last_component(bytes));
        }
        ControlFlow::Continue(())
    })
}

/// What `os.readlink(path)` followed by `Path.name` gives in Python. A target ends at a NUL, since
/// the system call that makes the link ends it there.
fn last_component(target: &[u8]) -> String {
    let end = target.iter().position(|byte| *byte == 0);
    let target = &target[..end.unwrap_or(target.len())];
    let mut parts = target.split(|byte| *byte == b'/');
    let name = parts.rfind(|part| !matches!(*part, b"" | b"."));
    String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_shows_the_last_component_of_its_target() {
        for (target, expected) in [
            ("../outside/deep/t.txt", "t.txt"),
            ("src/", "src"),
            ("/etc/passwd", "passwd"),
            ("a/.", "a"),
            ("..", ".."),
            (".", ""),
            ("/", ""),
            ("a\0/b", "a"),
        ] {
            assert_eq!(last_component(target.as_bytes()), expected, "{target:?}");
        }
        assert_eq!(last_component(b"a/\xff"), "\u{fffd}");
    }
}
