//! The gate that no job passes while the machine, the store or name resolution is at fault.

use std::time::Duration;

use common::fault::Fault;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{error, info, warn};

/// Pauses between probes double from this …
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often the log repeats that the gate is closed.
const REPEAT: Duration = Duration::from_secs(60);

/// See the module. Jobs close it; one prober opens it.
#[derive(Debug)]
pub struct InfraGate {
    state: watch::Sender<GateState>,
}

/// Whether jobs may start.
#[derive(Clone, Debug)]
pub enum GateState {
    /// They may. Holds when everything was last found well again.
    Open(Option<Instant>),
    /// They may not.
    Closed(Closed),
    /// They may not, and patience has run out.
    GivenUp(Fault),
}

/// Why a gate is closed.
#[derive(Clone, Debug)]
pub struct Closed {
    since: Instant,
    /// What is wrong, as last found.
    fault: Fault,
    no_names: bool,
    first_pause: Duration,
}

impl Default for InfraGate {
    fn default() -> Self {
        Self {
            state: watch::Sender::new(GateState::Open(None)),
        }
    }
}

impl GateState {
    /// Why no job starts; `None` while jobs may.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Open(_) => None,
            Self::Closed(Closed { fault, .. }) | Self::GivenUp(fault) => Some(&fault.message),
        }
    }

    /// Whether a job failed because this machine resolves no names.
    pub fn no_names(&self) -> bool {
        matches!(self, Self::Closed(Closed { no_names: true, .. }))
    }

    /// What is wrong, once patience has run out.
    pub fn given_up(&self) -> Option<&Fault> {
        match self {
            Self::GivenUp(fault) => Some(fault),
            Self::Open(_) | Self::Closed(_) => None,
        }
    }
}

impl InfraGate {
    /// The state as it changes.
    pub fn watch(&self) -> watch::Receiver<GateState> {
        self.state.subscribe()
    }

    /// Whether jobs may not start now.
    pub fn is_closed(&self) -> bool {
        self.state.borrow().reason().is_some()
    }

    /// Returns when jobs may start: `true`; or never will: `false`.
    pub async fn opened(&self) -> bool {
        let mut state = self.watch();
        let decided = state.wait_for(|state| !matches!(state, GateState::Closed(_)));
        matches!(decided.await.as_deref(), Ok(GateState::Open(_)))
    }

