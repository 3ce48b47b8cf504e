//! Finds and reads the repository's ignore files.
//!
//! gitingest reads them wherever they lie, also below directories that are ignored themselves, and
//! before it looks at anything else.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use common::fault::Fault;
use common::text::thousands;

use super::rules::{MAX_PATTERNS, Rules};

use crate::digest::walk::{MAX_ENTRIES, Trees};
use crate::source::{EntryKind, ObjectId, Source};

/// Most ignore files that are applied.
const MAX_FILES: usize = 5_000;
/// Largest ignore file that is applied, in bytes.
const MAX_FILE_BYTES: u64 = 512 << 10;
/// Most bytes of ignore files that are read.
const MAX_TOTAL_BYTES: u64 = 16 << 20;

/// The names, in the order in which their patterns count.
const NAMES: [&str; 2] = [".gitignore", ".gitingestignore"];

/// An ignore file.
struct IgnoreFile {
    directory: String,
    blob: ObjectId,
}

/// All patterns that hold for the tree, and a notice if there were too many.
pub(in crate::digest) fn rules(
    source: &dyn Source,
    trees: &mut Trees<'_>,
    root: ObjectId,
    max_depth: usize,
) -> Result<(Rules, Option<String>), Fault> {
    let mut rules = Rules::new();
    let (holding, mut cut) = holding(trees, root, max_depth)?;
    let (found, too_many) = find(trees, root, &holding)?;
    cut |= too_many;
    let mut bytes = 0;
    for files in &found {
        cut |= read(source, files, &mut bytes, &mut rules)?;
    }
    cut |= rules.overflowed();
    let notice = cut.then(|| {
        format!(
            "Limit reached: {} ignore files or {} patterns; the rest of them is not applied",
            thousands(MAX_FILES as u64),
            thousands(MAX_PATTERNS as u64)
        )
    });
    Ok((rules, notice))
}

/// For each depth, the trees with an ignore file in them or below them; and whether it was too much
/// to look at all of them. Each tree is looked at once per depth, however many paths lead to it.
fn holding(
    trees: &mut Trees<'_>,
    root: ObjectId,
    max_depth: usize,
) -> Result<(Vec<HashSet<ObjectId>>, bool), Fault> {
    struct ScannedTree {
        own: bool,
        below: Vec<ObjectId>,
    }
    let mut levels: Vec<HashMap<ObjectId, ScannedTree>> = Vec::new();
    let mut level = vec![root];
    let mut visited = 0;
    let mut cut = false;
    while !level.is_empty() && levels.len() <= max_depth && !cut {
        let mut seen = HashMap::new();
        let mut next = Vec::new();
        let mut queued = HashSet::new();
        for tree in level {
            if visited >= MAX_ENTRIES {
                cut = true;
                break;
            }
            let entries = trees.get(tree)?;
            visited += entries.len() as u64;
            let mut below = Vec::new();
            for entry in entries.iter().filter(|e| e.kind == EntryKind::Directory) {
                below.push(entry.id);
                if queued.insert(entry.id) {
                    next.push(entry.id);
                }
            }
            let is_ignore_file = |name: &str| NAMES.contains(&name);
            let own = entries
                .iter()
                .any(|e| e.kind == EntryKind::File && is_ignore_file(&e.name));
            seen.insert(tree, ScannedTree { own, below });
        }
        levels.push(seen);
        level = next;
    }

    let mut holding: Vec<HashSet<ObjectId>> = vec![HashSet::new(); levels.len() + 1];
    for (depth, seen) in levels.iter().enumerate().rev() {
        let (this, deeper) = holding.split_at_mut(depth + 1);
        let holds =
            |seen: &ScannedTree| seen.own || seen.below.iter().any(|id| deeper[0].contains(id));
        this[depth].extend(seen.iter().filter(|(_, s)| holds(s)).map(|(id, _)| *id));
    }
    Ok((holding, cut))
}

/// The ignore files of either name in path order, and whether there are too many.
fn find(
    trees: &mut Trees<'_>,
    root: ObjectId,
    holding: &[HashSet<ObjectId>],
) -> Result<([Vec<IgnoreFile>; 2], bool), Fault> {
    let mut found = NAMES.map(|_| Vec::new());
    let mut count = 0;
    let mut open = vec![(String::new(), root, 0)];
    while let Some((directory, tree, depth)) = open.pop() {
        if !holding[depth].contains(&tree) {
            continue;
        }
        let entries = trees.get(tree)?;
        for (name, files) in NAMES.iter().zip(&mut found) {
            let is_it = |e: &&crate::digest::walk::CheckoutEntry| {
                e.kind == EntryKind::File && e.name == *name
            };
            if let Some(entry) = entries.iter().find(is_it) {
                if count == MAX_FILES {
                    return Ok((found, true));
                }
                count += 1;
                files.push(IgnoreFile {
                    directory: directory.clone(),
                    blob: entry.id,
                });
            }
        }
        let mut below: Vec<_> = entries
            .iter()
            .filter(|e| e.kind == EntryKind::Directory && holding[depth + 1].contains(&e.id))
            .collect();
        below.sort_unstable_by(|a, b| b.name.cmp(&a.name));
        for entry in below {
            let path = if directory.is_empty() {
                entry.name.clone()
            } else {
                format!("{directory}/{}", entry.name)
            };
            open.push((path, entry.id, depth + 1));
        }
    }
    Ok((found, false))
}

/// Adds the patterns of `files`; says whether some were left out. `bytes` counts what was read.
fn read(
    source: &dyn Source,
    files: &[IgnoreFile],
    bytes: &mut u64,
    rules: &mut Rules,
) -> Result<bool, Fault> {
    let blobs: Vec<ObjectId> = files.iter().map(|file| file.blob).collect();
    let sizes = source.sizes(&blobs)?;
    let mut cut = false;
    let mut wanted = Vec::new();
    for (file, size) in files.iter().zip(sizes) {
        if size > MAX_FILE_BYTES || *bytes + size > MAX_TOTAL_BYTES {
            cut = true;
        } else if size > 0 {
            *bytes += size;
            wanted.push(file);
        }
    }
    let blobs: Vec<ObjectId> = wanted.iter().map(|file| file.blob).collect();
    source.read(&blobs, &mut |i, text| {
        rules.add_file(&wanted[i].directory, text);
        if rules.overflowed() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    Ok(cut)
}
