//! Stopping: the first signal asks the process to finish, the second ends it at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::exit;

/// A signal that repeats within this time is the same one: `timeout` of GNU signals the process
/// and then its group.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// Whether, and how urgently, the process is to stop. Clones share the state.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled by the first signal: take no new work, finish or hand back what is in hand.
    pub soft: CancellationToken,
    /// Cancelled by the second signal: stop at once.
    pub hard: CancellationToken,
    /// The exit code of the first signal; 0 before it.
    code: Arc<AtomicU8>,
}

impl Shutdown {
    /// Listens to SIGTERM and SIGINT from now on.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let this = shutdown.clone();
        tokio::spawn(async move {
            let first = next(&mut terminate, &mut interrupt).await;
            let at = Instant::now();
            this.code.store(first, Ordering::SeqCst);
            warn!(
                operation = "shutdown",
                "stopping as soon as what is in hand allows; a second signal stops at once"
            );
            this.soft.cancel();
            while next(&mut terminate, &mut interrupt).await == first && at.elapsed() < SAME_SIGNAL
            {
            }
            warn!(operation = "shutdown", "second signal: stopping at once");
            this.hard.cancel();
        });
        Ok(shutdown)
    }

    /// Returns one that stops when this one does, or by itself.
    pub fn child(&self) -> Self {
        Self {
            soft: self.soft.child_token(),
            hard: self.hard.child_token(),
            code: Arc::clone(&self.code),
        }
    }

    /// The exit code of a process that stopped in good order: 0 after SIGTERM, 130 after SIGINT.
    pub fn code(&self) -> u8 {
        match self.unfinished() {
            exit::TERMINATED => exit::OK,
            code => code,
        }
    }

    /// The exit code of a process whose work was left undone by a signal: 143 after SIGTERM, 130
    /// after SIGINT.
    pub fn unfinished(&self) -> u8 {
        self.code.load(Ordering::SeqCst)
    }
}

/// Waits for a signal and returns its exit code.
async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> u8 {
    tokio::select! {
        _ = terminate.recv() => exit::TERMINATED,
        _ = interrupt.recv() => exit::INTERRUPTED,
    }
}
