//! Follows a pack that somebody else reads, and charges for its objects before they are paid for.

use common::fault::Fault;
use flate2::{Decompress, FlushDecompress, Status};

use super::delta;
use super::limits::{Budget, PackLimits};
use super::stream::{EntryKind, check_size};

/// Bytes that are inflated at a time.
const PIECE: usize = 64 * 1024;
/// Longest header of an object.
const MAX_HEADER: usize = 32;

/// The costs of a pack, as far as it has passed. Damage is left to its reader to find.
pub(crate) struct PackGauge {
    limits: PackLimits,
    budget: Budget,
    chains: Chains,
    /// Objects still to come.
    left: u32,
    /// Bytes that have passed.
    passed: u64,
    /// Where the object begins that passes now.
    start: u64,
    state: State,
    inflater: Decompress,
    inflated: Box<[u8]>,
}

/// What comes next.
enum State {
    /// The pack's header, as far as it came.
    Pack(Vec<u8>),
    /// An object's header, as far as it came.
    Object(Vec<u8>),
    /// The zlib stream of an object of so many bytes.
    Stream(u64),
    /// That of a delta whose sizes are not known yet, its beginning, and what its base
    /// costs, if that is known.
    Delta(u64, Vec<u8>, Option<u64>),
    /// Nothing that is looked at.
    Rest,
}

/// What it costs to make each object from its first base on. libgit2 does that for each delta, and
/// keeps bases of up to 1 MiB only.
///
/// Bases that are named, not placed, would take the names of all objects. git places those that are in the
/// pack; what other servers name costs at least its own bytes, and [`ResolveTime`](super::super::ResolveTime) bounds the rest.
struct Chains {
    /// Where each object begins, and its cost in bytes.
    costs: Vec<(u64, u64)>,
    budget: Budget,
}

impl Chains {
    /// Returns the cost of the base that begins `back` bytes before `start`.
    fn of_base(&self, start: u64, back: u64) -> Option<u64> {
        let at = start.checked_sub(back)?;
        let found = self.costs.binary_search_by_key(&at, |(start, _)| *start);
        found.ok().map(|found| self.costs[found].1)
    }

    /// Charges for the delta at `start`.
    fn delta(&mut self, start: u64, cost: u64) -> Result<(), Fault> {
        self.costs.push((start, cost));
        self.budget.spend(cost)
    }
}

impl PackGauge {
    /// Makes one for a pack that is still to come.
    pub(crate) fn new(limits: PackLimits) -> Self {
        Self {
            limits,
            budget: Budget::new(limits.inflated),
            chains: Chains {
                costs: Vec::new(),
                budget: Budget::of_chains(limits.chains),
            },
            left: 0,
            passed: 0,
            start: 0,
            state: State::Pack(Vec::new()),
            inflater: Decompress::new(true),
            inflated: vec![0; PIECE].into(),
        }
    }

