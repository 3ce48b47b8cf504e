//! The directory store keeps the contract, and its promises about crashes and disks.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use common::fault::FaultKind;
use common::ids::RepoRef;
use common::store::fs::FsStore;
use common::store::{DigestStore, Expected, Found, Renewal, SharedStore};
use tempfile::TempDir;
use testing::root::as_root;
use testing::small_disk::SmallDisk;
use testing::store_contract::{self, digest, push_time};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contract() {
    let folders: Mutex<Vec<TempDir>> = Mutex::default();
    store_contract::check(async || {
        let folder = tempfile::tempdir().unwrap();
        // One that is not there yet.
        let store: SharedStore = Arc::new(FsStore::new(folder.path().join("new/store")));
        folders.lock().unwrap().push(folder);
        store
    })
    .await;
}

fn repo() -> RepoRef {
    "owner/name".parse().unwrap()
}

struct Fixture {
    root: TempDir,
    store: FsStore,
}

impl Fixture {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = FsStore::new(root.path());
        Self { root, store }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join("gitingest/owner/name").join(name)
    }

    async fn put(&self, text: &str, pushed_at: &str) {
        let expected = self.store.head(&repo()).await.unwrap().expected();
        let digest = digest(text, pushed_at);
        let put = self.store.put(&repo(), &digest, &expected).await;
        assert!(put.unwrap().is_stored());
    }

    async fn stored(&self) -> (String, String) {
        let digest = self.store.get(&repo()).await.unwrap().unwrap();
        match self.store.head(&repo()).await.unwrap() {
            Found::Stored { meta, .. } => assert_eq!(meta, digest.meta),
            other => panic!("{other:?}"),
        }
        (digest.text, digest.meta.pushed_at.to_string())
    }
}

fn pair(text: &str, pushed_at: &str) -> (String, String) {
    (text.to_owned(), push_time(pushed_at))
}

/// What a crash between the two renames leaves: the new records and the old text.
#[tokio::test]
async fn records_ahead_of_their_text_leave_the_old_digest() {
    let fixture = Fixture::new();
    fixture.put("old", "1").await;
    fixture.put("new", "2").await;
    fs::write(fixture.file("summary.txt"), "old").unwrap();
    assert_eq!(fixture.stored().await, pair("old", "1"));
    fixture.put("newer", "3").await;
    assert_eq!(fixture.stored().await, pair("newer", "3"));
}

/// Alike in length and in the first 4 KiB: the whole text has to tell.
#[tokio::test]
async fn texts_that_differ_late_keep_their_own_records() {
    let fixture = Fixture::new();
    let text = |end: &str| format!("{}{end}", "x".repeat(5000));
    fixture.put(&text("a"), "1").await;
    fixture.put(&text("b"), "2").await;
    assert_eq!(fixture.stored().await, pair(&text("b"), "2"));
    fs::write(fixture.file("summary.txt"), text("a")).unwrap();
    assert_eq!(fixture.stored().await, pair(&text("a"), "1"));
}

/// Alike in length and in the first 4 KiB, and yet not the text that was stored.
#[tokio::test]
async fn the_record_of_a_foreign_text_is_not_renewed() {
    let fixture = Fixture::new();
    let text = |end: &str| format!("{}{end}", "x".repeat(5000));
    fixture.put(&text("a"), "1").await;
    fs::write(fixture.file("summary.txt"), text("b")).unwrap();
    let found = fixture.store.head(&repo()).await.unwrap();
    let Found::Stored { version, .. } = &found else {
        panic!("a look sees no difference: {found:?}");
    };
    let later = digest(&text("a"), "2").meta;
    let renewal = fixture.store.renew(&repo(), &later, version).await;
    assert_eq!(renewal.unwrap(), Renewal::Torn);
    assert_eq!(fixture.store.head(&repo()).await.unwrap(), found);

    // It can still be replaced.
    fixture.put(&text("a"), "2").await;
    assert_eq!(fixture.stored().await, pair(&text("a"), "2"));
}

