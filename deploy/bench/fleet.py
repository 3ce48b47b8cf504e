#!/usr/bin/env python3
"""Measures a fleet of workers with RabbitMQ and a bucket, on one machine.

    deploy/test.sh prepare
    cargo build --release --bins
    cargo build --release -p testing --example git-server --example queue-speed
    cargo build --release -p producer --example cache_speed
    python3 deploy/bench/fleet.py COMMAND

  speedup    one worker against forty, on repositories far away; computes what dealing by modulo would take
  overhead   CPU per repository that broker, bucket and processes add to a run in one process
  soak       24,500 jobs, with the memory of every process
  queue      how fast jobs are enqueued and the ledger is replayed
  cache      how fast 24,500 repositories are looked up in a bucket 40 ms away

Each prints its measurements and targets, and exits with 1 if a target was missed.
All run on a RabbitMQ node, an S3 server (SeaweedFS) and a git server of their own, which end with
them. `speedup`, `overhead` and `soak` take others by --broker-url and --store, `queue` another
broker.

examples:
  fleet.py speedup
  fleet.py speedup --workers 10 --repositories 200 --alone 20 --latency-ms 500   two minutes
  fleet.py overhead --rounds 7
  fleet.py soak --jobs 2000
  AWS_ENDPOINT_URL=… AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… \\
      fleet.py soak --broker-url amqp://guest:guest@localhost --store s3://bucket/prefix
"""

import argparse
import contextlib
import heapq
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

RELEASE = Path(__file__).resolve().parent.parent.parent / "target" / "release"
PREPARE = "run deploy/test.sh prepare"
BUILD_EXAMPLES = {
    "git-server": "-p testing --example git-server",
    "queue-speed": "-p testing --example queue-speed",
    "cache_speed": "-p producer --example cache_speed",
}
PUSHED_AT = "2026-01-01T00:00:00Z"


# Servers.


class Guardian:
    """Ends process groups and removes a folder when this script ends, however it ends."""

    SCRIPT = """
        trap '' INT TERM HUP
        while read -r group; do groups="$groups $group"; done
        for group in $groups; do kill -KILL -"$group"; done
        rm -rf "$1"
    """

    def __init__(self, folder):
        command = ["sh", "-c", self.SCRIPT, "guardian", folder]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, start_new_session=True, **quiet
        )

    def watch(self, process):
        self.process.stdin.write(f"{process.pid}\n")
        self.process.stdin.flush()
        return process

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def free_ports(count):
    """Distinct free ports below the kernel's range for outgoing connections."""
    listeners = []
    while len(listeners) < count:
        listener = socket.socket()
        try:
            listener.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            listeners.append(listener)
        except OSError:
            listener.close()
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def wait_until(what, process, log, ready, patience=120):
    """Waits until `ready`; fails with the log of `process` if it ends or takes too long."""
    deadline = time.monotonic() + patience
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{what} does not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


class Rabbit:
    """A node of RabbitMQ from Debian's package, as the tests start one."""

    PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

    def __init__(self):
        if not self.PROGRAM.exists():
            sys.exit(f"there is no {self.PROGRAM}: {PREPARE}, or name a broker with --broker-url")
        folder = Path(tempfile.mkdtemp(prefix="repofleet-rabbitmq-"))
        self.guardian = Guardian(folder)
        (folder / "rabbitmq.conf").write_text(
            "loopback_users.guest = true\nvm_memory_high_watermark.absolute = 1GB\n"
            "disk_free_limit.absolute = 50MB\n"
        )
        (folder / "rabbitmq-env.conf").write_text("")
        (folder / "enabled_plugins").write_text("[].\n")
        port, distribution, epmd = free_ports(3)
        # Schedulers that spin while waiting would distort the measurement.
        erlang = "-kernel inet_dist_use_interface {127,0,0,1} "
        erlang += "+sbwt none +sbwtdcpu none +sbwtdio none"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "RABBITMQ_NODENAME": f"bench{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": erlang,
        }
        log = folder / "out.log"
        with open(log, "w") as output:
            own = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            own |= {"start_new_session": True, "env": environment}
            # Before the node, which would leave one behind.
            names = ["epmd", "-port", str(epmd), "-address", "127.0.0.1"]
            self.guardian.watch(subprocess.Popen(names, **own))
            server = self.guardian.watch(subprocess.Popen([self.PROGRAM], **own))
        wait_until("RabbitMQ", server, log, lambda: self.answers(port))
        self.url = f"amqp://guest:guest@127.0.0.1:{port}"

    @staticmethod
    def answers(port):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as link:
            link.sendall(b"AMQP\x00\x00\x09\x01")
            return link.recv(1) == b"\x01"
        return False

    def stop(self):
        self.guardian.end()


