//! What every [`DigestStore`] promises, as tests: each implementation runs all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::TryStreamExt;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use common::fault::FaultKind;
use common::ids::PushedAt;
use common::ids::RepoRef;
use common::ids::RunId;
use common::job::DIGEST_FORMAT;
use common::store::{
    Digest, DigestMeta, DigestStore, Document, DocumentKey, Expected, Found, Listed, Put, Renewal,
    SharedStore, Version,
};

/// Runs every test, each on an empty store that `fresh` makes.
pub async fn check<F>(fresh: impl Fn() -> F)
where
    F: Future<Output = SharedStore>,
{
    an_empty_store_holds_nothing(&*fresh().await).await;
    what_is_put_is_found_and_read(&*fresh().await).await;
    a_listing_shows_what_is_there(&*fresh().await).await;
    owners_are_listed_as_they_are_spelled(&*fresh().await).await;
    put_replaces_only_what_was_expected(&*fresh().await).await;
    the_same_text_of_another_push_is_another_version(&*fresh().await).await;
    renewing_changes_the_record_alone(&*fresh().await).await;
    only_what_was_expected_is_renewed(&*fresh().await).await;
    renewing_and_putting_at_once_leave_one_of_both(fresh().await).await;
    of_many_that_put_at_once_one_wins(fresh().await).await;
    readers_never_see_a_mixture(fresh().await).await;
    documents_are_replaced_and_read(&*fresh().await).await;
    a_document_is_replaced_only_if_expected(&*fresh().await).await;
    a_document_is_read_up_to_its_limit(&*fresh().await).await;
    only_what_was_expected_is_removed(&*fresh().await).await;
    withdrawn_digests_are_apart(&*fresh().await).await;
    a_store_in_use_is_well(&*fresh().await).await;
    looking_whether_a_store_answers_changes_nothing(&*fresh().await).await;
}

/// The RFC 3339 time `number` seconds into 1970; any other text unchanged. Keeps tests that number
/// their pushes short.
pub fn push_time(number: &str) -> String {
    match number.parse() {
        Ok(seconds) => OffsetDateTime::from_unix_timestamp(seconds)
            .expect("a small number")
            .format(&Rfc3339)
            .expect("a year of four digits"),
        Err(_) => number.to_owned(),
    }
}

/// A digest with `text`, of a push at [`push_time`] of `pushed_at`.
pub fn digest(text: &str, pushed_at: &str) -> Digest {
    Digest {
        text: text.to_owned(),
        meta: DigestMeta {
            pushed_at: PushedAt::new(&push_time(pushed_at)).expect("a plain time"),
            url: "https://github.com/owner/name".to_owned(),
            processed_at: "2026-01-01T00:00:00Z".to_owned(),
            commit: Some("0123456789012345678901234567890123456789".to_owned()),
            format: DIGEST_FORMAT.to_owned(),
            bytes: text.len() as u64,
            truncated: false,
            run: RunId::new(),
            sha256: Some(common::text::sha256(text)),
            tokens: None,
            files: None,
        },
    }
}

fn repo(name: &str) -> RepoRef {
    RepoRef::new("owner", name).expect("a plain name")
}

async fn version(store: &dyn DigestStore, repo: &RepoRef) -> Version {
    match store.head(repo).await.expect("head") {
        Found::Stored { version, .. } => version,
        other => panic!("{repo}: {other:?}"),
    }
}

async fn put(store: &dyn DigestStore, repo: &RepoRef, digest: &Digest, expected: &Expected) -> Put {
    store.put(repo, digest, expected).await.expect("put")
}

async fn an_empty_store_holds_nothing(store: &dyn DigestStore) {
    assert_eq!(store.head(&repo("a")).await.expect("head"), Found::Absent);
    assert_eq!(store.get(&repo("a")).await.expect("get"), None);
    let listed: Vec<_> = store.list("").try_collect().await.expect("list");
    assert_eq!(listed, []);
}

