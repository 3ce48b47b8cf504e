//! A slot's child process: fetches and digests one repository, and tells its parent.

use std::io::{self, BufWriter, Read, Stdout, Write};
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::fault::Fault;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getppid, set_parent_process_death_signal, setrlimit,
};

use super::protocol::{ARGUMENT, ChildRequest, Frame, MAX_PIECE};
use crate::digest::Part;
use crate::digest::write::write;
use crate::fetch::{self, ProgressSink};
use crate::source::{Head, ObjectId, Source, TreeEntry};

/// How much has to come in to count as progress: a server that sends a byte a second makes none.
const PROGRESS_BYTES: u64 = 1000;
/// How often progress is told at most.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Does a slot's work and gives the exit code, if this process was started for that. To be called
/// first in `main`, before any thread is started.
pub fn main_if_slot() -> Option<ExitCode> {
    if std::env::args_os().nth(1)? != ARGUMENT {
        return None;
    }
    Some(match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The parent keeps this as evidence.
            writeln!(io::stderr(), "{error}").ok();
            ExitCode::FAILURE
        }
    })
}

fn run() -> io::Result<()> {
    let mut request = Vec::new();
    io::stdin().read_to_end(&mut request)?;
    let request: ChildRequest = serde_json::from_slice(&request).map_err(|e| {
        io::Error::other(format!(
            "this is for a worker to start, not for people: {e}"
        ))
    })?;
    limit(&request)?;
    let teller = Arc::new(FrameWriter::default());
    let last = match work(&request, &teller) {
        Ok(last) => last,
        Err(fault) => Frame::Failed(fault),
    };
    teller.tell(&last, b"")
}

/// Gives up what this process will not need, before anything of a stranger's is read.
fn limit(request: &ChildRequest) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the line above.
    if getppid().map(Pid::as_raw_nonzero).map(i32::from) != Some(request.parent) {
        return Err(io::Error::other("the parent is gone"));
    }
    // Should memory run out, the kernel is to end a slot, which is one job, and not the worker. Where this may not be
    // said, the largest process goes, which mostly is the slot.
    std::fs::write("/proc/self/oom_score_adj", "500").ok();
    for (resource, limit) in [
        (Resource::As, request.address_space),
        (Resource::Fsize, request.file_bytes),
        (Resource::Cpu, request.cpu_seconds),
        (Resource::Core, 0),
        (Resource::Nofile, 256),
    ] {
        // Never above what the system allows already.
        let system = rustix::process::getrlimit(resource).maximum;
        let within = |limit: u64| Some(system.map_or(limit, |system| system.min(limit)));
        let limits = Rlimit {
            current: within(limit),
            // At the first of the two the kernel sends SIGXCPU, which says what it is about; at
            // the second SIGKILL.
            maximum: within(limit + u64::from(resource == Resource::Cpu)),
        };
        setrlimit(resource, limits)?;
    }
    // A write over the file limit is then an error that can be told, not the end.
    const SIGXFSZ: i32 = 25;
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
    Ok(())
}

fn work(request: &ChildRequest, teller: &Arc<FrameWriter>) -> Result<Frame, Fault> {
    let start = Instant::now();
    let watch: Arc<dyn ProgressSink> = Arc::clone(teller) as Arc<dyn ProgressSink>;
    let fetched = fetch::fetch(&request.url, &request.policy, &request.scratch, watch)?;
    let told = teller.tell(
        &Frame::Fetched {
            fetched_bytes: fetched.bytes,
            millis: millis(start),
        },
        b"",
    );
    told.map_err(|e| parent_gone(&e))?;

    let start = Instant::now();
    let mut emit = |part: Part, text: &str| {
        for piece in pieces(text) {
            let frame = Frame::Text {
                part,
                bytes: piece.len(),
            };
            let told = teller.tell(&frame, piece.as_bytes());
            told.map_err(|e| parent_gone(&e))?;
        }
        Ok(())
    };
    let source = ProgressSource {
        source: &fetched.source,
        teller,
    };
    let facts = write(&source, &request.subject, &request.limits, &mut emit)?;
    Ok(Frame::Done {
        facts,
        millis: millis(start),
    })
}

/// A source whose every use counts as progress: a large repository may be looked at for long
/// before there is text to send.
struct ProgressSource<'a> {
    source: &'a dyn Source,
    teller: &'a FrameWriter,
}

impl Source for ProgressSource<'_> {
    fn head(&self) -> Result<Option<Head>, Fault> {
        self.source.head()
    }

    fn entries(&self, tree: ObjectId) -> Result<Vec<TreeEntry>, Fault> {
        self.teller.alive();
        self.source.entries(tree)
    }

    fn sizes(&self, blobs: &[ObjectId]) -> Result<Vec<u64>, Fault> {
        self.teller.alive();
        self.source.sizes(blobs)
    }

    fn read(
        &self,
        blobs: &[ObjectId],
        visit: &mut dyn FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), Fault> {
        self.source.read(blobs, &mut |i, blob| {
            self.teller.alive();
            visit(i, blob)
        })
    }
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

fn parent_gone(error: &io::Error) -> Fault {
    Fault::infra(format!("the parent does not listen: {error}"))
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Writes frames, and progress when there is any.
struct FrameWriter {
    output: Mutex<Output>,
}

struct Output {
    out: BufWriter<Stdout>,
    /// Bytes received when progress was last told, and when that was.
    told: (u64, Instant),
}

impl Default for FrameWriter {
    fn default() -> Self {
        Self {
            output: Mutex::new(Output {
                out: BufWriter::with_capacity(64 * 1024, io::stdout()),
                told: (0, Instant::now()),
            }),
        }
    }
}

impl FrameWriter {
    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, frame: &Frame, text: &[u8]) -> io::Result<()> {
        let out = &mut self.output().out;
        serde_json::to_writer(&mut *out, frame)?;
        out.write_all(b"\n")?;
        out.write_all(text)?;
        out.flush()
    }

    fn progress(&self, fetched_bytes: u64) {
        // The next write that matters will find out that the parent is gone.
        self.tell(&Frame::Progress { fetched_bytes }, b"").ok();
    }
}

impl ProgressSink for FrameWriter {
    fn received(&self, total: u64) {
        {
            let mut output = self.output();
            let (bytes, when) = output.told;
            if total - bytes < PROGRESS_BYTES || when.elapsed() < PROGRESS_EVERY {
                return;
            }
            output.told = (total, Instant::now());
        }
        self.progress(total);
    }

    fn alive(&self) {
        let total = {
            let mut output = self.output();
            if output.told.1.elapsed() < PROGRESS_EVERY {
                return;
            }
            output.told.1 = Instant::now();
            output.told.0
        };
        self.progress(total);
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
