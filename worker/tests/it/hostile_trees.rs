//! Repositories made to waste time or memory. Work is counted, not timed.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;

use common::fault::{Fault, FaultKind};
use testing::packs::Mode;
use testing::repositories::{
    BombLeaf, Builder, Raw, git_bomb, hostile_names, many_files, nested_directories,
};
use worker::digest::assemble::{DigestText, assemble};
use worker::digest::write::write;
use worker::digest::{CUT_NOTICE, DigestLimits, Facts, Part, Subject};
use worker::fetch::objects::Objects;
use worker::source::{Head, ObjectId, Source};

/// Counts a digest's requests to its source.
#[derive(Debug)]
struct Counting {
    inner: Objects,
    work: RefCell<Work>,
}

#[derive(Clone, Debug, Default)]
struct Work {
    trees: usize,
    sizes: usize,
    read: Vec<ObjectId>,
    read_bytes: usize,
}

impl Source for Counting {
    fn head(&self) -> Result<Option<Head>, Fault> {
        self.inner.head()
    }

    fn tree(&self, tree: ObjectId) -> Result<Rc<[u8]>, Fault> {
        self.work.borrow_mut().trees += 1;
        self.inner.tree(tree)
    }

    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault> {
        self.work.borrow_mut().sizes += blobs.len();
        self.inner.sizes(blobs)
    }

    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault> {
        self.inner.read(blobs, &mut |i, bytes| {
            let mut work = self.work.borrow_mut();
            work.read.push(blobs[i]);
            work.read_bytes += bytes.len();
            drop(work);
            visit(i, bytes)
        })
    }
}

struct SlotOutput {
    facts: Facts,
    tree: String,
    content: String,
    text: DigestText,
    work: Work,
}

fn make(path: &Path, limits: &DigestLimits) -> SlotOutput {
    let source = Counting {
        inner: Objects::open(path).unwrap(),
        work: RefCell::default(),
    };
    let subject = Subject::Repository {
        owner: "o".to_owned(),
        name: "r".to_owned(),
    };
    let (mut tree, mut content) = (String::new(), String::new());
    let facts = write(&source, &subject, limits, &mut |part, text| {
        match part {
            Part::Tree => tree.push_str(text),
            Part::Content => content.push_str(text),
        }
        Ok(())
    });
    let facts = facts.unwrap();
    let text = assemble(&facts, &tree, &content, limits.max_text_bytes);
    SlotOutput {
        facts,
        tree,
        content,
        text,
        work: source.work.into_inner(),
    }
}

fn with_text_limit(max_text_bytes: Option<u64>) -> DigestLimits {
    DigestLimits {
        max_text_bytes,
        ..DigestLimits::default()
    }
}

/// There are few trees, and each is read once, however many paths lead to it.
fn assert_bounded(made: &SlotOutput) {
    assert!(made.work.trees <= 12, "{} trees read", made.work.trees);
    assert!(made.work.sizes <= 1_100_000, "{} sizes", made.work.sizes);
    assert!(made.text.text.len() < 600_000);
}

#[test]
fn a_git_bomb_of_files_ends_at_the_limit_of_files() {
    let root = tempfile::tempdir().unwrap();
    let path = git_bomb(root.path(), "o", "r", BombLeaf::File("f", b"boom\n"));
    let made = make(&path, &DigestLimits::default());
    assert_bounded(&made);
    assert_eq!(made.facts.files, 10_000);
    let notice = "Limit reached: 10,000 files; the rest of the repository is left out";
    assert_eq!(made.facts.notices, [notice]);
    assert!(
        made.text
            .text
            .contains(&format!("\nFiles analyzed: 10000\n{notice}\n\nEst"))
    );
}

