"""From nodes to steps: each op once, projections fused, numbered as the C++ executor numbers them."""

import re
from pathlib import Path

import pytest

from gemkit import nn
from gemkit.errors import ModelError
from gemkit.executors.native.buffers import RENAMES
from gemkit.executors.native.lower import OPS, Sketch, lower, packed_weights, plain_weights
from gemkit.program.ir import Node, Program, Value, Weight
from gemkit.program.trace import trace, trace_tower
from support.tiny import TOWER, tiny

NAMES = ["gemma-2b", "gemma-2-27b", "gemma-3-1b", "recurrentgemma-2b"]
HEADER = Path(__file__).parents[4] / "csrc" / "executor.h"


def test_the_executor_numbers_its_ops_as_they_are_written():
    body = re.search(r"enum Op : int32_t \{[^\n]*\n(.*?)\};", HEADER.read_text(), re.S)
    assert body
    numbers = {name.lower(): int(number) for name, number in re.findall(r"(\w+) = (\d+)", body[1])}
    assert numbers.pop("ops") == len(OPS)
    assert numbers == {{"causal_conv1d": "conv1d"}.get(op, op): number for number, op in enumerate(OPS)}


@pytest.mark.parametrize("name", NAMES)
def test_steps_cover_every_node_once(name):
    program = trace(nn.Decoder(tiny(name)))
    covered = [node.result.number for step in lower(program).steps for node in step.nodes]
    computed = [node.result.number for node in program.nodes if node.op not in RENAMES]
    assert sorted(covered) == sorted(computed)


def test_steps_of_a_tower_cover_every_node_once():
    program = trace_tower(nn.Multimodal(tiny("paligemma-3b-pt-224"), TOWER))
    lowered = lower(program)
    covered = [node.result.number for step in lowered.steps for node in step.nodes]
    assert sorted(covered) == sorted(n.result.number for n in program.nodes if n.op not in RENAMES)
    assert sum(step.op == "attend_within" for step in lowered.steps) == TOWER.tower.depth
    assert {w.name for w in [*packed_weights(lowered), *plain_weights(lowered)]} == set(program.weights())
    kernel = next(w for w in packed_weights(lowered) if "patch_embedding" in w.name)
    assert kernel.shape == (TOWER.tower.width, 3 * TOWER.tower.patch_size**2)


@pytest.mark.parametrize("name", NAMES)
def test_projections_of_one_input_are_one_step(name):
    lowered = lower(trace(nn.Decoder(tiny(name))))
    widths = {len(step.weights) for step in lowered.steps if step.op == "linear"}
    assert widths <= {1, 2, 3}
    assert sum(step.op == "linear" for step in lowered.steps) == 4 * len(tiny(name).layers) + 1


def test_quantized_projections_share_one_quantization_and_dense_ones_have_none():
    x = Value(0, ("T", 32), "float32")
    kinds = ["Q8_0", "bfloat16", "Q4_0"]
    weights = [Weight(f"w{i}", (8, 32), kind, 1) for i, kind in enumerate(kinds)]
    nodes = [
        Node("linear", {"x_TI": x, "weight_OI": w, "bias_O": None}, (Value(i, ("T", 8), "float32"),))
        for i, w in enumerate(weights, 1)
    ]
    steps = lower(Program((Node("embed", EMBED, (x,)), *nodes), {}, nodes[-1].result)).steps
    assert [step.op for step in steps] == ["embed", "quantize", "linear", "linear"]
    assert [[w.kind for w in step.weights] for step in steps[2:]] == [["Q8_0", "Q4_0"], ["bfloat16"]]


EMBED = {"tokens_T": Value(9, ("T",), "int64"), "table_VD": Weight("e", (4, 32), "Q8_0", 1)}
EMBED |= {"scale": 55.4, "scale_dtype": "bfloat16"}


def test_a_scale_is_rounded_as_the_released_embedder_rounds_it():
    x = Value(0, ("T", 32), "float32")
    (step,) = lower(Program((Node("embed", EMBED, (x,)),), {}, x)).steps
    assert step.scalars == (55.5,)


def test_only_a_large_table_is_screened():
    def head(rows: int) -> Program:
        x, y = Value(0, ("R", 32), "float32"), Value(1, ("R", rows), "float32")
        weight = Weight("e", (rows, 32), "Q8_0", 1)
        take = {"x_TD": Value(8, ("T", 32), "float32"), "rows": Value(7, ("R",), "int64")}
        embed = Node("embed", EMBED, (take["x_TD"],))
        linear = Node("linear", {"x_TI": x, "weight_OI": weight, "bias_O": None}, (y,))
        return Program((embed, Node("take_rows", take, (x,)), linear), {}, y)

    sketches = [[p for p in plain_weights(lower(head(n))) if isinstance(p, Sketch)] for n in (16_383, 16_384)]
    assert [len(found) for found in sketches] == [0, 1]


def test_an_op_that_the_executor_lacks_is_named():
    program = trace(nn.Decoder(tiny("gemma-2b")))
    odd = Node("fft", program.nodes[3].operands, program.nodes[3].results)
    with pytest.raises(ModelError, match="fft is no op of the native executor"):
        lower(Program((*program.nodes[:3], odd), program.inputs, program.output))
