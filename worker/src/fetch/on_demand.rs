//! A [`Source`] of trees alone, which asks the server for the sizes and blobs that a digest wants.

use std::cell::OnceCell;
use std::ops::ControlFlow;
use std::rc::Rc;

use common::fault::Fault;

use super::pack::Pack;
use super::pack::limits::Failure;
use super::wire::Server;
use crate::source::{Head, ObjectId, Source};

/// Makes another source of the same commit, for the reason given.
type Otherwise = dyn Fn(&Server, &str) -> Result<Box<dyn Source>, Fault>;

/// See the module. Once the server surprises, another source does the rest.
pub(super) struct OnDemand {
    server: Server,
    trees: Pack,
    otherwise: Box<Otherwise>,
    other: OnceCell<Box<dyn Source>>,
}

impl OnDemand {
    /// Makes one of a commit's trees.
    pub(super) fn new(server: Server, trees: Pack, otherwise: Box<Otherwise>) -> Self {
        Self {
            server,
            trees,
            otherwise,
            other: OnceCell::new(),
        }
    }

    /// Returns what `ask` does, or the other source.
    fn ask<T>(&self, ask: impl FnOnce() -> Result<T, Failure>) -> Result<Asked<'_, T>, Fault> {
        let other = match self.other.get() {
            Some(other) => other,
            None => match ask() {
                Ok(answer) => return Ok(Asked::Answer(answer)),
                Err(Failure::Fault(fault)) => return Err(fault),
                Err(Failure::Surprise(why)) => {
                    let other = (self.otherwise)(&self.server, &why)?;
                    self.other.get_or_init(|| other)
                }
            },
        };
        Ok(Asked::Other(other.as_ref()))
    }
}

enum Asked<'a, T> {
    Answer(T),
    Other(&'a dyn Source),
}

impl Source for OnDemand {
    fn head(&self) -> Result<Option<Head>, Fault> {
        self.trees.head()
    }

    fn tree(&self, tree: ObjectId) -> Result<Rc<[u8]>, Fault> {
        self.trees.tree(tree)
    }

    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault> {
        match self.ask(|| self.server.sizes(blobs))? {
            Asked::Answer(sizes) => Ok(sizes),
            Asked::Other(other) => other.sizes(blobs),
        }
    }

    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault> {
        if blobs.is_empty() {
            return Ok(());
        }
        match self.ask(|| self.server.fetch_blobs(blobs))? {
            Asked::Answer(pack) => pack.read(blobs, visit),
            Asked::Other(other) => other.read(blobs, visit),
        }
    }
}
