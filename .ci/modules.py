#!/usr/bin/env python3
"""Fails if modules of a crate depend on each other, and prints the cycles.

A module depends on those that its paths begin with (`crate::…`, `self::…`, `super::…`, or a child's name), in `use` and
elsewhere, tests and comments aside. A module and its descendants count as one for everybody else: a parent that uses its
children and children that use what their parent defines are one unit of code in several files.

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
    paths += re.findall(rf"\b(?:crate|super|self)(?:::{IDENT})+", text)
    for path in paths:
        parts = path.split("::")
        at = module
        if parts[0] == "crate":
            at, parts = (), parts[1:]
        else:
            while parts and parts[0] in ("self", "super"):
                at = at[:-1] if parts[0] == "super" else at
                parts = parts[1:]
            if at == module and parts and at + (parts[0],) not in modules:
                continue  # Another crate, or something of this module.
        while parts and at + (parts[0],) in modules:
            at, parts = at + (parts[0],), parts[1:]
        if at != module:
            yield at


def cycles(root):
    """Pairs of sibling modules that reach each other, below each parent."""
    modules = modules_of(root)
    uses = {m: set(uses_of(m, text, modules)) for m, text in modules.items()}
    edges = {}
    for source, targets in uses.items():
        for target in targets:
            common = next((i for i, (a, b) in enumerate(zip(source, target)) if a != b), None)
            if common is not None:  # Neither is the other's ancestor.
                edge = source[: common + 1], target[: common + 1]
                edges.setdefault(edge[0], {}).setdefault(edge[1], (source, target))
    found = set()
    for start in edges:
        queue, seen = [[start]], {start}
        while queue:
            path = queue.pop(0)
            for target in edges.get(path[-1], {}):
                if target == start:
                    rotated = min(tuple(path[i:] + path[:i]) for i in range(len(path)))
                    found.add(rotated)
                    queue = []
                    break
                if target not in seen:
                    seen.add(target)
                    queue.append([*path, target])
    return modules, edges, sorted(found)


def main(crates):
    failed = False
    for crate in crates:
        modules, edges, found = cycles(Path(crate))
        for cycle in found:
            failed = True
            print(f"{crate}: " + " → ".join("::".join(m) for m in [*cycle, cycle[0]]))
            for source, target in zip(cycle, [*cycle[1:], cycle[0]]):
                where = edges[source][target]
                print(f"    {'::'.join(where[0])} uses {'::'.join(where[1])}")
        print(f"{crate}: {len(modules)} modules, {len(found)} cycles")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
