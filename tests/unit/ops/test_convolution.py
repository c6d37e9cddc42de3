"""The convolutions against loops in NumPy, and their gradients against finite differences."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from gemkit import ops
from support.mask_weights import same_conv, transposed_conv


def normal(*shape):
    return torch.from_numpy(np.random.default_rng(len(shape)).normal(size=shape))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (4, 4), (5, 2)])
@pytest.mark.parametrize("size", [(4, 4), (7, 5), (1, 8)])
def test_convolution_equals_the_loop(size, kernel):
    x, weight, bias = normal(2, 3, *size), normal(5, 3, *kernel), normal(5)
    got = ops.conv2d(x, weight, bias)
    expected = np.stack([same_conv(picture, weight.numpy(), bias.numpy()) for picture in x.numpy()])
    torch.testing.assert_close(got, torch.from_numpy(expected))


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_transposed_convolution_equals_the_loop(size, stride, padding):
    x, weight, bias = normal(2, 3, *size), normal(3, 5, 4, 4), normal(5)
    got = ops.conv_transpose2d(x, weight, bias, stride, padding)
    loop = [transposed_conv(picture, weight.numpy(), bias.numpy(), stride, padding) for picture in x.numpy()]
    torch.testing.assert_close(got, torch.from_numpy(np.stack(loop)))


def test_gradients():
    x, weight, bias = normal(1, 2, 4, 5), normal(3, 2, 4, 4), normal(3)
    assert gradcheck(ops.conv2d, [p.requires_grad_(True) for p in (x, weight, bias)])
    x, weight = normal(1, 3, 2, 3), normal(3, 3, 4, 4)
    checked = [p.requires_grad_(True) for p in (x, weight, bias)]
    assert gradcheck(lambda *p: ops.conv_transpose2d(*p, 2, 1), checked)


def test_relu_is_zero_below_zero():
    assert ops.relu(torch.tensor([-2.0, -0.0, 0.0, 3.0])).tolist() == [0, 0, 0, 3]


def test_a_grid_is_in_reading_order():
    x_TD = torch.arange(24.0).view(12, 2)
    grid = ops.to_grid(x_TD, 2, 3)
    assert grid.shape == (2, 2, 2, 3)
    assert grid[0, 0].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert grid[1, 1].tolist() == [[13, 15, 17], [19, 21, 23]]
