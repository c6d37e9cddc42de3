"""The modules that own a weight against torch's own."""

import copy

import pytest
import torch
from torch.nn import ModuleDict, Parameter
from torch.nn import functional as F

from gemkit.adapters.layers import EmbeddingLoRA, LoRA
from gemkit.block_types import KINDS
from gemkit.nn.layers import Embedding, Head, LayerNorm, Linear, RMSNorm, Score
from gemkit.weights.quantize import nearest

IDS = torch.tensor([5, 0, 5, 63])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def drawn(module, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(0, 0.5, generator=generator)
    return module.to(dtype)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def quantized(module, kind="Q8_0"):
    """The module with its weight in blocks of 8 bits, and those made dense."""
    weight = nearest(module.weight, KINDS[kind])
    module.set_param("weight", weight)
    return module, weight.dequantize()


@EVERY_DTYPE
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_torchs(bias, dtype):
    ours, theirs = drawn(Linear(6, 3, bias), dtype), torch.nn.Linear(6, 3, bias, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x = normal(4, 6, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@EVERY_DTYPE
def test_layer_norm_is_torchs_in_float32(dtype):
    ours = drawn(LayerNorm(6, 1e-3), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    theirs = torch.nn.LayerNorm(6, 1e-3, dtype=wide)
    theirs.load_state_dict(ours.state_dict())
    x = 3 + normal(4, 6, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x.to(wide)).to(dtype), rtol=0, atol=0)


@EVERY_DTYPE
def test_rms_norm_is_torchs_with_one_more_than_the_weight(dtype):
    ours, x = drawn(RMSNorm(6, 1e-3), dtype), 3 * normal(4, 6, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.rms_norm(x.to(wide), (6,), 1 + ours.weight.to(wide), 1e-3)
    close = {"rtol": 2**-8} if dtype == torch.bfloat16 else {"rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(ours(x), expected.to(dtype), atol=1e-9, **close)


@pytest.mark.parametrize(("scale_dtype", "scale"), [("run", 3072**0.5), ("bfloat16", 55.5)])
def test_an_embedding_is_scaled_by_a_rounded_number(scale_dtype, scale):
    module = drawn(Embedding(64, 6, 3072**0.5, scale_dtype))
    torch.testing.assert_close(module(IDS), module.weight[IDS] * torch.tensor(scale), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_quantized_table_is_read_in_the_run_dtype(dtype):
    module, dense = quantized(drawn(Embedding(64, 32, 2.0, "run")))
    module.run_dtype = dtype
    assert module(IDS).dtype == (dtype or torch.float32)
    torch.testing.assert_close(module(IDS), dense[IDS].to(dtype or torch.float32) * 2, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_linear_multiplies_the_dense_weight_in_float32(dtype):
    module, dense = quantized(drawn(Linear(32, 5, bias=True)))
    module, x = module.to(dtype), normal(3, 32, dtype=dtype)
    assert module.weight.planes["scales"].dtype == torch.float16  # a cast of the module leaves its blocks alone
    expected = (x.float() @ dense.T).to(dtype) + module.bias
    torch.testing.assert_close(module(x), expected)
    assert str(module) == "Linear(in_features=32, out_features=5, bias=True, Q8_0)"


def test_a_quantized_weight_is_no_parameter_until_a_dense_one_takes_its_place():
    module, dense = quantized(drawn(Linear(32, 5)))
    assert not list(module.parameters())
    module.set_param("weight", Parameter(dense))
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    torch.testing.assert_close(module(normal(2, 32)), normal(2, 32) @ dense.T)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_every_adapter_of_a_linear_adds_its_change(in_blocks):
    module = drawn(Linear(32, 6))
    dense = quantized(module)[1] if in_blocks else module.weight
    first, second = drawn(LoRA(32, 6, 2, 0.5)), drawn(LoRA(32, 6, 3, 2.0))
    second.strength = 0.25
    module.adapters, x = ModuleDict({"a": first, "b": second}), normal(4, 32)
    change = sum(
        factor * adapter.lora_B.weight @ adapter.lora_A.weight for factor, adapter in ((0.5, first), (0.5, second))
    )
    torch.testing.assert_close(module(x), x @ (dense + change).T)


def test_an_adapter_of_an_embedding_changes_no_tied_head():
    table, x = drawn(Embedding(64, 6, 3.0, "run"), torch.bfloat16), normal(2, 6, dtype=torch.bfloat16)
    head = Head(table)
    before = head(x)
    adapter = drawn(EmbeddingLoRA(table, 2, 0.5))  # float32 beside bfloat16
    table.adapters = ModuleDict({"a": adapter})
    change = (0.5 * 3 * adapter.lora_A.weight[IDS] @ adapter.lora_B.weight.T).bfloat16()
    torch.testing.assert_close(table(IDS), 3 * table.weight[IDS] + change, rtol=2**-7, atol=2**-7)
    assert torch.equal(head(x), before)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_head_is_tied_and_capped(cap):
    model = torch.nn.Module()
    model.table = drawn(Embedding(64, 6, 3.0, "run"), torch.bfloat16)
    model.head, x = Head(model.table, cap), normal(2, 6, dtype=torch.bfloat16)
    assert [name for name, _ in model.head.named_parameters()] == []
    assert sum(p.numel() for p in model.parameters()) == 64 * 6
    logits = F.linear(x, model.table.weight)
    expected = logits if cap is None else 2 * torch.tanh(logits.float() / 2)
    torch.testing.assert_close(model.head(x), expected, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.table.weight
    assert (
        str(model.head)
        == f"Head(in_features=6, out_features=64, tied to embed_tokens{'' if cap is None else ', softcap=2'})"
    )


def test_a_score_is_computed_in_the_dtype_of_its_weight():
    module, x = drawn(Score(6)), normal(3, 6, dtype=torch.bfloat16)
    assert module(x).dtype == torch.float32
    torch.testing.assert_close(module(x), x.float() @ module.weight.T)
    assert str(module) == "Score(in_features=6, out_features=1)"


def test_norms_and_tables_print_their_sizes():
    assert str(RMSNorm(6, 1e-6)) == "RMSNorm((6,), eps=1e-06)"
    assert str(LayerNorm(6, 1e-6)) == "LayerNorm((6,), eps=1e-06)"
    assert str(Embedding(64, 6, 1.0, "run")) == "Embedding(64, 6)"
