//! git's protocol v2: the refs and objects that a digest needs, and nothing else.
//!
//! Three requests: the server's capabilities, HEAD, and a pack of its one commit without large blobs. If
//! there is no HEAD, the third asks for other refs.

use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use common::fault::{Fault, FaultKind};

use super::answer;
use super::http::{HttpSession, ProgressSink, ResponseBody};
use super::pack::Pack;
use super::pack::limits::{Failure, PackLimits};
use super::packets;
use crate::source::ObjectId;

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

/// Most bytes in one packet's data; its length has four digits and counts itself.
const MAX_PACKET: usize = 65_516;
/// The file in the scratch folder for a pack that memory has no room for.
const PACK_FILE: &str = "pack";

/// Fetches HEAD without blobs larger than `largest`; `None` if HEAD is `known`.
pub(super) fn fetch(
    session: &Arc<HttpSession>,
    largest: u64,
    scratch: &Path,
    known: Option<ObjectId>,
    sink: Arc<dyn ProgressSink>,
) -> Result<Option<Pack>, Failure> {
    // git leaves out blobs of this size too.
    let limits = PackLimits::filtered_at(largest.saturating_add(1));
    let capabilities = Capabilities::read(&mut Packets::of(session.capabilities()?))?;
    let head = match ask_head(session, &capabilities)? {
        RemoteHead::Commit(id) => id,
        RemoteHead::Unborn(branch) => {
            let mut refs = Packets::of(session.refs(capabilities.other_refs())?);
            read_names(&mut refs, |name| session.keep_ref(name))?;
            expect_no_refs(session, || branch)?;
            return Ok(Some(Pack::empty(limits, sink)));
        }
    };
    if known == Some(head) {
        return Ok(None);
    }
    let request = capabilities.fetch(head, limits.filter);
    let response = session
        .command(request)
        .map_err(|fault| match session.broke_server() {
            // It may be the filter that its git cannot do.
            true => Failure::Surprise(fault.message),
            false => Failure::Fault(fault),
        })?;
    let mut packets = Packets::of(response);
    packets.skip_to_pack()?;
    let mut pieces = || packets.pack_piece();
    Pack::read(&mut pieces, head, limits, scratch.join(PACK_FILE), sink).map(Some)
}

/// What a server says of HEAD.
#[derive(Debug, PartialEq, Eq)]
enum RemoteHead {
    Commit(ObjectId),
    /// HEAD names a branch that does not exist: this one, if the server says which.
    Unborn(Option<String>),
}

/// Fails if a repository whose HEAD libgit2 did not find has refs. libgit2 does not tell what HEAD names,
/// so the server is asked; not every server can be.
pub(super) fn expect_empty(session: &Arc<HttpSession>) -> Result<(), Fault> {
    expect_no_refs(session, || {
        let capabilities = Capabilities {
            tells_unborn: true,
            ..Capabilities::default()
        };
        match ask_head(session, &capabilities) {
            Ok(RemoteHead::Unborn(branch)) => branch,
            Ok(RemoteHead::Commit(_)) | Err(_) => None,
        }
    })
}

/// Fails if the session has met refs, though there is no HEAD: it names `branch`.
fn expect_no_refs(
    session: &HttpSession,
    branch: impl FnOnce() -> Option<String>,
) -> Result<(), Fault> {
    let refs = session.some_refs();
    match refs.is_empty() {
        true => Ok(()),
        false => Err(answer::unborn_head(branch().as_deref(), &refs)),
    }
}

fn ask_head(
    session: &Arc<HttpSession>,
    capabilities: &Capabilities,
) -> Result<RemoteHead, Failure> {
    head(&mut Packets::of(session.refs(capabilities.ls_refs())?))
}

/// What a server refuses may be what only this way asks for; if its words tell more, that is final.
fn refusal(said: Fault) -> Failure {
    match said.kind {
        FaultKind::Transient => Failure::Surprise(said.message),
        _ => Failure::Fault(said),
    }
}

