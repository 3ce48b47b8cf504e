"""Repositories with something odd about them, made by git alone and always the same."""

import json
import os
import random
import subprocess

TIME = "1700000000 +0000"
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER")
       for what, value in (("NAME", "x"), ("EMAIL", "x@example.org"), ("DATE", TIME))},
}
LIMIT = 512 << 10


def git(path, *arguments, data=b""):
    command = ["git", "-C", path, *arguments]
    return subprocess.run(command, check=True, input=data, env=ENVIRONMENT, stdout=subprocess.PIPE).stdout


def quoted(path):
    return b'"' + b"".join(b"\\%03o" % byte for byte in path) + b'"'


class Repository:
    """A bare repository ROOT/odd/NAME.git."""

    def __init__(self, root, name, *options):
        self.path = root / "odd" / f"{name}.git"
        self.path.mkdir(parents=True)
        git(self.path, "init", "--quiet", "--bare", "--initial-branch=main", *options)

    def commit(self, files, branch="main"):
        """Commits (mode, path, content) or (path, content), each bytes or text."""
        stream = [f"commit refs/heads/{branch}\ncommitter x <x@example.org> {TIME}\ndata 0\n".encode()]
        for file in files:
            mode, path, content = file if len(file) == 3 else ("100644", *file)
            path, content = (text.encode() if isinstance(text, str) else text for text in (path, content))
            if mode == "160000":
                stream.append(b"M 160000 %s %s\n" % (content, quoted(path)))
                continue
            stream.append(b"M %s inline %s\ndata %d\n%s\n" % (mode.encode(), quoted(path), len(content), content))
        git(self.path, "fast-import", "--quiet", "--done", data=b"".join(stream) + b"\ndone\n")
        return self

    def tree(self, entries):
        """Commits a tree of exactly these (mode, name, id), even if git would not write it."""
        tree = b"".join(b"%s %s\0%s" % (mode, name, bytes.fromhex(name_of)) for mode, name, name_of in entries)
        arguments = ["hash-object", "--literally", "-t", "tree", "-w", "--stdin"]
        tree = git(self.path, *arguments, data=tree).decode().strip()
        commit = git(self.path, "commit-tree", "-m", "x", tree).decode().strip()
        git(self.path, "update-ref", "refs/heads/main", commit)

    def blob(self, content):
        return git(self.path, "hash-object", "-w", "--stdin", data=content).decode().strip()


def noise(count, seed):
    return random.Random(seed).randbytes(count)


def notebook(*cells):
    cells = [{"cell_type": kind, "source": source, "outputs": outputs} for kind, source, outputs in cells]
    return json.dumps({"cells": cells, "nbformat": 4})


