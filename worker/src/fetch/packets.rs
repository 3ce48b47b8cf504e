//! git's packets: a response cut into pieces of known length, as protocol v0 and v2 have it.

use bytes::{Bytes, BytesMut};
use common::fault::{Fault, FaultKind};

use super::answer;
use super::pack::limits::Failure;

#[cfg(any(test, fuzzing))]
pub(super) mod cut;

/// Most bytes in one packet's data; its length has four digits and counts itself.
pub(super) const MAX_PACKET: usize = 65_516;

/// What a server refuses may be what only this way asks for; if its words tell more, that is final.
fn refusal(said: Fault) -> Failure {
    match said.kind {
        FaultKind::Transient => Failure::Surprise(said.message),
        _ => Failure::Fault(said),
    }
}

/// Says that a server answers in a way that is not understood.
pub(super) fn strange(what: &str) -> Failure {
    Failure::Surprise(format!("it answers {what}"))
}

/// Removes a line's end.
pub(super) fn trimmed(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\n").unwrap_or(line)
}

pub(super) fn early_end() -> Failure {
    Failure::Fault(Fault::transient("the server's answer ended early"))
}

/// A response's body.
pub(super) trait Chunks {
    /// Returns the next piece; an empty one is the end.
    fn chunk(&mut self) -> Result<Bytes, Fault>;
    /// Classifies what the host says in it instead of going on.
    fn said(&self, words: &[u8]) -> Fault;
}

/// A response as git's packets.
pub(super) struct Packets<B> {
    body: B,
    /// What is not read yet of the last piece.
    piece: Bytes,
    /// Bytes of the current packet's pack still to come.
    pack: usize,
}

/// A packet of a response.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Packet {
    Data(Bytes),
    Flush,
    Delimiter,
}

impl<B: Chunks> Packets<B> {
    /// Reads a body.
    pub(super) fn of(body: B) -> Self {
        Self {
            body,
            piece: Bytes::new(),
            pack: 0,
        }
    }

    /// Returns the next packet; `None` at the body's end.
    pub(super) fn next(&mut self) -> Result<Option<Packet>, Failure> {
        let Some(length) = self.length()? else {
            return Ok(None);
        };
        let packet = match length {
            0 => Packet::Flush,
            1 => Packet::Delimiter,
            4.. => {
                let data = self.take(length - 4)?;
                if let Some(words) = answer::last_word(&data) {
                    return Err(refusal(self.body.said(words)));
                }
                Packet::Data(data)
            }
            _ => return Err(strange("with an unknown kind of packet")),
        };
        Ok(Some(packet))
    }

    /// Returns the next packet, which is not of `sections`; `None` at the flush.
    pub(super) fn next_line(&mut self, sections: &str) -> Result<Option<Bytes>, Failure> {
        match self.next()?.ok_or_else(early_end)? {
            Packet::Data(line) => Ok(Some(line)),
            Packet::Flush => Ok(None),
            Packet::Delimiter => Err(strange(sections)),
        }
    }

    /// Reads a packet's length, which counts its own four digits; `None` at the body's end.
    fn length(&mut self) -> Result<Option<usize>, Failure> {
        if self.piece.is_empty() {
            self.piece = self.body.chunk()?;
            if self.piece.is_empty() {
                return Ok(None);
            }
        }
        let digit =
            |length: usize, byte: &u8| Some(length << 4 | char::from(*byte).to_digit(16)? as usize);
        match self.take(4)?.iter().try_fold(0, digit) {
            Some(length) if length <= MAX_PACKET + 4 => Ok(Some(length)),
            _ => Err(strange("something that is not git's protocol")),
        }
    }

    fn take(&mut self, count: usize) -> Result<Bytes, Failure> {
        if self.piece.len() >= count {
            return Ok(self.piece.split_to(count));
        }
        let mut taken = BytesMut::with_capacity(count);
        while taken.len() < count {
            if self.piece.is_empty() {
                self.piece = self.body.chunk()?;
                if self.piece.is_empty() {
                    return Err(early_end());
                }
            }
            let more = self.piece.len().min(count - taken.len());
            taken.extend_from_slice(&self.piece.split_to(more));
        }
        Ok(taken.freeze())
    }

    /// Reads the sections before the pack.
    pub(super) fn skip_to_pack(&mut self) -> Result<(), Failure> {
        loop {
            match self.next()?.ok_or_else(early_end)? {
                Packet::Data(line) if trimmed(&line) == b"packfile" => return Ok(()),
                // The shallow commits: HEAD's alone.
                Packet::Data(_) | Packet::Delimiter => {}
                Packet::Flush => return Err(strange("without a pack")),
            }
        }
    }

