//! Follows git's packets in an answer that somebody else reads.

/// Bytes of a packet that are kept.
pub(super) const KEPT: usize = 2 << 10;

/// Parses a packet's length, which counts its own four digits.
pub(super) fn length(digits: &[u8]) -> Option<usize> {
    let digit =
        |length: usize, byte: &u8| Some(length << 4 | char::from(*byte).to_digit(16)? as usize);
    digits.iter().try_fold(0, digit)
}

/// Finds the packets of an answer as it passes in pieces, except those of side bands 1 and 2 (pack and
/// progress).
#[derive(Debug, Default)]
pub(super) struct PacketScan {
    /// The digits of a packet's length so far.
    digits: Vec<u8>,
    /// The beginning of a packet.
    kept: Vec<u8>,
    /// Bytes of the packet still to come.
    left: usize,
    /// What passes is not packets.
    lost: bool,
}

impl PacketScan {
    /// Scans the next piece; `visit` gets the first [`KEPT`] bytes of each packet once it is whole.
    pub(super) fn scan(&mut self, mut piece: &[u8], mut visit: impl FnMut(&[u8])) {
        while !piece.is_empty() && !self.lost {
            if self.left == 0 {
                self.digits.push(piece[0]);
                piece = &piece[1..];
                self.length();
                continue;
            }
            let (part, rest) = piece.split_at(self.left.min(piece.len()));
            if !self.is_data() {
                let room = KEPT - self.kept.len();
                self.kept.extend(&part[..part.len().min(room)]);
            }
            self.left -= part.len();
            piece = rest;
            if self.left == 0 {
                if !self.is_data() {
                    visit(&self.kept);
                }
                self.kept.clear();
            }
        }
    }

    fn is_data(&self) -> bool {
        matches!(self.kept.first(), Some(1 | 2))
    }

    fn length(&mut self) {
        if self.digits.len() < 4 {
            return;
        }
        match length(&self.digits) {
            // Below 4 there is no packet: flush, delimiter or end of answer.
            Some(length) => self.left = length.saturating_sub(4),
            None => self.lost = true,
        }
        self.digits.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_found_however_an_answer_is_cut_up() {
        let answer =
            "0008NAK\n000d\u{2}counting0009\u{1}PACK00000004000aERR no0007\u{3}sorry, not read";
        for size in 1..60 {
            let mut scan = PacketScan::default();
            let mut found = Vec::new();
            for piece in answer.as_bytes().chunks(size) {
                scan.scan(piece, |packet| found.push(packet.to_vec()));
            }
            let found: Vec<_> = found.iter().map(|p| String::from_utf8_lossy(p)).collect();
            assert_eq!(found, ["NAK\n", "ERR no", "\u{3}so"], "by {size}");
            assert!(scan.lost);
        }
    }

    #[test]
    fn of_a_long_packet_the_beginning_is_kept() {
        let mut scan = PacketScan::default();
        let mut kept = 0;
        for piece in ["ffff", &"x".repeat(0xffff - 4)] {
            scan.scan(piece.as_bytes(), |packet| kept = packet.len());
        }
        assert_eq!(kept, KEPT);
    }
}
