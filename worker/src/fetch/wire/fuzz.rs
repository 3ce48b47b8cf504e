//! Answers in git's packets mean the same however they are cut.

use std::collections::BTreeMap;
use std::fmt;

use super::*;
use crate::fetch::packets::MAX_PACKET;
use crate::fetch::packets::cut::Cut;

pub(in crate::fetch) fn packets(input: &[u8]) {
    let Some((size, body)) = input.split_first() else {
        return;
    };
    alike(*size, body, |packets| {
        let (read, end) = all(packets, Packets::next);
        check_written(body, &read);
        (read, end)
    });
    alike(*size, body, |mut packets| {
        packets.skip_to_pack()?;
        let (pieces, end) = all(packets, Packets::pack_piece);
        assert!(
            pieces
                .iter()
                .all(|piece| (1..=MAX_PACKET).contains(&piece.len()))
        );
        Ok::<_, Failure>((pieces.concat(), end))
    });
    alike(*size, body, |mut packets| Capabilities::read(&mut packets));
    alike(*size, body, |mut packets| head(&mut packets));
    alike(*size, body, |mut packets| {
        let told = sizes(&mut packets, 3)?;
        assert!(told.len() <= 3);
        Ok::<_, Failure>(told.into_iter().collect::<BTreeMap<_, _>>())
    });
    alike(*size, body, |mut packets| {
        let mut names = Vec::new();
        let end = read_names(&mut packets, |name| {
            names.push(name);
            names.len() < 3
        });
        assert!(names.len() <= 3);
        (names, end.map_err(shown))
    });
}

/// Fails unless a body comes to the same whole and in pieces of `size`.
fn alike<T: fmt::Debug>(size: u8, body: &[u8], read: impl Fn(Packets<Cut>) -> T) {
    let read = |size: usize| read(Packets::of(Cut(Bytes::copy_from_slice(body), size.max(1))));
    let [whole, cut] = [body.len(), size.into()].map(|size| format!("{:?}", read(size)));
    assert_eq!(whole, cut);
}

/// Returns all that `next` reads, and why it ends.
fn all<T>(
    mut packets: Packets<Cut>,
    next: fn(&mut Packets<Cut>) -> Result<Option<T>, Failure>,
) -> (Vec<T>, Option<String>) {
    let mut all = Vec::new();
    loop {
        match next(&mut packets) {
            Ok(Some(one)) => all.push(one),
            Ok(None) => return (all, None),
            Err(failure) => return (all, Some(shown(failure))),
        }
    }
}

/// Returns a failure as text that a terminal may show.
fn shown(failure: Failure) -> String {
    let text = match failure {
        Failure::Fault(fault) => fault.message,
        Failure::Surprise(why) => why,
    };
    assert!(!text.contains(char::is_control), "{text:?}");
    text
}

/// Fails unless the body begins with these packets.
fn check_written(mut body: &[u8], packets: &[Packet]) {
    for packet in packets {
        let (length, data) = match packet {
            Packet::Flush => (0, &b""[..]),
            Packet::Delimiter => (1, &b""[..]),
            Packet::Data(data) => (data.len() + 4, &data[..]),
        };
        let (digits, rest) = body.split_at(4);
        assert!(digits.eq_ignore_ascii_case(format!("{length:04x}").as_bytes()));
        body = rest
            .strip_prefix(data)
            .expect("a packet's data is in the body");
    }
}