    /// Returns why the gate stays closed, once patience has run out.
    pub async fn given_up(&self) -> Fault {
        let mut state = self.watch();
        loop {
            if let Some(fault) = state.borrow_and_update().given_up() {
                return fault.clone();
            }
            if state.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Closes the gate because of an attempt that began at `started`, unless everything was found
    /// well since. Returns whether this call closed it. `before` is how often the same job has
    /// closed it already: each time the first probe waits twice as long.
    pub fn close(&self, fault: &Fault, started: Instant, before: u32) -> bool {
        let no_names = fault.unresolved.is_some();
        self.state.send_if_modified(|state| match state {
            GateState::Open(well) if well.is_none_or(|well| well < started) => {
                error!(
                    operation = "infra",
                    "not a repository's fault, no job is started until it is mended: {fault}"
                );
                *state = GateState::Closed(Closed {
                    since: Instant::now(),
                    fault: fault.clone(),
                    no_names,
                    first_pause: SHORTEST_PAUSE * 2_u32.pow(before),
                });
                true
            }
            GateState::Closed(closed) => {
                closed.no_names |= no_names;
                false
            }
            _ => false,
        })
    }

    /// Opens the gate each time that it is closed and `probe` finds everything well again. Gives
    /// up when that takes longer than `patience`. Ends only then.
    pub async fn look_after<F>(&self, patience: Option<Duration>, probe: impl Fn() -> F)
    where
        F: Future<Output = Result<(), Fault>>,
    {
        let mut state = self.watch();
        loop {
            let closed = match state.wait_for(|state| state.reason().is_some()).await {
                Ok(state) => state.clone(),
                Err(_) => return,
            };
            let GateState::Closed(closed) = closed else {
                return;
            };
            let well = self.until_well(closed.first_pause, &probe);
            let in_time = match patience {
                Some(patience) => tokio::time::timeout_at(closed.since + patience, well).await,
                None => {
                    well.await;
                    Ok(())
                }
            };
            self.state.send_modify(|state| match in_time {
                Ok(()) => *state = GateState::Open(Some(Instant::now())),
                Err(_) => {
                    if let GateState::Closed(Closed { fault, .. }) = state {
                        *state = GateState::GivenUp(fault.clone());
                    }
                }
            });
        }
    }

    async fn until_well<F>(&self, mut pause: Duration, probe: &impl Fn() -> F)
    where
        F: Future<Output = Result<(), Fault>>,
    {
        let mut repeat = tokio::time::interval_at(Instant::now() + REPEAT, REPEAT);
        let probing = async {
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                match probe().await {
                    Ok(()) => return,
                    Err(fault) => self.still_closed(fault),
                }
            }
        };
        tokio::pin!(probing);
        loop {
            tokio::select! {
                () = &mut probing => break,
                _ = repeat.tick() => {
                    if let Some(why) = self.state.borrow().reason() {
                        warn!(operation = "infra", "still not well: {why}");
                    }
                }
            }
        }
        info!(operation = "infra", "machine and store are well again");
    }

    /// Keeps what a probe found: unlike the job that closed the gate, it names no repository.
    fn still_closed(&self, found: Fault) {
        self.state.send_if_modified(|state| match state {
            GateState::Closed(closed) if closed.fault.message != found.message => {
                closed.fault = found;
                true
            }
            _ => false,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn gate_looked_after(
        patience: Option<Duration>,
        fails: u32,
    ) -> (Arc<InfraGate>, Arc<AtomicU32>) {
        let (gate, probes) = (Arc::new(InfraGate::default()), Arc::new(AtomicU32::new(0)));
        let (of, counted) = (Arc::clone(&gate), Arc::clone(&probes));
        tokio::spawn(async move {
            let probe = || {
                let fails = counted.fetch_add(1, Ordering::SeqCst) < fails;
                let found = fails.then(|| Fault::infra("the disk is full"));
                std::future::ready(found.map_or(Ok(()), Err))
            };
            of.look_after(patience, probe).await;
        });
        (gate, probes)
    }

    #[tokio::test(start_paused = true)]
    async fn one_prober_opens_it_for_everybody() {
        let (gate, probes) = gate_looked_after(None, 2);
        assert!(gate.opened().await);
        let started = Instant::now();
        let fault = Fault::infra("cannot store a/b");
        assert!(gate.close(&fault, started, 0));
        assert!(!gate.close(&fault, started, 0), "it is closed already");
        assert!(gate.is_closed());
        assert!(gate.opened().await);
        assert_eq!(started.elapsed().as_millis() / 100, 35, "0.5 + 1 + 2 s");
        assert_eq!(probes.load(Ordering::SeqCst), 3);
        assert!(!gate.close(&fault, started, 0), "found well since");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(gate.close(&fault, Instant::now(), 1));
        let closed = Instant::now();
        assert!(gate.opened().await);
        assert_eq!(closed.elapsed().as_secs(), 1, "twice the pause");
    }

    #[tokio::test(start_paused = true)]
    async fn patience_means_what_it_says() {
        let (gate, _) = gate_looked_after(Some(Duration::from_secs(3600)), u32::MAX);
        let start = Instant::now();
        assert!(gate.close(&Fault::infra("cannot store a/b"), start, 0));
        assert!(!gate.opened().await);
        assert_eq!(start.elapsed().as_secs(), 3600);
        assert_eq!(gate.given_up().await.message, "the disk is full");
    }
}