fn strange(what: &str) -> Failure {
    Failure::Surprise(format!("it answers {what}"))
}

/// What a server can do, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Capabilities {
    names_object_format: bool,
    /// Whether it tells which branch HEAD names if that does not exist.
    tells_unborn: bool,
}

impl Capabilities {
    /// Reads an advertisement, and fails if it lacks what is needed.
    fn read<B: Chunks>(packets: &mut Packets<B>) -> Result<Self, Failure> {
        let mut lines = Vec::new();
        loop {
            match packets.next()?.ok_or_else(early_end)? {
                // Some servers name the service first, as in v0.
                Packet::Data(line) if lines.is_empty() && line.starts_with(b"# service=") => {}
                Packet::Flush if lines.is_empty() => {}
                Packet::Data(line) => {
                    if lines.is_empty() && trimmed(&line) != b"version 2" {
                        return Err(strange("in an older version of git's protocol"));
                    }
                    lines.push(line);
                }
                Packet::Flush => return Self::parse(&lines),
                Packet::Delimiter => return Err(strange("its capabilities in sections")),
            }
        }
    }

    fn parse(lines: &[Bytes]) -> Result<Self, Failure> {
        let value = |name: &str| {
            lines.iter().find_map(|line| {
                let rest = trimmed(line).strip_prefix(name.as_bytes())?;
                match rest.split_first() {
                    None => Some(&b""[..]),
                    Some((b'=', value)) => Some(value),
                    Some(_) => None,
                }
            })
        };
        let format = value("object-format");
        match format {
            None | Some(b"sha1") => {}
            Some(b"sha256") => return Err(Failure::Fault(answer::sha256())),
            Some(_) => return Err(strange("with an unknown object format")),
        }
        let has = |features: &[u8], feature: &[u8]| {
            let mut features = features.split(|byte| *byte == b' ');
            features.any(|name| name == feature)
        };
        let ls_refs = value("ls-refs").ok_or_else(|| strange("without ls-refs"))?;
        let features = value("fetch").ok_or_else(|| strange("without fetch"))?;
        for needed in [&b"shallow"[..], b"filter"] {
            if !has(features, needed) {
                let needed = String::from_utf8_lossy(needed);
                return Err(strange(&format!("that it fetches without {needed}")));
            }
        }
        Ok(Self {
            names_object_format: format.is_some(),
            tells_unborn: has(ls_refs, b"unborn"),
        })
    }

    /// Returns the request for HEAD.
    fn ls_refs(&self) -> Vec<u8> {
        let arguments = ["symrefs", "ref-prefix HEAD", "unborn"];
        let asked = if self.tells_unborn { 3 } else { 2 };
        self.command("ls-refs", &arguments[..asked])
    }

    /// Returns the request for all refs but HEAD.
    fn other_refs(&self) -> Vec<u8> {
        self.command("ls-refs", &["ref-prefix refs/"])
    }

    /// Returns the request for a pack of `commit` without blobs of `filter` bytes or more.
    fn fetch(&self, commit: ObjectId, filter: u64) -> Vec<u8> {
        let want = format!("want {commit}");
        let filter = format!("filter blob:limit={filter}");
        let arguments = [
            "no-progress",
            "ofs-delta",
            &want,
            "deepen 1",
            &filter,
            "done",
        ];
        self.command("fetch", &arguments)
    }

    fn command(&self, name: &str, arguments: &[&str]) -> Vec<u8> {
        let mut request = line(&format!("command={name}"));
        request += &line(concat!("agent=repofleet/", env!("CARGO_PKG_VERSION")));
        if self.names_object_format {
            request += &line("object-format=sha1");
        }
        request += "0001";
        request.extend(arguments.iter().map(|argument| line(argument)));
        request += "0000";
        request.into_bytes()
    }
}

