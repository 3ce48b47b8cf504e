//! A real S3 server for tests: SeaweedFS's `weed`, in a process and a folder of its own.

use std::env;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use super::s3_server::{ACCESS_KEY, BUCKET, SECRET_KEY, config};
use common::store::DigestStore;
use common::store::s3::S3Store;
use common::store::s3::config::S3Config;

/// The version that `deploy/test.sh` installs.
const VERSION: &str = "4.48";
/// It takes a second.
const PATIENCE: Duration = Duration::from_secs(60);
/// What listens in there, each on a port of its own.
const PORTS: [&str; 12] = [
    "s3.port",
    "s3.port.grpc",
    "s3.port.iceberg",
    "s3.port.lance",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
];

/// A SeaweedFS on 127.0.0.1 with the bucket [`BUCKET`], ended when this is dropped.
#[derive(Debug)]
pub struct SeaweedFs {
    process: Child,
    ports: Vec<u16>,
    folder: TempDir,
}

impl SeaweedFs {
    /// Starts one, and waits until its bucket takes objects.
    ///
    /// Call it from a thread that lives as long as the server: that is whose end ends it, however
    /// that comes about.
    ///
    /// # Panics
    /// Where there is no `weed`, with a sentence that says how to get one; when it does not start.
    pub async fn start() -> Self {
        Self::start_with_roles(&[]).await
    }

    /// Starts one in which each of `roles`, a name and a policy as Amazon has them, has the keys
    /// [`role_keys`] as well.
    ///
    /// # Panics
    /// As [`SeaweedFs::start`].
    pub async fn start_with_roles(roles: &[(&str, String)]) -> Self {
        let weed = weed();
        let mut why = String::new();
        // Somebody else may take a port between our look and its start.
        for _ in 0..3 {
            match Self::try_start(&weed, roles).await {
                Ok(server) => return server,
                Err(log) => why = log,
            }
        }
        panic!("{} does not start: {why}", weed.display());
    }

    /// # Errors
    /// With what it wrote before it ended.
    async fn try_start(weed: &Path, roles: &[(&str, String)]) -> Result<Self, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let identities = folder.path().join("identities.json");
        fs::write(&identities, identities_of(roles)).expect("a file");
        let ports = free_ports(PORTS.len()).expect("free ports");
        let log = File::create(folder.path().join("log")).expect("a log");
        let data = folder.path().join("data");
        fs::create_dir(&data).expect("a folder");
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(weed)
            .args(["mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"])
            // It would tell its makers.
            .args([
                "-master.telemetry=false",
                "-webdav=false",
                "-admin.ui=false",
            ])
            .arg(format!("-dir={}", data.display()))
            .arg(format!("-bucket={BUCKET}"))
            .arg(format!("-s3.config={}", identities.display()))
            .args(
                PORTS
                    .iter()
                    .zip(&ports)
                    .map(|(name, port)| format!("-{name}={port}")),
            )
            .env("HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {} by setpriv: {error}", weed.display()));
        let mut server = Self {
            process,
            ports,
            folder,
        };
        let (store, started) = (S3Store::new(&server.config()), Instant::now());
        loop {
            let Err(fault) = store.probe().await else {
                return Ok(server);
            };
            let ended = server.process.try_wait().expect("a child's state");
            if ended.is_some() || started.elapsed() > PATIENCE {
                let log = fs::read_to_string(server.folder.path().join("log"));
                return Err(format!("{fault}\n{}", log.unwrap_or_default()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the store needs to know of it.
    pub fn config(&self) -> S3Config {
        config(&format!("http://127.0.0.1:{}", self.ports[0]), BUCKET)
    }
}

/// The access key and the secret key of a role.
pub fn role_keys(role: &str) -> [String; 2] {
    [format!("{role}-access-key"), format!("{role}-secret-key")]
}

/// Its configuration: one who may do everything, and the roles.
fn identities_of(roles: &[(&str, String)]) -> String {
    let credentials =
        |access: &str, secret: &str| json!([{"accessKey": access, "secretKey": secret}]);
    let all = json!({"name": "all", "credentials": credentials(ACCESS_KEY, SECRET_KEY), "actions": ["Admin"]});
    let identities = roles.iter().map(|(role, _)| {
        let [access, secret] = role_keys(role);
        json!({"name": role, "credentials": credentials(&access, &secret), "policyNames": [role]})
    });
    let identities: Vec<_> = [all].into_iter().chain(identities).collect();
    let policies = roles.iter();
    let policies = policies.map(|(role, policy)| json!({"name": role, "content": policy}));
    let policies: Vec<_> = policies.collect();
    json!({"identities": identities, "policies": policies}).to_string()
}

impl Drop for SeaweedFs {
    fn drop(&mut self) {
        // Asked nicely it takes a quarter of a minute.
        self.process.kill().ok();
        self.process.wait().ok();
        // Its sockets, which it has in /tmp whatever it is told.
        for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let port = name
                .strip_prefix("seaweedfs-")
                .and_then(|rest| rest.strip_suffix(".sock"))
                .and_then(|rest| rest.rsplit('-').next()?.parse().ok());
            if port.is_some_and(|port| self.ports.contains(&port)) {
                fs::remove_file(entry.path()).ok();
            }
        }
    }
}

fn free_ports(count: usize) -> io::Result<Vec<u16>> {
    // All at once, so that they differ.
    let listeners: Vec<_> = (0..count)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<Result<_, _>>()?;
    let port = |listener: &TcpListener| Ok(listener.local_addr()?.port());
    listeners.iter().map(port).collect()
}

/// The program: from `WEED`, from where `deploy/test.sh` puts it, or from the path.
fn weed() -> PathBuf {
    if let Some(weed) = env::var_os("WEED") {
        return weed.into();
    }
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    let installed = cache.map(|cache| cache.join(format!("repofleet/seaweedfs-{VERSION}/weed")));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("weed"));
    installed
        .into_iter()
        .chain(on_path)
        .find(|weed| weed.is_file())
        .expect(
            "this test needs an S3 server, SeaweedFS's program `weed`: run `deploy/test.sh prepare`, \
             which installs it below ~/.cache, or name yours in the variable WEED",
        )
}