class Bucket:
    """A SeaweedFS from the package that deploy/test.sh installs, with one bucket."""

    PORTS = (
        "s3.port s3.port.grpc s3.port.iceberg s3.port.lance master.port master.port.grpc "
        "volume.port volume.port.grpc filer.port filer.port.grpc admin.port admin.port.grpc"
    ).split()

    def __init__(self):
        weed = self.program()
        folder = Path(tempfile.mkdtemp(prefix="repofleet-seaweedfs-"))
        self.guardian = Guardian(folder)
        self.ports = free_ports(len(self.PORTS))
        keys = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "not-a-secret"}
        (folder / "data").mkdir()
        log = folder / "log"
        command = [weed, "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        command += ["-webdav=false", "-admin.ui=false", f"-dir={folder / 'data'}", "-bucket=bench"]
        command += [f"-{name}={port}" for name, port in zip(self.PORTS, self.ports)]
        with open(log, "w") as output:
            process = subprocess.Popen(
                command,
                env={"PATH": os.environ["PATH"], "HOME": str(folder)} | keys,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.guardian.watch(process)
        self.url = "s3://bench"
        self.environment = keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports[0]}"}
        # It refuses unsigned requests; any answer is enough.
        wait_until("SeaweedFS", process, log, lambda: b"HTTP/" in self.first_bytes())

    def first_bytes(self):
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.ports[0]), 5) as link:
                link.sendall(b"GET /bench HTTP/1.0\r\n\r\n")
                return link.recv(100)
        return b""

    @staticmethod
    def program():
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        installed = cache / "repofleet" / "seaweedfs-4.48" / "weed"
        for weed in (os.environ.get("WEED"), installed, shutil.which("weed")):
            if weed and Path(weed).is_file():
                return weed
        sys.exit(
            f"there is no S3 server, SeaweedFS's program weed: {PREPARE}, name yours in the "
            "variable WEED, or name a bucket with --store"
        )

    def stop(self):
        self.guardian.end()
        # Its sockets, which are always in /tmp.
        for path in Path("/tmp").glob("seaweedfs-*.sock"):
            if any(path.stem.endswith(f"-{port}") for port in self.ports):
                path.unlink(missing_ok=True)


class Repositories:
    """Small bare repositories: some dozens of real ones, under any number of names."""

    REAL = 48

    def __init__(self, folder, count):
        self.root = folder / "served"
        self.names = [f"owner-{i % 97}/repository-{i}" for i in range(count)]
        for i in range(min(self.REAL, count)):
            self.make(folder / "real" / f"{i}.git", random.Random(i))
        for i, name in enumerate(self.names):
            link = self.root / f"{name}.git"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder / "real" / f"{i % self.REAL}.git")

    @staticmethod
    def make(path, dice):
        git = ["git", "--git-dir", path, "-c", "fastimport.unpackLimit=0"]
        subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", path], check=True)
        stream = [b"commit refs/heads/main\ncommitter A <a@example.org> 0 +0000\ndata 0\n"]
        for i in range(dice.randrange(4, 40)):
            words = (f"{dice.randrange(16**6):06x}" for _ in range(dice.randrange(20, 800)))
            text = " ".join(words).replace(" 0", "\n").encode()
            stream.append(b"M 644 inline src/%d.txt\ndata %d\n%s\n" % (i, len(text), text))
        subprocess.run(git + ["fast-import", "--quiet"], input=b"".join(stream), check=True)


