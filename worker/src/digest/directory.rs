//! Directories: the entries of a tree that git would check out, in the digest's order.

use std::borrow::Cow;
use std::collections::HashMap;
use std::rc::Rc;

use common::fault::Fault;

use crate::source::{EntryKind, ObjectId, Source, TreeEntry, tree_entries};

/// Most bytes of trees that are sorted for one purpose; a tree sorted twice counts twice. A million
/// ordinary entries have 45 MB. Also bounds the memory of nested directories that are all open.
const MAX_SORTED: usize = 128 << 20;
/// Most bytes in the cache of directories.
const MAX_CACHED: usize = 16 << 20;
/// Longest name in a file system, in bytes.
const NAME_MAX: usize = 255;

/// The directories of a source.
///
/// Trees are shared with the source and never copied. Few are sorted again and again: there is a cache,
/// and a budget for trees that contain another a billion times.
pub(super) struct Trees<'a> {
    source: &'a dyn Source,
    cache: HashMap<ObjectId, Rc<Directory>>,
    cached: usize,
    sorted: usize,
}

impl<'a> Trees<'a> {
    pub(super) fn new(source: &'a dyn Source) -> Self {
        Self {
            source,
            cache: HashMap::new(),
            cached: 0,
            sorted: 0,
        }
    }

    /// Starts anew with the budget, for another purpose.
    pub(super) fn renew(&mut self) {
        self.sorted = 0;
    }

    /// Whether no more trees should be read.
    pub(super) fn is_exhausted(&self) -> bool {
        self.sorted >= MAX_SORTED
    }

    /// Returns the directory of a tree.
    pub(super) fn get(&mut self, tree: ObjectId) -> Result<Rc<Directory>, Fault> {
        if let Some(directory) = self.cache.get(&tree) {
            return Ok(Rc::clone(directory));
        }
        let bytes = self.source.tree(tree)?;
        self.sorted += bytes.len();
        let directory = Directory::new(bytes);
        let directory =
            directory.ok_or_else(|| Fault::transient(format!("tree {tree} is damaged")))?;
        let directory = Rc::new(directory);
        let weight = directory.weight();
        if self.cached + weight <= MAX_CACHED {
            self.cached += weight;
            self.cache.insert(tree, Rc::clone(&directory));
        }
        Ok(directory)
    }
}

/// The entries of a tree that git would check out, in the digest's order.
#[derive(Debug, Default)]
pub(super) struct Directory {
    tree: Rc<[u8]>,
    places: Box<[Place]>,
    /// Entries of the tree that git would not check out.
    pub(super) unusable: usize,
}

/// Where an entry is in its tree's bytes.
#[derive(Clone, Copy, Debug)]
struct Place {
    name: u32,
    len: u8,
    kind: EntryKind,
}

/// An entry of a [`Directory`].
#[derive(Debug)]
pub(super) struct CheckoutEntry<'a> {
    /// With U+FFFD for bytes that are not UTF-8.
    pub(super) name: Cow<'a, str>,
    pub(super) kind: EntryKind,
    pub(super) id: ObjectId,
}

