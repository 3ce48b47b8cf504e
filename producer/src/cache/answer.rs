//! What the cache says of one repository.

use std::fmt;

use common::job::DIGEST_FORMAT;
use common::run::documents::CacheReason;
use common::store::freshness::{Freshness, Wanted};
use common::store::{DigestMeta, Found};

use crate::feed::entry::FeedRepo;

/// A [`CacheReason`] and what it rests on.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) reason: CacheReason,
    pub(crate) detail: String,
    pub(crate) force: bool,
    /// The record of the digest in the store.
    pub(crate) stored: Option<DigestMeta>,
}

impl From<CacheReason> for Answer {
    fn from(reason: CacheReason) -> Self {
        Self {
            reason,
            detail: String::new(),
            force: false,
            stored: None,
        }
    }
}

impl Answer {
    /// Somebody asked for this digest, whatever is stored.
    pub(crate) fn called_for(reason: CacheReason) -> Self {
        Self {
            force: true,
            ..reason.into()
        }
    }

    /// A miss for want of an answer: if the store holds the digest, the worker keeps it.
    pub(crate) fn unknown(why: impl fmt::Display) -> Self {
        Self {
            detail: format!("not known: {why}"),
            ..CacheReason::Miss.into()
        }
    }

    /// Reads the reason off what the store holds.
    pub(crate) fn of_store(found: &Found, entry: &FeedRepo) -> Self {
        match found {
            Found::Absent => CacheReason::Miss.into(),
            Found::Unreadable { why, .. } => Self {
                detail: why.clone(),
                ..CacheReason::Unreadable.into()
            },
            Found::Stored { meta, .. } => {
                Self::of_digest(meta, &Wanted::new(&entry.pushed_at, &entry.url))
            }
        }
    }

    /// Reads the reason off a stored digest's record.
    pub(crate) fn of_digest(stored: &DigestMeta, wanted: &Wanted<'_>) -> Self {
        let freshness = stored.freshness(wanted);
        let detail = match freshness {
            Freshness::Older | Freshness::Newer => {
                format!("stored {}, the feed says {}", stored.pushed_at, wanted.push)
            }
            Freshness::OtherUrl => format!("stored from {}, now {}", stored.url, wanted.url),
            Freshness::OtherFormat => {
                format!("stored as {:?}, now {DIGEST_FORMAT:?}", stored.format)
            }
            Freshness::Unreadable => "it is empty".to_owned(),
            Freshness::Absent | Freshness::Current => String::new(),
        };
        Self {
            detail,
            stored: Some(stored.clone()),
            ..reason(freshness).into()
        }
    }
}

/// Maps a stored digest's freshness to the reason that reports give.
fn reason(freshness: Freshness) -> CacheReason {
    match freshness {
        Freshness::Absent => CacheReason::Miss,
        Freshness::Unreadable => CacheReason::Unreadable,
        Freshness::Older => CacheReason::Stale,
        Freshness::OtherUrl => CacheReason::Url,
        Freshness::OtherFormat => CacheReason::Format,
        Freshness::Current => CacheReason::Hit,
        Freshness::Newer => CacheReason::Newer,
    }
}
