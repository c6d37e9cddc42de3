"""The files of a repository in the order in which they build on one another, for rows of several files.

As the CodeGemma report (arXiv:2406.11409, section 2.3) describes its packing: imports at the head of each file are
matched with the longest path suffix; a file comes after those that it imports; where imports go round in a circle the
weakest are dropped; of the files that may come next, the nearest to the last one does. Files that import nothing and
are imported by none are sorted by name, each unit test beside what it tests.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import PurePosixPath

_SEARCHED = 500  # files; without a limit a repository of n files would take n * n steps
HEAD_LINES = 100  # in which imports are looked for; the report says the top N and no number

_IMPORTS = re.compile(
    r"""^\s*(?:
        from\s+(?P<package>\.*[\w.]*)\s+import\s+\(?\s*(?P<names>[\w, ]+)  # Python
      | import\s+(?P<modules>[A-Za-z_][\w.]*(?:\s+as\s+\w+)?(?:\s*,\s*[\w.]+(?:\s+as\s+\w+)?)*)\s*;?\s*(?:\#.*)?$
      | import\s+(?:static\s+)?(?P<java>[\w.]+)(?:\.\*)?\s*;  # Java, Kotlin
      | \#\s*include\s+["<](?P<include>[^">]+)[">]  # C
      | (?:import|export)\b[^'"\n]*['"](?P<script>[^'"\n]+)['"]  # JavaScript, TypeScript
      | (?:const|let|var)\b[^'"\n]*\brequire\(['"](?P<required>[^'"\n]+)['"]\)
    )""",
    re.VERBOSE | re.MULTILINE,
)
_TEST = re.compile(r"(?:^test_(?P<a>.+)|^(?P<b>.+?)[_.-](?:test|spec)s?|^Test(?P<c>[A-Z].*)|^(?P<d>.+)Tests?)$")


def head(text: str) -> str:
    """The lines of a file in which its imports are looked for."""
    return "".join(text.splitlines(keepends=True)[:HEAD_LINES])


def order(files: Mapping[str, str]) -> list[str]:
    """The paths of `files` (path -> text), each after those that it imports. The same for the same files."""
    needs = dependencies(files)
    users: dict[str, list[str]] = {path: [] for path in needs}
    for path, of in needs.items():
        for other in of:
            users[other].append(path)
    near = {path: sorted({*needs[path], *users[path]}) for path in needs}
    missing = {path: sum(of.values()) for path, of in needs.items() if near[path]}  # how often it names what is to come
    ready = {path for path, count in missing.items() if not count}
    tested = {path: _tested(path) for path in missing}
    done: list[str] = []
    while missing:
        if not ready:  # a circle: begin where the least is missing
            fewest = min(missing.values())
            path = min(path for path, count in missing.items() if count == fewest)
        else:
            path = _nearest(done[-1], ready, near, tested) if done else min(ready)
        done.append(path)
        ready.discard(path)
        del missing[path]
        for user in users[path]:
            if user in missing:
                missing[user] -= needs[user][path]
                if not missing[user]:
                    ready.add(user)
    return done + sorted((path for path, of in near.items() if not of), key=_beside_what_it_tests)


def groups(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Neighbours of together at most `limit`: (first, after the last). One that is larger is alone."""
    start, size = 0, 0
    for i, more in enumerate(sizes):
        if i > start and size + more > limit:
            yield start, i
            start, size = i, 0
        size += more
    if start < len(sizes):
        yield start, len(sizes)


def dependencies(files: Mapping[str, str]) -> dict[str, Counter[str]]:
    """For each file, the others that it imports, and how many times it names them."""
    ends = _ends(files)
    matched: dict[tuple[tuple[str, ...], PurePosixPath, str], str | None] = {}
    found: dict[str, Counter[str]] = {}
    for path, text in files.items():
        of: Counter[str] = Counter()
        pure = PurePosixPath(path)
        for wanted in _imports(head(text), pure):
            key = wanted, pure.parent, pure.suffix
            if key not in matched:
                matched[key] = _match(*key, ends)
            target = matched[key]
            if target is not None and target != path:
                of[target] += 1
        found[path] = of
    return found


def _ends(files: Mapping[str, str]) -> dict[tuple[str, ...], list[PurePosixPath]]:
    """Every end of every path, without its extension, with the paths that have it; a package is its `__init__`."""
    ends: dict[tuple[str, ...], list[PurePosixPath]] = {}
    for path in map(PurePosixPath, sorted(files)):
        for parts in {path.with_suffix("").parts, path.parts, path.parent.parts if path.stem == "__init__" else ()}:
            for start in range(len(parts)):
                ends.setdefault(parts[start:], []).append(path)
    return ends


def _match(
    wanted: tuple[str, ...],
    folder: PurePosixPath,
    suffix: str,
    ends: Mapping[tuple[str, ...], Sequence[PurePosixPath]],
) -> str | None:
    """The file whose path has the longest end in common with what a file in `folder` imports. Of several, one in the
    same language and near in the tree."""

    def distance(path: PurePosixPath) -> tuple[bool, int, str]:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(folder.parts, path.parts, strict=False)))
        return path.suffix != suffix, len(path.parts) - 2 * shared, str(path)

    for start in range(len(wanted)):
        if start and len(wanted) - start < 2 < len(wanted):
            break  # of a.b.c the c alone says too little
        if candidates := ends.get(wanted[start:]):
            return str(min(candidates, key=distance))
    return None


def _imports(text: str, path: PurePosixPath) -> Iterator[tuple[str, ...]]:
    """What a file imports, each as parts of a path."""
    for found in _IMPORTS.finditer(text):
        if (package := found["package"]) is not None:
            dots = len(package) - len(package.lstrip("."))
            base = path.parts[: max(0, len(path.parts) - dots)] if dots else ()
            parts = (*base, *filter(None, package.lstrip(".").split(".")))
            names = [name.split()[0] for name in found["names"].split(",") if name.strip()]
            for name in names:  # each may be a module of the package, or something in it
                yield (*parts, name)
            if parts:
                yield parts
        elif modules := found["modules"]:
            for module in modules.split(","):
                yield tuple(module.split()[0].split("."))
        elif java := found["java"]:
            yield tuple(java.split("."))
        else:
            target = found["include"] or found["script"] or found["required"]
            base = path.parent.parts if target.startswith(".") or found["include"] else ()
            parts: tuple[str, ...] = tuple(base)
            for part in PurePosixPath(target).parts:
                parts = parts[:-1] if part == ".." else parts if part == "." else (*parts, part)
            yield parts


def _nearest(last: str, ready: set[str], near: Mapping[str, Sequence[str]], tested: Mapping[str, str | None]) -> str:
    """Of `ready`, the file with the fewest imports between it and `last`, whichever way they point; a test of `last`
    before others, then by name. Where many are passed without finding one, none is near, and the name decides."""
    seen, layer = {last}, [last]
    while layer and len(seen) < _SEARCHED:
        reached = {other for path in layer for other in near[path]} - seen
        if found := reached & ready:
            stem = PurePosixPath(last).stem
            return min(found, key=lambda path: (tested[path] != stem, path))
        seen |= reached
        layer = [*reached]
    return min(ready)


def _tested(path: str) -> str | None:
    """The name of what a unit test tests; None if it is none."""
    found = _TEST.match(PurePosixPath(path).stem)
    return next(filter(None, found.groups()), None) if found else None


def _beside_what_it_tests(path: str) -> tuple[str, bool, str]:
    tested = _tested(path)
    return (tested or PurePosixPath(path).stem), tested is not None, path