async fn what_is_put_is_found_and_read(store: &dyn DigestStore) {
    let long = "ä€😀\n".repeat(100_000);
    let texts = [
        ("a", ""),
        ("b", "text\0\r\n"),
        ("a.b", "x"),
        ("A", "y"),
        ("long", &long),
    ];
    for (name, text) in texts {
        let put = put(store, &repo(name), &digest(text, "1"), &Expected::Absent).await;
        assert!(put.is_stored(), "{name}");
    }
    for (name, text) in texts {
        let read = store
            .get(&repo(name))
            .await
            .expect("get")
            .expect("it is there");
        assert_eq!(read.text, text, "{name}");
        match store.head(&repo(name)).await.expect("head") {
            Found::Stored { meta, .. } => assert_eq!(meta, read.meta, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(read.meta.bytes, text.len() as u64);
    }
}

async fn a_listing_shows_what_is_there(store: &dyn DigestStore) {
    assert_eq!(listed(store, "").await, BTreeMap::new());
    let all = ["ab/c", "ab/cd", "ab-c/d", "A/b", "b/..."].map(|repo| repo.parse().expect("a name"));
    for repo in &all {
        let digest = digest(&format!("of {repo}"), "1");
        assert!(
            put(store, repo, &digest, &Expected::Absent)
                .await
                .is_stored()
        );
    }
    let (one, another) = (listed(store, "").await, listed(store, "").await);
    assert_eq!(one, another, "unless something is stored");
    assert_eq!(one.len(), all.len());
    for repo in &all {
        let (etag, _, bytes) = &one[repo];
        assert_eq!(version(store, repo).await.etag(), etag);
        assert_eq!(*bytes, format!("of {repo}").len() as u64);
    }
    for (prefix, expected) in [
        ("ab", &all[..3]),
        ("ab/", &all[..2]),
        ("ab/c", &all[..2]),
        ("ab/c/", &all[..1]),
        ("ab/cd", &all[1..2]),
        ("A", &all[3..4]),
        ("b", &all[4..]),
        ("x", &[]),
    ] {
        let listed: BTreeSet<_> = listed(store, prefix).await.into_keys().collect();
        assert_eq!(listed, expected.iter().cloned().collect(), "{prefix:?}");
    }

    let of_one = Expected::Version(version(store, &all[0]).await);
    put(store, &all[0], &digest("another", "2"), &of_one).await;
    let after = listed(store, "").await;
    assert_ne!(after[&all[0]], one[&all[0]]);
    assert_eq!(after[&all[1]], one[&all[1]]);
}

/// All of [`Listed`], by its repository.
async fn listed(store: &dyn DigestStore, prefix: &str) -> BTreeMap<RepoRef, (String, i64, u64)> {
    let listed: Vec<Listed> = store.list(prefix).try_collect().await.expect("list");
    let count = listed.len();
    let by_repo: BTreeMap<_, _> = listed
        .into_iter()
        .map(|l| (l.repo, (l.etag, l.modified_millis, l.bytes)))
        .collect();
    assert_eq!(by_repo.len(), count, "each once");
    by_repo
}

async fn owners_are_listed_as_they_are_spelled(store: &dyn DigestStore) {
    assert_eq!(store.owners().await.expect("owners"), [""; 0]);
    for name in [
        "AlphaGov/Site",
        "alphagov/site",
        "alphagov/other",
        "a-b/c",
        "a/b",
    ] {
        let repo = name.parse().expect("a name");
        let stored = put(store, &repo, &digest(name, "1"), &Expected::Absent).await;
        assert!(stored.is_stored(), "{name}");
    }
    let mut owners = store.owners().await.expect("owners");
    owners.sort();
    assert_eq!(owners, ["AlphaGov", "a", "a-b", "alphagov"]);
    // Spellings of a name are keys of their own.
    let read = store.get(&"AlphaGov/Site".parse().expect("a name")).await;
    assert_eq!(
        read.expect("get").map(|digest| digest.text),
        Some("AlphaGov/Site".to_owned())
    );
}

async fn put_replaces_only_what_was_expected(store: &dyn DigestStore) {
    let repo = repo("a");
    let (one, two, three) = (digest("one", "1"), digest("two", "2"), digest("three", "3"));
    let never = Expected::Version(Version("0".to_owned()));
    assert_eq!(put(store, &repo, &one, &never).await, Put::Conflict);
    assert_eq!(store.head(&repo).await.expect("head"), Found::Absent);

    assert!(put(store, &repo, &one, &Expected::Absent).await.is_stored());
    let of_one = Expected::Version(version(store, &repo).await);
    assert_eq!(
        put(store, &repo, &two, &Expected::Absent).await,
        Put::Conflict
    );
    assert!(put(store, &repo, &two, &of_one).await.is_stored());
    assert_eq!(put(store, &repo, &three, &of_one).await, Put::Conflict);
    assert_eq!(store.get(&repo).await.expect("get"), Some(two));
}

async fn the_same_text_of_another_push_is_another_version(store: &dyn DigestStore) {
    let repo = repo("a");
    put(store, &repo, &digest("same", "1"), &Expected::Absent).await;
    let one = version(store, &repo).await;
    let two = digest("same", "2");
    let expected = Expected::Version(one.clone());
    assert!(put(store, &repo, &two, &expected).await.is_stored());
    assert_ne!(version(store, &repo).await, one);
    assert_eq!(store.get(&repo).await.expect("get"), Some(two));
}

async fn renew(
    store: &dyn DigestStore,
    repo: &RepoRef,
    digest: &Digest,
    version: &Version,
) -> Renewal {
    let renewal = store.renew(repo, &digest.meta, version).await;
    renewal.expect("renew")
}

async fn renewing_changes_the_record_alone(store: &dyn DigestStore) {
    let (one, other) = (repo("a"), repo("b"));
    let text = "ä€😀\n".repeat(10_000);
    for repo in [&one, &other] {
        put(store, repo, &digest(&text, "1"), &Expected::Absent).await;
    }
    let (old, before) = (version(store, &one).await, listed(store, "").await);
    let mut renewed = digest(&text, "2");
    renewed.meta.processed_at = "2026-01-02T00:00:00Z".to_owned();
    // The text's, whatever is said.
    let mut said = renewed.clone();
    said.meta.bytes = 1;
    let Renewal::Renewed(new) = renew(store, &one, &said, &old).await else {
        panic!("nobody else was there");
    };
    assert_ne!(new, old);
    assert_eq!(version(store, &one).await, new);
    assert_eq!(store.get(&one).await.expect("get"), Some(renewed.clone()));

    let after = listed(store, "").await;
    assert_eq!(after[&other], before[&other]);
    assert_eq!(new.etag(), after[&one].0);
    assert_eq!(after[&one].2, before[&one].2, "the same size");
    if store.is_remote() {
        assert_eq!(
            after[&one].0, before[&one].0,
            "the same text, the same ETag"
        );
    }
    // And again, and then another text.
    let third = digest(&text, "3");
    let Renewal::Renewed(new) = renew(store, &one, &third, &new).await else {
        panic!("nobody else was there");
    };
    assert_eq!(store.get(&one).await.expect("get"), Some(third));
    let fourth = digest("another", "4");
    let put = put(store, &one, &fourth, &Expected::Version(new)).await;
    assert!(put.is_stored());
    assert_eq!(store.get(&one).await.expect("get"), Some(fourth));
}

async fn only_what_was_expected_is_renewed(store: &dyn DigestStore) {
    let repo = repo("a");
    let (one, two, three) = (
        digest("same", "1"),
        digest("same", "2"),
        digest("same", "3"),
    );
    let never = Version("0 0".to_owned());
    assert_eq!(renew(store, &repo, &one, &never).await, Renewal::Conflict);
    assert_eq!(store.head(&repo).await.expect("head"), Found::Absent);

    put(store, &repo, &one, &Expected::Absent).await;
    let of_one = version(store, &repo).await;
    assert_eq!(renew(store, &repo, &two, &never).await, Renewal::Conflict);
    // Neither by a put nor by a renewal may it be taken for what it was before.
    put(store, &repo, &two, &Expected::Version(of_one.clone())).await;
    assert_eq!(
        renew(store, &repo, &three, &of_one).await,
        Renewal::Conflict
    );
    assert_eq!(store.get(&repo).await.expect("get"), Some(two));
    let of_two = version(store, &repo).await;
    renew(store, &repo, &three, &of_two).await;
    for expected in [of_one, of_two] {
        let four = digest("four", "4");
        assert_eq!(
            renew(store, &repo, &four, &expected).await,
            Renewal::Conflict
        );
        let put = put(store, &repo, &four, &Expected::Version(expected)).await;
        assert_eq!(put, Put::Conflict);
    }
    assert_eq!(store.get(&repo).await.expect("get"), Some(three));
}

/// A new text is never overwritten by an old one with a new record.
async fn renewing_and_putting_at_once_leave_one_of_both(store: SharedStore) {
    for round in 0..20 {
        let repo = repo(&format!("r{round}"));
        put(&*store, &repo, &digest("old", "1"), &Expected::Absent).await;
        let of_old = version(&*store, &repo).await;
        let (renewed, new) = (digest("old", "2"), digest("new", "3"));
        let expected = Expected::Version(of_old.clone());
        let (renewal, put) = tokio::join!(
            renew(&*store, &repo, &renewed, &of_old),
            put(&*store, &repo, &new, &expected)
        );
        let stored = store.get(&repo).await.expect("get");
        let expected = match (put, renewal) {
            (Put::Stored(_), _) => new,
            (Put::Conflict, Renewal::Renewed(_)) => renewed,
            (Put::Conflict, lost) => panic!("one of both: {lost:?}"),
        };
        assert_eq!(stored, Some(expected), "{round}");
    }
}

async fn of_many_that_put_at_once_one_wins(store: SharedStore) {
    let repo = repo("a");
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..16 {
        let (store, repo) = (Arc::clone(&store), repo.clone());
        tasks.spawn(async move {
            let digest = digest(&format!("text {n}"), &n.to_string());
            let put = put(&*store, &repo, &digest, &Expected::Absent).await;
            (put, digest)
        });
    }
    let (winners, losers): (Vec<_>, Vec<_>) = tasks
        .join_all()
        .await
        .into_iter()
        .partition(|(put, _)| put.is_stored());
    assert_eq!((winners.len(), losers.len()), (1, 15));
    let stored = store.get(&repo).await.expect("get");
    assert_eq!(stored.as_ref(), Some(&winners[0].1));
}

/// Each text says what its metadata must be.
async fn readers_never_see_a_mixture(store: SharedStore) {
    const ROUNDS: usize = 100;
    let repo = repo("a");
    let text = |n: usize| format!("{n} {}", "x".repeat(n * 1000));
    put(&*store, &repo, &digest(&text(0), "0"), &Expected::Absent).await;
    let writer = {
        let (store, repo) = (Arc::clone(&store), repo.clone());
        tokio::spawn(async move {
            for n in 1..=ROUNDS {
                let expected = Expected::Version(version(&*store, &repo).await);
                let digest = digest(&text(n), &n.to_string());
                assert!(put(&*store, &repo, &digest, &expected).await.is_stored());
            }
        })
    };
    let mut reads = 0;
    while !writer.is_finished() || reads == 0 {
        let read = store
            .get(&repo)
            .await
            .expect("get")
            .expect("always one or the other");
        let n = read.text.split(' ').next().expect("a number first");
        assert_eq!(read.meta.pushed_at.as_str(), push_time(n));
        assert_eq!(read.meta.bytes, read.text.len() as u64);
        match store.head(&repo).await.expect("head") {
            Found::Stored { .. } => {}
            other => panic!("{other:?}"),
        }
        reads += 1;
    }
    writer.await.expect("the writer");
}

async fn documents_are_replaced_and_read(store: &dyn DigestStore) {
    let run = RunId::new();
    let key = |document| DocumentKey::OfRun {
        run: run.clone(),
        document,
    };
    let (manifest, summary) = (key(Document::Manifest), key(Document::Summary));
    for key in [&manifest, &DocumentKey::Index] {
        assert_eq!(store.document(key).await.expect("document"), None);
        let longest = vec![b'x'; key.max_bytes().min(4 << 20) as usize];
        for content in [&b"{}"[..], b"{\"a\":1}", &longest, b""] {
            store.put_document(key, content).await.expect("put");
            let read = store.document(key).await.expect("document");
            assert!(read.as_deref() == Some(content), "{key}");
        }
    }
    assert_eq!(store.document(&summary).await.expect("document"), None);
    let listed: Vec<_> = store.list("").try_collect().await.expect("list");
    assert_eq!(listed, [], "documents are no digests");
}

async fn a_document_is_replaced_only_if_expected(store: &dyn DigestStore) {
    let key = &DocumentKey::Failures;
    let write = async |content: &[u8], expected: &Expected| {
        let written = store.write_document(key, content, Some(expected)).await;
        written.expect("write")
    };
    let Put::Stored(first) = write(b"1", &Expected::Absent).await else {
        panic!("there was none");
    };
    assert_eq!(write(b"2", &Expected::Absent).await, Put::Conflict);
    let read = store.read_document(key).await.expect("read");
    assert_eq!(read, Some((b"1".to_vec(), first.clone())));
    let expected = Expected::Version(first);
    let Put::Stored(second) = write(b"22", &expected).await else {
        panic!("nobody else wrote");
    };
    assert_eq!(write(b"333", &expected).await, Put::Conflict);
    let read = store.read_document(key).await.expect("read");
    assert_eq!(read, Some((b"22".to_vec(), second)));
}

/// Whoever can write a document must not be able to take the memory of those who read it.
async fn a_document_is_read_up_to_its_limit(store: &dyn DigestStore) {
    let key = &DocumentKey::Latest;
    let longest = vec![b' '; key.max_bytes() as usize];
    store.put_document(key, &longest).await.expect("put");
    let read = store.document(key).await.expect("document");
    assert_eq!(read.map(|read| read.len()), Some(longest.len()));
    let longer = [&longest[..], b" "].concat();
    store.put_document(key, &longer).await.expect("put");
    let fault = store.document(key).await.expect_err("too long");
    assert_eq!(fault.kind, FaultKind::TooLarge);
    let names_both = fault.message.contains("runs/latest.json") && fault.message.contains("65,536");
    assert!(names_both, "{fault}");
    store.reachable().await.expect("it answers all the same");
}

async fn only_what_was_expected_is_removed(store: &dyn DigestStore) {
    let (a, b) = (&repo("a"), &repo("b"));
    put(store, a, &digest("x", "1"), &Expected::Absent).await;
    put(store, b, &digest("x", "1"), &Expected::Absent).await;
    let old = version(store, a).await;
    let replaced = put(store, a, &digest("x", "2"), &old.clone().into()).await;
    assert!(replaced.is_stored());
    assert!(!store.remove(a, &old).await.expect("remove"));
    let now = version(store, a).await;
    assert!(store.remove(a, &now).await.expect("remove"));
    assert!(!store.remove(a, &now).await.expect("remove"), "only once");
    assert_eq!(store.head(a).await.expect("head"), Found::Absent);
    assert_eq!(store.get(a).await.expect("get"), None);
    let listed: Vec<_> = store.list("").try_collect().await.expect("list");
    let listed: Vec<_> = listed.into_iter().map(|l: Listed| l.repo).collect();
    assert_eq!(listed, [b.clone()]);
    let again = put(store, a, &digest("y", "1"), &Expected::Absent).await;
    assert!(again.is_stored(), "as if there had never been one");
}

async fn withdrawn_digests_are_apart(store: &dyn DigestStore) {
    let withdrawn = store.withdrawn();
    let (a, b) = (&repo("a"), &repo("b"));
    put(store, a, &digest("x", "1"), &Expected::Absent).await;
    put(&*withdrawn, b, &digest("y", "1"), &Expected::Absent).await;
    for (store, here, there) in [(store, a, b), (&*withdrawn, b, a)] {
        let listed: Vec<_> = store.list("").try_collect().await.expect("list");
        let listed: Vec<_> = listed.into_iter().map(|l: Listed| l.repo).collect();
        assert_eq!(listed, [here.clone()]);
        assert_eq!(store.head(there).await.expect("head"), Found::Absent);
        let version = version(store, here).await;
        assert!(store.remove(here, &version).await.expect("remove"));
    }
}

async fn looking_whether_a_store_answers_changes_nothing(store: &dyn DigestStore) {
    store.reachable().await.expect("empty");
    store
        .put_document(&DocumentKey::Latest, b"{}")
        .await
        .expect("put");
    let (repo, one) = (repo("a"), digest("x", "1"));
    put(store, &repo, &one, &Expected::Absent).await;
    let before = version(store, &repo).await;
    store.reachable().await.expect("in use");
    assert_eq!(version(store, &repo).await, before);
    let latest = store
        .document(&DocumentKey::Latest)
        .await
        .expect("document");
    assert_eq!(latest.as_deref(), Some(&b"{}"[..]));
}

async fn a_store_in_use_is_well(store: &dyn DigestStore) {
    store.probe().await.expect("well when empty");
    put(store, &repo("a"), &digest("x", "1"), &Expected::Absent).await;
    store.probe().await.expect("well when in use");
    let listed: Vec<_> = store.list("").try_collect().await.expect("list");
    let listed: Vec<_> = listed
        .into_iter()
        .map(|listed: Listed| listed.repo)
        .collect();
    assert_eq!(listed, [repo("a")], "a probe leaves nothing behind");
}
