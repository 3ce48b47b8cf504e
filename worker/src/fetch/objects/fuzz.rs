//! A tree is read as libgit2 reads it.

use super::*;

pub(in crate::fetch) fn tree(input: &[u8]) {
    let read = parse_tree(input);
    let raw: Vec<_> = raw_entries(input).collect();
    assert_eq!(raw.iter().all(Option::is_some), read.is_some());
    assert!(raw.iter().rev().skip(1).all(Option::is_some));
    if let Some(entries) = &read {
        assert_eq!(raw.len(), entries.len());
        assert_eq!(parse_tree(&written(entries)).as_ref(), Some(entries));
    }
    // Each refuses trees that the other reads: for a name that is merely odd, for a mode with a sign.
    if let (Some(entries), Some(others)) = (read, by_libgit2(input)) {
        assert_eq!(entries, others);
    }
}

fn written(entries: &[TreeEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        let mode = match entry.kind {
            EntryKind::File => "100644 ",
            EntryKind::Symlink => "120000 ",
            EntryKind::Directory => "40000 ",
            EntryKind::Submodule => "160000 ",
        };
        bytes.extend_from_slice(mode.as_bytes());
        bytes.extend_from_slice(&entry.name);
        bytes.push(0);
        bytes.extend_from_slice(&entry.id.0);
    }
    bytes
}

/// Returns a tree's entries as libgit2 reads them, if it does.
fn by_libgit2(bytes: &[u8]) -> Option<Vec<TreeEntry>> {
    let odb = Odb::new().expect("an object database in memory");
    odb.add_new_mempack_backend(1).expect("memory");
    let repository = Repository::from_odb(odb).expect("a repository in memory");
    let odb = repository.odb().expect("its object database");
    let id = odb.write(ObjectType::Tree, bytes).ok()?;
    let tree = repository.find_tree(id).ok()?;
    let entries = tree.iter().map(|entry| TreeEntry {
        name: entry.name_bytes().to_vec(),
        // What an unknown type is, git decides, not libgit2.
        kind: match entry.filemode_raw() & 0o170_000 {
            0o100_000 => EntryKind::File,
            0o120_000 => EntryKind::Symlink,
            0o040_000 => EntryKind::Directory,
            _ => EntryKind::Submodule,
        },
        id: object_id(entry.id()),
    });
    Some(entries.collect())
}