/// What a crash before any rename leaves.
#[tokio::test]
async fn leftovers_of_a_crash_do_no_harm() {
    let fixture = Fixture::new();
    fixture.put("old", "1").await;
    fs::write(fixture.file(".summary.txt.tmp"), "half a te").unwrap();
    fs::write(fixture.file(".summary.meta.json.tmp"), "[{").unwrap();
    assert_eq!(fixture.stored().await, pair("old", "1"));
    fixture.put("new", "2").await;
    assert_eq!(fixture.stored().await, pair("new", "2"));
    let mut names: Vec<_> = fs::read_dir(fixture.file(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["summary.meta.json", "summary.txt"]);
}

#[tokio::test]
async fn torn_or_foreign_files_are_unreadable_and_replaced() {
    for damage in [
        |f: &Fixture| fs::write(f.file("summary.txt"), "te").unwrap(),
        |f: &Fixture| fs::write(f.file("summary.txt"), "").unwrap(),
        |f: &Fixture| fs::write(f.file("summary.meta.json"), "").unwrap(),
        |f: &Fixture| fs::write(f.file("summary.meta.json"), "[{\"pushedAt\":\"\"}]").unwrap(),
        |f: &Fixture| fs::remove_file(f.file("summary.meta.json")).unwrap(),
    ] {
        let fixture = Fixture::new();
        fixture.put("text", "1").await;
        damage(&fixture);
        let found = fixture.store.head(&repo()).await.unwrap();
        assert!(matches!(found, Found::Unreadable { .. }), "{found:?}");
        assert_eq!(fixture.store.get(&repo()).await.unwrap(), None);
        fixture.put("text", "1").await;
        assert_eq!(fixture.stored().await, pair("text", "1"));
    }
}

/// Runs as somebody who has to obey permissions, which root does not.
fn as_nobody(test: impl FnOnce() + Send + 'static) {
    // Of this thread only, and for good: so on a thread of its own.
    std::thread::spawn(move || {
        if rustix::process::geteuid().is_root() {
            let nobody = rustix::process::Uid::from_raw(65_534);
            rustix::thread::set_thread_uid(nobody).unwrap();
        }
        test();
    })
    .join()
    .unwrap();
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    // Blocking work stays on threads that this one starts, which are nobody's too.
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

#[test]
fn a_folder_without_write_permission_is_named_with_the_remedy() {
    let fixture = Fixture::new();
    let root = fixture.root.path().to_owned();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o555)).unwrap();
    as_nobody(move || {
        let store = FsStore::new(&root);
        let digest = digest("x", "1");
        let put = block_on(store.put(&repo(), &digest, &Expected::Absent));
        for fault in [put.unwrap_err(), block_on(store.probe()).unwrap_err()] {
            assert_eq!(fault.kind, FaultKind::Infra);
            let message = fault.message;
            for part in [&*root.to_string_lossy(), "Permission denied", "--store"] {
                assert!(message.contains(part), "{part:?} in {message:?}");
            }
        }
    });
    assert_eq!(fs::read_dir(fixture.root.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_that_cannot_be_read_or_made_is_not_reachable() {
    let fixture = Fixture::new();
    let root = fixture.root.path().to_owned();
    for name in ["closed", "fixed"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    fs::write(root.join("file"), "").unwrap();
    fs::set_permissions(root.join("closed"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(root.join("fixed"), fs::Permissions::from_mode(0o555)).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
    as_nobody(move || {
        let reachable = |name: &str| block_on(FsStore::new(root.join(name)).reachable());
        reachable("new").unwrap();
        reachable("new/and/deep").unwrap();
        // What is there already may be read, though not written.
        reachable("fixed").unwrap();
        for name in ["closed", "closed/new", "fixed/new/deep", "file", "file/new"] {
            let fault = reachable(name).unwrap_err();
            assert_eq!(fault.kind, FaultKind::Infra);
            assert!(fault.message.contains("--store"), "{fault}");
        }
        assert!(!root.join("new").exists(), "a look makes nothing");
    });
}

#[test]
fn a_full_disk_leaves_the_old_digest_and_nothing_else() {
    let name = "fs_store::a_full_disk_leaves_the_old_digest_and_nothing_else";
    as_root(name, || block_on(on_a_full_disk()));
}

async fn on_a_full_disk() {
    let fixture = Fixture::new();
    let _disk = SmallDisk::mount(fixture.root.path(), "1m");
    fixture.put("old", "1").await;

    let expected = fixture.store.head(&repo()).await.unwrap().expected();
    let too_much = digest(&"x".repeat(2 << 20), "2");
    let fault = fixture
        .store
        .put(&repo(), &too_much, &expected)
        .await
        .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Infra);
    assert!(fault.message.contains("No space left on device"), "{fault}");
    assert!(fault.message.contains("make room"), "{fault}");

    assert_eq!(fixture.stored().await, pair("old", "1"));
    assert!(!fixture.file(".summary.txt.tmp").exists());
    fixture
        .store
        .probe()
        .await
        .expect("there is room for a digest of the usual size");
    fs::write(fixture.file("other"), vec![0; 700_000]).unwrap();
    let fault = fixture.store.probe().await.unwrap_err();
    assert!(fault.message.contains("No space left on device"), "{fault}");
    fs::remove_file(fixture.file("other")).unwrap();
    fixture.put("new", "2").await;
    assert_eq!(fixture.stored().await, pair("new", "2"));
}