fn line(text: &str) -> String {
    format!("{:04x}{text}\n", text.len() + 5)
}

fn trimmed(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\n").unwrap_or(line)
}

/// Reads what HEAD is.
fn head<B: Chunks>(packets: &mut Packets<B>) -> Result<RemoteHead, Failure> {
    let mut head = RemoteHead::Unborn(None);
    while let Some(line) = packets.next_line("refs in sections")? {
        // `OID HEAD symref-target:refs/heads/main`; other refs may begin with HEAD too.
        let mut words = trimmed(&line).split(|byte| *byte == b' ');
        match (words.next(), words.next()) {
            (Some(b"unborn"), Some(b"HEAD")) => {
                let branch = words.find_map(|word| word.strip_prefix(b"symref-target:"));
                let branch = branch.map(|name| String::from_utf8_lossy(name).into_owned());
                head = RemoteHead::Unborn(branch);
            }
            (Some(id), Some(b"HEAD")) => {
                let id = std::str::from_utf8(id).ok().and_then(ObjectId::parse);
                let id = id.ok_or_else(|| strange("a ref without an object"))?;
                head = RemoteHead::Commit(id);
            }
            (_, Some(_)) => {}
            // An answer without refs would be that of an empty repository.
            (_, None) => return Err(strange("something that is no ref")),
        }
    }
    Ok(head)
}

/// Reads the names of refs until there are none, or no more are wanted.
fn read_names<B: Chunks>(
    packets: &mut Packets<B>,
    mut keep: impl FnMut(String) -> bool,
) -> Result<(), Failure> {
    while let Some(line) = packets.next_line("refs in sections")? {
        if let Some(name) = answer::advertised(&line)
            && !keep(name)
        {
            break;
        }
    }
    Ok(())
}

fn early_end() -> Failure {
    Failure::Fault(Fault::transient("the server's answer ended early"))
}

/// A response's body in pieces; an empty one is the end.
trait Chunks {
    fn chunk(&mut self) -> Result<Bytes, Fault>;
    /// Classifies what the host says in it instead of going on.
    fn said(&self, words: &[u8]) -> Fault;
}

impl Chunks for ResponseBody {
    fn chunk(&mut self) -> Result<Bytes, Fault> {
        ResponseBody::chunk(self)
    }

    fn said(&self, words: &[u8]) -> Fault {
        ResponseBody::said(self, words)
    }
}

/// A response as git's packets.
struct Packets<B> {
    body: B,
    /// What is not read yet of the last piece.
    piece: Bytes,
    /// Bytes of the current packet's pack still to come.
    pack: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum Packet {
    Data(Bytes),
    Flush,
    Delimiter,
}

impl<B: Chunks> Packets<B> {
    fn of(body: B) -> Self {
        Self {
            body,
            piece: Bytes::new(),
            pack: 0,
        }
    }

