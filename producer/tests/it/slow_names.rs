//! Name lookups that take their time, in a process that may not have hundreds of threads.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use common::exit;
use common::store::{DigestStore, Expected};
use testing::s3_server::{ACCESS_KEY, S3Server, SECRET_KEY};
use testing::store_contract::digest;

use crate::fleet::{Fleet, PUSHED, Running};

/// As many as the cache check looks at together, and some.
const REPOS: usize = 300;
/// What a container has room for: the processes that `compose.yaml` allows.
const THREADS: u64 = 128;

/// Makes a library that has the name `slow.example` lead here, after `seconds`.
fn slow_resolver(fleet: &Fleet, seconds: &str) -> PathBuf {
    let source = r#"
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <netdb.h>
        #include <string.h>
        #include <unistd.h>
        typedef int (*Lookup)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
        int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                        struct addrinfo **found) {
            Lookup lookup = (Lookup)dlsym(RTLD_NEXT, "getaddrinfo");
            if (name && strcmp(name, "slow.example") == 0) {
                usleep(SECONDS * 1000000);
                name = "127.0.0.1";
            }
            return lookup(name, service, hints, found);
        }"#;
    let (file, library) = (fleet.path().join("slow.c"), fleet.path().join("slow.so"));
    fs::write(&file, source).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", &format!("-DSECONDS={seconds}"), "-o"])
        .args([&library, &file])
        .arg("-ldl")
        .status();
    assert!(
        compiled
            .expect("a C compiler, which Rust needs as well")
            .success()
    );
    library
}

#[test]
fn lookups_are_as_wide_as_a_container_allows() {
    let fleet = Fleet::new();
    let names: Vec<_> = (0..REPOS).map(|n| format!("owner/name-{n}")).collect();
    let entries: Vec<_> = names.iter().map(|name| fleet.entry(name, PUSHED)).collect();
    fleet.write_feed(&entries);
    let server = S3Server::start();
    let store = server.store();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (name, entry) in names.iter().zip(&entries) {
        let mut digest = digest("text", PUSHED);
        entry["url"]
            .as_str()
            .unwrap()
            .clone_into(&mut digest.meta.url);
        let put = async {
            store
                .put(&name.parse().unwrap(), &digest, &Expected::Absent)
                .await
        };
        assert!(runtime.block_on(put).unwrap().is_stored());
    }
    server.forget_calls();

    let mut command = fleet.producer(&["--store", "s3://digests", "--check", "head"]);
    let endpoint = server.url().replace("127.0.0.1", "slow.example");
    command
        .env("AWS_ENDPOINT_URL", endpoint)
        .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        .env("LD_PRELOAD", slow_resolver(&fleet, "2"));
    let run = Running::start(&mut command);
    let process = format!("/proc/{}/status", run.pid().as_raw_nonzero());
    let mut most = 0;
    while let Ok(status) = fs::read_to_string(&process)
        && !status.contains("State:\tZ")
    {
        let threads = status
            .lines()
            .find_map(|line| line.strip_prefix("Threads:"));
        most = most.max(threads.unwrap().trim().parse().unwrap());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let ended = run.wait().with(exit::OK);
    let counts = "Pipeline complete: 300 total, 300 cached (100.0%), 0 processed, 0 failed";
    assert!(ended.sentence().starts_with(counts), "{}", ended.sentence());
    assert!(most < THREADS, "{most} threads");
    assert!(!ended.stderr.contains("panic"), "{}", ended.stderr);
}
