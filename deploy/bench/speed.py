#!/usr/bin/env python3
"""Compares CPU and memory of fetch + digest + store with other ways to do it, in one run.

    cargo build --release --bins && cargo build --release -p testing --example git-server
    python3 deploy/bench/speed.py CORPUS --gitingest-python VENV/bin/python --token-table FILE

CORPUS holds bare repositories CORPUS/{owner}/{name}.git, best of one commit each. They are served
over HTTP from this machine, and every way fetches from there; only the clients are measured: user
and system time of the process and of all its children.

  ours, default   producer run: text cut at 512 KiB, files up to 512 KiB, stored and synced
  ours, no limit  worker digest --no-limit --gitingest-limits, one process a repository
  git             git clone --depth 1 --bare, then git cat-file --batch-all-objects --batch
  gitingest       gitingest 0.3.1, all repositories in one process: its start-up counts once

The least of ROUNDS rounds counts for each way; gitingest has one round.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "parity"))
RELEASE = Path(__file__).resolve().parent.parent.parent / "target" / "release"


def measured(command, **keywords):
    """Seconds of CPU of a command, and peak bytes of its largest process."""
    process = subprocess.Popen(command, **keywords)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


class Server:
    """Serves the corpus over HTTP, in lower case, as gitingest requests it."""

    def __init__(self, corpus, binary, scratch):
        root = scratch / "served"
        self.names = []
        for repository in sorted(corpus.resolve().glob("*/*.git")):
            name = f"{repository.parent.name}/{repository.name.removesuffix('.git')}".lower()
            link = root / f"{name}.git"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(repository)
            self.names.append(name)
        if not self.names:
            sys.exit(f"no repositories {corpus}/OWNER/NAME.git")
        command = [binary, "--root", root, "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]
        self.authority = self.url.removeprefix("http://")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def ours_default(server, arguments, scratch):
    feed = scratch / "feed.json"
    entries = []
    for name in server.names:
        owner, _, repository = name.partition("/")
        url = f"{server.url}/{name}"
        entry = {"owner": owner, "name": repository, "url": url, "pushedAt": "2026-01-01T00:00:00Z"}
        entries.append(entry)
    feed.write_text(json.dumps(entries))
    store = scratch / "digests"
    shutil.rmtree(store, ignore_errors=True)
    command = [arguments.release / "producer", "run", "--feed", feed, "--store", store]
    command += ["--allow-host", server.authority, "--allow-http", "--concurrency", "2"]
    with open(scratch / "log", "w") as log:
        result = measured(command, stdout=log)
    last = json.loads((scratch / "log").read_text().splitlines()[-1])
    if last["context"]["metadata"]["processed"] != len(server.names):
        sys.exit(f"not all repositories were processed: {last['message']}")
    return result


def over_repositories(server, one):
    """Adds up the CPU of `one` for each repository; the peak is the largest."""
    results = [one(name) for name in server.names]
    return sum(cpu for cpu, _ in results), max(peak for _, peak in results)


def ours_no_limit(server, arguments, scratch):
    def one(name):
        command = [arguments.release / "worker", "digest", f"{server.url}/{name}"]
        command += ["--no-limit", "--gitingest-limits", "-o", scratch / "digest.txt"]
        command += ["--allow-host", server.authority, "--allow-http"]
        return measured(command)

    return over_repositories(server, one)


def git(server, _arguments, scratch):
    def one(name):
        clone = scratch / "clone"
        shutil.rmtree(clone, ignore_errors=True)
        url = f"{server.url}/{name}"
        cloned = measured(["git", "clone", "--quiet", "--depth", "1", "--bare", url, clone])
        read = ["git", "-C", clone, "cat-file", "--batch-all-objects", "--batch"]
        read = measured(read, stdout=subprocess.DEVNULL)
        return cloned[0] + read[0], max(cloned[1], read[1])

    return over_repositories(server, one)


def gitingest(server, arguments, _scratch):
    command = [arguments.gitingest_python, __file__, arguments.corpus, "--as-gitingest", server.url]
    command += ["--token-table", arguments.token_table]
    return measured(command)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--release", type=Path, default=RELEASE, help="folder of the binaries")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gitingest-python", type=Path, help="a Python that has gitingest 0.3.1")
    parser.add_argument("--token-table", type=Path, help="see deploy/parity/reference.py")
    parser.add_argument("--as-gitingest", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_gitingest:
        return be_gitingest(arguments)

    ways = {"ours, default": ours_default, "ours, no limit": ours_no_limit, "git": git}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        server = Server(arguments.corpus, arguments.release / "examples" / "git-server", scratch)
        try:
            best = {}
            for _ in range(arguments.rounds):
                for way, measure in ways.items():
                    result = measure(server, arguments, scratch)
                    known = best.get(way, result)
                    best[way] = min(known[0], result[0]), max(known[1], result[1])
            if arguments.gitingest_python:
                best["gitingest"] = gitingest(server, arguments, scratch)
        finally:
            server.stop()

    print(f"{len(server.names)} repositories")
    for way, (cpu, peak) in best.items():
        print(f"{way:15} {cpu:8.2f} s of CPU, largest process {peak / 1e6:6.0f} MB")
    default, no_limit = best["ours, default"][0], best["ours, no limit"][0]
    print(f"ours, default  : git       = {default / best['git'][0]:.2f}")
    if "gitingest" in best:
        print(f"gitingest : ours, default  = {best['gitingest'][0] / default:.1f}")
        print(f"gitingest : ours, no limit = {best['gitingest'][0] / no_limit:.1f}")


if __name__ == "__main__":
    sys.exit(main())
