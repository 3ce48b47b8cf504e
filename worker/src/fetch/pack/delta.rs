//! Deltas: objects written as copies from a base and new bytes.

/// Most bytes at the head of a delta that hold its sizes.
pub(super) const HEAD: usize = 20;

/// Returns the sizes of base and result, and removes them from the head of `delta`.
pub(super) fn sizes(delta: &mut &[u8]) -> Option<(u64, u64)> {
    Some((size(delta)?, size(delta)?))
}

fn size(bytes: &mut &[u8]) -> Option<u64> {
    let mut size = 0;
    for shift in (0..63).step_by(7) {
        let byte = next(bytes)?;
        size |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(size);
        }
    }
    None
}

fn next(bytes: &mut &[u8]) -> Option<u8> {
    let (first, rest) = bytes.split_first()?;
    *bytes = rest;
    Some(*first)
}

/// Applies `delta` to `base`; `None` if it does not fit. The result has exactly `expected` bytes, and
/// no more memory is taken for it.
pub(super) fn apply(base: &[u8], mut delta: &[u8], expected: usize) -> Option<Vec<u8>> {
    let (base_size, result_size) = sizes(&mut delta)?;
    if base_size != base.len() as u64 || result_size != expected as u64 {
        return None;
    }
    let mut result = Vec::with_capacity(expected);
    while let Some((&command, rest)) = delta.split_first() {
        delta = rest;
        let copied = if command & 0x80 == 0 {
            // Zero is reserved.
            let (new, rest) = delta.split_at_checked(usize::from(command))?;
            delta = rest;
            (!new.is_empty()).then_some(new)?
        } else {
            let mut argument = |bits: std::ops::Range<u32>| {
                let mut value = 0;
                for (at, bit) in bits.enumerate() {
                    if command & 1 << bit != 0 {
                        value |= usize::from(next(&mut delta)?) << (8 * at);
                    }
                }
                Some(value)
            };
            let offset = argument(0..4)?;
            let length = match argument(4..7)? {
                0 => 0x1_0000,
                length => length,
            };
            base.get(offset..)?.get(..length)?
        };
        if result.len() + copied.len() > expected {
            return None;
        }
        result.extend_from_slice(copied);
    }
    (result.len() == expected).then_some(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_and_new_bytes_make_the_result() {
        // 10 bytes become 7: three from offset 2, "xy", two from offset 0.
        let delta = [10, 7, 0x91, 2, 3, 2, b'x', b'y', 0x90, 2];
        assert_eq!(apply(b"0123456789", &delta, 7).unwrap(), b"234xy01");
    }

    #[test]
    fn a_copy_without_a_length_is_of_64_kibibytes() {
        let base: Vec<u8> = (0..0x1_0001_u32).map(|i| i as u8).collect();
        let delta = [0x81, 0x80, 0x04, 0x80, 0x80, 0x04, 0x81, 1];
        assert_eq!(apply(&base, &delta, 0x1_0000).unwrap(), base[1..]);
    }

    #[test]
    fn what_does_not_fit_is_no_object() {
        let base = b"0123456789";
        for (delta, expected) in [
            // Another base, another size, cut at every place.
            (&[9, 3, 0x91, 2, 3][..], 3),
            (&[10, 3, 0x91, 2, 3], 4),
            (&[10, 4, 0x91, 2, 3], 4),
            (&[10, 3, 0x91, 2], 3),
            (&[10, 3, 0x91], 3),
            (&[10, 3], 3),
            (&[10], 3),
            (&[], 3),
            (&[10, 2, 2, b'x'], 2),
            // Beyond the base, beyond the result, the reserved command.
            (&[10, 3, 0x91, 8, 3], 3),
            (&[10, 3, 0x91, 11, 3], 3),
            (&[10, 3, 0x98, 1, 3], 3),
            (&[10, 3, 0x90, 3, 0x90, 3], 3),
            (&[10, 0, 0], 0),
            (&[0xff; 20], 3),
        ] {
            assert_eq!(apply(base, delta, expected), None, "{delta:?}");
        }
    }
}
