"""Short Python files to fill in, made of the standard library's own.

    python recipes/b-codegemma/make_data.py --out data/code

A whole module rarely fits a tiny model's context, and its imports stand far from their uses. So each function of a
module becomes a file of its own, and so does each statement and each run of a few that use something imported: those
of the module's imports that are used, then the code. What is learned of them is what the model is for: names above
that fit the code below.

    train.jsonl, held-out.jsonl   {"text": "import sys\n\n\ndef main():\n ...", "path": "json/tool.py"}
    lines.jsonl                   {"before": "import sys\n", "middle": "def main():", "after": "\n ..."}, held out too

Whole modules are held out, one in twenty, chosen by their paths, and so is any file with one of the variants of
`variants.py` in it. Of what is left, no import is trained on more often than a few hundred times unless others come
with it: a model that has seen `import os` in every twelfth file says `os` without looking. One file in four keeps its
path, for a caret may come with one or without.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import sys
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from common import library_files, write_jsonl
from variants import PREFIX, VARIANTS

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SHORTEST, LONGEST = 20, 200  # characters of a file
OFTEN = 300  # files of one import
WITH_PATH = 0.25  # of files
LINES = 200  # to measure with
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_IMPORT = re.compile(r"^(?:import|from) .+", re.MULTILINE)
MAIN = 'if __name__ == "__main__":\n', "if __name__ == '__main__':\n"


def small_files(source: str, rng: np.random.Generator) -> Iterator[str]:
    """Pieces of a module, each with the imports that it uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    imports = list(_imports(tree))

    def text(nodes: Sequence[ast.stmt]) -> tuple[str, list[str]]:
        """Their source, and the imports of what they use."""
        first = min([nodes[0].lineno, *(decorator.lineno for decorator in getattr(nodes[0], "decorator_list", ()))])
        body = textwrap.dedent("".join(lines[first - 1 : nodes[-1].end_lineno])).strip("\n")
        used = {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}
        needed = sorted({line for names, line in imports if names & used})
        return body, [needed[i] for i in rng.permutation(len(needed))]

    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            body, needed = text([node])
            if needed or rng.random() < 0.3:  # fewer of those that teach nothing of imports
                yield "".join(f"{line}\n" for line in needed) + ("\n\n" if needed else "") + body + "\n"
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(node, ast.ClassDef) or not isinstance(block, list):
                continue
            for run in (run for longest in (1, 3) for run in _runs(block, longest, rng)):
                if any(isinstance(statement, DEFINITIONS | ast.Import | ast.ImportFrom) for statement in run):
                    continue
                body, needed = text(run)
                if needed:
                    yield "".join(f"{line}\n" for line in needed) + _framed(body, rng)


def _runs(block: Sequence[ast.stmt], longest: int, rng: np.random.Generator) -> Iterator[Sequence[ast.stmt]]:
    """The statements of a block in runs of at most so many."""
    at = 0
    while at < len(block):
        run = block[at : at + int(rng.integers(1, longest + 1))]
        at += len(run)
        yield run


def _framed(body: str, rng: np.random.Generator) -> str:
    """Statements as they may stand below imports: after some empty lines, or guarded as a program's are."""
    if rng.random() < 0.25:
        body = MAIN[int(rng.integers(2))] + textwrap.indent(body, "    ")
    return "\n" * int(rng.integers(3)) + body + "\n" * int(rng.integers(2))


def _imports(tree: ast.Module) -> Iterator[tuple[set[str], str]]:
    """Names that an import of the module binds, and a line that does so, for each name alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield {alias.asname or alias.name.split(".")[0]}, f"import {ast.unparse(alias)}"
        elif isinstance(node, ast.ImportFrom) and node.names[0].name != "*":
            for alias in node.names:
                yield (
                    {alias.asname or alias.name},
                    f"from {'.' * node.level}{node.module or ''} import {ast.unparse(alias)}",
                )


def is_held_out(path: str) -> bool:
    return hashlib.sha256(path.encode()).digest()[0] < 256 // 20


def records(seed: int) -> Iterator[dict[str, str]]:
    """All small files of the library, module by module."""
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    measured = [PREFIX + name + suffix for name, suffix in VARIANTS.items()]
    for path in library_files():
        for text in small_files(path.read_text(encoding="utf-8"), rng):
            if SHORTEST <= len(text) <= LONGEST and text not in seen and not any(file in text for file in measured):
                seen.add(text)
                yield {"text": text, "path": str(path.relative_to(LIBRARY))}


def balanced(records: Sequence[dict[str, str]], rng: np.random.Generator) -> list[dict[str, str]]:
    """Those without imports, and each of the others that has one which is not there often enough yet."""
    counts: Counter[str] = Counter()
    kept = []
    for i in rng.permutation(len(records)):
        imports = _IMPORT.findall(records[i]["text"])
        if not imports or min(counts[line] for line in imports) < OFTEN:
            counts.update(imports)
            kept.append(records[i])
    return kept


def single_lines(records: Sequence[dict[str, str]], rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """Of so many files one line each, with at least four characters, cut out but for its indentation."""
    for i in rng.permutation(len(records))[:LINES]:
        text = records[i]["text"]
        bodies = list(re.finditer(r"\S[^\n]{2,}\S", text))
        if bodies:
            start, end = bodies[int(rng.integers(len(bodies)))].span()
            yield {"before": text[:start], "middle": text[start:end], "after": text[end:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/code"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    everything = list(records(options.seed))
    held_out = [record for record in everything if is_held_out(record["path"])]
    rng = np.random.default_rng(options.seed)
    trained = balanced([record for record in everything if not is_held_out(record["path"])], rng)
    for record in [*held_out, *trained]:
        if rng.random() >= WITH_PATH:
            del record["path"]
    write_jsonl(options.out / "train.jsonl", trained)
    write_jsonl(options.out / "held-out.jsonl", held_out)
    lines = write_jsonl(options.out / "lines.jsonl", single_lines(held_out, rng))
    print(f"{len(trained)} files to train on, {len(held_out)} and {lines} lines to measure with, in {options.out}")


if __name__ == "__main__":
    main()
