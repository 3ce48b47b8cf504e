//! The directory structure as text.

use std::ops::ControlFlow;

use common::fault::Fault;

use super::walk::{Listing, NodeKind};
use crate::source::{ObjectId, Source};

/// Links that are read at once: each time may be a request to a host.
const LINKS_BATCH: usize = 4096;

/// Renders the tree until the text is longer than `max_bytes`, and reads its links' targets.
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
    // The open directories, with the prefix of their children's lines.
    let mut open: Vec<(usize, String)> = Vec::new();
    for i in 0..listing.nodes.len() {
        if text.len() > max {
            break;
        }
        if let NodeKind::Symlink { target: None, .. } = listing.nodes[i].kind {
            read_links(source, listing, i)?;
        }
        let node = &listing.nodes[i];
        let is_root = i == 0;
        if !is_root {
            let place = open.iter().rposition(|(open, _)| *open == node.parent);
            open.truncate(place.map_or(0, |place| place + 1));
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
fn read_links(source: &dyn Source, listing: &mut Listing, from: usize) -> Result<(), Fault> {
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

/// Returns Python's `Path(os.readlink(path)).name`. A target ends at a NUL, as for the system call that
/// makes the link.
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
