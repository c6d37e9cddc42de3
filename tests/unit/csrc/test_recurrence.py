"""Griffin's kernels against the ops, and that cutting a sequence, or dividing its channels, changes no bit."""

import itertools

import numpy as np
import pytest
import torch

from gemkit import ops
from gemkit.nn import Batch


def tensors(seed: int, *shapes) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(1.5 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]


def conv(kernel, x, weight, bias, cuts=(), channels=None, extra=0):
    """All rows in pieces that end at `cuts`, from zeros; x's rows lie `extra` further apart than they are wide."""
    (rows, width), taps = x.shape, weight.shape[1]
    wide = np.full((rows, width + extra), np.nan, np.float32)
    wide[:, :width] = x
    tail, y = np.zeros((taps - 1, width), np.float32), np.full((rows, width), 7, np.float32)
    edges = [0, *cuts, rows]
    for start, end in itertools.pairwise(edges):
        for first, last in channels or [(0, width)]:
            out = y[start:end]
            kernel.call(
                "conv1d", wide[start:end], end - start, width, width + extra, weight, bias, taps, tail, out, first, last
            )
    return y, tail


@pytest.mark.parametrize("width", [1, 16, 40, 100])
@pytest.mark.parametrize("taps", [1, 2, 4, 16])
def test_convolution(kernel, width, taps):
    x, weight, bias = tensors(0, (21, width), (width, taps), width)
    y, tail = conv(kernel, x, weight, bias, extra=5)
    theirs = ops.causal_conv1d(*(torch.from_numpy(a).double() for a in (x, weight, bias)), Batch.of([[0] * 21]))
    np.testing.assert_allclose(y, theirs.numpy(), rtol=1e-5, atol=1e-5)  # a sum of at most 16 products
    np.testing.assert_array_equal(tail, x[21 - taps + 1 :])
    for cuts in ((1,), (1, 2, 3), (10, 11), tuple(range(1, 21))):
        again, tail_again = conv(kernel, x, weight, bias, cuts)
        np.testing.assert_array_equal(again, y)
        np.testing.assert_array_equal(tail_again, tail)
    if width == 100:
        divided, _ = conv(kernel, x, weight, bias, (3,), [(0, 7), (7, 50), (50, 100)])
        np.testing.assert_array_equal(divided, y)


def projected(kernel, x, weight, bias, blocks=None):
    y = np.full_like(x, 7)
    for first, last in blocks or [(0, len(weight))]:
        kernel.call("block_linear", x, len(x), len(weight), weight.shape[1], weight, bias, y, first, last)
    return y


@pytest.mark.parametrize("width", [1, 16, 24, 64, 100, 256])
@pytest.mark.parametrize("blocks", [1, 3])
def test_block_linear(kernel, width, blocks):
    x, weight, bias = tensors(1, (19, blocks * width), (blocks, width, width), (blocks, width))
    y = projected(kernel, x, weight, bias)
    theirs = ops.block_linear(*(torch.from_numpy(a).double() for a in (x, weight, bias))).numpy()
    np.testing.assert_allclose(y, theirs, rtol=1e-5, atol=1e-6 * width)
    for rows in (1, 2, 5, 8, 9):
        part = np.ascontiguousarray(x[3 : 3 + rows])
        np.testing.assert_array_equal(projected(kernel, part, weight, bias), y[3 : 3 + rows])
    np.testing.assert_array_equal(projected(kernel, x, weight, bias, [(i, i + 1) for i in range(blocks)]), y)


def unit(kernel, x, input_gate, recurrent_gate, param, cuts=(), channels=None, hidden=None):
    rows, width = x.shape
    first, y = hidden is None, np.full_like(x, 7)
    state = np.full(width, np.nan, np.float32) if hidden is None else hidden.copy()  # not read in a first row
    edges = [0, *cuts, rows]
    for start, end in itertools.pairwise(edges):
        for channel0, channel1 in channels or [(0, width)]:
            gates = input_gate[start:end], recurrent_gate[start:end]
            fresh = first and start == 0
            kernel.call(
                "rg_lru",
                x[start:end],
                *gates,
                param,
                end - start,
                width,
                fresh,
                state,
                y[start:end],
                channel0,
                channel1,
            )
    return y, state


