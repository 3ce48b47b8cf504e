#!/usr/bin/env python3
"""Makes the expected texts of the parity fixtures with the real gitingest.

    cargo run -p worker --example fixtures -- DIR
    pip install gitingest==0.3.1
    python3 deploy/parity/expected.py DIR worker/tests/it/parity --token-table FILE

For each repository NAME that DIR/fixtures.tsv lists without a reason not to, it writes
    NAME.txt            files up to 512 KiB, not cut
    NAME.cut-600.txt    the same, cut at 600 bytes
and, for those named in VARIANTS,
    NAME.10m.txt        files up to 10 MiB, gitingest's own limit
    NAME.local.txt      gitingest's local form, made of a clone, as `cd NAME; gitingest .` makes it
Of those with a reason it writes NAME.txt and NAME.cut-600.txt only where ORDERED names them: there
gitingest runs with its patterns in a list, in our order (worker/README.md), instead of a set. The others' texts are written by hand and left alone.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import reference

CUT = 600
CUT_NOTICE = "\n\n[... Summary truncated at 512KB limit ...]"
VARIANTS = {"sizes": ["10m"], "order": ["local"], "links": ["local"]}
ORDERED = ["negations"]


def whole(summary, tree, content):
    return f"{summary}\n\n{tree}\n{content}".encode()


def cut(summary, tree, content, limit):
    """The text cut at `limit` bytes, with the token count of the rest of tree and content."""
    if len(whole(summary, tree, content)) <= limit:
        return whole(summary, tree, content)
    from gitingest.output_formatter import _format_token_count

    frame = summary.rpartition(" ")[0] + " "
    room = 1
    while True:
        body = limit - len(frame.encode()) - room - len("\n\n")
        text = f"{tree}\n{content}".encode()[: max(body, 0)].decode(errors="ignore")
        seen = text[: len(tree)] + text[len(tree) + 1 :]
        figure = _format_token_count(seen)
        if len(figure) <= room:
            return f"{frame}{figure}\n\n{text}{CUT_NOTICE}".encode()
        room = len(figure)


def local(repository, name):
    """Runs gitingest in a clone of the repository."""
    from gitingest import ingest

    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch, name)
        subprocess.run(["git", "clone", "--quiet", str(repository), str(clone)], check=True)
        os.chdir(clone)
        try:
            return ingest(".", max_file_size=512 << 10)
        finally:
            os.chdir(before)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fixtures", type=Path, help="DIR")
    parser.add_argument("expected", type=Path, help="where the texts are written")
    reference.token_table_argument(parser)
    arguments = parser.parse_args()
    gitingest = reference.Gitingest(arguments.fixtures, arguments.token_table)

    def write(name, text):
        path = arguments.expected / f"{name}.txt"
        changed = not path.exists() or path.read_bytes() != text
        path.write_bytes(text)
        print("changed " if changed else "same    ", path.name)

    for line in (arguments.fixtures / "fixtures.tsv").read_text().splitlines():
        owner, name, reason = line.split("\t")
        if reason and name not in ORDERED:
            print("by hand ", f"{name}.txt ({reason})")
            continue
        gitingest.ordered = name in ORDERED
        parts = gitingest.ingest(owner, name, 512 << 10)
        write(name, whole(*parts))
        write(f"{name}.cut-{CUT}", cut(*parts, CUT))
        for variant in VARIANTS.get(name, []):
            if variant == "10m":
                write(f"{name}.10m", whole(*gitingest.ingest(owner, name, 10 << 20)))
            if variant == "local":
                repository = arguments.fixtures / owner / f"{name}.git"
                write(f"{name}.local", whole(*local(repository, name)))


if __name__ == "__main__":
    main()