#[test]
fn git_bombs_that_show_nothing_end_at_the_limit_of_entries() {
    let root = tempfile::tempdir().unwrap();
    let large = DigestLimits {
        max_file_bytes: 3,
        ..DigestLimits::default()
    };
    for (name, leaf, limits) in [
        ("empty", BombLeaf::Nothing, &DigestLimits::default()),
        (
            "ignored",
            BombLeaf::File("x.png", b"boom\n"),
            &DigestLimits::default(),
        ),
        ("large", BombLeaf::File("x", b"boom\n"), &large),
    ] {
        let path = git_bomb(root.path(), "o", name, leaf);
        let made = make(&path, limits);
        assert_bounded(&made);
        assert_eq!(made.facts.files, 0, "{name}");
        assert_eq!(made.tree, "Directory structure:\n└── o-r/\n");
        let notice =
            "Limit reached: 1,000,000 tree entries; the rest of the repository is left out";
        assert_eq!(made.facts.notices, [notice], "{name}");
    }
}

#[test]
fn a_git_bomb_of_ignore_files_reads_some_of_them() {
    let root = tempfile::tempdir().unwrap();
    for (name, lines) in [("plain", "a\nb*c\n"), ("wild", "*/a*b*/[!c]\n!*/**/d\n")] {
        let leaf = BombLeaf::File(".gitignore", lines.as_bytes());
        let path = git_bomb(root.path(), "o", name, leaf);
        let made = make(&path, &DigestLimits::default());
        assert_bounded(&made);
        assert!(made.work.read.len() <= 5_000, "{}", made.work.read.len());
        assert_eq!(made.facts.files, 0);
        let notice = made.facts.notices.last().unwrap();
        assert!(
            notice.contains("5,000 ignore files or 50,000 patterns"),
            "{notice}"
        );
    }
}

#[test]
fn a_hundred_thousand_files_are_counted_up_to_the_limit() {
    let root = tempfile::tempdir().unwrap();
    let path = many_files(root.path(), "o", "r", 100_000);
    let made = make(&path, &DigestLimits::default());
    assert_eq!(made.facts.files, 10_000);
    assert_eq!(made.facts.notices.len(), 1);
    assert_eq!(made.work.trees, 1);
    assert!(made.work.sizes <= 11_000, "{}", made.work.sizes);
    assert!(made.text.truncated);

    let exactly = many_files(root.path(), "o", "exactly", 10_000);
    let made = make(&exactly, &DigestLimits::default());
    assert_eq!((made.facts.files, made.facts.notices.len()), (10_000, 0));
}

#[test]
fn five_thousand_nested_directories_are_read_to_the_limit_of_depth() {
    let root = tempfile::tempdir().unwrap();
    let path = nested_directories(root.path(), "o", "r", 5_000);
    let made = make(&path, &DigestLimits::default());
    assert_eq!(made.facts.files, 1);
    assert!(made.facts.notices.is_empty());
    assert!(made.work.trees <= 21, "{}", made.work.trees);
    // Nothing recurses, so no depth is too deep.
    let limits = DigestLimits {
        max_depth: usize::MAX,
        ..DigestLimits::default()
    };
    assert_eq!(make(&path, &limits).facts.files, 2);
}

#[test]
fn names_that_reach_out_are_left_out_and_odd_ones_shown() {
    let root = tempfile::tempdir().unwrap();
    let path = hostile_names(root.path(), "o", "r");
    let made = make(&path, &DigestLimits::default());
    assert_eq!(
        made.tree,
        "Directory structure:\n└── o-r/\n    ├── a\nb\n    ├── bell\u{7}\u{1b}[31m\n    \
         ├── latin-\u{fffd}\n    ├── twice\n    ├── passwd -> passwd\n    └── z/\n        \
         └── inside\n"
    );
    assert!(!made.content.contains("root:"));
    assert!(made.content.contains("SYMLINK: passwd -> passwd\n"));
    // Four files and the link, nothing else.
    assert_eq!(made.facts.files, 6);
}

#[test]
fn a_large_blob_is_measured_and_not_read() {
    let root = tempfile::tempdir().unwrap();
    let path = Builder::new()
        .file("large.txt", vec![b'x'; (512 << 10) + 1])
        .file("small.txt", "small\n")
        .file(".gitignore", vec![b'#'; (512 << 10) + 1])
        .build(root.path(), "o", "r");
    let made = make(&path, &DigestLimits::default());
    assert_eq!(made.work.read_bytes, 6);
    assert_eq!(made.facts.files, 1);
    // An ignore file that is too large hides no files.
    assert_eq!(made.facts.notices.len(), 1);
}

