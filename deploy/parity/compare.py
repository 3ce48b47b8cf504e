#!/usr/bin/env python3
"""Compares our digests with gitingest's on real repositories.

Takes bare repositories ROOT/{owner}/{name}.git, all of them or those named, and prints for each
whether the two texts are equal, or where they first differ. Neither text is cut. Exit code 1 if a
repository differs that has no excuse; these are excuses:
  - an ignore file with a `!` line: gitingest itself then depends on PYTHONHASHSEED;
  - more than 10,000 files: which are left out depends on the file system.

Run it with a Python that has gitingest 0.3.1 (`pip install gitingest==0.3.1`).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import reference

MAX_FILES = 10_000


def git(repository, *arguments):
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def excuse(repository, text, ordered):
    """Why gitingest may not reproduce its text; None if it does."""
    files = re.search(rb"^Files analyzed: (\d+)$", text, re.MULTILINE)
    if files and int(files[1]) >= MAX_FILES:
        return f"{int(files[1])} files"
    if ordered:
        return None
    for line in git(repository, "ls-tree", "-r", "-z", "HEAD").split(b"\0"):
        entry, _, path = line.partition(b"\t")
        if path.rpartition(b"/")[2] not in (b".gitignore", b".gitingestignore"):
            continue
        blob = git(repository, "cat-file", "blob", entry.split()[2].decode())
        if any(line.strip().startswith(b"!") for line in blob.splitlines()):
            return f"`!` line in {path.decode(errors='replace')}"
    return None


def first_difference(ours, theirs):
    shorter = min(len(ours), len(theirs))
    at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    around = slice(max(0, at - 60), at + 60)
    return f"at byte {at}\n    ours      {ours[around]!r}\n    gitingest {theirs[around]!r}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("repositories", nargs="*", metavar="OWNER/NAME")
    parser.add_argument("--worker", default="worker", help="our binary")
    parser.add_argument(
        "--gitingest-limits", action="store_true", help="files up to 10 MiB instead of 512 KiB"
    )
    parser.add_argument(
        "--ordered",
        action="store_true",
        help="fix the order of gitingest's patterns to ours (worker/README.md), "
        "so that `!` lines are not an excuse",
    )
    parser.add_argument("--keep", type=Path, help="keep the texts in this directory")
    reference.token_table_argument(parser)
    arguments = parser.parse_intermixed_args()
    root = arguments.root.resolve()
    names = arguments.repositories or sorted(
        f"{path.parent.name}/{path.name[:-len('.git')]}" for path in root.glob("*/*.git")
    )

    counts = {"equal": 0, "excused": 0, "different": 0}
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.keep or Path(scratch)
        directory.mkdir(exist_ok=True)
        for name in names:
            repository = root / f"{name}.git"
            ours, theirs = (directory / f"{name.replace('/', '-')}.{who}" for who in ("ours", "gitingest"))
            command = [arguments.worker, "digest", "--name", name, str(repository), "--no-limit"]
            command += ["--gitingest-limits"] if arguments.gitingest_limits else []
            before = os.times()
            subprocess.run([*command, "-o", str(ours)], check=True)
            between = os.times()
            size = (10 << 20) if arguments.gitingest_limits else (512 << 10)
            # In a process of its own: gitingest takes gigabytes on large repositories.
            script = [sys.executable, reference.__file__, str(root), name, str(theirs)]
            script += ["--max-file-size", str(size), "--token-table", str(arguments.token_table)]
            script += ["--ordered"] if arguments.ordered else []
            failed = subprocess.run(script, capture_output=True, text=True)
            after = os.times()
            if failed.returncode != 0:
                reason = (failed.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"excused    {name}: gitingest failed: {reason}", flush=True)
                counts["excused"] += 1
                continue
            cpu = [
                end.children_user + end.children_system - start.children_user - start.children_system
                for start, end in ((before, between), (between, after))
            ]
            ours_text, theirs_text = ours.read_bytes(), theirs.read_bytes()
            seconds = f"{len(ours_text):,} bytes, {cpu[0]:.2f} s of CPU, gitingest {cpu[1]:.2f} s"
            if ours_text == theirs_text:
                counts["equal"] += 1
                print(f"equal      {name}: {seconds}", flush=True)
                continue
            why = excuse(repository, theirs_text, arguments.ordered)
            verdict = "excused" if why else "different"
            counts[verdict] += 1
            why = f"{why}; " if why else ""
            print(f"{verdict:10} {name}: {why}{first_difference(ours_text, theirs_text)}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
