#!/usr/bin/env python3
"""Compares ways to fetch, digest and store: requests, bytes, CPU, memory and time, in one run.

    cargo build --release --locked --workspace --bins --example git-server
    deploy/bench/speed.py CORPUS

CORPUS holds bare repositories CORPUS/OWNER/NAME.git, best of one commit each. They are served over
HTTP from this machine, and every way fetches from there; only the clients are measured: user and
system time of a process and all its children, the largest of them, and all bytes on the network.

  git          git clone --depth 1 --bare, then git cat-file --batch-all-objects --batch, for each
  git2, v2     producer run --fetch git2 and v2, from a server that filters, in one process with slots:
               text cut at 512 KiB, files up to 512 KiB, stored and synced
  object-info  producer run, from a server that tells sizes too
  unmoved      the same repositories with a later push and the same HEAD
  cached       the same again: what the run itself takes
  no limit     worker digest --no-limit --gitingest-limits, one process a repository
  gitingest    gitingest 0.3.1, all repositories in one process: its start-up counts once

CPU and memory are of the best of ROUNDS rounds; the times are of a last one in which the network
takes LATENCY ms for a round trip. gitingest has one round. Exit code 1 if a goal is missed.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "parity"))
import servers  # noqa: E402

OBJECT_INFO = "--config=transfer.advertiseObjectInfo=true"
PUSHES = {"unmoved": "2026-01-02T00:00:00Z", "cached": "2026-01-02T00:00:00Z"}
PUSHED_AT = "2026-01-01T00:00:00Z"
# The most that each may take of what `git` takes, in CPU and bytes, and the largest process in MB.
GOALS = {"v2": (0.26, 0.60, 100), "object-info": (0.13, 0.06, 30)}
# The most that a repository may take, in requests, bytes and milliseconds of CPU.
UNMOVED = (2, 3000, 6)


@dataclasses.dataclass
class Figures:
    requests: int = 0
    bytes: int = 0
    cpu: float = 0.0
    memory: int = 0
    seconds: float = 0.0


class Bench:
    def __init__(self, arguments, scratch):
        self.arguments, self.scratch = arguments, scratch
        # gitingest asks for them in lower case.
        self.root = scratch / "served"
        self.names = servers.serve_together([arguments.corpus], self.root, str.lower)
        self.certificate = servers.Certificate(scratch) if arguments.tls else None
        # What this machine's environment names would be read too.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SSL_CERT_", "GIT_"))}
        self.environment = {**kept, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        if self.certificate:
            self.environment["SSL_CERT_FILE"] = self.environment["GIT_SSL_CAINFO"] = str(self.certificate.file)

    def one(self, way, latency=0.0):
        """Goes one way, and returns its figures."""
        measure, options = WAYS[way]
        with servers.GitServer(self.root, self.arguments.release, *options) as server:
            network = servers.Network(server.authority, latency, self.certificate)
            cpu, memory, seconds = measure(self, network, way)
            asked = server.stop().values()
        requests = sum(of["info_refs"] + of["upload_packs"] for of in asked)
        return Figures(requests, network.take(), cpu, memory, seconds)

    def run(self, network, way):
        """producer run, with the digests of the way before, if it needs them."""
        feed, store, log = (self.scratch / name for name in ("feed.json", "digests", "log"))
        entries = []
        for name in self.names:
            owner, _, repository = name.partition("/")
            entry = {"owner": owner, "name": repository, "pushedAt": PUSHES.get(way, PUSHED_AT)}
            # A digest is of an address, and the network has another port each time.
            entries.append({**entry, "url": f"{network.url}/{name}"})
        feed.write_text(json.dumps(entries))
        if way in PUSHES:
            self.move(store, network.url)
        else:
            shutil.rmtree(store, ignore_errors=True)
        command = [self.arguments.release / "producer", "run", "--feed", feed, "--store", store]
        command += ["--allow-host", network.authority, "--allow-http"]
        command += ["--concurrency", self.arguments.concurrency]
        command += ["--fetch", way] if way in ("git2", "v2") else []
        with open(log, "w") as file:
            figures = servers.measured(command, stdout=file, env=self.environment)
        counts = json.loads(log.read_text().splitlines()[-1])["context"]["metadata"]
        if counts["cached" if way == "cached" else "processed"] != len(self.names):
            sys.exit(f"{way}: not all repositories were processed: {counts}")
        return figures

    def move(self, store, url):
        """Makes the stored digests those of repositories at `url`."""
        for record in store.glob("gitingest/*/*/summary.meta.json"):
            record.write_text(re.sub(r"https?://127\.0\.0\.1:\d+", url, record.read_text()))

    def each(self, one):
        """Adds up the figures of `one` for each repository; the largest process is that of all."""
        cpu, memory, seconds = zip(*map(one, self.names))
        return sum(cpu), max(memory), sum(seconds)

    def no_limit(self, network, _way):
        def one(name):
            command = [self.arguments.release / "worker", "digest", f"{network.url}/{name}"]
            command += ["--no-limit", "--gitingest-limits", "-o", self.scratch / "digest.txt"]
            command += ["--allow-host", network.authority, "--allow-http"]
            return servers.measured(command, env=self.environment)

        return self.each(one)

    def git(self, network, _way):
        clone = self.scratch / "clone"

        def one(name):
            shutil.rmtree(clone, ignore_errors=True)
            command = ["git", "clone", "--quiet", "--depth", "1", "--bare", f"{network.url}/{name}", clone]
            cloned = servers.measured(command, env=self.environment)
            command = ["git", "-C", clone, "cat-file", "--batch-all-objects", "--batch"]
            read = servers.measured([*command], env=self.environment, stdout=servers.NOWHERE)
            return cloned[0] + read[0], max(cloned[1], read[1]), cloned[2] + read[2]

        return self.each(one)

    def gitingest(self, network, _way):
        command = [self.arguments.gitingest_python, __file__, self.arguments.corpus]
        command += ["--as-gitingest", network.url, "--token-table", self.arguments.token_table]
        return servers.measured(command, env=self.environment)

    def print(self, table):
        print(f"{len(self.names)} repositories, {'https' if self.certificate else 'http'}")
        latency = f"at {self.arguments.latency} ms"
        print(f"{'':12} {'requests':>9} {'MB':>8} {'CPU s':>8} {'largest MB':>10} {'s':>7} {latency:>9} {'CPU':>6} {'bytes':>6}")
        base = table["git"][0]
        for way, (figures, late) in table.items():
            print(
                f"{way:12} {figures.requests:9} {figures.bytes / 1e6:8.2f} {figures.cpu:8.2f} {figures.memory / 1e6:10.0f}"
                f" {figures.seconds:7.1f} {late.seconds if late else 0:9.1f}"
                f" {figures.cpu / base.cpu:6.3f} {figures.bytes / base.bytes:6.3f}"
            )

    def misses(self, table):
        """Prints what each goal came to, and returns whether one was missed."""
        missed = False
        base = table["git"][0]
        lines = []
        for way, goals in GOALS.items():
            figures = table[way][0]
            found = figures.cpu / base.cpu, figures.bytes / base.bytes, figures.memory / 1e6
            lines += zip([f"{way}, CPU", f"{way}, bytes", f"{way}, MB of the largest process"], found, goals)
        count, (unmoved, _), (cached, _) = len(self.names), table["unmoved"], table["cached"]
        # The run itself is paid once, however many repositories there are.
        found = unmoved.requests / count, unmoved.bytes / count, (unmoved.cpu - cached.cpu) * 1000 / count
        lines += zip(["unmoved, requests", "unmoved, bytes", "unmoved, ms of CPU"], found, UNMOVED)
        for what, found, goal in lines:
            missed |= found > goal
            print(f"{what:34} {found:9.3f} {'over' if found > goal else 'within'} {goal}")
        return missed


WAYS = {
    "git": (Bench.git, []),
    "git2": (Bench.run, []),
    "v2": (Bench.run, []),
    "object-info": (Bench.run, [OBJECT_INFO]),
    "unmoved": (Bench.run, []),
    "cached": (Bench.run, []),
    "no limit": (Bench.no_limit, []),
}


def be_gitingest(arguments):
    import reference

    ingest = reference.Gitingest(arguments.corpus, arguments.token_table)
    config = Path(ingest.links.name, "http")
    config.write_text(f'[url "{arguments.as_gitingest}/"]\n\tinsteadOf = https://github.com/\n')
    os.environ["GIT_CONFIG_GLOBAL"] = str(config)
    for repository in sorted(arguments.corpus.resolve().glob("*/*.git")):
        owner, name = repository.parent.name, repository.name.removesuffix(".git")
        ingest.ingest(owner, name, 10 << 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--release", type=Path, default=servers.RELEASE, help="folder of the binaries")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--latency", type=int, default=40, help="of the network in the last round, in ms; 0: no such round")
    parser.add_argument("--tls", action="store_true", help="over https")
    parser.add_argument("--gitingest-python", type=Path, help="a Python that has gitingest 0.3.1")
    parser.add_argument("--token-table", type=Path, help="see deploy/parity/reference.py")
    parser.add_argument("--as-gitingest", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_gitingest:
        return be_gitingest(arguments)
    if arguments.gitingest_python:
        WAYS["gitingest"] = Bench.gitingest, []

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, Path(scratch))
        table = {}
        for _ in range(arguments.rounds):
            for way in WAYS:
                if way == "gitingest" and way in table:
                    continue
                found = bench.one(way)
                best, _ = table.setdefault(way, (found, None))
                best.cpu, best.seconds = min(best.cpu, found.cpu), min(best.seconds, found.seconds)
                best.memory = max(best.memory, found.memory)
        for way in WAYS if arguments.latency else []:
            if way != "gitingest":
                table[way] = table[way][0], bench.one(way, arguments.latency / 1000)
        bench.print(table)
        return bench.misses(table)


if __name__ == "__main__":
    sys.exit(main())