class GitServer:
    """Serves them over HTTP."""

    def __init__(self, bench, repositories, latency_ms=0, spread=0.0):
        command = [bench.program("git-server"), "--root", repositories.root]
        command += ["--latency-ms", str(latency_ms), "--latency-spread", str(spread)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        greeting = self.process.stdout.readline()
        if not greeting:
            sys.exit("git-server does not start; see its message above")
        self.url = greeting.split()[-1]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


# The measured programs.


class Bench:
    """Programs, servers, and a temporary folder."""

    def __init__(self, arguments, stack):
        self.binaries, self.stack = arguments.binaries, stack
        for program in ("producer", "worker", "git-server"):
            self.program(program)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-bench-")))
        self.name = f"bench-{random.randrange(16**8):08x}"
        # Without the caller's settings.
        kept = ("PATH", "HOME", "SSL_CERT_FILE")
        self.environment = {key: os.environ[key] for key in kept if key in os.environ}
        (self.folder / "scratch").mkdir()
        self.environment["TMPDIR"] = str(self.folder / "scratch")
        if arguments.store:
            families = ("AWS_", "R2_")
            self.environment |= {k: v for k, v in os.environ.items() if k.startswith(families)}
            self.store = f"{arguments.store.rstrip('/')}/{self.name}"
            print(f"digests stay in {self.store}")
        else:
            bucket = Bucket()
            stack.callback(bucket.stop)
            self.environment |= bucket.environment
            self.store = bucket.url
        if arguments.broker_url:
            self.broker_url = arguments.broker_url
            print(f"queues and exchanges named {self.name}-* stay on the broker")
        else:
            rabbit = Rabbit()
            stack.callback(rabbit.stop)
            self.broker_url = rabbit.url
        self.wait_for_store()

    def program(self, name):
        return program(self.binaries, name)

    def serve(self, repositories, **latency):
        server = GitServer(self, repositories, **latency)
        self.stack.callback(server.stop)
        return server

    def wait_for_store(self):
        """Waits for the bucket, which may appear after its server."""
        feed = self.feed(["a/b"], "https://github.com")
        command = [self.program("producer"), "run", "--dry-run", "--feed", feed]
        command += ["--store", self.store]
        output = self.folder / "store.log"
        for _ in range(20):
            with open(output, "w") as log:
                ended = subprocess.run(command, env=self.environment, stdout=log, stderr=log)
            if ended.returncode == 0:
                return
            time.sleep(0.5)
        sys.exit(f"the store {self.store} cannot be used:\n{output.read_text()[-2000:]}")

    def feed(self, names, url):
        feed = self.folder / f"feed-{random.randrange(16**8):08x}.json"
        entries = []
        for name in names:
            owner, _, repository = name.partition("/")
            entry = {"owner": owner, "name": repository, "url": f"{url}/{name}"}
            entries.append(entry | {"pushedAt": PUSHED_AT})
        feed.write_text(json.dumps(entries))
        return feed

    def start(self, label, program, *arguments):
        log = self.folder / f"{label}.log"
        command = [self.program(program), "run", *map(str, arguments)]
        with open(log, "w") as output:
            process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output
            )
        self.stack.callback(kill, process)
        return Process(label, process, log)

    def produce(self, label, names, url, *arguments):
        return self.start(label, "producer", "--feed", self.feed(names, url), *arguments)


def program(binaries, name):
    example = BUILD_EXAMPLES.get(name)
    path = binaries / ("examples" if example else "") / name
    if not path.is_file():
        build = example or "--bins"
        sys.exit(f"there is no {path}: run cargo build --release {build}, or see --binaries")
    return path


def kill(process):
    """Ends every process of a benchmark, however it ends."""
    if process.returncode is None:
        process.kill()
        process.wait()


