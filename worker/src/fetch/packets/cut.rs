//! Answers that come in pieces, for tests.

use reqwest::header::HeaderMap;
use time::OffsetDateTime;

use super::answer::{Asked, Context};
use super::*;

/// A body in pieces of one size.
pub(in crate::fetch) struct Cut(pub(in crate::fetch) Bytes, pub(in crate::fetch) usize);

impl Chunks for Cut {
    fn chunk(&mut self) -> Result<Bytes, Fault> {
        Ok(self.0.split_to(self.0.len().min(self.1)))
    }

    fn said(&self, words: &[u8]) -> Fault {
        let context = Context {
            asked: Asked::Pack,
            anonymous: Some("github.com"),
            headers: &HeaderMap::new(),
            now: OffsetDateTime::UNIX_EPOCH,
        };
        answer::said(words, context)
    }
}

#[cfg(test)]
pub(in crate::fetch) fn surprise<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
    match result {
        Err(Failure::Surprise(why)) => why,
        other => panic!("{other:?}"),
    }
}
