//! A slot's child process: fetches and digests one repository, and reports to its parent.

use std::io::{self, BufWriter, Read, Stdout, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::fault::Fault;
use common::process;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getppid, set_parent_process_death_signal, setrlimit,
};
use zeroize::Zeroizing;

use super::confine::{Needs, confine};
use super::protocol::{ARGUMENT, ChildRequest, Frame, MAX_PIECE};
use crate::digest::Part;
use crate::digest::write::{largest_blob, write};
use crate::fetch::answer::TokenRefusal;
use crate::fetch::http::ProgressSink;
use crate::fetch::policy::{FetchSource, FetchWay};
use crate::fetch::{self, FetchResult, Wanted, local};

/// More than a request takes, unless an operator names hundreds of hosts.
const REQUEST_BYTES: usize = 64 * 1024;
/// Bytes that count as progress: a server that sends a byte a second makes none.
const PROGRESS_BYTES: u64 = 1000;
/// Shortest time between two reports of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Does a slot's work and returns the exit code, if this process was started as a slot's child. Call
/// it first in `main`, before any thread starts.
pub fn main_if_slot() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    let scratch = PathBuf::from(arguments.next().unwrap_or_default());
    Some(match run(&scratch) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Evidence for the parent.
            writeln!(io::stderr(), "{error}").ok();
            ExitCode::FAILURE
        }
    })
}

fn run(scratch: &Path) -> io::Result<()> {
    let request = enter(scratch)?;
    let frames = Arc::new(FrameWriter::new());
    let last = match request {
        Ok(request) => work(request, scratch, &frames).unwrap_or_else(Frame::Failed),
        Err(fault) => Frame::Failed(fault),
    };
    frames.write(&last, b"")
}

/// Reads the job, and gives up what this process does not need for it, before it reads untrusted
/// input. `scratch` is the job's folder. Only tests that try to break out call it from elsewhere.
///
/// # Errors
/// If nobody or another program started this process; within that, if it cannot be confined.
pub fn enter(scratch: &Path) -> io::Result<Result<ChildRequest, Fault>> {
    // If memory runs out, the kernel should kill a slot, not the worker. Where this is forbidden it
    // kills the largest process, usually the slot. No longer possible after the next line.
    std::fs::write("/proc/self/oom_score_adj", "500").ok();
    process::harden();
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Wiped, and large enough not to be moved, since the token is in it.
    let mut text = Zeroizing::new(Vec::with_capacity(REQUEST_BYTES));
    io::stdin().read_to_end(&mut text)?;
    let request: ChildRequest = serde_json::from_slice(&text)
        .map_err(|e| io::Error::other(format!("only a worker can start a slot: {e}")))?;
    // The parent may have died before it was to take this process with it.
    if getppid().map(Pid::as_raw_nonzero).map(i32::from) != Some(request.parent) {
        return Err(io::Error::other("the parent is gone"));
    }
    limit(&request)?;
    Ok(confine_to(&request, scratch).map(|()| request))
}

/// Raises the walls.
fn confine_to(request: &ChildRequest, scratch: &Path) -> Result<(), Fault> {
    let needs = match request.policy.source(&request.url)? {
        FetchSource::Local(path) => Needs::local(scratch, local::places(&path)),
        FetchSource::Remote { .. } => Needs::remote(scratch, request.policy.ports()),
    };
    let walls = confine(&needs);
    let missing = request.walls.iter().find(|wall| !walls.contains(wall));
    missing.map_or(Ok(()), |wall| {
        let wall = wall.as_ref();
        Err(Fault::infra(format!(
            "cannot confine a slot by {wall}, as was possible when this program started"
        )))
    })
}

/// Limits what this process may use.
fn limit(request: &ChildRequest) -> io::Result<()> {
    for (resource, limit) in [
        (Resource::As, request.address_space),
        (Resource::Fsize, request.file_bytes),
        (Resource::Cpu, request.cpu_seconds),
        (Resource::Core, 0),
        (Resource::Nofile, 256),
    ] {
        // Never above the system's limit.
        let system = rustix::process::getrlimit(resource).maximum;
        let within = |limit: u64| Some(system.map_or(limit, |system| system.min(limit)));
        let limits = Rlimit {
            current: within(limit),
            // The kernel sends SIGXCPU, which names the cause, at the first and SIGKILL at the second.
            maximum: within(limit + u64::from(resource == Resource::Cpu)),
        };
        setrlimit(resource, limits)?;
    }
    // Makes a write over the file limit an error instead of the end.
    const SIGXFSZ: i32 = 25;
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    Ok(())
}

