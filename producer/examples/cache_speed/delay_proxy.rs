//! A way to a server that takes time: what a network does to many small requests.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::future::join;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Chunks that are on their way at most.
const CHUNKS: usize = 256;

/// A proxy on a port of its own on 127.0.0.1, as long as the task that runs it.
///
/// Whatever goes through it arrives half a round trip later, in order, at any rate. Opening a
/// connection costs a round trip as well.
#[derive(Debug)]
pub(crate) struct DelayProxy {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    listener: TcpListener,
}

impl DelayProxy {
    /// Listens; nothing is passed on before [`DelayProxy::run`].
    ///
    /// # Errors
    /// When no port can be had.
    pub(crate) async fn bind() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        Ok(Self { address, listener })
    }

    /// Passes connections on to `server` until dropped.
    pub(crate) async fn run(self, server: SocketAddr, round_trip: Duration) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((client, _)) => {
                        connections.spawn(pass(client, server, round_trip));
                    }
                    // Out of file descriptors, most likely: others will be closed.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

async fn pass(client: TcpStream, server: SocketAddr, round_trip: Duration) {
    tokio::time::sleep(round_trip).await;
    let Ok(server) = TcpStream::connect(server).await else {
        return;
    };
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    join(
        delay(from_client, to_server, round_trip / 2),
        delay(from_server, to_client, round_trip / 2),
    )
    .await;
}

/// Ends when either side does; the other direction then ends by itself.
async fn delay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: Duration) {
    let (chunks, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS);
    let read = async move {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let chunk = buffer[..count].to_vec();
            if chunks.send((Instant::now() + delay, chunk)).await.is_err() {
                break;
            }
        }
    };
    let write = async move {
        while let Some((at, chunk)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&chunk).await.is_err() {
                break;
            }
        }
        to.shutdown().await.ok();
    };
    join(read, write).await;
}
