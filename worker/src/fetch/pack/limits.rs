//! What reading a pack may cost, and how it fails.
//!
//! Sizes are declared before the bytes that they are about, so each is charged before it is paid.

use common::fault::Fault;

/// Largest tree that is read, in bytes: one of 350,000 ordinary names. GitHub does not show a tenth of it.
pub(crate) const MAX_TREE: u64 = 16 << 20;

/// Why a repository was not read from a server's pack.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Final, whichever way it is fetched.
    Fault(Fault),
    /// The server or its pack is not what was expected; libgit2 may do better.
    Surprise(String),
}

impl Failure {
    /// Returns what is final where there is no other way.
    pub(crate) fn into_fault(self) -> Fault {
        match self {
            Self::Fault(fault) => fault,
            Self::Surprise(why) => Fault::transient(why),
        }
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Bounds on one pack.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackLimits {
    /// Blobs of this size or larger were filtered out by the server; those that come are passed over.
    pub(crate) filter: u64,
    /// Most objects.
    pub(crate) objects: u32,
    /// Most entries of all trees together.
    pub(crate) tree_entries: u32,
    /// Most bytes of all objects together, with those of deltas.
    pub(crate) inflated: u64,
    /// Largest result of a delta, and largest delta.
    pub(crate) delta: u64,
    /// Most bytes that are made to resolve deltas, by a reader who begins with the base of each anew.
    pub(crate) chains: u64,
    /// Largest tree, in bytes.
    pub(crate) tree: u64,
    /// Largest commit or tag, in bytes.
    pub(crate) commit: u64,
    /// Most bytes of deltas' bases in memory while their deltas are resolved.
    pub(crate) bases: usize,
    /// Packs beyond this go to the scratch folder.
    pub(crate) in_memory: usize,
}

impl PackLimits {
    /// The limits for a pack without blobs of `filter` bytes or more.
    pub(crate) fn filtered_at(filter: u64) -> Self {
        Self {
            filter,
            objects: 2_000_000,
            tree_entries: 5_000_000,
            inflated: 4 << 30,
            delta: filter.max(MAX_TREE),
            // Ours begins with each base once.
            chains: u64::MAX,
            tree: MAX_TREE,
            commit: 1 << 20,
            bases: 64 << 20,
            in_memory: 32 << 20,
        }
    }

    /// The limits for a pack with all blobs, which libgit2 reads.
    pub(crate) fn unfiltered() -> Self {
        Self {
            // It keeps 160 bytes of each, and the gauge 16.
            objects: 800_000,
            delta: 64 << 20,
            // 8 s of CPU. 320 MB of source code in many similar files take 1.6 GB.
            chains: 32 << 30,
            ..Self::filtered_at(u64::MAX)
        }
    }

    /// Fails if a pack of `count` objects has too many.
    pub(super) fn check_count(&self, count: u32) -> Result<(), Fault> {
        match count > self.objects {
            true => Err(Fault::too_large(format!(
                "{count} objects, more than {}",
                self.objects
            ))),
            false => Ok(()),
        }
    }

    /// Fails if the trees have `count` entries, and these are too many.
    pub(super) fn check_tree_entries(&self, count: u32) -> Result<(), Fault> {
        match count > self.tree_entries {
            true => Err(Fault::too_large(format!(
                "the trees have more than {} entries",
                self.tree_entries
            ))),
            false => Ok(()),
        }
    }

    /// Fails if a delta, or what it makes, has too many bytes to be held.
    pub(super) fn check_delta(&self, bytes: u64) -> Result<(), Fault> {
        match bytes > self.delta {
            true => Err(Fault::too_large(format!(
                "a delta of {bytes} bytes, more than {}",
                self.delta
            ))),
            false => Ok(()),
        }
    }
}

/// What is left of a number of bytes.
#[derive(Debug)]
pub(super) struct Budget {
    what: &'static str,
    spent: u64,
    limit: u64,
}

impl Budget {
    /// Of all objects together, inflated.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            what: "the objects have",
            spent: 0,
            limit,
        }
    }

    /// Of [`PackLimits::chains`].
    pub(super) fn of_chains(limit: u64) -> Self {
        Self {
            what: "resolving its deltas takes",
            ..Self::new(limit)
        }
    }

    /// Takes `bytes`, or fails as [`FaultKind::TooLarge`](common::fault::FaultKind::TooLarge).
    pub(super) fn spend(&mut self, bytes: u64) -> Result<(), Fault> {
        self.spent = self.spent.saturating_add(bytes);
        if self.spent > self.limit {
            return Err(Fault::too_large(format!(
                "{} {} bytes or more, which is over {}",
                self.what, self.spent, self.limit
            )));
        }
        Ok(())
    }
}
