"""The modules of an adapter against the formula, written out."""

import pytest
import torch

from gemkit.adapters.layers import EmbeddingLoRA, LoRA
from gemkit.nn.layers import Embedding


def filled(adapter):
    """With random numbers instead of zeros, in float64."""
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(weight.numel()))
    return adapter.double()


def test_a_low_rank_change():
    adapter, x_TI = filled(LoRA(6, 8, 2, 0.5)), torch.randn(3, 6, dtype=torch.float64)
    expected = 0.5 * x_TI @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    torch.testing.assert_close(adapter(x_TI), expected)
    adapter.strength = 2.0
    torch.testing.assert_close(adapter(x_TI), 2 * expected)
    adapter.strength = 0.0
    assert not adapter(x_TI).any()


def test_heads_have_an_a_each_and_share_one_b():
    adapter, x_TI = filled(LoRA(6, 8, 3, 0.5, heads=2)), torch.randn(5, 6, dtype=torch.float64)
    a_NRI = adapter.lora_A.weight.unflatten(0, (2, 3))
    expected = 0.5 * torch.einsum("ti,nri,or->tno", x_TI, a_NRI, adapter.lora_B.weight).flatten(1)
    torch.testing.assert_close(adapter(x_TI), expected)
    assert repr(adapter).startswith("LoRA(\n  rank=3, scale=0.5, heads=2")


def test_inputs_are_dropped_while_training_alone():
    adapter, x_TI = filled(LoRA(64, 8, 4, 1.0, dropout=0.5)), torch.ones(4, 64, dtype=torch.float64)
    plain = adapter.eval()(x_TI)
    assert torch.equal(plain, adapter(x_TI))
    assert not torch.equal(plain, adapter.train()(x_TI))


@pytest.mark.parametrize("scale_dtype", ["run", "bfloat16"])
def test_rows_of_an_embedding_are_scaled_as_its_own(scale_dtype):
    embedding = Embedding(10, 6, 6**0.5, scale_dtype)
    adapter, tokens_T = filled(EmbeddingLoRA(embedding, 2, 0.5)), torch.tensor([3, 3, 9])
    scale = torch.tensor(6**0.5, dtype=torch.float64 if scale_dtype == "run" else torch.bfloat16).double()
    rows_TR = adapter.lora_A.weight[tokens_T] * scale
    torch.testing.assert_close(adapter(tokens_T), 0.5 * rows_TR @ adapter.lora_B.weight.T)
