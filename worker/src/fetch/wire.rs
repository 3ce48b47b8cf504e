//! git's protocol v2: the refs and objects that a digest needs, and nothing else.
//!
//! Three requests fetch a repository: for the server's capabilities, for HEAD, and for a pack of its one
//! commit without large blobs. If there is no HEAD, the third asks for other refs. Where the server tells
//! sizes, there may be more requests, each for less: trees, sizes, some blobs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use common::fault::Fault;

use super::answer;
use super::http::{HttpSession, ProgressSink, ResponseBody};
use super::pack::limits::{Failure, PackLimits};
use super::pack::{Pack, missing};
use super::packets::{Chunks, Packet, Packets, early_end, strange, trimmed};
use crate::source::ObjectId;

#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;

/// The file in the scratch folder for a pack that memory has no room for.
const PACK_FILE: &str = "pack";

/// A server of a repository, by protocol v2.
pub(super) struct Server {
    session: Arc<HttpSession>,
    capabilities: Capabilities,
    limits: PackLimits,
    pack_path: PathBuf,
    sink: Arc<dyn ProgressSink>,
}

impl Server {
    /// Asks for the server's capabilities. Blobs larger than `largest` are not needed.
    pub(super) fn new(
        session: &Arc<HttpSession>,
        largest: u64,
        scratch: &Path,
        sink: Arc<dyn ProgressSink>,
    ) -> Result<Self, Failure> {
        Ok(Self {
            session: Arc::clone(session),
            capabilities: Capabilities::read(&mut Packets::of(session.capabilities()?))?,
            // git leaves out blobs of this size too.
            limits: PackLimits::filtered_at(largest.saturating_add(1)),
            pack_path: scratch.join(PACK_FILE),
            sink,
        })
    }

    /// Returns the commit that is HEAD; `None` for a repository without one.
    pub(super) fn head(&self) -> Result<Option<ObjectId>, Failure> {
        match ask_head(&self.session, &self.capabilities)? {
            RemoteHead::Commit(id) => Ok(Some(id)),
            RemoteHead::Unborn(branch) => {
                let request = self.capabilities.other_refs();
                let mut refs = Packets::of(self.session.refs(request)?);
                read_names(&mut refs, |name| self.session.keep_ref(name))?;
                expect_no_refs(&self.session, || branch)?;
                Ok(None)
            }
        }
    }

    /// Whether it tells the sizes of blobs.
    pub(super) fn tells_sizes(&self) -> bool {
        self.capabilities.tells_sizes
    }

    /// Returns a source without a commit.
    pub(super) fn nothing(&self) -> Pack {
        Pack::empty(self.limits, Arc::clone(&self.sink))
    }

    /// Fetches `commit` without large blobs.
    pub(super) fn fetch(&self, commit: ObjectId) -> Result<Pack, Failure> {
        let filter = format!("filter blob:limit={}", self.limits.filter);
        self.pack([format!("want {commit}"), "deepen 1".to_owned(), filter])?
            .at(commit)
    }

    /// Fetches `commit` and its trees, and visits its blobs, which do not come.
    pub(super) fn fetch_trees(
        &self,
        commit: ObjectId,
        visit: &mut dyn FnMut(ObjectId),
    ) -> Result<Pack, Failure> {
        let filter = "filter blob:none".to_owned();
        self.pack([format!("want {commit}"), "deepen 1".to_owned(), filter])?
            .at_trees(commit, visit)
    }

    /// Fetches `blobs`.
    pub(super) fn fetch_blobs(&self, blobs: &[ObjectId]) -> Result<Pack, Failure> {
        let pack = self.pack(distinct(blobs).iter().map(|blob| format!("want {blob}")))?;
        match pack.lacking(blobs.iter().copied()).first() {
            Some(blob) => Err(missing("blob", *blob)),
            None => Ok(pack),
        }
    }

    /// Whether a blob of this size is left out by [`Self::fetch`].
    pub(super) fn leaves_out(&self, size: u64) -> bool {
        size >= self.limits.filter
    }

    /// Asks for the sizes of `blobs`.
    pub(super) fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Failure> {
        if blobs.is_empty() {
            return Ok(Vec::new());
        }
        let asked = distinct(blobs);
        let lines = asked.iter().map(|blob| format!("oid {blob}"));
        let lines = std::iter::once("size".to_owned()).chain(lines);
        let request = self.capabilities.command("object-info", lines);
        let mut packets = self.command(request)?;
        let sizes = sizes(&mut packets, asked.len())?;
        let size = |blob| sizes.get(blob).copied();
        let sizes = blobs.iter().map(size).collect::<Option<Vec<_>>>();
        sizes.ok_or_else(|| strange("without all sizes"))
    }

    fn command(&self, request: Vec<u8>) -> Result<Packets<ResponseBody>, Failure> {
        let response = self.session.command(request);
        let failure = |fault: Fault| match self.session.broke_server() {
            // It may be what is asked for that its git cannot do.
            true => Failure::Surprise(fault.message),
            false => Failure::Fault(fault),
        };
        response.map(Packets::of).map_err(failure)
    }

