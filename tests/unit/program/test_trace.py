"""A Program says what a module does: run op by op, it gives the module's own numbers."""

import pytest
import torch

from gemkit import nn, ops
from gemkit.errors import ModelError
from gemkit.executors.native.lower import lower
from gemkit.inspect.cost import image_flops
from gemkit.nn import Batch
from gemkit.ops.symbolic import OPS
from gemkit.program.ir import Boundaries, Memory, Program, Value, Weight, count
from gemkit.program.trace import trace, trace_tower
from support.tiny import TOWER, tiny, tokens

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
            case Boundaries():
                return batch
            case _:
                return operand

    for node in program.nodes:
        result = getattr(ops, node.op)(**{name: real(operand) for name, operand in node.operands.items()})
        results = result if isinstance(result, tuple) else (result,)
        sizes = {"T": len(batch), "R": len(rows)}
        for value, array in zip(node.results, results, strict=True):
            assert array.numel() == count(value.shape, sizes), f"{node.op}: {tuple(array.shape)} is not {value.shape}"
            assert str(array.dtype) == f"torch.{value.dtype}", f"{node.op}: {array.dtype} is not {value.dtype}"
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
    assert "window=(7, 0)" in text


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


def test_nodes_know_the_module_that_called_them():
    scopes = {(node.op, node.scope) for node in trace(randomised("gemma-2-27b")).nodes}
    assert ("attention", "layers.3.self_attn") in scopes
    assert ("linear", "layers.0.mlp.gate_proj") in scopes
    assert ("add", "layers.0") in scopes
    assert ("linear", "lm_head") in scopes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_values_have_the_dtypes_that_are_computed(dtype):
    """Gemma 2, whose final cap gives float32 whatever the run dtype."""
    module = randomised("gemma-2-27b").to(dtype)
    batch, rows = Batch.of(tokens(5)), torch.tensor([4])
    interpreted(trace(module), module, batch, module.new_state(1), rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_program_goes_to_json_and_back(name):
    program = trace(randomised(name))
    again = Program.from_json(program.to_json())
    assert again == program
    assert lower(again).steps == lower(program).steps


def test_a_tower_is_traced_for_any_number_of_images():
    program = trace_tower(nn.Multimodal(tiny("paligemma-3b-pt-224"), TOWER))
    assert program.inputs["pixels"].shape == ("I", 3, TOWER.tower.image_size, TOWER.tower.image_size)
    assert program.output.shape == ("T", tiny("paligemma-3b-pt-224").width)
    attention = [node for node in program.nodes if node.op == "attention"]
    assert [node.operands["batch"] for node in attention] == [Boundaries(TOWER.tokens)] * TOWER.tower.depth
    assert Program.from_json(program.to_json()) == program
    # each image's patches see one another: what `inspect.cost` counts for an image
    flops = sum(node.cost(tokens=TOWER.tokens).flops for node in program.nodes)
    assert flops == image_flops(tiny("paligemma-3b-pt-224"), TOWER)


def test_every_op_has_a_spec():
    """What a program names, `ops.symbolic.OPS` describes: the operands of each node are those of its op."""
    for node in trace(randomised("recurrentgemma-2b")).nodes:
        assert tuple(node.operands) == OPS[node.op].operands