class Remembered:
    """What the op wants to know of one sequence."""

    def __init__(self, hidden):
        self.h = None if hidden is None else torch.from_numpy(hidden).double()

    def hidden(self, slot):
        return self.h

    def keep_hidden(self, slot, hidden_R):
        self.h = hidden_R


@pytest.mark.parametrize("width", [1, 16, 40, 100])
@pytest.mark.parametrize("goes_on", [False, True])
def test_rg_lru(kernel, width, goes_on):
    x, input_gate, recurrent_gate, (hidden,) = tensors(2, *[(33, width)] * 3, (1, width))
    param = np.linspace(-9, 3, width, dtype=np.float32)  # decays from near 1 to near 0
    given = hidden if goes_on else None
    y, state = unit(kernel, x, input_gate, recurrent_gate, param, hidden=given)
    memory = Remembered(given)
    with torch.no_grad():
        inputs = (torch.from_numpy(a).double() for a in (x, input_gate, recurrent_gate, param))
        theirs = ops.rg_lru(*inputs, Batch.of([[0] * 33]), memory)
    np.testing.assert_allclose(y, theirs.numpy(), rtol=5e-6, atol=5e-6)  # 33 rounded steps, a handful of roundings each
    np.testing.assert_array_equal(state, y[-1])
    for cuts in ((1,), (1, 2, 3), (16, 17), tuple(range(1, 33))):
        again, state_again = unit(kernel, x, input_gate, recurrent_gate, param, cuts, hidden=given)
        np.testing.assert_array_equal(again, y)
        np.testing.assert_array_equal(state_again, state)
    if width == 100:
        divided, _ = unit(kernel, x, input_gate, recurrent_gate, param, (5,), [(0, 9), (9, 64), (64, 100)], given)
        np.testing.assert_array_equal(divided, y)


def test_edges_of_the_recurrence(kernel):
    """Gates that are shut or open, decays of 0 and of 1, infinite and spoilt inputs: as the op has them."""
    values = np.array([0, -0.0, 1e-45, 1e30, -1e30, 200, -200, np.inf, -np.inf, np.nan], np.float32)
    grid = np.stack(np.meshgrid(values, values, values, np.array([-200, 0, 200], np.float32))).reshape(4, 1, -1)
    x, input_gate, recurrent_gate, param = (np.ascontiguousarray(np.repeat(a, 2, 0)) for a in grid)
    hidden = np.ones(x.shape[1], np.float32)
    y, _ = unit(kernel, x, input_gate, recurrent_gate, param[0].copy(), hidden=hidden)
    memory = Remembered(hidden)
    memory.h = memory.h.float()
    with torch.no_grad():
        inputs = (torch.from_numpy(a) for a in (x, input_gate, recurrent_gate, param[0]))
        theirs = ops.rg_lru(*inputs, Batch.of([[0, 0]]), memory).numpy()
    np.testing.assert_allclose(y, theirs, rtol=1e-5, atol=1e-30)


def test_every_instruction_set_gives_the_same_bits(kernels):
    x, input_gate, recurrent_gate, weight, bias = tensors(3, *[(30, 72)] * 3, (3, 24, 24), (3, 24))
    param, taps = np.linspace(-9, 3, 72, dtype=np.float32), tensors(4, (72, 4), 72)
    results = []
    for kernel in kernels.values():
        y = (
            unit(kernel, x, input_gate, recurrent_gate, param)[0],
            projected(kernel, x, weight, bias),
            conv(kernel, x, *taps)[0],
        )
        results.append(np.concatenate(y).view(np.uint32))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