    /// Fetches a pack as `lines` ask for it.
    fn pack(&self, lines: impl IntoIterator<Item = String>) -> Result<Pack, Failure> {
        let begin = ["no-progress", "ofs-delta"].map(str::to_owned);
        let lines = begin.into_iter().chain(lines);
        let lines = lines.chain(std::iter::once("done".to_owned()));
        let request = self.capabilities.command("fetch", lines);
        let mut packets = self.command(request)?;
        packets.skip_to_pack()?;
        let mut pieces = || packets.pack_piece();
        let (path, sink) = (self.pack_path.clone(), Arc::clone(&self.sink));
        Pack::read(&mut pieces, self.limits, path, sink)
    }
}

/// Returns each of `blobs` once.
fn distinct(blobs: &[ObjectId]) -> Vec<ObjectId> {
    let mut blobs = blobs.to_vec();
    blobs.sort_unstable();
    blobs.dedup();
    blobs
}

/// Reads the sizes of up to `count` objects.
fn sizes<B: Chunks>(
    packets: &mut Packets<B>,
    count: usize,
) -> Result<HashMap<ObjectId, u64>, Failure> {
    let sections = "sizes in sections";
    match packets.next_line(sections)? {
        Some(line) if trimmed(&line) == b"size" => {}
        _ => return Err(strange("something other than sizes")),
    }
    let mut sizes = HashMap::with_capacity(count);
    while let Some(line) = packets.next_line(sections)? {
        // `OID SIZE`; of an object that it does not have, some servers say nothing or -1.
        let line = std::str::from_utf8(trimmed(&line)).unwrap_or_default();
        let parts = line.split_once(' ');
        let size = parts.and_then(|(id, size)| Some((ObjectId::parse(id)?, size.parse().ok()?)));
        let (id, size) = size.ok_or_else(|| strange("without a size"))?;
        sizes.insert(id, size);
        if sizes.len() > count {
            return Err(strange("with sizes that nobody asked for"));
        }
    }
    Ok(sizes)
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

/// What a server can do, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Capabilities {
    names_object_format: bool,
    /// Whether it tells which branch HEAD names if that does not exist.
    tells_unborn: bool,
    tells_sizes: bool,
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
            tells_sizes: value("object-info")
                .is_some_and(|info| info.is_empty() || has(info, b"size")),
        })
    }

    /// Returns the request for HEAD.
    fn ls_refs(&self) -> Vec<u8> {
        let arguments = ["symrefs", "ref-prefix HEAD", "unborn"].map(str::to_owned);
        let asked = if self.tells_unborn { 3 } else { 2 };
        self.command("ls-refs", arguments.into_iter().take(asked))
    }

    /// Returns the request for all refs but HEAD.
    fn other_refs(&self) -> Vec<u8> {
        self.command("ls-refs", ["ref-prefix refs/".to_owned()])
    }

    fn command(&self, name: &str, arguments: impl IntoIterator<Item = String>) -> Vec<u8> {
        let mut request = line(&format!("command={name}"));
        request += &line(concat!("agent=repofleet/", env!("CARGO_PKG_VERSION")));
        if self.names_object_format {
            request += &line("object-format=sha1");
        }
        request += "0001";
        request.extend(arguments.into_iter().map(|argument| line(&argument)));
        request += "0000";
        request.into_bytes()
    }
}

fn line(text: &str) -> String {
    format!("{:04x}{text}\n", text.len() + 5)
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

#[cfg(test)]
mod tests {
    use common::fault::FaultKind;

    use super::super::packets::cut::{Cut, surprise};
    use super::*;

    fn capabilities(lines: &[&'static str]) -> Result<Capabilities, Failure> {
        let lines: Vec<Bytes> = lines
            .iter()
            .map(|line| Bytes::from_static(line.as_bytes()))
            .collect();
        Capabilities::parse(&lines)
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
            tells_sizes: false,
        };
        let agent = line(concat!("agent=repofleet/", env!("CARGO_PKG_VERSION")));
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

    #[test]
    fn sizes_are_told_line_by_line_or_not_believed() {
        let read = |lines: &[&str], count| {
            let lines = lines.iter().map(|text| line(text)).collect::<String>() + "0000";
            sizes(&mut Packets::of(Cut(Bytes::from(lines), 7)), count)
        };
        let (one, two) = ("1".repeat(40), "2".repeat(40));
        let (one, two) = (one.as_str(), two.as_str());
        let told = [format!("{one} 0"), format!("{two} 5000000000")];
        let told = [told[0].as_str(), told[1].as_str()];
        let found = read(&[&["size"], &told[..]].concat(), 2).unwrap();
        assert_eq!(found[&ObjectId([0x11; 20])], 0);
        assert_eq!(found[&ObjectId([0x22; 20])], 5_000_000_000);
        assert_eq!(found.len(), 2);
        assert_eq!(read(&["size"], 0).unwrap().len(), 0);
        for lines in [
            &[][..],
            &["attributes"],
            &["size", one],
            &["size", &format!("{one} ")],
            &["size", &format!("{one} -1")],
            &["size", &format!("{one} ?")],
            &["size", "12 5"],
            &["size", told[0], told[1]],
        ] {
            surprise(read(lines, 1));
        }
    }
}
