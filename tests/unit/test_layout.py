"""The shape of the tree: unit tests lie as the source does, files and functions fit one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "gemkit"
UNIT = ROOT / "tests" / "unit"
FILES = sorted(SOURCE.rglob("*.py"))

MAX_FILE, MAX_FUNCTION = 500, 80  # lines

# Tests of no single file: rules of the whole tree, kinds of input that several files meet, recipes and benchmarks.
ACROSS = {
    "test_benchmarks.py",
    "test_docs.py",
    "test_imports.py",
    "test_layout.py",
    "test_recipes.py",
    "cli/test_show_compare_models.py",
    "images/test_hostile_pictures.py",
    "ops/test_gradients.py",
    "train/data/test_leakage.py",
    "weights/formats/test_hostile_files.py",
}
# Where a fault would else show as a wrong logit or a wrong file: these have tests of their own.
TESTED = (
    "executors/interface.py",
    "executors/native/lower.py",
    "executors/native/packfile.py",
    "files.py",
    "generate/loop.py",
    "generate/policy.py",
    "generate/request.py",
    "generate/sequence.py",
    "program/ir.py",
    "weights/config_gguf.py",
    "weights/config_hf.py",
    "weights/hub.py",
    "weights/load.py",
    "weights/maps.py",
)


def test_path(source: Path) -> Path:
    """`a/b.py` is tested by `a/test_b.py`, a package's `__init__.py` by `a/test_a.py`."""
    inside = source.relative_to(SOURCE)
    name = inside.parent.name if inside.name == "__init__.py" else inside.stem
    return inside.parent / f"test_{name}.py"


test_path.__test__ = False  # type: ignore[attr-defined]


def test_unit_tests_mirror_the_source():
    places = {str(test_path(file)) for file in FILES}
    places |= {f"csrc/test_{file.stem}.py" for file in (ROOT / "csrc").rglob("*.h")}
    found = {str(path.relative_to(UNIT)) for path in UNIT.rglob("test_*.py")}
    assert sorted(found - places - ACROSS) == [], "tests of no file: move them, or name them in ACROSS"
    assert sorted(ACROSS - found) == []


@pytest.mark.parametrize("file", TESTED)
def test_files_where_faults_hide_have_tests_of_their_own(file):
    assert (UNIT / test_path(SOURCE / file)).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_fit_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE, "look for the second idea in it"
    long = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = (node.end_lineno or first) - first + 1
            if length > MAX_FUNCTION and "long because" not in "\n".join(lines[first - 1 : node.end_lineno]):
                long.append(f"{node.name}: {length} lines")
    assert long == [], "cut it, or say in it: long because ..."
