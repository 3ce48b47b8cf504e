//! Stopping: the first signal says finish, the second says now.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::exit;

/// Whether, and how urgently, the process is to stop. Clones say the same.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled by the first signal: take no new work, finish or hand back what is in hand.
    pub soft: CancellationToken,
    /// Cancelled by the second signal: stop at once.
    pub hard: CancellationToken,
    /// The exit code that the first signal asks for.
    code: Arc<AtomicU8>,
}

impl Shutdown {
    /// Listens to SIGTERM and SIGINT from now on.
    ///
    /// # Errors
    /// Where the handlers cannot be installed.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let this = shutdown.clone();
        tokio::spawn(async move {
            let code = next(&mut terminate, &mut interrupt).await;
            this.code.store(code, Ordering::SeqCst);
            warn!(
                operation = "shutdown",
                "stopping as soon as what is in hand allows; a second signal stops at once"
            );
            this.soft.cancel();
            next(&mut terminate, &mut interrupt).await;
            warn!(operation = "shutdown", "second signal: stopping at once");
            this.hard.cancel();
        });
        Ok(shutdown)
    }

    /// One that stops when this one does, or by itself.
    pub fn child(&self) -> Self {
        Self {
            soft: self.soft.child_token(),
            hard: self.hard.child_token(),
            code: Arc::clone(&self.code),
        }
    }

    /// The exit code of a process that was asked to stop: 0 after SIGTERM, 130 after SIGINT.
    pub fn code(&self) -> u8 {
        self.code.load(Ordering::SeqCst)
    }
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> u8 {
    tokio::select! {
        _ = terminate.recv() => exit::OK,
        _ = interrupt.recv() => exit::INTERRUPTED,
    }
}
