//! A TCP connection that can be cut, refused, or made to stall.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Passes connections on to another address, until it is dropped.
#[derive(Debug)]
pub struct TcpProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    mode: Mode,
    /// Both ends of each connection, the client's first; those that have ended too.
    streams: Vec<TcpStream>,
    /// The server is not told of the end of this many connections, the first ones.
    unnoticed: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Flow,
    Stall,
    StallAt(&'static [u8]),
    CutAt(&'static [u8]),
    CutOnceAt(&'static [u8]),
    Refuse,
    Gone,
}

impl TcpProxy {
    /// Listens on a port of its own of 127.0.0.1.
    ///
    /// # Panics
    /// When no port can be had.
    pub fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port on 127.0.0.1");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared {
            target,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accepting.accept(&listener));
        Self { address, shared }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends every connection; new ones are taken.
    pub fn cut(&self) {
        self.shared.cut(&mut self.shared.state());
    }

    /// Ends every connection for its client; its server does not hear of that before the next
    /// [`TcpProxy::cut`].
    pub fn cut_clients(&self) {
        let mut state = self.shared.state();
        state.unnoticed = state.streams.len() / 2;
        for client in state.streams.iter().step_by(2) {
            _ = client.shutdown(Shutdown::Both);
        }
    }

    /// Ends every connection, and every new one at once.
    pub fn refuse(&self) {
        self.set(Mode::Refuse);
        self.cut();
    }

    /// Passes on nothing more, in either direction, without ending a connection.
    pub fn stall(&self) {
        self.set(Mode::Stall);
    }

    /// Passes on what comes before these bytes, where both come at once, and then nothing more in
    /// that direction.
    pub fn stall_at(&self, bytes: &'static [u8]) {
        self.set(Mode::StallAt(bytes));
    }

    /// Ends a connection where these bytes would come.
    pub fn cut_at(&self, bytes: &'static [u8]) {
        self.set(Mode::CutAt(bytes));
    }

    /// Ends the first connection where these bytes would come, and leaves all others alone.
    pub fn cut_once_at(&self, bytes: &'static [u8]) {
        self.set(Mode::CutOnceAt(bytes));
    }

    /// As at the start.
    pub fn flow(&self) {
        self.set(Mode::Flow);
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.shared.state().streams.len() / 2
    }

    fn set(&self, mode: Mode) {
        self.shared.state().mode = mode;
        self.shared.changed.notify_all();
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.set(Mode::Gone);
        self.cut();
        // Wakes the thread that accepts, which then sees that it is to end.
        _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self, state: &mut State) {
        for stream in &state.streams {
            _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for client in listener.incoming() {
            match self.state().mode {
                Mode::Gone => return,
                Mode::Refuse => continue,
                Mode::Flow
                | Mode::Stall
                | Mode::StallAt(_)
                | Mode::CutAt(_)
                | Mode::CutOnceAt(_) => {}
            }
            // What fails here fails for the client, as it would without us.
            _ = client.and_then(|client| self.pass_on(client));
        }
    }

    fn pass_on(self: &Arc<Self>, client: TcpStream) -> io::Result<()> {
        let server = TcpStream::connect(self.target)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let mut state = self.state();
        let number = state.streams.len() / 2;
        state.streams.push(client.try_clone()?);
        state.streams.push(server.try_clone()?);
        drop(state);
        let there = (client.try_clone()?, server.try_clone()?);
        for (from, to) in [there, (server, client)] {
            let shared = Arc::clone(self);
            thread::spawn(move || shared.copy(number, from, to));
        }
        Ok(())
    }

    fn copy(&self, number: usize, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = [0; 1 << 16];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if self.pass(&buffer[..length], &mut to).is_err() {
                break;
            }
        }
        if number >= self.state().unnoticed {
            _ = to.shutdown(Shutdown::Both);
            _ = from.shutdown(Shutdown::Both);
        }
    }

    /// The mode in which these bytes are passed on: a cut that happens once is over with it.
    fn mode_for(&self, bytes: &[u8]) -> Mode {
        let mut state = self.state();
        match state.mode {
            Mode::CutOnceAt(stop) if position(bytes, stop).is_some() => {
                state.mode = Mode::Flow;
                Mode::CutAt(stop)
            }
            mode => mode,
        }
    }

    fn pass(&self, bytes: &[u8], to: &mut TcpStream) -> io::Result<()> {
        let mode = self.mode_for(bytes);
        let at_once = match mode {
            Mode::Stall => 0,
            Mode::StallAt(stop) => position(bytes, stop).unwrap_or(bytes.len()),
            Mode::CutAt(stop) if position(bytes, stop).is_some() => {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            _ => bytes.len(),
        };
        to.write_all(&bytes[..at_once])?;
        let stalled = |state: &mut State| at_once < bytes.len() && state.mode == mode;
        drop(self.changed.wait_while(self.state(), stalled));
        to.write_all(&bytes[at_once..])
    }
}

fn position(bytes: &[u8], of: &[u8]) -> Option<usize> {
    bytes.windows(of.len()).position(|window| window == of)
}
