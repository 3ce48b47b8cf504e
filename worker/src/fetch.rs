//! Fetching: HEAD's one commit, or a local repository in place.
//!
//! By git's protocol v2 (`wire`) a server leaves out the files that no digest shows, and the pack is
//! read as it comes (`pack`). One that tells sizes sends trees first, and then what the digest asks for
//! (`on_demand`). Whatever surprises there is left to libgit2, which makes a shallow copy in a bare
//! scratch repository ([`objects`]). All ways make the same digests.
//!
//! The only user of git2. Nothing is ever checked out: no filter, hook, symbolic link or submodule of
//! a repository can do anything.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Once};
use std::time::Duration;

use common::fault::{Fault, FaultKind};
use git2::{AutotagOption, Direction, ErrorCode, FetchOptions, Oid, RemoteCallbacks, Repository};
use rustix::time::{ClockId, clock_gettime};
use url::Url;

use crate::disk;
use crate::fetch::http::{HttpSession, ProgressSink};
use crate::fetch::objects::Objects;
use crate::fetch::on_demand::OnDemand;
use crate::fetch::pack::limits::Failure;
use crate::fetch::pack::{Pack, missing};
use crate::fetch::policy::{FetchMode, FetchPolicy, FetchSource, FetchWay};
use crate::fetch::wire::Server;
use crate::source::{ObjectId, Source};

pub mod policy;

pub mod host;

pub mod token;

pub mod address;

pub mod http;

pub mod answer;

mod packets;

pub mod objects;

pub mod local;

mod on_demand;

mod wire;

mod pack;

#[cfg(any(test, fuzzing))]
pub mod fuzz;

/// The ref in the scratch repository that holds the remote's HEAD.
const HEAD: &str = "refs/repofleet/head";
/// The scratch repository's folder in the scratch folder, where there may be a pack already.
const REPOSITORY: &str = "repository";

/// Up to so many files are fetched in one pack even where the server tells sizes.
///
/// Asking for what shows takes three or four requests more, and spares bytes. Measured with 77
/// repositories, 27 of them with so few files, by `deploy/bench/speed.py`, two at a time (`git clone
/// --depth 1 --bare`: 231 requests, 375 MB). The time is at 40 ms for a round trip, and with 50 Mbit/s
/// for all bytes:
///
/// | few files | requests | MB down | CPU s | time s |
/// |---|--:|--:|--:|--:|
/// | none: always trees | 556 | 24.8 | 1.79 | 23.4 |
/// | 100 | 514 | 27.6 | 1.84 | 21.6 |
/// | 200 | 487 | 29.9 | 1.76 | 20.1 |
/// | 300 | 476 | 30.6 | 1.83 | 21.1 |
/// | 400 | 455 | 35.7 | 1.84 | 20.8 |
/// | 700 | 432 | 61.2 | 2.03 | 24.5 |
/// | 1,000 | 420 | 68.7 | 2.07 | 25.3 |
/// | all: trees, then one pack | 352 | 226.8 | 3.78 | 52.8 |
const FEW_FILES: usize = 300;

/// A fetched repository.
pub struct Fetched {
    /// The repository, ready to be read.
    pub source: Box<dyn Source>,
    /// Bytes received over the network.
    pub bytes: u64,
    /// Where redirects led, if that is another path.
    pub renamed_to: Option<String>,
}

/// What a fetch came to.
pub enum FetchResult {
    /// The repository can be read.
    Repository(Fetched),
    /// HEAD is the known commit: nothing was asked for but the refs.
    Unmoved {
        /// Bytes received over the network.
        bytes: u64,
        /// As [`Fetched::renamed_to`].
        renamed_to: Option<String>,
    },
}

/// What is wanted of a repository.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Files of more than this many bytes may be left out.
    pub largest: u64,
    /// If HEAD is this commit, nothing is wanted.
    pub known: Option<ObjectId>,
}

