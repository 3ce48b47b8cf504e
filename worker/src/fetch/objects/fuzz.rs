//! A tree is read as libgit2 reads it.

use super::*;
use crate::source::{EntryKind, TreeEntry, tree_entries};

pub(in crate::fetch) fn tree(input: &[u8]) {
    let each: Vec<_> = tree_entries(input).collect();
    // Damage ends it.
    assert!(each.iter().rev().skip(1).all(Option::is_some));
    let Some(entries) = each.into_iter().collect::<Option<Vec<_>>>() else {
        return;
    };
    let written = written(&entries);
    let again = tree_entries(&written).collect::<Option<Vec<_>>>();
    assert_eq!(again.as_ref(), Some(&entries));
    // Each refuses trees that the other reads: for a name that is merely odd, for a mode with a sign.
    compare_with_libgit2(input, &entries);
}

fn written(entries: &[TreeEntry<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        let mode = match entry.kind {
            EntryKind::File => "100644 ",
            EntryKind::Symlink => "120000 ",
            EntryKind::Directory => "40000 ",
            EntryKind::Submodule => "160000 ",
        };
        bytes.extend_from_slice(mode.as_bytes());
        bytes.extend_from_slice(entry.name);
        bytes.push(0);
        bytes.extend_from_slice(&entry.id.0);
    }
    bytes
}

/// Fails if libgit2 reads a tree, and finds other entries.
fn compare_with_libgit2(bytes: &[u8], entries: &[TreeEntry<'_>]) {
    let odb = Odb::new().expect("an object database in memory");
    odb.add_new_mempack_backend(1).expect("memory");
    let repository = Repository::from_odb(odb).expect("a repository in memory");
    let odb = repository.odb().expect("its object database");
    let Ok(id) = odb.write(ObjectType::Tree, bytes) else {
        return;
    };
    let Ok(tree) = repository.find_tree(id) else {
        return;
    };
    assert_eq!(tree.len(), entries.len());
    for (found, entry) in tree.iter().zip(entries) {
        // What an unknown type is, git decides, not libgit2.
        let kind = match found.filemode_raw() & 0o170_000 {
            0o100_000 => EntryKind::File,
            0o120_000 => EntryKind::Symlink,
            0o040_000 => EntryKind::Directory,
            _ => EntryKind::Submodule,
        };
        let found = (found.name_bytes(), kind, object_id(found.id()));
        assert_eq!(found, (entry.name, entry.kind, entry.id));
    }
}
