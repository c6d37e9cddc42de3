"""A Program as data: what it prints, what it costs, and its JSON form, without torch."""

import json
import subprocess
import sys

import pytest

from gemkit.errors import ModelError
from gemkit.program.ir import BATCH, Boundaries, Cost, Memory, Node, Program, Value, Weight, Work, count

TOKENS, X, Y = Value(0, ("T",), "int64"), Value(1, ("T", 8), "float32"), Value(2, ("T", 4), "float32")
TABLE, PROJECTION = Weight("embed.weight", (10, 8), "bfloat16", 160), Weight("out.weight", (4, 8), "Q8_0", 34)
EMBED = Node("embed", {"tokens_T": TOKENS, "table_VD": TABLE, "scale": 2.5}, (X,), "embed", Work(lookup=True))
LINEAR = Node("linear", {"x_TI": X, "weight_OI": PROJECTION, "bias_O": None}, (Y,), "out", Work(row_flops=64))
ATTENTION = Node(
    "attention",
    {"q_TNH": X, "table": (X, Y), "batch": BATCH, "memory": Memory(3), "capped": True},
    (X,),
    "layers.3",
    Work(key_bytes=16, pair_flops=10, window=4),
)
PROGRAM = Program((EMBED, LINEAR, ATTENTION), {"tokens": TOKENS}, Y)


def test_a_line_says_what_is_read_and_given():
    assert str(PROGRAM).splitlines() == [
        "%1 = embed(%0, embed.weight bfloat16 (10, 8), scale=2.5) -> (T, 8)",
        "%2 = linear(%1, out.weight Q8_0 (4, 8)) -> (T, 4)",
        "%1 = attention(%1, (%1, %2), memory[3], capped=True) -> (T, 8)",
    ]


def test_cost_grows_with_tokens_and_context():
    assert EMBED.cost(tokens=3) == Cost(weight_bytes=3 * 16)  # a row each
    assert LINEAR.cost(tokens=3) == Cost(weight_bytes=34, flops=3 * 64)  # the weight once
    # 3 tokens of 10 with a window of 4: the first sees keys 5 to 8, and together they see 4 + 2
    assert ATTENTION.cost(tokens=3, context=10) == Cost(state_bytes=6 * 16, flops=12 * 10)
    within = Node("attention", {"q": X, "batch": Boundaries(5)}, (X,), work=Work(key_bytes=16, pair_flops=10, length=5))
    assert within.cost(tokens=10, context=99) == Cost(flops=10 * 5 * 10)


def test_elements_of_an_open_shape():
    assert count(("T", 8), {"T": 3}) == 24


def test_json_gives_the_program_back(tmp_path):
    assert Program.from_json(PROGRAM.to_json()) == PROGRAM
    PROGRAM.save(tmp_path / "program.json")
    assert Program.load(tmp_path / "program.json") == PROGRAM


def test_json_is_read_without_torch(tmp_path):
    PROGRAM.save(tmp_path / "program.json")
    code = "import sys; from gemkit.program.ir import Program; print(Program.load(sys.argv[1]))"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "program.json"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{PROGRAM}\n")


def changed(**fields) -> str:
    return json.dumps({**json.loads(PROGRAM.to_json()), **fields})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        changed(version=99),
        changed(output=7),
        changed(values=3),
        changed(nodes=[{"op": "add", "scope": "", "operands": {"a": {"file": "x"}}, "results": [], "work": {}}]),
        changed(nodes=[{"op": "add", "scope": "", "operands": {"a": {"weight": "x"}}, "results": [], "work": {}}]),
        changed(nodes=[{"op": "add", "scope": "", "operands": {}, "results": [1], "work": {"speed": 3}}]),
    ],
)
def test_what_is_no_program_is_refused(text):
    with pytest.raises(ModelError):
        Program.from_json(text)


def test_a_file_is_named_in_the_error(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"p\.json"):
        Program.load(tmp_path / "p.json")


def test_an_object_is_no_operand():
    with pytest.raises(ModelError, match="is no operand"):
        Program((Node("f", {"x": object()}, (Y,)),), {}, Y).to_json()
