"""Who may import whom, and what modules may not do: read from the syntax tree of every file.

The rules about rooms are the table in docs/architecture.md itself, so that opening a door is one reviewed line.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "gemkit"
FILES = sorted(SOURCE.rglob("*.py"))
# may be imported by all but themselves; a sentence above the table says so
EVERYONE = {"errors", "files", "family", "block_types"}


def doors() -> dict[str, set[str]]:
    """Room -> the rooms that it may import, from the table of docs/architecture.md, from the ground up."""
    found = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if row := re.fullmatch(r"\| `([\w.]+)` \|.*\|([^|]*)\|", line):
            found[row[1]] = set(re.findall(r"`([\w.]+)`", row[2]))
    return found


def room(dotted: str) -> str | None:
    """The row that a module of ours is in, named without `gemkit.`: its own, or that of its top-level package; None if
    neither has one."""
    return next((name for name in (".".join(dotted.split(".")[:2]), dotted.partition(".")[0]) if name in TABLE), None)


def room_of(path: Path) -> str:
    """The room of a file; "gemkit" is the package's own `__init__`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts == ("__init__",):
        return "gemkit"
    return room(".".join(parts)) or parts[0]


TABLE = doors()
ROOMS = {room_of(path) for path in FILES}


def imported_rooms(source: str) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours, at any depth: those in functions and for type checking count too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "gemkit":
                yield node.lineno, room(rest) or "gemkit"


def forbidden(of: str, source: str) -> list[str]:
    """What the room `of` imports and may not."""
    allowed = {of, *TABLE[of]} | (EVERYONE if of not in EVERYONE else set())
    return [f"line {line}: {of} imports {other}" for line, other in imported_rooms(source) if other not in allowed]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_what_its_room_may(path):
    assert forbidden(room_of(path), path.read_text()) == []


def test_the_table_is_the_house():
    """Every room has a row, and each door opens downwards, so that no circle of rooms can be built."""
    assert set(TABLE) == ROOMS
    above = set()
    for name, opened in TABLE.items():
        assert opened <= above, f"{name} may import {opened - above}, which stand below it in the table"
        above.add(name)
    assert not any("cli" in opened for opened in TABLE.values())


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("text", "from gemkit.generate import Sampling"),
        ("ops", "import gemkit.nn"),
        ("nn", "def f():\n    from gemkit import weights"),
        ("generate", "if TYPE_CHECKING:\n    from gemkit.ops import linear"),
        ("gemma", "import gemkit.cli.options"),
        ("errors", "from gemkit.family import get"),
        ("weights", "from gemkit import __version__"),
        ("parallel.layout", "from gemkit.parallel import plan"),
        ("parallel.layout", "from gemkit.parallel.plan import Plan"),
        ("parallel.mesh", "import gemkit.parallel.layout"),
        ("inspect", "from gemkit.parallel.layout import Layout"),
    ],
)
def test_a_forbidden_import_is_found(room, source):
    assert len(forbidden(room, source)) == 1


def test_a_module_with_a_row_of_its_own_is_a_room():
    assert forbidden("parallel.layout", "from gemkit.parallel.mesh import Mesh\nfrom gemkit.parallel import mesh") == []
    assert room_of(SOURCE / "parallel" / "layout.py") == "parallel.layout"
    assert room_of(SOURCE / "parallel" / "keras.py") == "parallel"


# ---------------------------------------------------------------- modules compute only through ops

# batch.py and state.py hold tensors and are no modules
MODULES = [
    path
    for path in (SOURCE / "nn").glob("*.py")
    if path.name not in ("__init__.py", "batch.py", "state.py", "state_file.py")
]
OF_TORCH = {"Module", "ModuleList", "Parameter"}
# whose methods a forward may call: they are no tensors
NOT_TENSORS = {"self", "ops", "batch", "state", "Batch", "family", "dict"}
# rearranging what a forward returns computes nothing: the (B, T) convenience of the decoder, a mask without channels
REARRANGING = {"unflatten", "flatten"}


