//! The cache check against the store itself: by index and listing, or by reading each digest.

use common::exit::{self, ExitError};
use common::fault::Fault;
use common::ids::RepoRef;
use common::run::documents::CacheReason;
use common::store::freshness::Wanted;
use common::store::{DigestStore, DocumentKey, Found};
use common::text::thousands;
use futures::future::join;
use futures::stream::{self, StreamExt};
use time::OffsetDateTime;
use tracing::{debug, warn};

use super::answer::Answer;
use super::index::Index;
use super::listing::{Listing, Sight};
use crate::feed::entry::FeedRepo;

/// Digests that are read at the same time.
const WIDTH: usize = 256;
/// Failed reads that are warned of one by one.
const WARNINGS: usize = 10;

/// Reads each digest. What is absent in the feed's spelling is looked for in others.
pub(crate) async fn by_reading(
    store: &dyn DigestStore,
    repositories: &mut [FeedRepo],
) -> Result<Vec<Answer>, ExitError> {
    let mut answers = vec![Answer::from(CacheReason::Miss); repositories.len()];
    let mut absent = vec![false; repositories.len()];
    let all = (0..repositories.len()).collect();
    read(store, repositories, all, &mut answers, |place, found| {
        absent[place] = *found == Found::Absent;
    })
    .await?;
    let respelled = respell(store, repositories, |place| absent[place]).await;
    read(store, repositories, respelled, &mut answers, |_, _| {}).await?;
    Ok(answers)
}

/// Lists the digests, believes the index about what the listing confirms, and reads the rest.
/// Returns the index, too, if anything was learned.
pub(crate) async fn by_index(
    store: &dyn DigestStore,
    repositories: &mut [FeedRepo],
) -> Result<(Vec<Answer>, Option<Index>), ExitError> {
    let now = OffsetDateTime::now_utc();
    let listing = Listing::of(store, repositories.iter().map(|entry| &entry.repo));
    let (index, listing) = join(Index::load(store), listing).await;
    let index = index.unwrap_or_else(|why| {
        let key = DocumentKey::Index;
        warn!(
            operation = "cache-check",
            "cannot use the index {}/{key}, so every digest is read: {why}",
            store.location()
        );
        Index::default()
    });
    warn_of_faults(&listing);

    let mut answers = vec![Answer::from(CacheReason::Miss); repositories.len()];
    let mut unconfirmed = Vec::new();
    for (place, entry) in repositories.iter_mut().enumerate() {
        match listing.sight(&entry.repo) {
            Sight::Absent => {}
            Sight::Unknown => unconfirmed.push(place),
            Sight::Listed(listed) => {
                entry.repo = listed.repo.clone();
                let wanted = Wanted::new(&entry.pushed_at, &entry.url);
                match index.believed(listed, &wanted) {
                    Some(meta) => answers[place] = Answer::of_digest(meta, &wanted),
                    None => unconfirmed.push(place),
                }
            }
        }
    }

    let mut learned = index.clone();
    learned.retain(&listing);
    let reads = unconfirmed.len();
    let repos: Vec<RepoRef> = repositories
        .iter()
        .map(|entry| entry.repo.clone())
        .collect();
    read(
        store,
        repositories,
        unconfirmed,
        &mut answers,
        |place, found| {
            if let Sight::Listed(listed) = listing.sight(&repos[place]) {
                learned.learn(listed, found, now);
            }
        },
    )
    .await?;
    debug!(
        operation = "cache-check",
        indexed = learned.len(),
        reads,
        "read {} digests that the index did not know",
        thousands(reads as u64)
    );
    let changed = learned != index;
    Ok((answers, changed.then_some(learned)))
}

/// Gives the repositories `of_interest` the spelling in which the store holds them, if it does.
/// Returns the places of those that changed.
pub(crate) async fn respell(
    store: &dyn DigestStore,
    repositories: &mut [FeedRepo],
    of_interest: impl Fn(usize) -> bool,
) -> Vec<usize> {
    let places: Vec<_> = (0..repositories.len())
        .filter(|place| of_interest(*place))
        .collect();
    let listing = Listing::of(store, places.iter().map(|place| &repositories[*place].repo)).await;
    warn_of_faults(&listing);
    let mut respelled = Vec::new();
    for place in places {
        let repo = &mut repositories[place].repo;
        if let Sight::Listed(listed) = listing.sight(repo)
            && listed.repo.to_string() != repo.to_string()
        {
            *repo = listed.repo.clone();
            respelled.push(place);
        }
    }
    respelled
}

fn warn_of_faults(listing: &Listing) {
    if let Some(fault) = listing.faults().first() {
        warn!(
            operation = "cache-check",
            failed = listing.faults().len(),
            "some digests cannot be listed: {fault}"
        );
    }
}

/// Reads the digests in `places`, and shows `learn` what it finds.
async fn read(
    store: &dyn DigestStore,
    repositories: &[FeedRepo],
    places: Vec<usize>,
    answers: &mut [Answer],
    mut learn: impl FnMut(usize, &Found),
) -> Result<(), ExitError> {
    let (mut failed, mut in_a_row) = (0, 0);
    let width = places.len().min(WIDTH);
    let mut heads = stream::iter(places)
        .map(|place| head(store, place, &repositories[place]))
        .buffer_unordered(WIDTH);
    while let Some((place, found)) = heads.next().await {
        let entry = &repositories[place];
        answers[place] = match found {
            Ok(found) => {
                in_a_row = 0;
                learn(place, &found);
                Answer::of_store(&found, entry)
            }
            Err(fault) => {
                failed += 1;
                in_a_row += 1;
                if in_a_row == width {
                    return Err(ExitError::new(
                        exit::UNAVAILABLE,
                        format!("the store {} cannot be read: {fault}", store.location()),
                    ));
                }
                let repo = entry.repo.to_string();
                if failed <= WARNINGS {
                    warn!(
                        operation = "cache-check",
                        repo, "{repo} counts as a miss: {fault}"
                    );
                } else {
                    debug!(
                        operation = "cache-check",
                        repo, "{repo} counts as a miss: {fault}"
                    );
                }
                Answer::unknown(fault)
            }
        };
    }
    if failed > WARNINGS {
        warn!(
            operation = "cache-check",
            failed,
            "{} repositories in all count as misses because the store did not answer",
            thousands(failed as u64)
        );
    }
    Ok(())
}

async fn head(
    store: &dyn DigestStore,
    place: usize,
    entry: &FeedRepo,
) -> (usize, Result<Found, Fault>) {
    (place, store.head(&entry.repo).await)
}
