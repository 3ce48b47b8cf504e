//! A private RabbitMQ node from Debian's `rabbitmq-server`, without root, systemd or Docker.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueuePurgeOptions};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

/// Class and method of what a broker sends, for [`TcpProxy`](crate::tcp_proxy::TcpProxy).
pub mod frames {
    /// `channel.open-ok`.
    pub const OPENED: &[u8] = &[0, 20, 0, 11];
    /// `queue.declare-ok`.
    pub const DECLARED: &[u8] = &[0, 50, 0, 11];
    /// `basic.consume-ok`.
    pub const CONSUMING: &[u8] = &[0, 60, 0, 21];
    /// `basic.deliver`.
    pub const DELIVER: &[u8] = &[0, 60, 0, 60];
    /// `basic.ack` of a published message.
    pub const CONFIRMED: &[u8] = &[0, 60, 0, 80];
    /// What a producer or worker waits for while it starts.
    pub const START: [&[u8]; 5] = [OPENED, DECLARED, CONSUMING, DELIVER, CONFIRMED];
}

/// An AMQP URL in this variable is used instead of a node of our own, where one will do.
pub const URL_VARIABLE: &str = "REPOFLEET_TEST_AMQP_URL";

/// The programs themselves, not their wrappers in `/usr/sbin`, which insist on a user of their own.
const PROGRAMS: &str = "/usr/lib/rabbitmq/bin";
/// Below the ports that the kernel gives to outgoing connections, and away from 35672 to 35699,
/// which RabbitMQ's command-line tools use.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// A node starts in 7 to 13 s on two busy cores.
const STARTING: Duration = Duration::from_secs(120);

/// The URL of a broker that all tests of this process share: keep to names of your own.
///
/// # Panics
/// Where there is no RabbitMQ, with a sentence that says how to get one.
pub fn shared_url() -> String {
    if let Ok(url) = std::env::var(URL_VARIABLE) {
        return url;
    }
    static NODE: OnceLock<Node> = OnceLock::new();
    NODE.get_or_init(Node::start).url()
}

/// A prefix that no other test has.
pub fn fresh_prefix() -> String {
    format!("test-{:016x}", fastrand::u64(..))
}

/// Does something on a connection of its own.
async fn on_channel(
    url: &str,
    work: impl AsyncFnOnce(&Channel) -> lapin::Result<()>,
) -> lapin::Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    // Dropped last: a channel that is still closing would fail the connection's own close.
    let channel = connection.create_channel().await?;
    work(&channel).await?;
    connection.close(200, "done".into()).await
}

/// Publishes a message that may be no job to the jobs queue under `prefix`, as a stranger would.
///
/// # Panics
/// Where that does not succeed.
pub async fn publish_raw(url: &str, prefix: &str, id: &str, body: &[u8]) {
    let publish = on_channel(url, async |channel| {
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let properties = BasicProperties::default().with_message_id(id.into());
        channel
            .basic_publish(
                prefix.into(),
                "job".into(),
                BasicPublishOptions::default(),
                body,
                properties,
            )
            .await?
            .await
            .map(drop)
    });
    publish.await.expect("a message is published");
}

/// Purges a queue, as an operator would by hand.
///
/// # Panics
/// If that does not succeed.
pub async fn purge(url: &str, queue: &str) {
    let purge = on_channel(url, async |channel| {
        let options = QueuePurgeOptions::default();
        channel.queue_purge(queue.into(), options).await.map(drop)
    });
    purge.await.expect("a queue is purged");
}

/// Sends messages to an exchange, as one does who only has the right to.
///
/// # Panics
/// If that does not succeed.
pub async fn send(url: &str, exchange: &str, bodies: impl IntoIterator<Item = Vec<u8>>) {
    let send = on_channel(url, async |channel| {
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let mut confirms = Vec::new();
        for body in bodies {
            let options = BasicPublishOptions::default();
            let plain = BasicProperties::default();
            let sending = channel.basic_publish(exchange.into(), "".into(), options, &body, plain);
            confirms.push(sending.await?);
        }
        for confirm in confirms {
            confirm.await?;
        }
        Ok(())
    });
    send.await.expect("messages are sent");
}

