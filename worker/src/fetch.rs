//! Fetching: a shallow copy of HEAD in a bare scratch repository, or a local repository in place.
//!
//! The only user of git2. Nothing is ever checked out, so that no filter, hook, symbolic link or
//! submodule of a repository can do anything.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Once};

use common::fault::{Fault, FaultKind};
use git2::{AutotagOption, ErrorClass, ErrorCode, FetchOptions, Oid, RemoteCallbacks, Repository};

use crate::fetch::http::HttpSession;
use crate::fetch::objects::Objects;
use crate::fetch::policy::{FetchPolicy, FetchSource};

mod http;
pub mod objects;
pub mod policy;

/// Where the scratch repository keeps what was HEAD.
const HEAD: &str = "refs/repofleet/head";

/// Is told how a fetch gets on.
pub trait ProgressSink: Send + Sync {
    /// `total` bytes have come in so far.
    fn received(&self, total: u64);
    /// Something else went on: an answer began, deltas were resolved.
    fn alive(&self);
}

/// What a fetch brought.
pub struct Fetched {
    /// The repository, ready to be read.
    pub source: Objects,
    /// Bytes that came over the network.
    pub bytes: u64,
}

/// Fetches HEAD of `url` into `scratch`, an empty folder, or opens it where it is local.
///
/// # Errors
/// Of every class of what may be wrong with a source; see [`common::fault::FaultKind`].
pub fn fetch(
    url: &str,
    policy: &FetchPolicy,
    scratch: &Path,
    watch: Arc<dyn ProgressSink>,
) -> Result<Fetched, Fault> {
    configure();
    match policy.source(url)? {
        FetchSource::Local(path) => Ok(Fetched {
            source: Objects::open(&path)?,
            bytes: 0,
        }),
        FetchSource::Remote { url, named } => {
            let session = HttpSession::new(url.clone(), named, policy, Arc::clone(&watch))?;
            let result = session.run(|| download(url.as_str(), scratch, watch));
            let sort = |error| session.take_fault().unwrap_or_else(|| fault("git", &error));
            let (repository, head) = result.map_err(|error| match sort(error) {
                // libgit2 does not always say where.
                Fault {
                    kind: FaultKind::Infra,
                    message,
                    ..
                } => Fault::infra(format!("in {}: {message}", scratch.display())),
                other => other,
            })?;
            Ok(Fetched {
                source: Objects::new(repository, head.map(objects::object_id))?,
                bytes: session.received(),
            })
        }
    }
}

/// The scratch repository, and what HEAD was; `None` if there was none.
fn download(
    url: &str,
    scratch: &Path,
    watch: Arc<dyn ProgressSink>,
) -> Result<(Repository, Option<Oid>), git2::Error> {
    let repository = Repository::init_opts(
        scratch,
        git2::RepositoryInitOptions::new()
            .bare(true)
            .external_template(false),
    )?;
    let mut callbacks = RemoteCallbacks::new();
    let mut resolved = 0;
    callbacks.transfer_progress(move |progress| {
        // These come after the last byte. Objects that are indexed as they come in are no progress
        // but that of the bytes, or a server could drip small ones for ever.
        if progress.indexed_deltas() != resolved {
            resolved = progress.indexed_deltas();
            watch.alive();
        }
        true
    });
    let mut options = FetchOptions::new();
    options
        .depth(1)
        .download_tags(AutotagOption::None)
        .update_fetchhead(false)
        .remote_callbacks(callbacks);
    repository.remote_anonymous(url)?.fetch(
        &[format!("+HEAD:{HEAD}")],
        Some(&mut options),
        None,
    )?;
    let head = match repository.refname_to_id(HEAD) {
        Ok(head) => Some(head),
        Err(error) if error.code() == ErrorCode::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok((repository, head))
}

/// Sorts an error of libgit2 itself: all that the network did has been sorted before.
fn fault(what: impl fmt::Display, error: &git2::Error) -> Fault {
    let message = format!("{what}: {}", error.message());
    // libgit2 gives the system's errors only as text, and what it says of their class depends on
    // where it met them.
    let says = |text| error.message().contains(text);
    if says("No space left on device") || says("Disk quota exceeded") {
        return Fault::infra(format!(
            "{message}; make room in the scratch folder or choose another with --scratch"
        ));
    }
    if says("File too large") {
        return Fault::too_large(format!("{message}: over the file limit of a slot"));
    }
    if error.class() == ErrorClass::NoMemory || says("Cannot allocate memory") {
        return Fault::killed(format!("{message}: over the memory limit of a slot"));
    }
    if says("Too many open files") {
        return Fault::killed(message);
    }
    match error.class() {
        ErrorClass::Os | ErrorClass::Filesystem if !says("invalid packfile") => {
            Fault::infra(message)
        }
        // A pack that was cut or damaged on its way; another copy may be whole.
        _ => Fault::transient(message),
    }
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