/// Fetches HEAD of `url` with the help of `scratch`, an empty folder, or opens `url` if it is local.
/// Stops after the refs if HEAD is known.
///
/// # Errors
/// Any class that a source can cause; see [`FaultKind`].
pub fn fetch(
    url: &str,
    wanted: Wanted,
    policy: &FetchPolicy,
    scratch: &Path,
    sink: Arc<dyn ProgressSink>,
) -> Result<FetchResult, Fault> {
    match policy.source(url)? {
        FetchSource::Local(path) => {
            configure();
            let source = Objects::open(&path)?.report_to(sink);
            let head = source.head()?.map(|head| head.commit);
            if wanted.known.is_some() && head == wanted.known {
                return Ok(FetchResult::Unmoved {
                    bytes: 0,
                    renamed_to: None,
                });
            }
            Ok(FetchResult::Repository(Fetched {
                source: Box::new(source),
                bytes: 0,
                renamed_to: None,
            }))
        }
        FetchSource::Remote { url, named } => {
            let session = HttpSession::new(url.clone(), named, policy, Arc::clone(&sink))?;
            let remote = Remote {
                session: Arc::clone(&session),
                url,
                wanted,
                scratch: scratch.to_owned(),
                sink,
                mode: policy.mode,
            };
            let source = Rc::new(remote).fetch()?;
            let (bytes, renamed_to) = (session.received(), session.renamed_to());
            Ok(match source {
                Some(source) => FetchResult::Repository(Fetched {
                    source,
                    bytes,
                    renamed_to,
                }),
                None => FetchResult::Unmoved { bytes, renamed_to },
            })
        }
    }
}

/// A repository on a host. Its methods return `None` if HEAD is known.
struct Remote {
    session: Arc<HttpSession>,
    url: Url,
    wanted: Wanted,
    scratch: PathBuf,
    sink: Arc<dyn ProgressSink>,
    mode: FetchMode,
}

impl Remote {
    fn fetch(self: &Rc<Self>) -> Result<Option<Box<dyn Source>>, Fault> {
        if self.mode == FetchMode::Git2 {
            self.sink.way(FetchWay::Git2, "");
            return self.with_git2();
        }
        self.with_v2().or_else(|failure| self.otherwise(failure))
    }

    fn with_v2(self: &Rc<Self>) -> Result<Option<Box<dyn Source>>, Failure> {
        let Wanted { largest, known } = self.wanted;
        let sink = Arc::clone(&self.sink);
        let server = Server::new(&self.session, largest, &self.scratch, sink)?;
        let Some(head) = server.head()? else {
            self.sink.way(FetchWay::V2, "");
            return Ok(Some(Box::new(server.nothing())));
        };
        if known == Some(head) {
            self.sink.way(FetchWay::V2, "");
            return Ok(None);
        }
        if !server.tells_sizes() {
            return self.in_one_pack(&server, head, FetchWay::V2, "").map(Some);
        }
        let mut files = HashSet::new();
        let found = server.fetch_trees(head, &mut |file| {
            if files.len() <= FEW_FILES {
                files.insert(file);
            }
        });
        match found {
            Ok(_) if files.len() <= FEW_FILES => self.few(&server, head, files).map(Some),
            Ok(trees) => {
                self.sink.way(FetchWay::ObjectInfo, "");
                Ok(Some(Box::new(self.on_demand(server, head, trees))))
            }
            Err(Failure::Surprise(why)) => {
                let way = FetchWay::ObjectInfoFallback;
                self.in_one_pack(&server, head, way, &why).map(Some)
            }
            Err(failure) => Err(failure),
        }
    }