def torch_in_modules(source: str) -> list[str]:
    """Uses of torch other than the three classes that make a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"line {node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = {alias.name for alias in node.names}
            if node.module != "torch.nn" or not names <= OF_TORCH:
                found.append(f"line {node.lineno}: from {node.module} import {', '.join(sorted(names))}")
        elif isinstance(node, ast.Name) and node.id in ("torch", "F"):
            found.append(f"line {node.lineno}: {node.id}")
    return found


def arithmetic_in_forward(source: str) -> list[str]:
    """What a `forward` does with tensors other than hand them on: operators, tensor methods, indices, other modules'
    weights, memory kept on the module."""
    found = []
    for forward in ast.walk(ast.parse(source)):
        if not (isinstance(forward, ast.FunctionDef) and forward.name in ("forward", "compute")):
            continue
        for node in (n for statement in forward.body for n in ast.walk(statement)):
            what = _does(node)
            if what:
                found.append(f"line {node.lineno}: {what}")  # type: ignore[attr-defined]
    return found


def _does(node: ast.AST) -> str | None:
    match node:
        case ast.BinOp(left=ast.List() | ast.Attribute(value=ast.Name(id="family"))):
            return None  # [None] * 3 and the type family.Global | family.Sliding are Python's
        case ast.BinOp() | ast.AugAssign():
            return f"operator {type(node.op).__name__}"
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Invert()):
            return f"operator {type(node.op).__name__}"
        case ast.Compare(ops=ops) if not all(isinstance(op, ast.Is | ast.IsNot) for op in ops):
            return "comparison"
        case ast.Subscript(slice=ast.Slice() | ast.Tuple() | ast.Constant()):
            return "slice"
        case ast.Call(func=ast.Attribute(value=receiver, attr=method)) if method not in REARRANGING:
            root = receiver
            while isinstance(root, ast.Attribute):
                root = root.value
            if not (isinstance(root, ast.Name) and root.id in NOT_TENSORS):
                return f"method .{method}()"
        case ast.Attribute(value=owner, attr="weight" | "bias" | "recurrent_param"):
            if not (isinstance(owner, ast.Name) and owner.id == "self"):
                return f"weight of another module: {ast.unparse(node)}"
        case ast.Attribute(ctx=ast.Store()):
            return f"memory on a module: {ast.unparse(node)}"
    return None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_compute_only_through_ops(path):
    source = path.read_text()
    assert "def forward" in source, "not a file of modules: say so in MODULES"
    assert torch_in_modules(source) == []
    assert arithmetic_in_forward(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import torch.nn.functional as F",
        "from torch import Tensor",
        "from torch.nn import Linear, Module",
        "from torch.nn.functional import gelu",
        "y = torch.zeros(3)",
    ],
)
def test_torch_in_a_module_is_found(source):
    assert len(torch_in_modules(source)) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "return x_TD + y_TD",
        "x_TD *= 2",
        "return x_TI @ self.weight",
        "return -x_TD",
        "return x_TD > 0",
        "return x_TD.float()",
        "return self.mlp(x_TD).sum()",
        "return x_TD[:, 0]",
        "return x_TD[0]",
        "return ops.linear(x_TD, self.q_proj.weight)",
        "return ops.rg_lru(x_TD, self.rg_lru.recurrent_param)",
        "self.cache = x_TD",
        "if True:\n            x_TD = [f.exp() for f in x_TD]",
    ],
)
def test_arithmetic_in_a_forward_is_found(statement):
    assert len(arithmetic_in_forward(f"class M:\n    def forward(self, x_TD):\n        {statement}")) == 1


def test_what_a_forward_may_do():
    calls = "x = ops.add(self.norm(x), x)\n        for b in self.layers:\n            x = b(x, batch, a[b.rope])"
    assert (
        arithmetic_in_forward(f"class M:\n    def forward(self, x, batch, a):\n        {calls}\n        return x") == []
    )
    assert arithmetic_in_forward("class M:\n    def forward(self, x):\n        return [None] * 3") == []
    assert (
        arithmetic_in_forward("class M:\n    def forward(self, x):\n        isinstance(x, family.A | family.B)") == []
    )
    assert arithmetic_in_forward("class M:\n    def __init__(self, n, h):\n        self.width = n * h") == []


# ---------------------------------------------------------------- nothing that a file says is run


def dangers(source: str, may_import_by_name: bool = False) -> list[str]:
    """Ways for data to become code: computed imports, eval, pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                bad = [a.name for a in names if a.name.split(".")[0] in PICKLES]
            case ast.ImportFrom(module=module, names=names):
                bad = [module] if module and module.split(".")[0] in PICKLES else []
                if module == "importlib" and not may_import_by_name:
                    bad += [a.name for a in names if a.name == "import_module"]
                if module in ("torch", "numpy"):
                    bad += [a.name for a in names if a.name == "load"]
            case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" | "__import__" as name)):
                bad = [name]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in keywords)
                bad = [] if safe else ["torch.load without weights_only=True"]
            case ast.Call(func=ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="load"), keywords=keywords):
                # True is found below; what is computed may be True
                said = any(k.arg == "allow_pickle" and isinstance(k.value, ast.Constant) for k in keywords)
                bad = [] if said else ["np.load without allow_pickle=False"]
            case ast.Attribute(attr="import_module") if not may_import_by_name:
                bad = ["import_module"]
            case ast.keyword(arg="allow_pickle" | "trust_remote_code" as name, value=ast.Constant(value=True)):
                bad = [name]
            case _:
                continue
        found += [f"{type(node).__name__}: {name}" for name in bad]
    return found


PICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


# a constant table of our own modules; a function that a user names at the command line
BY_NAME = {SOURCE / "__init__.py", SOURCE / "train" / "objectives" / "judges.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_data_becomes_code(path):
    assert dangers(path.read_text(), may_import_by_name=path in BY_NAME) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from importlib import import_module",
        "import importlib\nimportlib.import_module(name)",
        "__import__(name)",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_danger_is_found(source):
    assert len(dangers(source)) == 1
    assert dangers("torch.load(file, weights_only=True, map_location='meta')") == []
    assert dangers("np.load(file, allow_pickle=False)") == []


def test_public_names_are_where_the_package_says():
    """The one import by name reads a constant table, of our own modules."""
    import gemkit

    for name, module in gemkit._PUBLIC.items():
        assert module.split(".")[0] == "gemkit"
        assert getattr(gemkit, name).__name__ == name


# ---------------------------------------------------------------- what works without torch

WITHOUT_TORCH = [
    "gemkit",
    "gemkit.errors",
    "gemkit.files",
    "gemkit.memory",
    "gemkit.family",
    "gemkit.text",
    "gemkit.images",
    "gemkit.generate",
    "gemkit.program.ir",
    "gemkit.executors.native.lower",
    "gemkit.program.saved",
    "gemkit.executors.native.packfile",
    "gemkit.executors.native.writer",
    "gemkit.executors.native.executor",
    "gemkit.runtime.pack_cache",
    "gemkit.runtime.native",
    "gemkit.runtime.checkpoint_weights",
    "gemkit.weights.report",
    "gemkit.weights.formats.base",
    "gemkit.weights.formats.safetensors",
    "gemkit.weights.formats.gguf",
    "gemkit.weights.formats.torch_checkpoint",
    "gemkit.weights.formats.npz",
    "gemkit.weights.mask_decoder",
    "gemkit.weights.formats.shards",
    "gemkit.weights.maps",
    "gemkit.weights.config_hf",
    "gemkit.weights.config_gguf",
    "gemkit.weights.config_vision",
    "gemkit.weights.formats.gguf_writer",
    "gemkit.weights.hub",
    "gemkit.weights.describe",
    "gemkit.weights.fit",
    "gemkit.weights.formats.sniff",
    "gemkit.weights.checkpoint",
    "gemkit.weights.resolve",
    "gemkit.adapters.resolve",
    "gemkit.images",
    "gemkit.images.coco",
    "gemkit.images.masks",
    "gemkit.images.overlay",
    "gemkit.inspect",
    "gemkit.inspect.cost",
    "gemkit.inspect.compare",
    "gemkit.inspect.tree",
    "gemkit.parallel.layout",
    "gemkit.parallel.keras",
    "gemkit.detections",
    "gemkit.gemma",
    "gemkit.cli",
]


def test_these_modules_do_not_import_torch():
    """One after the other in one fresh process, so that the first that does is named."""
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", program, *WITHOUT_TORCH], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
