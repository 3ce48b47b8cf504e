#!/usr/bin/env python3
"""Compares the digests of all ways of fetching, whole files, on servers of all kinds.

    cargo build --release --locked --workspace --bins --example git-server
    deploy/parity/ways.py CORPUS

Takes bare repositories CORPUS/OWNER/NAME.git and odd ones that it makes itself, and serves them over
HTTP from this machine. What libgit2 makes of a repository on a server like GitHub is what all others
must make: text for text, or the same exit code. A pack may hold blobs that no digest shows, and a
server may be one that v2 cannot use (`falls back`), but no text may differ.

Prints a line for each kind of server, and each difference. Exit code 1 if there is one that is not
expected.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import odd  # noqa: E402
import servers  # noqa: E402

PUSHED_AT = "2026-01-01T00:00:00Z"
NO_FILTER, OBJECT_INFO = "--config=uploadpack.allowFilter=false", "--config=transfer.advertiseObjectInfo=true"
NO_ANY = "--config=uploadpack.allowAnySHA1InWant=false"

# What the server does, its options, and the ways that are tried there. The first is the reference.
KINDS = [
    ("like GitHub", [], ["git2", "v2", "auto"]),
    ("only advertised objects", [NO_ANY], ["git2", "v2"]),
    ("no filters", [NO_FILTER], ["git2", "auto"]),
    ("no filters, only advertised objects", [NO_FILTER, NO_ANY], ["auto"]),
    ("object-info", [OBJECT_INFO], ["v2", "auto"]),
    ("object-info, no filters", [OBJECT_INFO, NO_FILTER], ["auto"]),
    ("object-info, only advertised objects", [OBJECT_INFO, NO_ANY], ["auto"]),
    ("protocol v0", ["--only-v0"], ["git2", "auto"]),
    ("sends what it should filter out", ["--filter="], ["v2", "auto"]),
    ("filters all blobs", ["--filter=blob:none"], ["auto"]),
    ("filters trees", ["--filter=tree:1"], ["auto"]),
    # Its objects are all that a server without object-info says of sizes.
    ("filters blobs of 100 bytes", ["--filter=blob:limit=100"], ["auto"]),
    ("object-info, filters blobs of 100 bytes", [OBJECT_INFO, "--filter=blob:limit=100"], ["auto"]),
]
# A server that keeps small blobs back and tells no sizes says nothing else than one that has large ones.
UNTOLD = {"filters blobs of 100 bytes"}
THROTTLES = ["status", "in-band"]


class Comparison:
    def __init__(self, arguments, root, names, scratch):
        self.arguments, self.root, self.names, self.scratch = arguments, root, names, scratch
        self.expected = {}
        self.failed = False

    def digest(self, server, name, way):
        """Returns a repository's digest, or the exit code in its place."""
        output = self.scratch / f"{name.replace('/', '-')}.txt"
        command = [self.arguments.programs / "worker", "digest", f"{server.url}/{name}", "-o", output]
        command += ["--fetch", way, "--name", name, "--allow-host", server.authority, "--allow-http"]
        command += self.arguments.limits.split()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            return f"exit code {done.returncode}", (done.stderr.strip().splitlines() or [""])[-1]
        text = output.read_bytes()
        output.unlink()
        return text, ""

    def one(self, kind, options, way):
        started = time.monotonic()
        with servers.GitServer(self.root, self.arguments.programs, *options) as server:
            with concurrent.futures.ThreadPoolExecutor(self.arguments.jobs) as pool:
                made = pool.map(lambda name: self.digest(server, name, way), self.names)
                made = dict(zip(self.names, made))
            asked = server.stop()
        if not self.expected:
            self.expected = {name: text for name, (text, _) in made.items()}
            for name, (text, message) in made.items():
                if isinstance(text, str):
                    print(f"    {name} has no text: {message}", flush=True)
        # Each way asks for the refs once. Alone, v2 says where it would fall back.
        fallen = [name for name in asked if asked[name]["info_refs"] > 1]
        if way == "v2":
            fallen = [name for name, (text, _) in made.items() if text == "exit code 2"]
            made = {name: text for name, text in made.items() if name not in fallen}
        different = {name: text for name, text in made.items() if text[0] != self.expected[name]}
        self.report(kind, way, len(fallen), len(made), different, time.monotonic() - started)

    def report(self, kind, way, fallen, count, different, seconds):
        refused = sum(isinstance(text, str) for text in self.expected.values())
        excused = " (no client can tell)" if different and kind in UNTOLD else ""
        figures = f"{count - len(different):5} equal {refused:3} of them no text {fallen:4} fall back"
        print(f"{kind:40} {way:5} {figures} {len(different):4} different{excused} {seconds:6.1f} s", flush=True)
        for name, (text, message) in different.items():
            if not excused:
                self.failed = True
                print(f"    {name}: {difference(self.expected[name], text)} {message}", flush=True)

    def throttled(self, form):
        """Digests all in one process, from a server that limits for a while."""
        started = time.monotonic()
        store, feed = self.scratch / f"throttled-{form}", self.scratch / "feed.json"
        seconds = self.arguments.throttle_seconds
        options = ["--throttle", form, "--throttle-seconds", seconds]
        with servers.GitServer(self.root, self.arguments.programs, *map(str, options)) as server:
            entries = []
            for name in self.names:
                owner, _, repository = name.partition("/")
                entry = {"owner": owner, "name": repository, "url": f"{server.url}/{name}"}
                entries.append({**entry, "pushedAt": PUSHED_AT})
            feed.write_text(json.dumps(entries))
            command = [self.arguments.programs / "producer", "run", "--feed", feed, "--store", store]
            command += ["--allow-host", server.authority, "--allow-http", "--max-failures", "100%"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        made = {}
        for name in self.names:
            digest = store / "gitingest" / name / "summary.txt"
            made[name] = digest.read_bytes() if digest.exists() else "exit code 69", ""
        different = {}
        for name, (text, _) in made.items():
            # A store's text is cut.
            if not is_beginning(text, self.expected[name]):
                different[name] = text, ""
        took = time.monotonic() - started
        self.report(f"limits for {seconds} s, by {form}", "auto", 0, len(made), different, took)


def is_beginning(text, whole):
    """Whether a stored text is that of the whole one, as far as it goes; token counts aside."""
    if isinstance(text, str) or isinstance(whole, str):
        return text == whole
    text, whole = (b"\n".join(line for line in part.split(b"\n") if not line.startswith(b"Estimated tokens: "))
                   for part in (text, whole))
    cut = text.rfind(b"\n\n[... Summary truncated at 512KB limit ...]")
    return whole.startswith(text[:cut]) if cut > 0 else text == whole


def difference(expected, text):
    if isinstance(expected, str) or isinstance(text, str):
        kind = [part if isinstance(part, str) else f"{len(part)} bytes" for part in (expected, text)]
        return f"{kind[0]} expected, {kind[1]} found;"
    shorter = min(len(expected), len(text))
    at = next((i for i in range(shorter) if expected[i] != text[i]), shorter)
    around = slice(max(0, at - 40), at + 40)
    return f"at byte {at} {expected[around]!r} expected, {text[around]!r} found"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--programs", type=Path, default=servers.RELEASE, help="folder of the binaries")
    parser.add_argument("--limits", default="--no-limit", help="options of worker digest [default: --no-limit]")
    parser.add_argument("--only", metavar="TEXT", default="", help="only servers whose description has this, beside the first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--throttle-seconds", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        odd.make(scratch / "made")
        root = scratch / "served"
        names = servers.serve_together([arguments.corpus, scratch / "made"], root)
        comparison = Comparison(arguments, root, names, scratch)
        odd_ones = sum(name.startswith("odd/") for name in names)
        print(f"{len(names)} repositories, {odd_ones} of them odd ones", flush=True)
        for at, (kind, options, ways) in enumerate(KINDS):
            if at > 0 and arguments.only not in kind:
                continue
            for way in ways:
                comparison.one(kind, options, way)
        for form in THROTTLES:
            if arguments.only in f"limits {form}":
                comparison.throttled(form)
    return comparison.failed


if __name__ == "__main__":
    sys.exit(main())