#[test]
fn what_sizes_leave_out_leaves_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let mut builder = Builder::new();
    let mut expected = String::from("Directory structure:\n└── o-r/\n");
    // Sizes are asked for by the thousand; directories begin and end anywhere between.
    for i in 0..3_000 {
        let (large, last) = (i % 7 != 3, i >= 2_994);
        let path = format!("d{:04}/e/f{i:04}", i / 5);
        let shown = (0..5).map(|j| i / 5 * 5 + j).filter(|j| j % 7 == 3);
        builder = builder.file(path, if large { "large" } else { "x" });
        if !large {
            assert_eq!(shown.clone().count(), 1);
            let (here, below) = if last {
                ("└", "    ")
            } else {
                ("├", "│   ")
            };
            expected += &format!(
                "    {here}── d{:04}/\n    {below}└── e/\n    {below}    └── f{i:04}\n",
                i / 5
            );
        }
    }
    let path = builder.build(root.path(), "o", "r");
    let limits = |max_files| DigestLimits {
        max_file_bytes: 3,
        max_files,
        max_text_bytes: None,
        ..DigestLimits::default()
    };
    let made = make(&path, &limits(10_000));
    assert_eq!(made.facts.files, 429);
    assert_eq!(made.tree, expected);
    // Nothing is left of what was met behind the last file that the limit admits.
    let made = make(&path, &limits(2));
    let tree = "Directory structure:\n└── o-r/\n    ├── d0000/\n    │   └── e/\n    │       └── \
                f0003\n    └── d0002/\n        └── e/\n            └── f0010\n";
    assert_eq!(made.tree, tree);
    assert_eq!(made.facts.notices.len(), 1, "{:?}", made.facts.notices);
}

#[test]
fn all_files_together_have_a_limit_in_output_order() {
    let root = tempfile::tempdir().unwrap();
    let path = Builder::new()
        .file("a", "123456")
        .file("b", "12345")
        .file("c", "1234")
        .build(root.path(), "o", "r");
    let limits = DigestLimits {
        max_total_bytes: 10,
        ..DigestLimits::default()
    };
    let made = make(&path, &limits);
    assert_eq!(
        made.tree,
        "Directory structure:\n└── o-r/\n    ├── a\n    └── c\n"
    );
    let notice = "Limit reached: 10 bytes of files; files that would exceed it are left out";
    assert_eq!(made.facts.notices, [notice]);
}

#[test]
fn blobs_that_the_cut_text_cannot_show_are_not_read() {
    let root = tempfile::tempdir().unwrap();
    let mut builder = Builder::new();
    for i in 0..300 {
        builder = builder
            .file(
                format!("f{i:03}"),
                format!("{i:03} {}\n", "text ".repeat(20)),
            )
            .symlink(format!("l{i:03}"), format!("target{i}"));
    }
    let path = builder.build(root.path(), "o", "r");
    let whole = make(&path, &with_text_limit(None));
    let (before, _) = whole.text.text.split_once("==").unwrap();
    // Cut in a header, in a body, right after one, and in the links.
    for max in [
        before.len() as u64 + 30,
        before.len() as u64 + 150,
        before.len() as u64 + 2_000,
        before.len() as u64 + 20_001,
        whole.text.text.len() as u64 - 200,
        whole.text.text.len() as u64 - 1,
    ] {
        let made = make(&path, &with_text_limit(Some(max)));
        assert!(made.text.truncated);
        // A body that is partly visible. One more may be read: the number of digits of the token
        // count is not known beforehand.
        let separator = "=".repeat(48);
        let is_shown = |i: &usize| {
            let begin = format!("FILE: f{i:03}\n{separator}\n{}", i / 100);
            made.text.text.contains(&begin)
        };
        let shown = (0..300).filter(is_shown).count();
        // Links are blobs too.
        let read = made.work.read.len() - 300;
        assert!(
            read == shown || read == shown + 1,
            "at {max}: {read} read, {shown} shown"
        );
        assert_eq!(
            made.facts, whole.facts,
            "the facts do not depend on the cut"
        );
    }
    // The tree alone is too long: no file is read, and no more of the tree is rendered than needed.
    let made = make(&path, &with_text_limit(Some(600)));
    assert!(made.work.read.is_empty(), "{}", made.work.read.len());
    assert!(made.tree.len() < 700 && made.content.is_empty());
    assert_eq!(made.facts.files, 600);
}

