"""The recurrence and the convolution against plain loops, and their gradients against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from gemkit import ops
from gemkit.nn import Batch
from gemkit.ops import recurrence


def naive_scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    h, rows = torch.zeros_like(b[0]), []
    for a_R, b_R in zip(a, b, strict=True):
        h = a_R * h + b_R
        rows.append(h)
    return torch.stack(rows)


def naive_unit(x, input_gate, recurrent_gate, param, lengths):
    """The equations of Griffin (arXiv:2402.19427), section 2.4, one row at a time, in the dtype of the inputs."""
    rows, at = [], 0
    for length in lengths:
        h = torch.zeros_like(x[0])
        for t in range(at, at + length):
            a = torch.sigmoid(param.neg()) ** (8 * torch.sigmoid(recurrent_gate[t]))
            gated = torch.sigmoid(input_gate[t]) * x[t]
            h = gated if t == at else a * h + torch.sqrt(1 - a**2) * gated
            rows.append(h)
        at += length
    return torch.stack(rows)


def naive_conv(x, weight, bias, lengths):
    parts = [
        torch.nn.functional.conv1d(part.T[None], weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        for part in x.split(lengths)
    ]
    return torch.cat([part[0, :, :length].T for part, length in zip(parts, lengths, strict=True)])


def ragged(lengths) -> Batch:
    return Batch.of([[0] * length for length in lengths])


def inputs(rows: int, channels: int, dtype=torch.float64, seed: int = 0):
    """x, both gates, and decays from near 0 to near 1."""
    generator = torch.Generator().manual_seed(seed)
    x, input_gate, recurrent_gate = (2 * torch.randn(rows, channels, dtype=dtype, generator=generator) for _ in "xir")
    return x, input_gate, recurrent_gate, torch.linspace(-9, 3, channels, dtype=dtype)


B = recurrence._BLOCK


@pytest.mark.parametrize("rows", [1, 2, B - 1, B, B + 1, 2 * B, 2 * B + 1, 5 * B - 3, B * B + 1, B * B + B + 1])
def test_a_scan_equals_the_loop_forwards_and_backwards(rows):
    """Around the borders of blocks, and of the blocks of their ends."""
    torch.manual_seed(0)
    a, b, dh = torch.rand(rows, 3, dtype=torch.float64), *torch.randn(2, rows, 3, dtype=torch.float64)
    ours, theirs = ([x.clone().requires_grad_(True) for x in (a, b)] for _ in range(2))
    got, expected = ops.linear_scan(*ours), naive_scan(*theirs)
    torch.testing.assert_close(got, expected)
    got.backward(dh)
    expected.backward(dh)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_scan_is_safe_with_decays_near_0_and_near_1():
    """Over 1,000 rows in float32: exact zeros, decays whose products vanish, and ones that hardly decay."""
    torch.manual_seed(0)
    decays = torch.tensor([0.0, 1e-30, 1e-5, 0.5, 0.999, 1 - 1e-6, 1.0])
    a, b = decays.expand(1000, -1).clone(), torch.randn(1000, len(decays))
    a[500] = 0.0  # starts anew
    exact = naive_scan(a.double(), b.double())
    got = ops.linear_scan(a, b)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)  # float32 sums of up to 500 terms
    assert torch.equal(got[500], b[500])


def test_a_scan_has_few_dependent_steps(monkeypatch):
    """On devices where each step is a launch their number is the time: at most 150 for 4,096 rows."""
    steps = 0
    addcmul = torch.addcmul

    def counted(*args, **kwargs):
        nonlocal steps
        steps += 1
        return addcmul(*args, **kwargs)

    monkeypatch.setattr(torch, "addcmul", counted)
    ops.linear_scan(torch.rand(4096, 1), torch.rand(4096, 1))
    assert 4096**0.5 < steps <= 150


@pytest.mark.parametrize("rows", [1, 3, B + 2])
def test_gradients_of_the_scan(rows):
    torch.manual_seed(0)
    a, b = torch.rand(rows, 2, dtype=torch.float64), torch.randn(rows, 2, dtype=torch.float64)
    assert gradcheck(ops.linear_scan, [x.requires_grad_(True) for x in (a, b)])


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 4], [1, 1]])
def test_gradients_of_the_unit_and_the_convolution(lengths):
    batch = ragged(lengths)
    x, input_gate, recurrent_gate, _ = inputs(sum(lengths), 3)
    param = torch.linspace(-3, 1, 3, dtype=torch.float64)  # where the derivative of the root is below its bound
    checked = [p.requires_grad_(True) for p in (x, input_gate, recurrent_gate, param)]
    assert gradcheck(lambda *p: ops.rg_lru(*p, batch), checked)
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    checked = [p.requires_grad_(True) for p in (x, weight, bias)]
    assert gradcheck(lambda *p: ops.causal_conv1d(*p, batch), checked)


@pytest.mark.parametrize("lengths", [[1000], [400, 1, 37, 562]])
def test_the_unit_equals_its_equations(lengths):
    """A thousand rows, in float64: value and all gradients; and the value in float32, where pieces are computed."""
    batch = ragged(lengths)
    ours, theirs = ([p.requires_grad_(True) for p in inputs(1000, 6)] for _ in range(2))
    got, expected = ops.rg_lru(*ours, batch), naive_unit(*theirs, lengths)
    torch.testing.assert_close(got, expected)
    got.sin().sum().backward()
    expected.sin().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    with torch.inference_mode():
        narrow = ops.rg_lru(*(p.float() for p in ours), batch)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected.detach(), rtol=1e-4, atol=1e-4)  # sums of up to 1,000 terms


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1000], [1], [2, 1, 3], [400, 1, 37, 562]])
def test_the_convolution_equals_torch_on_each_sequence(lengths, taps):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((sum(lengths), 5), (5, taps), (5,))]
    ours, theirs = ([t.clone().requires_grad_(True) for t in tensors] for _ in range(2))
    got, expected = ops.causal_conv1d(*ours, ragged(lengths)), naive_conv(*theirs, lengths)
    torch.testing.assert_close(got, expected)
    got.sin().sum().backward()
    expected.sin().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_pieces_equal_the_whole(monkeypatch):
    """Without gradients, rows are computed a piece at a time; odd sizes, and pieces shorter than the convolution."""
    torch.manual_seed(0)
    batch = ragged([30, 7])
    parts = inputs(37, 4)
    weight, bias = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    whole = ops.rg_lru(*parts, batch), ops.causal_conv1d(parts[0], weight, bias, batch)
    for elements in (1, 8, 20):
        monkeypatch.setattr(recurrence, "_PIECE", elements)
        with torch.no_grad():
            pieces = ops.rg_lru(*parts, batch), ops.causal_conv1d(parts[0], weight, bias, batch)
        torch.testing.assert_close(pieces, whole)


def test_the_recurrence_is_float32_whatever_the_inputs_are():
    """In bf16 a decay of 0.999 is 1, and a sum of many small inputs stands still."""
    rows = 2000
    x, gates = torch.ones(rows, 1), torch.zeros(rows, 1)
    param = torch.tensor([-8.0])
    exact = ops.rg_lru(x, gates, gates, param, ragged([rows]))
    narrow = ops.rg_lru(x.bfloat16(), gates.bfloat16(), gates.bfloat16(), param.bfloat16(), ragged([rows]))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, rtol=2**-8, atol=0)  # one rounding to bf16, at the end


def test_blocks_side_by_side_equal_one_block_diagonal_matrix():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 12), torch.randn(3, 4, 4), torch.randn(3, 4)
    expected = x @ torch.block_diag(*weight) + bias.flatten()
    torch.testing.assert_close(ops.block_linear(x, weight, bias), expected)