    /// Returns the next piece of the pack; `None` at its end.
    pub(super) fn pack_piece(&mut self) -> Result<Option<Bytes>, Failure> {
        while self.pack == 0 {
            let length = match self.length()?.ok_or_else(early_end)? {
                0 => return Ok(None),
                length @ 5.. => length - 5,
                // Some servers send an empty packet as a sign of life.
                4 => continue,
                _ => return Err(strange("a pack in sections")),
            };
            match self.take(1)?[0] {
                1 => self.pack = length,
                // Progress, for people.
                2 => drop(self.take(length)?),
                3 => {
                    let words = self.take(length)?;
                    return Err(refusal(self.body.said(&words)));
                }
                _ => return Err(strange("with an unknown side band")),
            }
        }
        if self.piece.is_empty() {
            self.piece = self.body.chunk()?;
            if self.piece.is_empty() {
                return Err(early_end());
            }
        }
        let piece = self.piece.split_to(self.piece.len().min(self.pack));
        self.pack -= piece.len();
        Ok(Some(piece))
    }
}

#[cfg(test)]
mod tests {
    use super::cut::{Cut, surprise};
    use super::*;

    fn packets(body: &'static str, size: usize) -> Packets<Cut> {
        Packets::of(Cut(Bytes::from_static(body.as_bytes()), size))
    }

    #[test]
    fn packets_are_read_however_the_body_is_cut() {
        for size in 1..40 {
            let mut packets = packets("0009fetch0001000000040006ab", size);
            let mut all = Vec::new();
            while let Some(packet) = packets.next().unwrap() {
                all.push(packet);
            }
            let data = |text: &'static str| Packet::Data(Bytes::from_static(text.as_bytes()));
            let expected = [
                data("fetch"),
                Packet::Delimiter,
                Packet::Flush,
                data(""),
                data("ab"),
            ];
            assert_eq!(all, expected, "{size}");
        }
    }

    #[test]
    fn a_pack_is_told_from_progress_however_the_body_is_cut() {
        let body = "0011shallow-info\n0034shallow 1111111111111111111111111111111111111111\
                    0001000dpackfile\n000a\u{2}hello0008\u{1}PAC00040005\u{1}0006\u{1}K0000";
        for size in 1..100 {
            let mut packets = packets(body, size);
            packets.skip_to_pack().unwrap();
            let mut pack = Vec::new();
            while let Some(piece) = packets.pack_piece().unwrap() {
                assert!(!piece.is_empty());
                pack.extend_from_slice(&piece);
            }
            assert_eq!(pack, b"PACK", "{size}");
        }
    }

    #[test]
    fn a_body_that_ends_inside_a_packet_is_transient() {
        for body in ["0", "000", "0009fetc", "0009"] {
            match packets(body, 2).next() {
                Err(Failure::Fault(fault)) => assert_eq!(fault.kind, FaultKind::Transient),
                other => panic!("{body}: {other:?}"),
            }
        }
        assert!(packets("", 2).next().unwrap().is_none());
        for body in [
            "000dpackfile\n",
            "000dpackfile\n0009\u{1}PA",
            "000dpackfile\n0009\u{1}PACK",
        ] {
            let mut packets = packets(body, 100);
            packets.skip_to_pack().unwrap();
            let end = loop {
                match packets.pack_piece() {
                    Ok(Some(_)) => {}
                    end => break end,
                }
            };
            assert!(matches!(end, Err(Failure::Fault(_))), "{body}: {end:?}");
        }
    }

    #[test]
    fn what_is_no_packet_surprises() {
        for body in [
            "not git",
            "0002",
            "0003",
            "fff1",
            "ffff",
            "00zz",
            "-001",
            "+009hello",
        ] {
            surprise(packets(body, 3).next());
        }
        surprise(packets("00010000", 3).skip_to_pack());
        for body in ["0006\u{4}x", "0001", "0002"] {
            surprise(packets(body, 3).pack_piece());
        }
    }

    #[test]
    fn a_server_is_quoted_and_cannot_write_to_the_terminal() {
        let why = surprise(packets("0012ERR no \u{1b}[31m!\n", 5).next());
        assert!(why.ends_with(r#"the host says "no \u{1b}[31m!""#), "{why}");
        let why = surprise(packets("000d\u{3}sorry\n0\n", 5).pack_piece());
        assert!(why.contains("sorry"), "{why}");
        let why = surprise(packets("000b\u{3}sorry\n", 5).next());
        assert!(why.contains("sorry"), "{why}");
    }

    #[test]
    fn a_limit_in_band_is_final() {
        let limit = "unauthenticated downloads are limited";
        let in_band = |start: &str| {
            let text = format!("{start}{limit}\n");
            let text = format!("{:04x}{text}", text.len() + 4);
            Packets::of(Cut(Bytes::from(text), 7))
        };
        let first = |end: Result<(), Failure>| match end {
            Err(Failure::Fault(fault)) => {
                assert_eq!(fault.kind, FaultKind::Throttled, "{fault}");
                assert!(fault.retry_after.is_some(), "{fault}");
            }
            other => panic!("{other:?}"),
        };
        first(in_band("ERR ").next().map(drop));
        first(in_band("\u{3}").next().map(drop));
        first(in_band("\u{3}").pack_piece().map(drop));
    }
}