#[test]
fn a_cut_text_has_its_length_its_end_and_its_own_token_count() {
    let root = tempfile::tempdir().unwrap();
    let line = "let größe = 1; // 日本語 and some words\n";
    let path = Builder::new()
        .file("a.rs", line.repeat(9_000))
        .file("b.rs", line.repeat(9_000))
        .build(root.path(), "o", "r");
    let limits = DigestLimits::default();
    let made = make(&path, &limits);
    let text = made.text.text.strip_suffix(CUT_NOTICE).unwrap();
    assert!(made.text.truncated);
    let max = 524_288;
    assert!(text.len() <= max && text.len() > max - 8, "{}", text.len());
    let whole = make(&path, &with_text_limit(None)).text;
    let body = |text: &str| text.split_once("Directory structure").unwrap().1.to_owned();
    assert!(body(&whole.text).starts_with(&body(text)));

    // The visible text has as many tokens as stated.
    let (_, shown) = text.split_once("\n\nDirectory").unwrap();
    let shown = format!("Directory{shown}");
    let (tree, content) = shown.split_at(made.tree.len());
    let again = assemble(&made.facts, tree, &content[1..], None);
    assert_eq!(again.tokens, made.text.tokens);
    let summary = |text: &str| text.split_once("Directory").unwrap().0.to_owned();
    assert_eq!(summary(&again.text), summary(text));
}

#[test]
fn exactly_the_limit_is_not_cut() {
    let root = tempfile::tempdir().unwrap();
    let build = |name: &str, size: usize| {
        let builder = Builder::new().file("a", "x ".repeat(size / 2) + &"y".repeat(size % 2));
        make(
            &builder.build(root.path(), "o", name),
            &DigestLimits {
                max_file_bytes: 1 << 20,
                ..DigestLimits::default()
            },
        )
    };
    let around = build("around", 500_000).text.text.len();
    let fits = 500_000 + 524_288 - around;
    let exactly = build("exactly", fits);
    assert_eq!(exactly.text.text.len(), 524_288);
    assert!(!exactly.text.truncated);
    let over = build("over", fits + 1);
    assert!(over.text.truncated);
    assert_eq!(over.text.text.len(), 524_288 + CUT_NOTICE.len());
}