    /// Looks at the next bytes.
    ///
    /// # Errors
    /// [`FaultKind::TooLarge`](common::fault::FaultKind::TooLarge) if the objects in them cost too much.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        while let Some((first, rest)) = bytes.split_first() {
            let before = bytes.len();
            match &mut self.state {
                State::Pack(header) => {
                    header.push(*first);
                    if let Some(count) = header.get(8..).and_then(|count| count.try_into().ok()) {
                        if !header.starts_with(b"PACK") {
                            self.state = State::Rest;
                            return Ok(());
                        }
                        self.left = u32::from_be_bytes(count);
                        self.limits.check_count(self.left)?;
                        self.chains.costs.reserve_exact(self.left as usize);
                        self.state = State::Object(Vec::new());
                    }
                    bytes = rest;
                }
                State::Object(_) if self.left == 0 => self.state = State::Rest,
                State::Object(header) => {
                    if header.is_empty() {
                        self.start = self.passed;
                    }
                    header.push(*first);
                    if let Some((kind, size, back)) = whole(header) {
                        self.begin(kind, size, back)?;
                    } else if header.len() == MAX_HEADER {
                        self.state = State::Rest;
                    }
                    bytes = rest;
                }
                State::Stream(_) | State::Delta(..) => bytes = self.inflate(bytes)?,
                State::Rest => return Ok(()),
            }
            self.passed += (before - bytes.len()) as u64;
        }
        Ok(())
    }

    fn begin(&mut self, kind: u8, size: u64, back: Option<u64>) -> Result<(), Fault> {
        self.budget.spend(size)?;
        if let Some(kind) = EntryKind::of(kind) {
            check_size(kind, size, &self.limits)?;
            self.chains.costs.push((self.start, size));
            self.state = State::Stream(size);
        } else {
            self.limits.check_delta(size)?;
            let base = back.and_then(|back| self.chains.of_base(self.start, back));
            self.state = State::Delta(size, Vec::new(), base);
        }
        self.left -= 1;
        self.inflater.reset(true);
        Ok(())
    }

    /// Inflates the next bytes, and returns those behind the stream's end.
    fn inflate<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Fault> {
        let before = (self.inflater.total_in(), self.inflater.total_out());
        let flush = FlushDecompress::None;
        let status = self.inflater.decompress(bytes, &mut self.inflated, flush);
        let read = self.inflater.total_in() - before.0;
        let written = self.inflater.total_out() - before.1;
        let (rest, new) = (&bytes[read as usize..], &self.inflated[..written as usize]);
        let is_over = matches!(status, Ok(Status::StreamEnd));
        let (State::Stream(size) | State::Delta(size, ..)) = self.state else {
            return Ok(rest);
        };
        if self.inflater.total_out() > size {
            return Err(Fault::transient(
                "an object in the pack is longer than its size",
            ));
        }
        if let State::Delta(_, head, base) = &mut self.state {
            head.extend_from_slice(&new[..new.len().min(delta::HEAD - head.len())]);
            if is_over || head.len() == delta::HEAD {
                if let Some((whole, result)) = delta::sizes(&mut head.as_slice()) {
                    self.budget.spend(result)?;
                    self.limits.check_delta(result)?;
                    let cost = [base.unwrap_or(whole), size, result];
                    let cost = cost.into_iter().fold(0, u64::saturating_add);
                    self.chains.delta(self.start, cost)?;
                }
                self.state = State::Stream(size);
            }
        }
        if is_over {
            self.state = State::Object(Vec::new());
        } else if status.is_err() || (read, written) == (0, 0) {
            self.state = State::Rest;
        }
        Ok(rest)
    }
}

/// Returns the kind and size in an object's header, and how far before it its base begins, once it is
/// whole.
fn whole(header: &[u8]) -> Option<(u8, u64, Option<u64>)> {
    let end = header.iter().position(|byte| *byte < 0x80)?;
    let kind = header[0] >> 4 & 7;
    let mut size = u64::from(header[0] & 0x0f);
    for (i, byte) in header[1..=end].iter().enumerate() {
        let part = u64::from(byte & 0x7f).checked_shl(7 * i as u32 + 4);
        size = size.saturating_add(part.unwrap_or(u64::MAX));
    }
    let base = &header[end + 1..];
    match kind {
        6 => Some((kind, size, Some(offset(base)?))),
        7 => (base.len() == 20).then_some((kind, size, None)),
        _ => Some((kind, size, None)),
    }
}

