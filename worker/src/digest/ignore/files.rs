//! Finds and reads the repository's ignore files.
//!
//! gitingest reads them before anything else, and also those below ignored directories.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use common::fault::Fault;
use common::text::thousands;

use super::rules::{MAX_PATTERNS, Rules};
use crate::digest::directory::Trees;
use crate::digest::walk::MAX_ENTRIES;
use crate::source::{ObjectId, Source};

/// Most ignore files that are applied.
const MAX_FILES: usize = 5_000;
/// Largest ignore file that is applied, in bytes.
pub(in crate::digest) const MAX_FILE_BYTES: u64 = 512 << 10;
/// Most bytes of ignore files that are read.
const MAX_TOTAL_BYTES: u64 = 16 << 20;

/// The names, in the order in which their patterns count.
const NAMES: [&str; 2] = [".gitignore", ".gitingestignore"];

struct IgnoreFile {
    directory: String,
    blob: ObjectId,
}

/// Returns all patterns for `root`, and a notice if some were left out.
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

/// Returns, for each depth, the trees with an ignore file in or below them, and whether there were too
/// many trees. Each tree is visited once per depth, however many paths lead to it.
fn holding(
    trees: &mut Trees<'_>,
    root: ObjectId,
    max_depth: usize,
) -> Result<(Vec<HashSet<ObjectId>>, bool), Fault> {
    /// Whether a tree has an ignore file, and its directories.
    type Scanned = (bool, Vec<ObjectId>);
    let mut levels: Vec<HashMap<ObjectId, Scanned>> = Vec::new();
    let mut level = vec![root];
    let mut visited = 0;
    let mut cut = false;
    while !level.is_empty() && levels.len() <= max_depth && !cut {
        let mut scanned = HashMap::new();
        let mut next = Vec::new();
        let mut queued = HashSet::new();
        for tree in level {
            if visited >= MAX_ENTRIES || trees.is_exhausted() {
                cut = true;
                break;
            }
            let directory = trees.get(tree)?;
            visited += directory.len() as u64;
            let below: Vec<ObjectId> = directory.directories().map(|(_, id)| id).collect();
            next.extend(below.iter().filter(|id| queued.insert(**id)));
            let has_file = NAMES.iter().any(|name| directory.file(name).is_some());
            scanned.insert(tree, (has_file, below));
        }
        levels.push(scanned);
        level = next;
    }

    let mut holding: Vec<HashSet<ObjectId>> = vec![HashSet::new(); levels.len() + 1];
    for (depth, scanned) in levels.iter().enumerate().rev() {
        let (this, deeper) = holding.split_at_mut(depth + 1);
        let holds = |(has_file, below): &Scanned| {
            *has_file || below.iter().any(|id| deeper[0].contains(id))
        };
        this[depth].extend(scanned.iter().filter(|(_, s)| holds(s)).map(|(id, _)| *id));
    }
    Ok((holding, cut))
}

/// Returns the ignore files of either name in path order, and whether there are too many.
fn find(
    trees: &mut Trees<'_>,
    root: ObjectId,
    holding: &[HashSet<ObjectId>],
) -> Result<([Vec<IgnoreFile>; 2], bool), Fault> {
    let mut found = NAMES.map(|_| Vec::new());
    let mut count = 0;
    let mut visited = 0;
    let mut open = vec![(String::new(), root, 0)];
    while let Some((directory, tree, depth)) = open.pop() {
        if !holding[depth].contains(&tree) {
            continue;
        }
        if visited >= MAX_ENTRIES || trees.is_exhausted() {
            return Ok((found, true));
        }
        let here = trees.get(tree)?;
        visited += here.len() as u64;
        for (name, files) in NAMES.iter().zip(&mut found) {
            if let Some(blob) = here.file(name) {
                if count == MAX_FILES {
                    return Ok((found, true));
                }
                count += 1;
                let directory = directory.clone();
                files.push(IgnoreFile { directory, blob });
            }
        }
        let below = here
            .directories()
            .filter(|(_, id)| holding[depth + 1].contains(id));
        let mut below: Vec<_> = below.map(|(index, _)| here.entry(index)).collect();
        below.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        // Each leads to a file at least; one more shows that there are too many.
        let room = MAX_FILES - count + 1;
        below.truncate(room);
        let slash = if directory.is_empty() { "" } else { "/" };
        open.extend(below.into_iter().rev().map(|entry| {
            let path = format!("{directory}{slash}{}", entry.name);
            (path, entry.id, depth + 1)
        }));
        let unreachable = open.len().saturating_sub(room);
        open.drain(..unreachable);
    }
    Ok((found, false))
}

/// Adds the patterns of `files`, and returns whether some were left out. `bytes` counts what was read.
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