#[test]
fn garbage_notebooks_are_reported_in_their_place() {
    let root = tempfile::tempdir().unwrap();
    let noise: Vec<u8> = (0..100_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let path = Builder::new()
        .file("deep.ipynb", "[".repeat(500_000))
        .file("objects.ipynb", "{\"a\":".repeat(100_000))
        .file("noise.ipynb", noise)
        .file("null.ipynb", "\0".repeat(1000))
        .file("fine.txt", "fine\n")
        .build(root.path(), "o", "r");
    let made = make(&path, &DigestLimits::default());
    assert_eq!(
        made.content.matches("Error processing notebook: ").count(),
        4
    );
    assert!(
        made.content
            .contains("Invalid JSON in notebook: null.ipynb\n")
    );
    assert!(made.content.contains("FILE: fine.txt"));
}

#[test]
fn garbage_ignore_files_leave_nothing_out() {
    let root = tempfile::tempdir().unwrap();
    let garbage = "[z-a]\n[\n\\\n!\n[[[[\n*[!\n".repeat(1_000);
    let path = Builder::new()
        .file("kept.txt", "kept\n")
        .file(".gitignore", garbage)
        .file(".gitingestignore", b"\xff\xfe\0*\n")
        .build(root.path(), "o", "r");
    let made = make(&path, &DigestLimits::default());
    assert!(made.tree.contains("kept.txt"));
    assert!(made.facts.notices.is_empty());
}

#[test]
fn patterns_that_are_slow_to_match_end_at_a_budget() {
    let root = tempfile::tempdir().unwrap();
    let mut builder = Builder::new();
    let mut patterns = String::new();
    for i in 0..2_000 {
        patterns.push_str(&format!("{}b{i}\n", "a*".repeat(60)));
        builder = builder.file(format!("{}{i:04}", "a".repeat(240)), "x");
    }
    let path = builder
        .file(".gitignore", patterns)
        .build(root.path(), "o", "r");
    let made = make(&path, &DigestLimits::default());
    assert!(made.facts.files < 2_000);
    assert!(
        made.facts.notices[0].contains("tree entries"),
        "{:?}",
        made.facts.notices
    );
}

#[test]
fn thousands_of_ignore_files_and_patterns_are_looked_up_not_tried() {
    let root = tempfile::tempdir().unwrap();
    let mut builder = Builder::new();
    for i in 0..4_000 {
        let lines = "a.txt\n*.tmp\nlog-*\n/x/y\n".to_owned();
        builder = builder
            .file(format!("d{i}/.gitignore"), lines)
            .file(format!("d{i}/a.txt"), "a")
            .file(format!("d{i}/b.txt"), "b");
    }
    let path = builder.build(root.path(), "o", "r");
    let made = make(&path, &DigestLimits::default());
    assert_eq!(made.facts.files, 4_000);
    assert!(made.facts.notices.is_empty(), "{:?}", made.facts.notices);
}

#[test]
fn objects_that_are_not_what_the_tree_says_are_a_fault() {
    let root = tempfile::tempdir().unwrap();
    let subject = Subject::Directory {
        slug: "x".to_owned(),
    };
    let missing = "5".repeat(40);
    let digest = |name: &str, mode: Mode, what: &str| {
        let raw = Raw::new(root.path(), "o", name);
        let inner = raw.tree(&[(Mode::File, "f", raw.blob(b"x").as_str())]);
        let id = match what {
            "tree" => inner,
            "blob" => raw.blob(b"x"),
            _ => missing.clone(),
        };
        let tree = raw.tree(&[(mode, "entry", id.as_str())]);
        let source = Objects::open(&raw.commit(&tree)).unwrap();
        write(&source, &subject, &DigestLimits::default(), &mut |_, _| {
            Ok(())
        })
    };
    for (name, mode, what) in [
        ("file-is-tree", Mode::File, "tree"),
        ("directory-is-blob", Mode::Directory, "blob"),
        ("file-missing", Mode::File, "missing"),
        ("directory-missing", Mode::Directory, "missing"),
        ("link-missing", Mode::Symlink, "missing"),
    ] {
        let fault = digest(name, mode, what).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Transient, "{name}: {fault}");
    }
    assert!(digest("fine", Mode::Directory, "tree").is_ok());
}

#[test]
fn what_emit_refuses_ends_the_digest() {
    let root = tempfile::tempdir().unwrap();
    let path = Builder::new().file("a", "x").build(root.path(), "o", "r");
    let source = Objects::open(&path).unwrap();
    let subject = Subject::Directory {
        slug: "x".to_owned(),
    };
    for refused in [Part::Tree, Part::Content] {
        let result = write(
            &source,
            &subject,
            &DigestLimits::default(),
            &mut |part, _| {
                if part == refused {
                    Err(Fault::infra("no more"))
                } else {
                    Ok(())
                }
            },
        );
        assert_eq!(result.unwrap_err().kind, FaultKind::Infra);
    }
}

#[test]
fn what_is_no_repository_is_gone() {
    let root = tempfile::tempdir().unwrap();
    let fault = Objects::open(&root.path().join("nowhere")).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Gone);
    assert_eq!(
        Objects::open(root.path()).unwrap_err().kind,
        FaultKind::Gone
    );
}

#[test]
fn every_path_is_shown_once() {
    let root = tempfile::tempdir().unwrap();
    let path = hostile_names(root.path(), "o", "r");
    let made = make(&path, &DigestLimits::default());
    let headers: Vec<&str> = made
        .content
        .lines()
        .filter(|line| line.starts_with("FILE: ") || line.starts_with("SYMLINK: "))
        .collect();
    let distinct: HashSet<&&str> = headers.iter().collect();
    assert_eq!(distinct.len(), headers.len());
}
