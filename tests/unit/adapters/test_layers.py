"""The modules of an adapter against the formula, written out."""

import pytest
import torch
from torch.nn import Parameter

from gemkit.adapters.layers import DoRA, EmbeddingDoRA, EmbeddingLoRA, HeadRows, LoRA, TokenRows
from gemkit.nn.layers import Embedding


def filled(adapter):
    """With random numbers instead of zeros, in float64."""
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(weight.numel()))
    return adapter.double()


def test_a_low_rank_change():
    adapter, x_TI = filled(LoRA(6, 8, 2, 0.5)), torch.randn(3, 6, dtype=torch.float64)
    expected = 0.5 * x_TI @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    y_TO, weight = torch.randn(3, 8, dtype=torch.float64), torch.zeros(8, 6)
    torch.testing.assert_close(adapter(y_TO, x_TI, weight, None), y_TO + expected)
    adapter.strength = 2.0
    torch.testing.assert_close(adapter(y_TO, x_TI, weight, None), y_TO + 2 * expected)
    adapter.strength = 0.0
    assert torch.equal(adapter(y_TO, x_TI, weight, None), y_TO)


def test_heads_have_an_a_each_and_share_one_b():
    adapter, x_TI = filled(LoRA(6, 8, 3, 0.5, heads=2)), torch.randn(5, 6, dtype=torch.float64)
    a_NRI = adapter.lora_A.weight.unflatten(0, (2, 3))
    expected = 0.5 * torch.einsum("ti,nri,or->tno", x_TI, a_NRI, adapter.lora_B.weight).flatten(1)
    torch.testing.assert_close(adapter.change(x_TI), expected)
    assert repr(adapter).startswith("LoRA(\n  rank=3, scale=0.5, heads=2")


def test_inputs_are_dropped_while_training_alone():
    adapter, x_TI = filled(LoRA(64, 8, 4, 1.0, dropout=0.5)), torch.ones(4, 64, dtype=torch.float64)
    given = torch.zeros(4, 8, dtype=torch.float64), x_TI, torch.zeros(8, 64), None
    plain = adapter.eval()(*given)
    assert torch.equal(plain, adapter(*given))
    assert not torch.equal(plain, adapter.train()(*given))


@pytest.mark.parametrize("scale_dtype", ["run", "bfloat16"])
def test_rows_of_an_embedding_are_scaled_as_its_own(scale_dtype):
    embedding = Embedding(10, 6, 6**0.5, scale_dtype)
    adapter, tokens_T = filled(EmbeddingLoRA(embedding, 2, 0.5)), torch.tensor([3, 3, 9])
    scale = torch.tensor(6**0.5, dtype=torch.float64 if scale_dtype == "run" else torch.bfloat16).double()
    rows_TR = adapter.lora_A.weight[tokens_T] * scale
    torch.testing.assert_close(adapter.change(tokens_T), 0.5 * rows_TR @ adapter.lora_B.weight.T)


def test_dora_gives_the_changed_weight_rows_of_its_lengths():
    """W' = m (W + s B A) / |W + s B A|, by rows; what is not multiplied is a bias."""
    adapter, x_TI = filled(DoRA(6, 8, 2, 0.5)), torch.randn(3, 6, dtype=torch.float64)
    weight, bias = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    changed = weight + 0.5 * adapter.lora_B.weight @ adapter.lora_A.weight
    changed = adapter.magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    y_TO = x_TI @ weight.T + bias
    torch.testing.assert_close(adapter(y_TO, x_TI, weight, bias), x_TI @ changed.T + bias)
    adapter.strength = 0.5
    torch.testing.assert_close(adapter(y_TO, x_TI, weight, bias), x_TI @ (weight + changed).T / 2 + bias)
    adapter.strength = 0.0
    assert torch.equal(adapter(y_TO, x_TI, weight, bias), y_TO)


def test_no_gradient_runs_through_doras_lengths():
    """With |W + s B A| held fixed at c, the derivative by A is that of m / c (W x + s B A x)."""
    adapter, x_TI = filled(DoRA(6, 8, 2, 0.5)), torch.randn(3, 6, dtype=torch.float64)
    weight, given = torch.randn(8, 6, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    (adapter(x_TI @ weight.T, x_TI, weight, None) * given).sum().backward()
    a, b, m = (p.detach().requires_grad_() for p in (adapter.lora_A.weight, adapter.lora_B.weight, adapter.magnitude))
    length = (weight + 0.5 * b @ a).norm(dim=1).detach()
    (m / length * (x_TI @ (weight + 0.5 * b @ a).T) * given).sum().backward()
    for ours, theirs in zip((adapter.lora_A.weight, adapter.lora_B.weight, adapter.magnitude), (a, b, m), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_dora_of_an_embedding_gives_the_table_columns_of_its_lengths():
    embedding = Embedding(10, 6, 3.0, "run").double()
    torch.nn.init.normal_(embedding.weight)
    adapter, tokens_T = filled(EmbeddingDoRA(embedding, 2, 0.5)), torch.tensor([3, 3, 9])
    changed = embedding.weight + 0.5 * adapter.lora_A.weight @ adapter.lora_B.weight.T
    changed = adapter.magnitude * changed / changed.norm(dim=0)
    x_TD = embedding(tokens_T)
    torch.testing.assert_close(adapter(x_TD, tokens_T, embedding.weight), 3 * changed[tokens_T])


def test_dropout_of_dora_drops_what_its_gain_multiplies_too():
    """As PEFT: y + (g - 1) W d + g s B A d, with d what dropout left of x."""
    adapter, x_TI = filled(DoRA(64, 8, 4, 1.0, dropout=0.5)).train(), torch.ones(4, 64, dtype=torch.float64)
    weight = torch.randn(8, 64, dtype=torch.float64)
    adapter.dropped = lambda x: x * torch.arange(64).remainder(2)
    low, y_TO = adapter.lora_B.weight @ adapter.lora_A.weight, x_TI @ weight.T
    gain, left = adapter.magnitude / (weight + low).norm(dim=1), adapter.dropped(x_TI)
    expected = y_TO + (gain - 1) * (left @ weight.T) + gain * (left @ low.T)
    torch.testing.assert_close(adapter(y_TO, x_TI, weight, None), expected)


def test_the_bias_of_b_is_multiplied_too():
    adapter, x_TI = filled(LoRA(6, 8, 2, 0.5, bias=True)), torch.randn(3, 6, dtype=torch.float64)
    low = x_TI @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T + adapter.lora_B.bias
    torch.testing.assert_close(adapter.change(x_TI), 0.5 * low)


def test_tokens_have_rows_of_their_own():
    ids, rows = (3, 9), Parameter(torch.randn(2, 6, dtype=torch.float64))
    x_TD, tokens_T = torch.randn(4, 6, dtype=torch.float64), torch.tensor([9, 2, 3, 9])
    adapter = TokenRows(ids, rows, 3.0, "run")
    expected = torch.stack([3 * rows[1], x_TD[1], 3 * rows[0], 3 * rows[1]])
    assert torch.equal(adapter(x_TD, tokens_T, None), expected)
    adapter.strength = 0.25
    torch.testing.assert_close(adapter(x_TD, tokens_T, None), 0.75 * x_TD + 0.25 * expected)
    head, y_TV = HeadRows(ids, rows), torch.randn(4, 12, dtype=torch.float64)
    expected = y_TV.clone()
    expected[:, [3, 9]] = x_TD @ rows.T
    assert torch.equal(head(y_TV, x_TD, None, None), expected)