/// Returns how far before a delta its base begins, once that is whole.
fn offset(bytes: &[u8]) -> Option<u64> {
    let (last, rest) = bytes.split_last().filter(|(last, _)| **last < 0x80)?;
    let offset = rest.iter().fold(0_u64, |offset, byte| {
        (offset << 7 | u64::from(byte & 0x7f)).wrapping_add(1)
    });
    Some(offset << 7 | u64::from(*last))
}

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;
    use testing::packs::{Kind, PackWriter, appending, deflated};

    use super::*;

    fn gauge(pack: &[u8], piece: usize, limits: PackLimits) -> Result<(), Fault> {
        let mut gauge = PackGauge::new(limits);
        pack.chunks(piece).try_for_each(|piece| gauge.push(piece))
    }

    fn at_most(inflated: u64) -> PackLimits {
        PackLimits {
            inflated,
            ..PackLimits::unfiltered()
        }
    }

    #[test]
    fn objects_and_what_deltas_make_are_charged_however_the_pack_is_cut() {
        let mut pack = PackWriter::default();
        let (at, name) = pack.object(Kind::Blob, &[b'x'; 5000]);
        let delta = appending(5000, b"y");
        pack.delta(at, &delta);
        pack.named_delta(name, &delta);
        pack.blob(b"");
        let tree = pack.tree::<&str>(&[]);
        pack.commit(tree);
        let commit = 46 + "author x <x> 1 +0000\ncommitter x <x> 1 +0000\n\nx\n".len();
        let cost = 5000 + 2 * (delta.len() + 5001) + commit;
        let pack = pack.finish();
        for piece in [1, 2, 3, 10, 100, 1 << 20] {
            gauge(&pack, piece, at_most(cost as u64)).unwrap();
            let fault = gauge(&pack, piece, at_most(cost as u64 - 1)).unwrap_err();
            assert_eq!(fault.kind, FaultKind::TooLarge, "{fault}");
            assert!(fault.message.contains(&cost.to_string()), "{fault}");
        }
    }

    #[test]
    fn what_a_delta_makes_has_a_limit() {
        let mut pack = PackWriter::default();
        let (at, _) = pack.object(Kind::Blob, &[b'x'; 5000]);
        pack.delta(at, &appending(5000, b"y"));
        let delta = |delta| PackLimits {
            delta,
            ..PackLimits::unfiltered()
        };
        gauge(&pack.finish(), 7, delta(5001)).unwrap();
        let fault = gauge(&pack.finish(), 7, delta(5000)).unwrap_err();
        assert!(fault.message.contains("a delta of 5001 bytes"), "{fault}");
    }

    /// libgit2 begins with the base of each delta anew.
    #[test]
    fn a_delta_costs_what_its_bases_cost() {
        let mut pack = PackWriter::default();
        let (mut at, name) = pack.object(Kind::Blob, &[b'x'; 5000]);
        let delta = |i| appending(5000 + i, b"y");
        let (mut chain, mut cost) = (5000, 0);
        for i in 0..40 {
            at = pack.delta(at, &delta(i));
            chain += delta(i).len() + 5001 + i;
            cost += chain;
        }
        // A base with a name costs at least its bytes.
        pack.named_delta(name, &delta(0));
        cost += 5000 + delta(0).len() + 5001;
        let chains = |chains| PackLimits {
            chains,
            ..PackLimits::unfiltered()
        };
        let pack = pack.finish();
        for piece in [1, 100, 1 << 20] {
            gauge(&pack, piece, chains(cost as u64)).unwrap();
            let fault = gauge(&pack, piece, chains(cost as u64 - 1)).unwrap_err();
            let said = format!("resolving its deltas takes {cost} bytes or more");
            assert!(fault.message.contains(&said), "{fault}");
        }
    }

    #[test]
    fn what_is_longer_than_its_size_ends_and_other_damage_is_left_to_the_reader() {
        let mut longer = PackWriter::default();
        longer.raw(3, 10, &[&deflated(&[0; 1 << 20])]);
        let fault = gauge(&longer.finish(), 1 << 20, at_most(1000)).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Transient, "{fault}");
        for rest in [&b"no zlib stream"[..], &[0xff; 40]] {
            let mut damaged = PackWriter::default();
            damaged.raw(3, 10, &[rest]);
            gauge(&damaged.finish(), 3, at_most(1000)).unwrap();
        }
        gauge(b"no pack at all, says libgit2", 3, at_most(1000)).unwrap();
        gauge(&longer.claiming(0), 3, at_most(0)).unwrap();
    }
}