fn work(request: ChildRequest, scratch: &Path, frames: &Arc<FrameWriter>) -> Result<Frame, Fault> {
    let write_frame = |frame: &Frame, text: &[u8]| {
        let written = frames.write(frame, text);
        written.map_err(|e| Fault::infra(format!("the parent does not read: {e}")))
    };
    let start = Instant::now();
    let sink: Arc<dyn ProgressSink> = Arc::clone(frames) as Arc<dyn ProgressSink>;
    let ChildRequest {
        url,
        subject,
        known,
        limits,
        policy,
        ..
    } = request;
    let wanted = Wanted {
        largest: largest_blob(&limits),
        known,
    };
    let fetched = fetch::fetch(&url, wanted, &policy, scratch, sink)?;
    // With the token, which is wiped.
    drop(policy);
    let fetched = match fetched {
        FetchResult::Repository(fetched) => fetched,
        FetchResult::Unmoved { bytes, renamed_to } => {
            return Ok(Frame::Unmoved {
                fetched_bytes: bytes,
                renamed_to,
            });
        }
    };
    let done = Frame::Fetched {
        fetched_bytes: fetched.bytes,
        millis: millis(start),
        renamed_to: fetched.renamed_to,
    };
    write_frame(&done, b"")?;

    let start = Instant::now();
    let mut emit = |part: Part, text: &str| {
        pieces(text).try_for_each(|piece| {
            let bytes = piece.len();
            write_frame(&Frame::Text { part, bytes }, piece.as_bytes())
        })
    };
    let source = fetched.source.as_ref();
    let facts = write(source, &subject, &limits, &mut emit)?;
    // A source may fetch while it is read.
    let fetched_bytes = frames.received.load(Ordering::Relaxed);
    write_frame(&Frame::Progress { fetched_bytes }, b"")?;
    Ok(Frame::Done {
        facts,
        millis: millis(start),
    })
}

/// Cuts a text into pieces that fit a frame, between characters.
fn pieces(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        if text.is_empty() {
            return None;
        }
        let (piece, rest) = text.split_at(text.floor_char_boundary(MAX_PIECE));
        text = rest;
        Some(piece)
    })
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Writes frames to standard output, and progress as it comes.
struct FrameWriter {
    output: Mutex<BufWriter<Stdout>>,
    /// Bytes received.
    received: AtomicU64,
    /// Bytes received when progress was last reported, and when that was.
    reported: Mutex<(u64, Instant)>,
}

impl FrameWriter {
    fn new() -> Self {
        Self {
            output: Mutex::new(BufWriter::with_capacity(64 * 1024, io::stdout())),
            received: AtomicU64::new(0),
            reported: Mutex::new((0, Instant::now())),
        }
    }

    fn write(&self, frame: &Frame, text: &[u8]) -> io::Result<()> {
        let mut out = lock(&self.output);
        serde_json::to_writer(&mut *out, frame)?;
        out.write_all(b"\n")?;
        out.write_all(text)?;
        out.flush()
    }

    /// Reports progress unless it was reported just now. `received` is the bytes received, if they
    /// are what makes the progress.
    fn progress(&self, received: Option<u64>) {
        let mut reported = lock(&self.reported);
        let (bytes, when) = *reported;
        let fetched_bytes = received.unwrap_or(bytes);
        let is_slow = received.is_some_and(|total| total - bytes < PROGRESS_BYTES);
        if is_slow || when.elapsed() < PROGRESS_EVERY {
            return;
        }
        *reported = (fetched_bytes, Instant::now());
        // If the parent is gone, the next write that matters fails too.
        self.write(&Frame::Progress { fetched_bytes }, b"").ok();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProgressSink for FrameWriter {
    fn way(&self, way: FetchWay, why: &str) {
        let why = why.to_owned();
        // As in `progress`.
        self.write(&Frame::Way { way, why }, b"").ok();
    }

    fn received(&self, total: u64) {
        self.received.store(total, Ordering::Relaxed);
        self.progress(Some(total));
    }

    fn alive(&self) {
        self.progress(None);
    }

    fn token_refused(&self, why: TokenRefusal) {
        // As above.
        self.write(&Frame::TokenRefused { why }, b"").ok();
    }

    fn token_used_up(&self, rest: Duration) {
        let seconds = rest.as_secs();
        // As above.
        self.write(&Frame::TokenUsedUp { seconds }, b"").ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_fit_and_lose_nothing() {
        let text = "aä€😀".repeat(MAX_PIECE / 4);
        let all: Vec<_> = pieces(&text).collect();
        assert!(all.len() > 1);
        assert!(all.iter().all(|piece| piece.len() <= MAX_PIECE));
        assert_eq!(all.concat(), text);
        assert_eq!(pieces("").count(), 0);
    }
}
