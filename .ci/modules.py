#!/usr/bin/env python3
"""Fails if modules of a crate depend on each other, and prints which.

A module depends on those that its paths lead into (`crate::…`, `self::…`, `super::…`, or a child's name), in `use` and
elsewhere; comments, strings and test modules aside. That is what `cargo modules dependencies --acyclic` checks, without
its ten minutes of compilation.

Usage: .ci/modules.py CRATE...    a crate's folder
"""

import re
import sys
from pathlib import Path

IDENT = r"[A-Za-z_][A-Za-z0-9_]*"


def modules_of(root):
    """Modules of a crate by path, such as ("store", "s3"), with their text."""
    found = {}
    for file in sorted((root / "src").rglob("*.rs")):
        parts = file.relative_to(root / "src").with_suffix("").parts
        if parts not in (("main",),):
            found[() if parts == ("lib",) else parts] = code_of(file.read_text())
    return found


def code_of(text):
    """The text without comments, strings and test modules."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"", lambda m: " " if m[0][0] == "/" else '""', text, flags=re.S)
    while test := re.search(r"#\[cfg\(test\)\]\s*(?:pub )?mod \w+ \{", text):
        depth, end = 1, test.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: test.start()] + text[end:]
    return text


def expand(tree):
    """Paths of a use tree: `a::{b, c::d}` is a::b and a::c::d."""
    start = tree.find("{")
    if start < 0:
        yield re.sub(r"\s+as\s+\w+|\s", "", tree)
        return
    head, depth, part = tree[:start], 0, ""
    for char in tree[start + 1 : tree.rindex("}")] + ",":
        if char == "," and depth == 0:
            if part.strip():
                yield from expand(head + part.strip())
            part = ""
            continue
        depth += {"{": 1, "}": -1}.get(char, 0)
        part += char


def uses_of(module, text, modules):
    """Modules that a module's paths lead into."""
    paths = []
    for tree in re.findall(r"\buse\s+([^;]+);", text):
        paths += expand(tree)
    text = re.sub(r"\buse\s+[^;]+;", "", text)
    paths += re.findall(rf"(?<![\w:]){IDENT}(?:::{IDENT})+", text)
    for path in paths:
        at, parts = module, path.split("::")
        if parts[0] == "crate":
            at, parts = (), parts[1:]
        while parts and parts[0] in ("self", "super"):
            at = at[:-1] if parts[0] == "super" else at
            parts = parts[1:]
        while parts and (*at, parts[0]) in modules:
            at, parts = (*at, parts[0]), parts[1:]
        if at and at != module:
            yield at


def cycles(uses):
    """Groups of modules that reach each other."""
    reached = {}
    for start in uses:
        reached[start], queue = set(), [start]
        while queue:
            for target in uses[queue.pop()] - reached[start]:
                reached[start].add(target)
                queue.append(target)
    return {frozenset(m for m in reached[start] if start in reached[m]) for start in uses if start in reached[start]}


def main(crates):
    failed = False
    for crate in crates:
        modules = modules_of(Path(crate))
        uses = {module: set(uses_of(module, text, modules)) for module, text in modules.items()}
        for cycle in cycles(uses):
            failed = True
            print(f"{crate}: these depend on each other:")
            for source in sorted(cycle):
                targets = ", ".join("::".join(target) for target in sorted(uses[source] & cycle))
                print(f"    {'::'.join(source)} uses {targets}")
        print(f"{crate}: {len(modules)} modules")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