class Process:
    """A running producer or worker."""

    def __init__(self, label, process, log):
        self.label, self.process, self.log = label, process, log
        self.cpu = 0.0

    def lines(self):
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    def is_connected(self):
        return '"operation":"worker"' in self.log.read_text()

    def wait(self):
        """Waits for its end; returns the CPU of it and its children."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode != 0:
            tail = self.log.read_text()[-2000:]
            sys.exit(f"{self.label} ended with {self.process.returncode}:\n{tail}")
        self.cpu = usage.ru_utime + usage.ru_stime
        return self.cpu

    def summary(self):
        """The run's summary; fails if the run did not close."""
        *_, last = self.lines()
        numbers = last["context"]["metadata"]
        if last["context"]["operation"] != "orchestrator-completion" or not numbers["closed"]:
            sys.exit(f"the run did not close: {last['message']}")
        return numbers | {"message": last["message"]}

    def digested(self, expected):
        """The same; fails if it did not digest so many."""
        summary = self.summary()
        if summary["processed"] != expected:
            sys.exit(f"not all {expected} were digested: {summary['message']}")
        return summary


class Fleet:
    """Workers of one slot each, with their own queues and their own prefix in the bucket."""

    def __init__(self, bench, label, workers, server, log_level="info"):
        self.bench, self.label, self.server = bench, label, server
        self.common = ["--broker-url", bench.broker_url]
        self.common += ["--queue-prefix", f"{bench.name}-{label}"]
        self.common += ["--store", f"{bench.store}/{label}"]
        authority = server.url.removeprefix("http://")
        options = ["--allow-host", authority, "--allow-http", "--concurrency", 1]
        options += ["--log-level", log_level]
        self.workers = [
            bench.start(f"{label}-worker-{i}", "worker", *self.common, *options)
            for i in range(workers)
        ]
        for worker in self.workers:
            wait_until(worker.label, worker.process, worker.log, worker.is_connected)

    def produce(self, label, names):
        return self.bench.produce(f"{self.label}-{label}", names, self.server.url, *self.common)

    def jobs(self, names):
        """Start and end of each job by name, by the worker's clock."""
        wanted, jobs = set(names), {}
        for worker in self.workers:
            for line in worker.lines():
                about = line["context"]["metadata"]
                if line["context"]["operation"] != "job" or about["repo"] not in wanted:
                    continue
                end = datetime.fromisoformat(line["timestamp"]).timestamp()
                jobs[about["repo"]] = (end - about["millis"] / 1000, end)
        if len(jobs) != len(wanted):
            sys.exit(f"the workers' logs tell of {len(jobs)} of {len(wanted)} jobs")
        return jobs

    def stop(self):
        """Returns the CPU of all workers and their slots."""
        for worker in self.workers:
            worker.process.send_signal(signal.SIGTERM)
        return sum(worker.wait() for worker in self.workers)


# Figures.


def load():
    return "load average " + " ".join(f"{x:.1f}" for x in os.getloadavg())


class Cores:
    """Load of all cores since its creation, by any process."""

    def __init__(self):
        self.before = self.now()

    @staticmethod
    def now():
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    def busy(self):
        (total, idle), (total_then, idle_then) = self.now(), self.before
        return 100 * (1 - (idle - idle_then) / max(1, total - total_then))


class Verdict:
    """A target, and whether it was reached."""

    def __init__(self):
        self.failed = False

    def check(self, what, value, holds, asked):
        self.failed |= not holds
        print(f"{what}: {value} (asked: {asked}){'' if holds else '  NOT REACHED'}")

    def code(self):
        print(load())
        return int(self.failed)


def by_queue(times, workers):
    """When the last worker ends if each takes the next job as soon as it is free."""
    free = [0.0] * workers
    for took in times:
        heapq.heappush(free, heapq.heappop(free) + took)
    return max(free)


def by_modulo(times, workers):
    """When each worker ends if the first takes jobs 1, 41, 81 …, the second 2, 42, 82 …"""
    return [sum(times[i::workers]) for i in range(workers)]


# Commands.