def make(root):
    """Makes them all below `root`."""
    Repository(root, "empty")
    Repository(root, "unborn-head").commit([("a", "a\n")], "other")
    Repository(root, "one-file").commit([("README.md", "# One\n")])
    Repository(root, "no-files").tree([])
    Repository(root, "only-ignored").commit([("node_modules/a.js", "1"), ("b.pyc", "2")])
    links = ["../outside", "/etc/passwd", "a.txt", ".", "links/loop", "x" * 4000]
    links = [("120000", f"links/{i}", target) for i, target in enumerate(links)]
    Repository(root, "symlinks").commit([("a.txt", "a\n"), ("120000", "links/loop", "loop"), *links])
    Repository(root, "submodules").commit(
        [("160000", "lib/one", "1" * 40), ("160000", "two", "2" * 40), (".gitmodules", "[submodule]\n"), ("a", "a\n")]
    )
    Repository(root, "only-large").commit([(f"f{i}", noise(LIMIT + 1, i)) for i in range(3)])
    around = [(f"f{size}", b"x" * size) for size in (LIMIT - 1, LIMIT, LIMIT + 1, (10 << 20) + 1)]
    Repository(root, "around-the-limit").commit([*around, ("text", "line\n" * 100_000), ("a/.gitignore", "#" * LIMIT)])
    Repository(root, "only-empty-files").commit([("a", ""), ("b/c", ""), ("b/.gitignore", "")])
    Repository(root, "empty-and-large").commit([("a", ""), ("b", noise(LIMIT + 1, 1)), ("120000", "l", "a")])
    names = [b"latin-\xe9", b"\xff\xfe/\x80", "größe/日本語".encode(), b"a\nb", b"tab\t", b"bell\x07\x1b[31m", b" lead", b"end ", b"-n", b"quo'te\""]
    Repository(root, "names").commit([(name, b"text of %s\n" % name) for name in names])
    Repository(root, "ignore-files").commit([
        (".gitattributes", "*.txt text eol=crlf ident working-tree-encoding=UTF-16\n*.bin binary\n*.lfs filter=lfs\n"),
        (".gitignore", "*.log\n!keep.log\nbuild/\n/only-root\n**/cache/**\n[a-c].dat\n\\#hash\n"),
        ("sub/.gitignore", "!*.log\nkeep.log\n*.tmp\n"), ("sub/.gitingestignore", "deep/\n!deep/x\n"),
        *[(name, f"{name}\n") for name in (
            "a.log", "keep.log", "sub/b.log", "sub/keep.log", "build/x", "only-root", "sub/only-root", "x/cache/y/z",
            "a.dat", "d.dat", "#hash", "sub/a.tmp", "sub/deep/x", "sub/deep/y", "id.txt", "big.lfs", "$Id$")],
    ])
    error = {"output_type": "error", "ename": "E", "evalue": "v", "traceback": []}
    stream = {"output_type": "stream", "text": ["one\n", "two"]}
    Repository(root, "notebooks").commit([
        ("a.ipynb", notebook(("markdown", ["# T\n", "x"], []), ("code", "a = 1", [stream, error]))),
        ("b.ipynb", "{"), ("c.ipynb", "[]"), ("d.ipynb", '{"worksheets": [{"cells": []}], "cells": [1]}'),
        ("e.ipynb", ""), ("f.ipynb", '{"cells": [NaN, {"cell_type": "\\ud800", "source": 1e999}]}'),
        ("g.ipynb", notebook(("code", "x" * LIMIT, []))),
    ])
    deep = [("/".join(["d"] * depth + ["f"]), f"{depth}\n") for depth in (1, 19, 20, 21, 22, 100)]
    Repository(root, "deep").commit(deep)
    Repository(root, "encodings").commit([
        ("crlf.txt", "a\r\nb\r\n"), ("cr.txt", "a\rb"), ("utf16.txt", "größe\n".encode("utf-16")), ("bom.txt", "\ufeffbom\n"),
        ("utf16-le.txt", "text\n".encode("utf-16-le")), ("latin1.txt", "größe\n".encode("latin-1")), ("nul.bin", b"a\0b"),
        ("late-nul.txt", b"a" * 2000 + b"\0"), ("control.txt", bytes(range(1, 32))), ("noise.bin", noise(5000, 1)),
        ("long-line.txt", "x" * 300_000), ("tokens.txt", "<|endoftext|> <|fim_prefix|>\n"), ("separators.txt", "a\x85b\u2028c\n"),
    ])
    Repository(root, "sha256", "--object-format=sha256").commit([("a", "a\n")])

    refs = Repository(root, "100000-refs").commit([("a", "a\n")])
    head = git(refs.path, "rev-parse", "main").decode().strip()
    lines = [f"{head} refs/{'heads' if i % 2 else 'pull'}/{i:06}\n" for i in range(100_000)]
    lines = [f"{head} refs/heads/main\n", *lines]
    (refs.path / "refs/heads/main").unlink()
    (refs.path / "packed-refs").write_text("# pack-refs with: sorted\n" + "".join(sorted(lines, key=lambda line: line[41:])))
    odd_refs = Repository(root, "odd-refs").commit([("a", "a\n")], "größe/HEAD")
    git(odd_refs.path, "symbolic-ref", "HEAD", "refs/heads/größe/HEAD")
    for name in ("refs/heads/HEAD", "refs/HEADER", "refs/tags/v1", "refs/remotes/origin/HEAD"):
        git(odd_refs.path, "update-ref", name, "refs/heads/größe/HEAD")
    git(odd_refs.path, "tag", "-a", "-m", "x", "annotated", "refs/heads/größe/HEAD")
    detached = Repository(root, "detached-head").commit([("a", "of main\n")])
    detached.commit([("a", "of other\n")], "other")
    git(detached.path, "update-ref", "--no-deref", "HEAD", "refs/heads/other")

    Repository(root, "large-pack").commit((f"d{i % 9}/f{i}", noise(400_000, i)) for i in range(180))
    alike = ["".join(f"line {j if j != 20 else i} of many\n" * 200 for j in range(40)) for i in range(200)]
    alike = Repository(root, "deltas").commit((f"d{i % 7}/f{i}", text) for i, text in enumerate(alike))
    git(alike.path, "repack", "-adfq", "--depth=50", "--window=50")
    Repository(root, "many-files").commit((f"f{i:05}.txt", f"{i % 10}\n") for i in range(12_000))
    hostile = Repository(root, "hostile-names")
    text, link = hostile.blob(b"text\n"), hostile.blob(b"/etc/passwd")
    files = [b"../escape", b".", b"..", b".GIT", b"/etc/x", b"twice", b"l" * 256]
    hostile.tree([*[(b"100644", name, text) for name in files], (b"100644", b"twice", link), (b"120000", b"passwd", link)])
    bomb = Repository(root, "bomb")
    tree = [(b"100644", b"f", bomb.blob(b"boom\n"))]
    for _ in range(10):
        bomb.tree(tree)
        name = git(bomb.path, "rev-parse", "main^{tree}").decode().strip()
        tree = [(b"40000", b"d%d" % i, name) for i in range(10)]
    bomb.tree(tree)
