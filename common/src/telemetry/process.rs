//! What the kernel says of this process and of its scratch disk, read when somebody asks for it.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, Registry};

use super::register;

/// Ticks a second in which the kernel tells CPU time to programs: the same wherever this runs.
const TICKS: f64 = 100.0;
/// Places in `/proc/self/stat`, counted from the field after the program's name.
mod field {
    pub(super) const USER: usize = 11;
    pub(super) const SYSTEM: usize = 12;
    pub(super) const CHILDREN_USER: usize = 13;
    pub(super) const CHILDREN_SYSTEM: usize = 14;
    pub(super) const START: usize = 19;
}

/// Adds, under the names that every program gives them, what is known of this process.
pub(super) fn add_process(registry: &Registry) {
    let gauge = |name: &str, help: &str, look: fn() -> Option<f64>| {
        register(
            registry,
            Gauge::new(name, help).map(|g| Looked::new(g, look)),
        );
    };
    gauge(
        "process_resident_memory_bytes",
        "Memory of this process, slots not included",
        resident_bytes,
    );
    gauge("process_open_fds", "Open file descriptors", open_files);
    // Looked up once: the next time, the kernel may be a second off.
    let name = "process_start_time_seconds";
    let start = Gauge::new(name, "When this process started: Unix time");
    register(registry, start).set(started().unwrap_or(0.0));
    let cpu = Counter::new(
        "process_cpu_seconds_total",
        "CPU time of this process, slots not included",
    );
    let look = || cpu_seconds(field::USER, field::SYSTEM);
    register(registry, cpu.map(|c| Looked::new(c, look)));
}

/// Adds what only workers have: the CPU time of slots, and the scratch disk once it is known.
pub(super) fn add_slots(registry: &Registry, scratch: &Arc<OnceLock<PathBuf>>) {
    let cpu = Counter::new(
        "slots_cpu_seconds_total",
        "CPU time of slots that have ended",
    );
    let look = || cpu_seconds(field::CHILDREN_USER, field::CHILDREN_SYSTEM);
    register(registry, cpu.map(|c| Looked::new(c, look)));
    let disk = |name: &str, help: &str, of: fn(Disk) -> u64| {
        let scratch = Arc::clone(scratch);
        // Exact to a few bytes where a disk has petabytes.
        let look = move || scratch.get().and_then(disk).map(|disk| of(disk) as f64);
        register(
            registry,
            Gauge::new(name, help).map(|g| Looked::new(g, look)),
        );
    };
    disk(
        "scratch_free_bytes",
        "Room that is left on the scratch folder's disk",
        |disk| disk.free,
    );
    disk(
        "scratch_size_bytes",
        "Size of the scratch folder's disk",
        |disk| disk.size,
    );
}

/// A number that is looked up when metrics are asked for. Where it cannot be, it stays.
#[derive(Clone)]
struct Looked<M> {
    metric: M,
    look: Arc<dyn Fn() -> Option<f64> + Send + Sync>,
    /// The last number: two who ask at the same time must not both add what is new.
    last: Arc<Mutex<f64>>,
}

impl<M> Looked<M> {
    fn new(metric: M, look: impl Fn() -> Option<f64> + Send + Sync + 'static) -> Self {
        Self {
            metric,
            look: Arc::new(look),
            last: Arc::default(),
        }
    }
}

impl<M> fmt::Debug for Looked<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Looked")
    }
}

/// A metric that goes from one number to another.
trait Move: Collector {
    fn go(&self, from: f64, to: f64);
}

impl Move for Gauge {
    fn go(&self, _: f64, to: f64) {
        self.set(to);
    }
}

impl Move for Counter {
    fn go(&self, from: f64, to: f64) {
        self.inc_by((to - from).max(0.0));
    }
}

impl<M: Move> Collector for Looked<M> {
    fn desc(&self) -> Vec<&Desc> {
        self.metric.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(now) = (self.look)() {
            self.metric.go(*last, now);
            *last = last.max(now);
        }
        self.metric.collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Disk {
    free: u64,
    size: u64,
}

fn disk(folder: &PathBuf) -> Option<Disk> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    Some(Disk {
        free: disk.f_bavail * disk.f_frsize,
        size: disk.f_blocks * disk.f_frsize,
    })
}

fn resident_bytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024.0)
}

fn open_files() -> Option<f64> {
    // Without the one that this look itself opens.
    Some(fs::read_dir("/proc/self/fd").ok()?.count() as f64 - 1.0)
}

fn stat() -> Option<Vec<f64>> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name is in parentheses, and may hold some of its own.
    let (_, fields) = stat.rsplit_once(") ")?;
    let number = |text: &str| text.parse().unwrap_or(0.0);
    Some(fields.split(' ').map(number).collect())
}

fn cpu_seconds(user: usize, system: usize) -> Option<f64> {
    let stat = stat()?;
    Some((stat.get(user)? + stat.get(system)?) / TICKS)
}

fn started() -> Option<f64> {
    let kernel = fs::read_to_string("/proc/stat").ok()?;
    let line = kernel.lines().find_map(|line| line.strip_prefix("btime "));
    let booted: f64 = line?.trim().parse().ok()?;
    Some(booted + stat()?.get(field::START)? / TICKS)
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;

    #[test]
    fn this_process_is_seen() {
        let now = OffsetDateTime::now_utc().unix_timestamp() as f64;
        let started = started().unwrap();
        assert!((now - 600.0..=now + 2.0).contains(&started), "{started}");
        assert!(resident_bytes().unwrap() > 1e6);
        assert!(open_files().unwrap() >= 3.0);
        assert!(cpu_seconds(field::USER, field::SYSTEM).unwrap() < 600.0);
        let disk = disk(&std::env::temp_dir()).unwrap();
        assert!(disk.size > 0 && disk.free <= disk.size, "{disk:?}");
    }

    #[test]
    fn a_count_that_is_looked_up_never_falls() {
        let number = Arc::new(Mutex::new(0.0));
        let look = {
            let number = Arc::clone(&number);
            move || Some(*number.lock().unwrap())
        };
        let looked = Looked::new(Counter::new("name", "help").unwrap(), look);
        for (now, shown) in [(1.5, 1.5), (1.0, 1.5), (4.0, 4.0), (4.0, 4.0)] {
            *number.lock().unwrap() = now;
            looked.collect();
            assert!((looked.metric.get() - shown).abs() < 1e-9, "{now}");
        }
    }
}