def speedup(arguments, stack):
    workers, count = arguments.workers, arguments.repositories
    if count < workers or count < arguments.alone:
        sys.exit("--repositories must not be less than --workers, nor than --alone")
    bench = Bench(arguments, stack)
    repositories = Repositories(bench.folder, count + 2 * workers)
    names, warming = repositories.names[:count], repositories.names[count:]
    server = bench.serve(
        repositories, latency_ms=arguments.latency_ms, spread=arguments.latency_spread
    )
    print(f"latency {arguments.latency_ms} ms, spread {arguments.latency_spread}; {load()}")

    def measure(label, workers, warming, names):
        # The workers' logs show how long each job took.
        fleet = Fleet(bench, label, workers, server, "info,worker=debug")
        # The first job of a process connects to the store.
        fleet.produce("warm-up", warming).wait()
        cores, producer = Cores(), fleet.produce("run", names)
        producer.wait()
        busy, seconds = cores.busy(), producer.digested(len(names))["elapsed_seconds"]
        fleet.stop()
        jobs = fleet.jobs(names)
        mean = statistics.mean(end - start for start, end in jobs.values())
        print(
            f"{workers} workers: {len(names)} repositories in {seconds:.1f} s, "
            f"{len(names) / seconds:.3f}/s; a job takes {mean:.2f} s; "
            f"{busy:.0f} % of all cores busy; {load()}"
        )
        return seconds, jobs

    step = count / arguments.alone
    sample = [names[int(i * step)] for i in range(arguments.alone)]
    alone, _ = measure("one", 1, warming[:2], sample)
    together, jobs = measure("fleet", workers, warming, names)
    times = {name: end - start for name, (start, end) in jobs.items()}
    # The few jobs of one worker may be shorter or longer than the average.
    all_alone = alone * sum(times.values()) / sum(times[name] for name in sample)
    times = [times[name] for name in names]
    rates = (count / together) / (arguments.alone / alone)
    print(f"repositories a second, compared: {rates:.1f} times as many")
    print(f"one worker would take {all_alone:.0f} s for all: {alone:.1f} s, scaled by their times")
    first = min(start for start, _ in jobs.values())
    last_taken = max(start for start, _ in jobs.values()) - first
    print(
        f"the last job was taken after {last_taken:.1f} s; then {workers} workers waited "
        "for the longest of those in hand"
    )
    quantiles = statistics.quantiles(times, n=100)
    print(
        f"a job's time: median {quantiles[49]:.2f} s, 90 % {quantiles[89]:.2f} s, "
        f"99 % {quantiles[98]:.2f} s, longest {max(times):.1f} s"
    )
    print(f"a queue that costs nothing: {by_queue(times, workers):.1f} s")
    dealt = by_modulo(times, workers)
    print(
        f"dealt by modulo {workers}: {max(dealt):.1f} s, the largest share "
        f"(mean {statistics.mean(dealt):.1f} s, smallest {min(dealt):.1f} s)"
    )
    verdict = Verdict()
    faster, asked = all_alone / together, 0.9 * workers
    verdict.check("speed-up", f"{faster:.1f} of {workers}", faster >= asked, f">= {asked:g}")
    longer = max(dealt) / together
    verdict.check("modulo compared with the queue", f"{longer:.2f}", longer > 1, "> 1")
    return verdict.code()


def overhead(arguments, stack):
    bench = Bench(arguments, stack)
    repositories = Repositories(bench.folder, arguments.repositories)
    names, count = repositories.names, arguments.repositories
    server = bench.serve(repositories)
    authority = server.url.removeprefix("http://")
    milliseconds = 1000 / count
    print(f"{count} repositories, CPU in ms for each; {load()}")

    def embedded(label):
        store = bench.folder / label
        options = ["--store", store, "--concurrency", 2]
        options += ["--allow-host", authority, "--allow-http"]
        producer = bench.produce(label, names, server.url, *options)
        cpu = producer.wait() * milliseconds
        producer.digested(count)
        shutil.rmtree(store)
        return cpu

    def fleet(label):
        fleet = Fleet(bench, label, 2, server)
        producer = fleet.produce("run", names)
        cpu = producer.wait() * milliseconds
        producer.digested(count)
        return cpu, fleet.stop() * milliseconds

    here, there, producers = [], [], []
    for i in range(arguments.rounds):
        # Alternating, each first as often as last.
        for what in ("embedded", "fleet") if i % 2 == 0 else ("fleet", "embedded"):
            if what == "embedded":
                here.append(embedded(f"embedded-{i}"))
            else:
                producer, workers = fleet(f"fleet-{i}")
                producers.append(producer)
                there.append(producer + workers)
        print(
            f"round {i + 1}: embedded {here[-1]:.2f}, fleet {there[-1]:.2f} "
            f"(producer {producers[-1]:.2f}), more by {there[-1] - here[-1]:.2f}; {load()}"
        )
    for what, figure in (("medians", statistics.median), ("least", min)):
        print(f"{what}: embedded {figure(here):.2f}, fleet {figure(there):.2f}")
    verdict = Verdict()
    more = statistics.median(b - a for a, b in zip(here, there))
    verdict.check("median difference, ms a repository", f"{more:.2f}", more < 3, "< 3")
    return verdict.code()