    /// Fetches a commit of few files in one pack. Those that did not come must be as large as the
    /// server was told to leave out.
    fn few(
        &self,
        server: &Server,
        head: ObjectId,
        files: HashSet<ObjectId>,
    ) -> Result<Box<dyn Source>, Failure> {
        let pack = server.fetch(head)?;
        let lacking = pack.lacking(files);
        let mut sizes = match server.sizes(&lacking) {
            Ok(sizes) => lacking.iter().zip(sizes),
            Err(Failure::Surprise(why)) => {
                self.sink.way(FetchWay::ObjectInfoFallback, &why);
                return Ok(Box::new(pack));
            }
            Err(failure) => return Err(failure),
        };
        if let Some((blob, _)) = sizes.find(|(_, size)| !server.leaves_out(*size)) {
            return Err(missing("blob", *blob));
        }
        self.sink.way(FetchWay::V2, "");
        Ok(Box::new(pack))
    }

    fn on_demand(self: &Rc<Self>, server: Server, head: ObjectId, trees: Pack) -> OnDemand {
        let remote = Rc::clone(self);
        let otherwise = move |server: &Server, why: &str| {
            let pack = remote.in_one_pack(server, head, FetchWay::ObjectInfoFallback, why);
            pack.or_else(|failure| {
                let source = remote.otherwise(failure)?;
                source.ok_or_else(|| Fault::transient("HEAD went back to the known commit"))
            })
        };
        OnDemand::new(server, trees, Box::new(otherwise))
    }

    /// Fetches all that may show, in one pack.
    fn in_one_pack(
        &self,
        server: &Server,
        head: ObjectId,
        way: FetchWay,
        why: &str,
    ) -> Result<Box<dyn Source>, Failure> {
        let pack = server.fetch(head)?;
        self.sink.way(way, why);
        Ok(Box::new(pack))
    }

    /// Falls back to libgit2 if that may help.
    fn otherwise(&self, failure: Failure) -> Result<Option<Box<dyn Source>>, Fault> {
        match failure {
            Failure::Fault(fault) => Err(fault),
            Failure::Surprise(why) if self.mode == FetchMode::V2 => {
                let message = format!("cannot fetch by protocol v2: {why}; --fetch auto goes on");
                Err(Fault::refused(message))
            }
            Failure::Surprise(why) => {
                self.sink.way(FetchWay::Fallback, &why);
                self.with_git2()
            }
        }
    }

    /// Fetches into a repository in the scratch folder.
    fn with_git2(&self) -> Result<Option<Box<dyn Source>>, Fault> {
        configure();
        let folder = self.scratch.join(REPOSITORY);
        let known = self.wanted.known;
        let sink = || Arc::clone(&self.sink);
        let download = || download(self.url.as_str(), &folder, known, sink(), &self.session);
        let result = self.session.run(download).map_err(|error| {
            let fault = self.session.take_fault();
            fault.unwrap_or_else(|| local_fault(&error, &self.scratch))
        })?;
        let Some((repository, head)) = result else {
            return Ok(None);
        };
        if head.is_none() {
            wire::expect_empty(&self.session)?;
        }
        let source = Objects::new(repository, head.map(objects::object_id))?;
        Ok(Some(Box::new(source.report_to(sink()))))
    }
}

/// Classifies an error of libgit2 that the host did not cause in words.
///
/// Only what this machine itself shows counts against it: that the system refused libgit2 room, or that
/// the scratch folder cannot be written.
fn local_fault(error: &git2::Error, scratch: &Path) -> Fault {
    let fault = objects::fault("git", error);
    if fault.kind != FaultKind::Infra {
        return fault;
    }
    // libgit2 does not always say where, and has removed what did not fit.
    let found = match objects::is_no_room(error) {
        true => Some(fault.message.clone()),
        false => {
            let found = disk::probe(scratch).err();
            found.map(|found| disk::full(found).message)
        }
    };
    match found {
        Some(found) => Fault::infra(format!("in {}: {found}", scratch.display())),
        None => Fault::transient(fault.message),
    }
}