impl Directory {
    /// Sorts the entries of a tree; `None` if it is damaged.
    fn new(tree: Rc<[u8]>) -> Option<Self> {
        let mut places = Vec::new();
        let mut unusable = 0;
        for entry in tree_entries(&tree) {
            let TreeEntry { name, kind, .. } = entry?;
            match u8::try_from(name.len()) {
                Ok(len) if usable(name) => {
                    let at = name.as_ptr().addr() - tree.as_ptr().addr();
                    let name = u32::try_from(at).ok()?;
                    places.push(Place { name, len, kind });
                }
                _ => unusable += 1,
            }
        }
        let all = places.len();
        // Of several of one name, the first counts. They are nearly in this order already.
        places.sort_by(|one, other| one.name(&tree).cmp(other.name(&tree)));
        places.dedup_by(|next, first| next.name(&tree) == first.name(&tree));
        unusable += all - places.len();
        let places = in_order(places, &tree);
        Some(Self {
            tree,
            places,
            unusable,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn entry(&self, index: usize) -> CheckoutEntry<'_> {
        let place = self.places[index];
        CheckoutEntry {
            name: String::from_utf8_lossy(place.name(&self.tree)),
            kind: place.kind,
            id: self.id(place),
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = CheckoutEntry<'_>> {
        (0..self.len()).map(|index| self.entry(index))
    }

    /// Returns the subdirectories: their places among the entries, and their trees.
    pub(super) fn directories(&self) -> impl Iterator<Item = (usize, ObjectId)> {
        let places = self.places.iter().enumerate();
        let directories = places.filter(|(_, place)| place.kind == EntryKind::Directory);
        directories.map(|(index, place)| (index, self.id(*place)))
    }

    /// Returns the blob of a file.
    pub(super) fn file(&self, name: &str) -> Option<ObjectId> {
        let is_it = |place: &&Place| {
            place.kind == EntryKind::File && place.name(&self.tree) == name.as_bytes()
        };
        Some(self.id(*self.places.iter().find(is_it)?))
    }

    fn id(&self, place: Place) -> ObjectId {
        // Behind the name and a NUL.
        let at = place.name as usize + usize::from(place.len) + 1;
        let id = self.tree[at..].first_chunk();
        ObjectId(*id.expect("the tree was read before"))
    }

    /// Returns the bytes that this takes.
    fn weight(&self) -> usize {
        self.tree.len() + size_of_val(&*self.places) + size_of::<Self>()
    }
}

impl Place {
    fn name(self, tree: &[u8]) -> &[u8] {
        &tree[self.name as usize..][..usize::from(self.len)]
    }
}

/// What decides about an entry's place in the digest.
struct Key {
    group: u8,
    /// Where the name in lower case is, if that is another.
    lower: (u32, u32),
    place: Place,
}

fn in_order(places: Vec<Place>, tree: &[u8]) -> Box<[Place]> {
    let mut lowered = Vec::new();
    let mut keys = Vec::with_capacity(places.len());
    for place in places {
        let name = place.name(tree);
        let mut lower = (0, 0);
        let is_plain = |byte: &u8| byte.is_ascii() && !byte.is_ascii_uppercase();
        if !name.iter().all(is_plain) {
            let other = String::from_utf8_lossy(name).to_lowercase();
            if other.as_bytes() != name {
                let start = lowered.len() as u32;
                lowered.extend_from_slice(other.as_bytes());
                lower = (start, lowered.len() as u32);
            }
        }
        keys.push(Key {
            group: 0,
            lower,
            place,
        });
    }
    let text = |key: &Key| match key.lower {
        (0, 0) => key.place.name(tree),
        (start, end) => &lowered[start as usize..end as usize],
    };
    for key in &mut keys {
        key.group = group(key.place.kind, text(key));
    }
    keys.sort_unstable_by(|one, other| {
        let by_group = one.group.cmp(&other.group);
        let by_text = || text(one).cmp(text(other));
        let by_name = || one.place.name(tree).cmp(other.place.name(tree));
        by_group.then_with(by_text).then_with(by_name)
    });
    keys.into_iter().map(|key| key.place).collect()
}

/// Whether git would check out an entry of this name.
fn usable(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= NAME_MAX
        && !name.contains(&b'/')
        && !name.eq_ignore_ascii_case(b".git")
}

/// READMEs, files, dot-files, directories and links, dot-directories and dot-links.
fn group(kind: EntryKind, lower: &[u8]) -> u8 {
    let dot = u8::from(lower.starts_with(b"."));
    match kind {
        EntryKind::File if lower == b"readme" || lower.starts_with(b"readme.") => 0,
        EntryKind::File => 1 + dot,
        EntryKind::Symlink | EntryKind::Directory | EntryKind::Submodule => 3 + dot,
    }
}

#[cfg(test)]
mod tests {
    use super::EntryKind::{Directory as Folder, File, Submodule, Symlink};
    use super::*;

    /// Returns the names of a tree of these entries, in the digest's order.
    fn names(entries: &[(EntryKind, &str)]) -> Vec<String> {
        let mut tree = Vec::new();
        for (kind, name) in entries {
            let mode = match kind {
                File => "100644",
                Symlink => "120000",
                Folder => "40000",
                Submodule => "160000",
            };
            tree.extend(format!("{mode} {name}\0").as_bytes());
            tree.extend([name.len() as u8; 20]);
        }
        let directory = Directory::new(tree.into()).unwrap();
        assert_eq!(directory.len() + directory.unusable, entries.len());
        let entries = directory.entries();
        let name = |entry: CheckoutEntry<'_>| {
            assert_eq!(entry.id, ObjectId([entry.name.len() as u8; 20]));
            entry.name.into_owned()
        };
        entries.map(name).collect()
    }

    #[test]
    fn files_come_before_directories_and_links_and_dots_after_the_rest_of_their_kind() {
        let sorted = names(&[
            (File, ".a"),
            (File, "B.txt"),
            (File, "_u.txt"),
            (File, "a.txt"),
            (File, "ReadMe"),
            (File, "README.md"),
            (File, "readmes"),
            (Symlink, "README.link"),
            (Symlink, ".link"),
            (Folder, "Dir"),
            (Folder, ".dir"),
            (Submodule, "module"),
        ]);
        let expected = [
            "ReadMe",
            "README.md",
            "_u.txt",
            "a.txt",
            "B.txt",
            "readmes",
            ".a",
            "Dir",
            "module",
            "README.link",
            ".dir",
            ".link",
        ];
        assert_eq!(sorted, expected);
    }

    #[test]
    fn names_that_only_case_tells_apart_are_sorted_raw() {
        let sorted = names(&["b", "É", "B", "é", "a"].map(|name| (File, name)));
        assert_eq!(sorted, ["a", "B", "b", "É", "é"]);
    }

    #[test]
    fn what_a_checkout_would_refuse_is_dropped() {
        let long = "x".repeat(256);
        for name in ["", ".", "..", ".git", ".GIT", "a/b", "/", &long] {
            assert_eq!(names(&[(File, name), (File, "a")]), ["a"], "{name:?}");
        }
        assert_eq!(names(&[(File, &long[1..])]), [&long[1..]]);
    }

    #[test]
    fn of_several_entries_of_one_name_the_first_counts() {
        let mut tree = Vec::new();
        for (mode, name) in [
            ("100644", "b"),
            ("40000", "a"),
            ("100644", "a"),
            ("40000", "b"),
        ] {
            tree.extend(format!("{mode} {name}\0").as_bytes());
            tree.extend([0; 20]);
        }
        let directory = Directory::new(tree.into()).unwrap();
        let kinds: Vec<_> = directory.entries().map(|e| (e.name, e.kind)).collect();
        assert_eq!(kinds, [("b".into(), File), ("a".into(), Folder)]);
        assert_eq!(directory.unusable, 2);
        assert_eq!(directory.file("b"), Some(ObjectId([0; 20])));
        assert_eq!(directory.file("a"), None);
    }
}