class Memory(threading.Thread):
    """Resident memory of processes, every few seconds."""

    def __init__(self, processes, every):
        super().__init__(daemon=True)
        self.processes, self.every = processes, every
        self.samples, self.stopped = [], threading.Event()
        self.begin = time.monotonic()

    @staticmethod
    def resident(process):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.process.pid}/status").read_text()
            if match := re.search(r"^VmRSS:\s+(\d+) kB", status, re.M):
                return int(match[1]) / 1024
        # It has ended.
        return None

    def run(self):
        while True:
            now = time.monotonic() - self.begin
            self.samples.append((now, [self.resident(process) for process in self.processes]))
            if self.stopped.wait(self.every):
                return

    def report(self, duration, jobs):
        print(f"{'MiB resident at':24}    10 %    50 %   100 %    most   for 1,000 jobs more")
        for i, process in enumerate(self.processes):
            known = [(at, sizes[i]) for at, sizes in self.samples if sizes[i]]
            known = [(at, size) for at, size in known if at <= duration] or known[:1]
            sizes = [
                min(known, key=lambda sample: abs(sample[0] - share * duration))[1]
                for share in (0.1, 0.5, 1.0)
            ]
            sizes.append(max(size for _, size in known))
            settled = [(at, size) for at, size in known if at >= 0.1 * duration]
            slope = 0.0
            if len(settled) > 2:
                slope = statistics.linear_regression(*zip(*settled)).slope
            slope *= 1000 * duration / jobs
            print(f"{process.label:24}{''.join(f'{size:8.1f}' for size in sizes)}   {slope:+.3f}")


def soak(arguments, stack):
    bench = Bench(arguments, stack)
    repositories = Repositories(bench.folder, arguments.jobs)
    server = bench.serve(repositories)
    print(f"{arguments.jobs} jobs, {arguments.workers} workers; {load()}")
    fleet = Fleet(bench, "soak", arguments.workers, server)
    producer = fleet.produce("producer", repositories.names)
    memory = Memory([producer, *fleet.workers], arguments.every)
    memory.start()
    producer.wait()
    memory.stopped.set()
    memory.join()
    fleet.stop()
    ended = producer.summary()
    print(ended["message"])
    seconds = ended["elapsed_seconds"]
    print(f"{seconds:.0f} s, {arguments.jobs / seconds:.1f} jobs a second; {load()}")
    cpu = sum(worker.cpu for worker in fleet.workers)
    print(f"CPU: producer {producer.cpu:.1f} s, workers and their slots {cpu:.1f} s")
    memory.report(seconds, arguments.jobs)
    again = fleet.produce("again", repositories.names)
    again.wait()
    again = again.summary()
    print(f"once more: {again['message']}")
    verdict = Verdict()
    held, failed = again["cached"], ended["failed"]
    verdict.check("digests in the store", held, held == arguments.jobs, arguments.jobs)
    verdict.check("failed", failed, failed == 0, 0)
    return verdict.code()


def example(arguments, name, *options, **environment):
    """Runs an example; prints and returns its output."""
    command = [program(arguments.binaries, name), *map(str, options)]
    environment = os.environ | environment
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    print(ended.stdout, end="")
    if ended.returncode != 0:
        sys.exit(f"{name} ended with {ended.returncode}; why stands above")
    return ended.stdout