/// Fetches into a new scratch repository. Returns it and the remote's HEAD, if it has one; `None` if
/// HEAD is `known`.
fn download(
    url: &str,
    scratch: &Path,
    known: Option<ObjectId>,
    sink: Arc<dyn ProgressSink>,
    session: &HttpSession,
) -> Result<Option<(Repository, Option<Oid>)>, git2::Error> {
    let mut init = git2::RepositoryInitOptions::new();
    let repository = Repository::init_opts(scratch, init.bare(true).external_template(false))?;
    let mut callbacks = RemoteCallbacks::new();
    let mut resolved = 0;
    let mut time = ResolveTime::default();
    callbacks.transfer_progress(move |progress| {
        // Deltas are resolved after the last byte. Objects indexed before count only as bytes:
        // otherwise a server could drip small ones for ever.
        if progress.indexed_deltas() == resolved {
            return true;
        }
        resolved = progress.indexed_deltas();
        sink.alive();
        let checked = time.check(thread_cpu_time(), progress.received_bytes() as u64);
        checked.map_err(|fault| session.note(fault)).is_ok()
    });
    let mut options = FetchOptions::new();
    options
        .depth(1)
        .download_tags(AutotagOption::None)
        .update_fetchhead(false)
        .remote_callbacks(callbacks);
    let refspec = [format!("+HEAD:{HEAD}")];
    {
        let mut remote = repository.remote_anonymous(url)?;
        remote.connect(Direction::Fetch)?;
        let advertised = remote.list()?.iter().find(|head| head.name() == "HEAD");
        let advertised = advertised.map(|head| objects::object_id(head.oid()));
        if known.is_some() && advertised == known {
            return Ok(None);
        }
        // Over the connection that is there.
        remote.fetch(&refspec, Some(&mut options), None)?;
    }
    let head = match repository.refname_to_id(HEAD) {
        Ok(head) => Some(head),
        Err(error) if error.code() == ErrorCode::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(Some((repository, head)))
}

/// The CPU time in which libgit2 resolves a pack's deltas. What is known of them before is bounded by
/// [`PackGauge`](pack::gauge::PackGauge). Those that name their bases libgit2 tries again and again, in the
/// order of the pack, until none is left: with a pack in the worst order that takes hours.
#[derive(Default)]
struct ResolveTime {
    began: Option<Duration>,
}

impl ResolveTime {
    /// For a pack of any size; several times what the largest in the corpus takes.
    const LEAST: Duration = Duration::from_secs(8);
    /// A quarter of the speed that a slow machine has.
    const BYTES_PER_SECOND: u64 = 32 << 20;

    /// Fails as [`FaultKind::TooLarge`] if too much has passed since the first call, for a pack of so many
    /// bytes.
    fn check(&mut self, now: Duration, bytes: u64) -> Result<(), Fault> {
        let taken = now.saturating_sub(*self.began.get_or_insert(now));
        let most = Self::LEAST + Duration::from_secs(bytes / Self::BYTES_PER_SECOND);
        match taken > most {
            true => Err(Fault::too_large(format!(
                "resolving the deltas of a pack of {bytes} bytes takes more than {} s of CPU",
                most.as_secs()
            ))),
            false => Ok(()),
        }
    }
}

fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("it begins at zero")
}

/// Keeps libgit2 from reading any configuration of the machine.
#[expect(
    unsafe_code,
    reason = "libgit2's settings are global; written once, by one thread"
)]
fn configure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for level in [
            git2::ConfigLevel::System,
            git2::ConfigLevel::Global,
            git2::ConfigLevel::XDG,
            git2::ConfigLevel::ProgramData,
        ] {
            // SAFETY: `Once` lets one thread in, before this module opens any repository.
            unsafe { git2::opts::set_search_path(level, "") }.expect("an empty path is a C string");
        }
        // SAFETY: as above. A local source is read whoever owns it: nothing of it is executed,
        // and the operator allowed it.
        unsafe { git2::opts::set_verify_owner_validation(false) }.expect("the option exists");
    });
}