/// A node, with what belongs to it. Ended, and its folder removed, when it is dropped or when this
/// process ends, in whatever way.
#[derive(Debug)]
pub struct Node {
    folder: TempDir,
    port: u16,
    distribution_port: u16,
    epmd_port: u16,
    epmd: Child,
    server: Child,
    /// Ends all of it when the pipe to it closes: a `static` is never dropped.
    guardian: Child,
}

impl Node {
    /// Starts one and waits until it takes connections.
    ///
    /// # Panics
    /// Where there is no RabbitMQ, or it does not start.
    pub fn start() -> Self {
        assert!(
            Path::new(PROGRAMS).join("rabbitmq-server").exists(),
            "this test needs RabbitMQ: run `deploy/test.sh prepare`, or `apt-get install --no-install-recommends rabbitmq-server`, or name a broker in {URL_VARIABLE}"
        );
        let folder = tempfile::Builder::new()
            .prefix("repofleet-rabbitmq-")
            .tempdir()
            .expect("a temporary folder");
        let configuration = "loopback_users.guest = true\n\
             vm_memory_high_watermark.absolute = 1GB\n\
             disk_free_limit.absolute = 50MB\n\
             raft.wal_max_size_bytes = 64000000\n";
        write(folder.path(), "rabbitmq.conf", configuration);
        write(folder.path(), "rabbitmq-env.conf", "");
        write(folder.path(), "enabled_plugins", "[].\n");
        let [port, distribution_port, epmd_port] = free_ports();
        // In the foreground and before the node, which would leave one behind that nobody knows.
        let epmd = Command::new("epmd")
            .args(["-port", &epmd_port.to_string(), "-address", "127.0.0.1"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("epmd, which comes with Erlang, starts");
        write(folder.path(), "epmd.group", &epmd.id().to_string());
        let guardian = guardian(folder.path());
        let server = spawn(folder.path(), port, distribution_port, epmd_port);
        let node = Self {
            folder,
            port,
            distribution_port,
            epmd_port,
            epmd,
            server,
            guardian,
        };
        node.wait();
        node
    }

    /// `amqp://guest:guest@127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}", self.port)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Ends it by SIGKILL, as a machine would that loses its power but keeps its disk.
    pub fn kill(&mut self) {
        end(&mut self.server);
    }

    /// Ends it in good order.
    ///
    /// # Panics
    /// Where it does not end.
    pub fn shut_down(&mut self) {
        self.control(&["shutdown"]);
        self.server.wait().expect("the node has ended");
    }

    /// Starts it again after one of these, with what is on its disk.
    pub fn start_again(&mut self) {
        self.server = spawn(
            self.folder.path(),
            self.port,
            self.distribution_port,
            self.epmd_port,
        );
        self.wait();
    }

    /// Runs `rabbitmqctl`, which takes most of a second, and gives what it prints.
    ///
    /// # Panics
    /// Where it fails.
    pub fn control(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(Path::new(PROGRAMS).join("rabbitmqctl"));
        environment(
            &mut command,
            self.folder.path(),
            self.port,
            self.distribution_port,
            self.epmd_port,
        );
        let Output {
            status,
            stdout,
            stderr,
        } = command
            .arg("-q")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("rabbitmqctl starts");
        assert!(
            status.success(),
            "rabbitmqctl {arguments:?}: {status}: {}{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        );
        String::from_utf8_lossy(&stdout).into_owned()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        let logs = fs::read_dir(self.folder.path().join("log"))
            .into_iter()
            .flatten();
        let logs = logs.flatten().map(|log| fs::read_to_string(log.path()));
        logs.flatten().collect()
    }

    fn wait(&self) {
        let start = Instant::now();
        while !answers(self.port) {
            assert!(
                start.elapsed() < STARTING,
                "RabbitMQ does not start:\n{}",
                fs::read_to_string(self.folder.path().join("out.log")).unwrap_or_default()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        end(&mut self.server);
        end(&mut self.epmd);
        // Its pipe first, or it would wait for us while we wait for it.
        drop(self.guardian.stdin.take());
        _ = self.guardian.wait();
    }
}

fn write(folder: &Path, name: &str, content: &str) {
    fs::write(folder.join(name), content).expect("the node's folder can be written");
}

fn environment(command: &mut Command, folder: &Path, port: u16, distribution: u16, epmd: u16) {
    let loopback = "-kernel inet_dist_use_interface {127,0,0,1}";
    command
        // Erlang's cookie is written there.
        .env("HOME", folder)
        .env("RABBITMQ_NODENAME", format!("test{port}@localhost"))
        .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
        .env("RABBITMQ_NODE_PORT", port.to_string())
        .env("RABBITMQ_DIST_PORT", distribution.to_string())
        .env("ERL_EPMD_ADDRESS", "127.0.0.1")
        .env("ERL_EPMD_PORT", epmd.to_string())
        .env("RABBITMQ_MNESIA_BASE", folder.join("mnesia"))
        .env("RABBITMQ_LOG_BASE", folder.join("log"))
        .env("RABBITMQ_CONFIG_FILE", folder.join("rabbitmq"))
        .env("RABBITMQ_CONF_ENV_FILE", folder.join("rabbitmq-env.conf"))
        .env(
            "RABBITMQ_ENABLED_PLUGINS_FILE",
            folder.join("enabled_plugins"),
        )
        .env("RABBITMQ_PID_FILE", folder.join("pid"))
        // Schedulers that spin while they wait would take the cores from the tests.
        .env(
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            format!("{loopback} +sbwt none +sbwtdcpu none +sbwtdio none"),
        )
        .env("RABBITMQ_CTL_ERL_ARGS", format!("{loopback} +sbwt none"));
}

fn spawn(folder: &Path, port: u16, distribution: u16, epmd: u16) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.join("out.log"))
        .expect("the node's folder can be written");
    let mut command = Command::new(Path::new(PROGRAMS).join("rabbitmq-server"));
    environment(&mut command, folder, port, distribution, epmd);
    let server = command
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle"))
        .stderr(log)
        // The script, the virtual machine and its helpers are ended together.
        .process_group(0)
        .spawn()
        .expect("rabbitmq-server starts");
    write(folder, "server.group", &server.id().to_string());
    server
}

/// A shell that waits for the end of this process, however it comes, and then ends the node.
fn guardian(folder: &Path) -> Child {
    let script = r#"
        trap '' INT TERM HUP
        cat >/dev/null
        for group in "$1"/server.group "$1"/epmd.group; do
            kill -KILL -"$(cat "$group")"
        done
        rm -rf "$1"
    "#;
    Command::new("sh")
        .args(["-c", script, "guardian"])
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("sh starts")
}

fn end(child: &mut Child) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(group) = group {
        // It may have ended already.
        _ = kill_process_group(group, Signal::KILL);
    }
    _ = child.wait();
}

fn free_ports<const N: usize>() -> [u16; N] {
    // Held until all are found, so that they differ.
    let listeners = [(); N].map(|()| {
        loop {
            let port = fastrand::u16(PORTS);
            if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
                break (port, listener);
            }
        }
    });
    listeners.map(|(port, _)| port)
}

/// Whether a broker answers AMQP's greeting.
fn answers(port: u16) -> bool {
    let greet = || -> io::Result<bool> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"AMQP\x00\x00\x09\x01")?;
        let mut first = [0];
        stream.read_exact(&mut first)?;
        // A method frame: connection.start.
        Ok(first == [1])
    };
    greet().unwrap_or(false)
}