    /// Returns the next packet; `None` at the body's end.
    fn next(&mut self) -> Result<Option<Packet>, Failure> {
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
    fn next_line(&mut self, sections: &str) -> Result<Option<Bytes>, Failure> {
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
        let digits = self.take(4)?;
        match packets::length(&digits) {
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
    fn skip_to_pack(&mut self) -> Result<(), Failure> {
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
    fn pack_piece(&mut self) -> Result<Option<Bytes>, Failure> {
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
    use super::fuzz::Cut;
    use super::*;

    fn packets(body: &'static str, size: usize) -> Packets<Cut> {
        Packets::of(Cut(Bytes::from_static(body.as_bytes()), size))
    }

    fn surprise<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
        match result {
            Err(Failure::Surprise(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    fn capabilities(lines: &[&'static str]) -> Result<Capabilities, Failure> {
        let lines: Vec<Bytes> = lines
            .iter()
            .map(|line| Bytes::from_static(line.as_bytes()))
            .collect();
        Capabilities::parse(&lines)
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

    #[test]
    fn a_server_needs_refs_shallow_fetches_and_filters() {
        let good = [
            "version 2",
            "agent=x",
            "ls-refs=unborn",
            "fetch=shallow wait-for-done filter\n",
        ];
        let found = capabilities(&good).unwrap();
        assert!(!found.names_object_format && found.tells_unborn);
        let older = ["version 2", "ls-refs", "fetch=shallow filter"];
        assert!(!capabilities(&older).unwrap().tells_unborn);
        let named = [&good[..], &["object-format=sha1\n"]].concat();
        assert!(capabilities(&named).unwrap().names_object_format);
        for (bad, part) in [
            (&["version 2", "fetch=shallow filter"][..], "ls-refs"),
            (&["version 2", "ls-refs"], "fetch"),
            (&["version 2", "ls-refs", "fetch=shallow"], "filter"),
            (&["version 2", "ls-refs", "fetch=filters shallow"], "filter"),
            (&["version 2", "ls-refs", "fetch=filter"], "shallow"),
            (&["version 2", "ls-refs", "fetch"], "shallow"),
            (
                &[
                    "version 2",
                    "ls-refs",
                    "fetch=shallow filter",
                    "object-format=md5",
                ],
                "format",
            ),
        ] {
            let why = surprise(capabilities(bad));
            assert!(why.contains(part), "{why}");
        }
        match capabilities(&[&good[..], &["object-format=sha256"]].concat()) {
            Err(Failure::Fault(fault)) => {
                assert_eq!(fault.kind, FaultKind::Gone);
                assert!(fault.message.contains("SHA-256"), "{fault}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_gits() {
        let capabilities = Capabilities {
            names_object_format: true,
            tells_unborn: true,
        };
        let request = capabilities.fetch(ObjectId([0x1f; 20]), 524_289);
        let request = String::from_utf8(request).unwrap();
        let agent = line(concat!("agent=repofleet/", env!("CARGO_PKG_VERSION")));
        let expected = format!(
            "0012command=fetch\n{agent}0017object-format=sha1\n0001\
             0010no-progress\n000eofs-delta\n0032want {}\n000ddeepen 1\n\
             001dfilter blob:limit=524289\n0009done\n0000",
            "1f".repeat(20)
        );
        assert_eq!(request, expected);
        let request = String::from_utf8(capabilities.ls_refs()).unwrap();
        let expected = format!(
            "0014command=ls-refs\n{agent}0017object-format=sha1\n0001\
             000csymrefs\n0014ref-prefix HEAD\n000bunborn\n0000"
        );
        assert_eq!(request, expected);
        let older = Capabilities::default().ls_refs();
        assert!(!String::from_utf8(older).unwrap().contains("unborn"));
    }

    #[test]
    fn head_is_found_among_refs_that_begin_alike() {
        let id = "1f".repeat(20);
        let refs = |lines: &[String]| {
            let lines = lines.iter().map(|text| line(text)).collect::<String>() + "0000";
            head(&mut Packets::of(Cut(Bytes::from(lines), 7)))
        };
        let found = RemoteHead::Commit(ObjectId([0x1f; 20]));
        let named = format!("{id} HEAD symref-target:refs/heads/main");
        let other = format!("{} HEADER", "2".repeat(40));
        assert_eq!(refs(&[named, other.clone()]).unwrap(), found);
        assert_eq!(refs(&[other, format!("{id} HEAD")]).unwrap(), found);
        let unborn = "unborn HEAD symref-target:refs/heads/main".to_owned();
        let branch = Some("refs/heads/main".to_owned());
        assert_eq!(refs(&[unborn]).unwrap(), RemoteHead::Unborn(branch));
        assert_eq!(refs(&[]).unwrap(), RemoteHead::Unborn(None));
        surprise(refs(&["NAK".to_owned()]));
        surprise(refs(&["12 HEAD".to_owned()]));
        surprise(refs(&[format!("{} HEAD", "1".repeat(64))]));
    }
}
