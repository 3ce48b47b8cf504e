"""Runs the real gitingest, unchanged but for one check, on bare repositories of this machine.

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

# Before gitingest is imported: it asks for the locale's encoding, and prints its name.
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
    """gitingest, looking at the repositories ROOT/{owner}/{name}.git."""

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
        use_token_table(token_table)

    def ingest(self, owner, name, max_file_size):
        """Gives (summary, tree, content)."""
        from gitingest import ingest

        summary, tree, content = ingest(
            f"https://github.com/{owner}/{name}", max_file_size=max_file_size
        )
        if "Estimated tokens" not in summary:
            sys.exit(f"gitingest could not count the tokens of {owner}/{name}")
        return summary, tree, TEMPORARY_PATH.sub("", content)


def use_token_table(path):
    """Makes tiktoken read the table from `path`; it checks the digest itself."""
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
    token_table_argument(parser)
    arguments = parser.parse_intermixed_args()
    gitingest = Gitingest(arguments.root, arguments.token_table)
    owner, name = arguments.repository.split("/")
    summary, tree, content = gitingest.ingest(owner, name, arguments.max_file_size)
    text = f"{summary}\n\n{tree}\n{content}"
    arguments.output.write_bytes(text.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    main()