def seconds_in(text, pattern):
    match = re.search(pattern, text, re.M)
    if not match:
        sys.exit(f"nothing like {pattern!r} in what was printed")
    return float(match[1])


def queue(arguments, stack):
    program(arguments.binaries, "queue-speed")
    url = arguments.broker_url
    if not url:
        rabbit = Rabbit()
        stack.callback(rabbit.stop)
        url = rabbit.url
    enqueued, replayed = [], []
    for _ in range(arguments.rounds):
        print(load())
        text = example(arguments, "queue-speed", arguments.jobs, REPOFLEET_TEST_AMQP_URL=url)
        enqueued.append(seconds_in(text, r"^enqueued and confirmed: .* in ([\d.]+) s"))
        replayed.append(seconds_in(text, r"^ledger read: .* in ([\d.]+) s"))
    verdict = Verdict()
    for what, times in (("enqueued and confirmed", enqueued), ("ledger replayed", replayed)):
        median = statistics.median(times)
        verdict.check(f"{what}, median", f"{median:.2f} s", median < 5, "< 5 s")
    return verdict.code()


def cache(arguments, stack):
    print(load())
    text = example(arguments, "cache_speed", arguments.latency_ms)
    verdict = Verdict()
    for what, asked in (("index and listing", 5), ("listing, index lost", 8)):
        seconds = seconds_in(text, f"^{what}: median ([\\d.]+) s")
        verdict.check(what, f"{seconds:.2f} s", seconds < asked, f"< {asked} s")
    return verdict.code()


def main():
    binaries = argparse.ArgumentParser(add_help=False)
    binaries.add_argument(
        "--binaries",
        type=Path,
        default=RELEASE,
        metavar="DIR",
        help="folder of the programs (default: target/release of this checkout)",
    )
    broker = argparse.ArgumentParser(add_help=False)
    broker.add_argument(
        "--broker-url", metavar="URL", help="a RabbitMQ that runs, in place of one of its own"
    )
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--store",
        metavar="s3://BUCKET[/PREFIX]",
        help="a bucket in place of one of its own; endpoint and keys in AWS_* or R2_*",
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(function, about, *parents):
        added = commands.add_parser(
            function.__name__, help=about, description=about, parents=[binaries, *parents]
        )
        added.set_defaults(function=function)

        def option(name, default, about, of=positive):
            about = f"{about} (default: {default:,})"
            added.add_argument(name, type=of, default=default, metavar="N", help=about)

        return option

    option = command(speedup, "one worker and many on repositories far away", broker, store)
    option("--workers", 40, "the many")
    option("--repositories", 6400, "how many they do")
    option("--alone", 80, "how many of these the one does, evenly spaced")
    option("--latency-ms", 1000, "mean of how late each answer of the git server is")
    option("--latency-spread", 1.0, "how much that differs, see git-server --help", of=float)
    option = command(overhead, "CPU of the fleet compared with embedded mode", broker, store)
    option("--repositories", 1000, "small ones, without latency")
    option("--rounds", 5, "of both, in turn; the median counts")
    option = command(soak, "many jobs, with the memory of every process", broker, store)
    option("--jobs", 24_500, "small repositories")
    option("--workers", 4, "of one slot each")
    option("--every", 5, "seconds between looks at the memory")
    option = command(queue, "jobs into the queue, the ledger out of it", broker)
    option("--jobs", 24_500, "how many")
    option("--rounds", 3, "the median counts")
    option = command(cache, "24,500 repositories looked up in a bucket far away")
    option("--latency-ms", 40, "of a round trip")
    arguments = parser.parse_args()
    if not getattr(arguments, "store", None):
        arguments.store = None
    elif not arguments.store.startswith("s3://"):
        parser.error("--store is s3://BUCKET[/PREFIX]: it is a bucket that is measured")
    with contextlib.ExitStack() as stack:
        return arguments.function(arguments, stack)


def positive(text):
    number = int(text)
    if number <= 0:
        raise ValueError
    return number


if __name__ == "__main__":
    # Ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
