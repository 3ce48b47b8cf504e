"""Runs the real gitingest, with one check disabled, on local bare repositories.

Needs `pip install gitingest==0.3.1` in the Python that runs it, and git. Nothing is downloaded:
gitingest is given https://github.com/{owner}/{name}, git is told to find that below a directory
of links to the repositories, the check whether the address answers is skipped, and the token
table comes from a file.
"""

import argparse
import gzip
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

# Before gitingest is imported: it reads the locale's encoding, and prints its name.
os.environ["LC_ALL"] = "C.UTF-8"
os.environ["LOG_LEVEL"] = "CRITICAL"

TEMPORARY_PATH = re.compile(r"(?<=Invalid JSON in notebook: )/\S*?/gitingest/[0-9a-f-]{36}/[^/\n]+/")


def token_table_argument(parser):
    parser.add_argument(
        "--token-table",
        type=Path,
        required=True,
        help="o200k_base.tiktoken or o200k_base.tiktoken.gz, as the crates bpe-openai (data/) and "
        "tiktoken-rs (assets/) ship it",
    )


class Gitingest:
    """gitingest, looking at the repositories ROOT/{owner}/{name}.git.

    With `ordered`, its patterns are in a list instead of a set, in our order: defaults, .gitignore files in path order, .gitingestignore files in path order. That is
    one of the orders that the set may have.
    """

    ordered = False

    def __init__(self, root, token_table):
        from gitingest import clone

        self.links = tempfile.TemporaryDirectory()
        for repository in Path(root).resolve().glob("*/*.git"):
            # gitingest asks for addresses in lower case.
            owner, name = repository.parent.name.lower(), repository.name.lower()
            link = Path(self.links.name, owner, name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(repository)
        config = Path(self.links.name, "gitconfig")
        config.write_text(
            f'[url "file://{self.links.name}/"]\n\tinsteadOf = https://github.com/\n'
            "[safe]\n\tdirectory = *\n[advice]\n\tdetachedHead = false\n"
        )
        os.environ["GIT_CONFIG_GLOBAL"] = str(config)
        os.environ["GIT_CONFIG_NOSYSTEM"] = "1"

        async def exists(url, token=None):
            return True

        clone.check_repo_exists = exists
        self.order_patterns()
        use_token_table(token_table)

    def order_patterns(self):
        from gitingest import entrypoint, ingestion
        from gitingest.utils.ignore_patterns import _parse_ignore_file
        from pathspec import PathSpec

        apply, should_exclude = entrypoint._apply_gitignores, ingestion._should_exclude
        parsed = []

        class Lines(list):
            """Stands in for the set that a file's patterns are collected in."""

            add = list.append

        def ordered_lines(path, root):
            code = _parse_ignore_file.__globals__
            code["set"] = Lines
            try:
                return list(_parse_ignore_file(path, root))
            finally:
                del code["set"]

        def apply_gitignores(query):
            if not self.ordered:
                return apply(query)
            lines = sorted(query.ignore_patterns)
            for name in (".gitignore", ".gitingestignore"):
                files = [path for path in query.local_path.rglob(name) if path.is_file()]
                for path in sorted(files, key=lambda path: path.parent.parts):
                    lines += ordered_lines(path, query.local_path)
            parsed[:] = [PathSpec.from_lines("gitwildmatch", lines)]

        def excluded(path, base_path, ignore_patterns):
            if not self.ordered:
                return should_exclude(path, base_path, ignore_patterns)
            return parsed[0].match_file(str(path.relative_to(base_path)))

        entrypoint._apply_gitignores = apply_gitignores
        ingestion._should_exclude = excluded

    def ingest(self, owner, name, max_file_size):
        """Returns (summary, tree, content)."""
        from gitingest import ingest, output_formatter

        summary, tree, content = ingest(
            f"https://github.com/{owner}/{name}", max_file_size=max_file_size
        )
        if "Estimated tokens" not in summary:
            sys.exit(f"gitingest could not count the tokens of {owner}/{name}")
        without_path = TEMPORARY_PATH.sub("", content)
        if without_path != content:
            # The random path's tokens cannot be compared.
            figure = output_formatter._format_token_count(tree + without_path)
            summary = f"{summary.rpartition(' ')[0]} {figure}"
        return summary, tree, without_path


def use_token_table(path):
    """Makes tiktoken read the table from `path`; tiktoken checks its hash."""
    import tiktoken.load

    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)

    def read_file_cached(blobpath, expected_hash=None):
        if hashlib.sha256(data).hexdigest() != expected_hash:
            sys.exit(f"{path} is not the table that tiktoken expects")
        return data

    tiktoken.load.read_file_cached = read_file_cached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-file-size", type=int, default=512 << 10)
    parser.add_argument("--ordered", action="store_true", help="patterns in our order")
    token_table_argument(parser)
    arguments = parser.parse_intermixed_args()
    gitingest = Gitingest(arguments.root, arguments.token_table)
    gitingest.ordered = arguments.ordered
    owner, name = arguments.repository.split("/")
    summary, tree, content = gitingest.ingest(owner, name, arguments.max_file_size)
    text = f"{summary}\n\n{tree}\n{content}"
    arguments.output.write_bytes(text.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    main()
