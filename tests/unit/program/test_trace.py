"""A Program says what a module does: run op by op, it gives the module's own numbers."""

import pytest
import torch

from gemkit import nn, ops
from gemkit.errors import ModelError
from gemkit.executors.native.lower import lower
from gemkit.nn import Batch
from gemkit.program.ir import BATCH, Memory, Program, Value, Weight, count
from gemkit.program.trace import trace
from support.tiny import tiny, tokens

NAMES = ["gemma-2b", "gemma-2-27b", "gemma-3-1b", "recurrentgemma-2b"]


def randomised(name: str) -> nn.Decoder:
    torch.manual_seed(0)
    module = nn.Decoder(tiny(name))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.1)
    return module.eval()


def interpreted(
    program: Program, module: nn.Decoder, batch: Batch, state: nn.State, rows: torch.Tensor
) -> torch.Tensor:
    """The program on real arrays: each node is a call of the op that it names."""
    given = {"tokens": batch.tokens, "positions": batch.positions, "rows": rows}
    values = {value.number: given[name] for name, value in program.inputs.items()}

    def real(operand):
        match operand:
            case Value(number=number):
                return values[number]
            case Weight(name=name):
                return module.get_parameter(name)
            case Memory(layer=layer):
                return state.layers[layer]
            case tuple():
                return tuple(map(real, operand))
            case _:
                return batch if operand is BATCH else operand

    for node in program.nodes:
        result = getattr(ops, node.op)(**{name: real(operand) for name, operand in node.operands.items()})
        results = result if isinstance(result, tuple) else (result,)
        sizes = {"T": len(batch), "R": len(rows)}
        for value, array in zip(node.results, results, strict=True):
            assert array.numel() == count(value.shape, sizes), f"{node.op}: {tuple(array.shape)} is not {value.shape}"
            values[value.number] = array
    return values[program.output.number]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_program_computes_what_the_module_does(name):
    module = randomised(name)
    program = trace(module)
    batch, rows = Batch.of(tokens(11, 3, 1)), torch.tensor([14, 2])
    expected = module(batch, module.new_state(3), rows)
    assert torch.equal(interpreted(program, module, batch, module.new_state(3), rows), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_read_and_every_byte_is_counted(name):
    module = randomised(name)
    program = trace(module)
    assert set(program.weights()) == {name for name, _ in module.named_parameters()}
    once = sum(node.cost().weight_bytes for node in program.nodes if node.op != "embed")
    assert once == sum(p.nbytes for p in module.parameters())  # the table is counted where the head reads all of it


def test_a_program_prints_as_the_story_of_a_token():
    text = str(trace(randomised("gemma-3-1b")))
    assert "= embed(%0, embed_tokens.weight float32 (320, 16), scale=" in text.splitlines()[0]
    assert "attention(" in text
    assert "memory[25]" in text
    assert "window=8" in text


def test_what_is_no_op_cannot_be_traced():
    module = randomised("gemma-2b")

    class Doubled(nn.Decoder):
        def forward(self, batch, state=None, rows=None, features_ED=None):
            return super().forward(batch, state, rows, features_ED) * 2

    module.__class__ = Doubled
    with pytest.raises(ModelError, match="Doubled cannot be traced after linear"):
        trace(module)


def test_a_weight_that_no_module_owns_cannot_be_traced():
    module = randomised("gemma-2b")
    module.layers[0].mlp.forward = lambda x: ops.linear(x, torch.zeros(x.shape[-1], x.shape[-1]))
    with pytest.raises(ModelError, match="that is no weight of the model"):
        trace(module)


@pytest.mark.parametrize("name", NAMES)
def test_lowered_steps_cover_every_node_once(name):
    program = trace(randomised(name))
    covered = [node.result.number for step in lower(program).steps for node in step.nodes]
    computed = [node.result.number for node in program.nodes if node.op not in ("split_heads", "merge_heads")]
    assert sorted(covered) == sorted(computed)


@pytest.mark.parametrize("name", NAMES)
def test_projections_of_one_input_are_one_step(name):
    lowered = lower(trace(randomised(name)))
    widths = {len(step.weights) for step in lowered.steps if step.op == "linear"}
    assert widths <= {1, 2, 3}
    assert sum(step.op == "linear" for step in lowered.steps) == 4 * len(tiny(name).layers) + 1


def test_an_op_that_the_executor_lacks_is_named():
    program = trace(randomised("gemma-2b"))
    odd = type(program.nodes[0])("fft", program.nodes[3].operands, program.nodes[3].results)
    with pytest.raises(ModelError, match="fft is no op of the native executor"):
        lower(Program((*program.nodes[:3], odd), program.inputs, program.output))
