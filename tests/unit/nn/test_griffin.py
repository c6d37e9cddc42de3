"""The modules of the recurrent mixer against plain loops over tokens."""

import pytest
import torch
from torch.nn import functional as F

from gemkit import family
from gemkit.errors import StateError
from gemkit.nn import Batch
from gemkit.nn.griffin import RGLRU, BlockDiagonal, CausalConv1d, Recurrent
from gemkit.nn.state import RecurrentState

WIDTH, BLOCKS, TAPS = 8, 2, 4  # channels of the recurrence
LAYER = family.Recurrent(WIDTH, BLOCKS, TAPS)
LENGTHS = (5, 1, 2)  # longer than the taps, one token, shorter
CONFIG = family.DecoderConfig(vocab_size=4, width=6, layers=(family.Layer(LAYER, family.Mlp(4)),), max_context=64)
BATCH = Batch.of([[0] * length for length in LENGTHS])


def drawn(module):
    """The module in float64, in which the loops' sums agree to rounding, with random weights."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().requires_grad_(False).parameters():
        parameter.normal_(0, 0.7, generator=generator)
    return module


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def conv(module, x_TR):
    """One sequence."""
    padded = F.pad(x_TR.T[None], (TAPS - 1, 0))
    return F.conv1d(padded, module.weight[:, None], module.bias, groups=WIDTH)[0].T


def gate(module, x_TR):
    return x_TR @ torch.block_diag(*module.weight) + module.bias.flatten()


def unit(module, x_TR):
    """Griffin (arXiv:2402.19427), section 2.4, one sequence; the first token is taken in whole."""
    h, rows = torch.zeros(WIDTH, dtype=x_TR.dtype), []
    for x, i, r in zip(x_TR, gate(module.input_gate, x_TR), gate(module.recurrent_gate, x_TR), strict=True):
        a = torch.sigmoid(-module.recurrent_param) ** (8 * torch.sigmoid(r))
        keep = torch.sqrt(1 - a**2) if rows else 1.0
        h = a * h + keep * torch.sigmoid(i) * x
        rows.append(h)
    return torch.stack(rows)


def mixer(module, x_TD):
    gate_TR = F.gelu(F.linear(x_TD, module.linear_y.weight, module.linear_y.bias), approximate="tanh")
    h_TR = F.linear(x_TD, module.linear_x.weight, module.linear_x.bias)
    h_TR = unit(module.rg_lru, conv(module.conv_1d, h_TR))
    return F.linear(h_TR * gate_TR, module.linear_out.weight, module.linear_out.bias)


def test_gates_are_block_diagonal():
    module, x = drawn(BlockDiagonal(WIDTH, BLOCKS)), normal(3, WIDTH)
    torch.testing.assert_close(module(x), gate(module, x))


@pytest.mark.parametrize(
    ("module", "plain", "width"),
    [
        (CausalConv1d(WIDTH, TAPS), conv, WIDTH),
        (RGLRU(LAYER), unit, WIDTH),
        (Recurrent(CONFIG, LAYER), mixer, CONFIG.width),
    ],
    ids=["conv", "unit", "mixer"],
)
def test_each_sequence_is_computed_by_itself(module, plain, width):
    x = normal(sum(LENGTHS), width)
    expected = torch.cat([plain(drawn(module), part) for part in x.split(LENGTHS)])
    torch.testing.assert_close(module(x, BATCH, None), expected)


@pytest.mark.parametrize("first", [1, 2, 3, 6])
def test_a_mixer_goes_on_from_its_state(first):
    """Cut before, at and after the number of inputs that the convolution remembers; float32 state, hence the bound."""
    module, x, state = drawn(Recurrent(CONFIG, LAYER)), normal(7, CONFIG.width), RecurrentState(LAYER)
    parts, at = [], 0
    for count in (first, 7 - first):
        batch = Batch.of([[0] * count], offsets=[at], slots=[3])
        parts.append(module(x[at : at + count], batch, state))
        state.commit(3)
        at += count
    torch.testing.assert_close(torch.cat(parts), mixer(module, x), rtol=0, atol=1e-6)
    assert state.tail(3).shape == (TAPS - 1, WIDTH)
    torch.testing.assert_close(state.tail(3), F.linear(x[-3:], module.linear_x.weight, module.linear_x.bias))


def test_the_run_dtype_comes_out_and_the_state_is_float32():
    module, state = drawn(Recurrent(CONFIG, LAYER)).bfloat16(), RecurrentState(LAYER)
    x = normal(3, CONFIG.width).bfloat16()
    y = module(x, Batch.of([[0] * 3]), state)
    state.commit(0)
    assert (y.dtype, state.tail(0).dtype, state.hidden(0).dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = mixer(module.double(), x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.03 * expected.abs().max().item())  # 8 bits, 5 ops


def test_a_state_is_for_inference():
    module = drawn(Recurrent(CONFIG, LAYER)).requires_grad_(True)
    with pytest.raises(StateError, match="gradient"):
        module(normal(2, CONFIG.width), Batch.of([[0, 0]]), RecurrentState(LAYER))


def test_they_print_their_sizes():
    text = str(Recurrent(CONFIG, LAYER))
    assert "(conv_1d): CausalConv1d(8, taps=4)" in text
    assert "(input_gate): BlockDiagonal(blocks=2, in_features=4, out_features=4)" in text
    assert "(linear_out): Linear(in_features=8, out_features=6, bias=True)" in text
