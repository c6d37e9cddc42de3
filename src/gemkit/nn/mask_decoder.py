"""Sixteen codes to a mask of 64 x 64 and back: the VQ-VAE behind PaliGemma's segmentation tokens.

    codes ─ codebook ─ 4 x 4 ─ conv ─ 2 residuals ─ 4 x (ConvT, relu) ─ conv ─► map    8, 16, 32, 64 pixels a side
    mask ─ 4 x (conv, relu) ─ 2 residuals ─ conv ─ 4 x 4 ─ nearest ─► codes            32, 16, 8, 4

    T  codes, 16 a mask, in reading order    B  masks    C  channels    Y, X  rows and columns    D  codebook width

A value of the map is positive where the thing is. The models were trained on masks of OpenImages, within the box of
each thing: `images.masks` puts a map in its place in a picture, and cuts a mask out of one.

Source: google-research/big_vision, evaluators/proj/paligemma/transfers/segmentation.py (decoder) and
pp/proj/paligemma/segmentation.py (encoder), after Ning et al., arXiv:2301.02229.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch.nn import Module, ModuleList, Parameter

from gemkit import ops
from gemkit.nn.layers import Embedding, ParamModule

CODES = 128  # rows of the codebook
GRID = 4  # codes a side
CHANNELS = 128  # of the decoder before its first enlargement

Shape = tuple[int, int, int, int]  # of a convolution's weight: (out, in, rows, columns)


class Conv2d(ParamModule):
    """A convolution that keeps the size, divided by the stride; the weight is (out, in, rows, columns)."""

    def __init__(self, shape: Shape, stride: int = 1):
        super().__init__()
        self.weight = Parameter(ops.new_weight(*shape))
        self.bias = Parameter(ops.new_weight(shape[0]))
        self.stride = stride

    def forward(self, x_BCYX):
        return ops.conv2d(x_BCYX, self.weight, self.bias, self.stride)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, stride={self.stride}"


class ConvTranspose2d(ParamModule):
    """A convolution that doubles the size, by a kernel of 4 x 4; the weight is (in, out, rows, columns)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = Parameter(ops.new_weight(in_channels, out_channels, 4, 4))
        self.bias = Parameter(ops.new_weight(out_channels))

    def forward(self, x_BCYX):
        return ops.conv_transpose2d(x_BCYX, self.weight, self.bias, stride=2, padding=1)

    def extra_repr(self):
        return str(tuple(self.weight.shape))


class Residual(Module):
    """Three convolutions beside the identity."""

    def __init__(self, shapes: Sequence[Shape]):
        super().__init__()
        self.convs = ModuleList(Conv2d(shape) for shape in shapes)

    def forward(self, x_BCYX):
        first, second, third = self.convs
        h_BCYX = ops.relu(second(ops.relu(first(x_BCYX))))
        return ops.add(x_BCYX, third(h_BCYX))


class Nearest(ParamModule):
    """The number of a codebook's nearest row; the weight is the codebook, (rows, width)."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = Parameter(ops.new_weight(rows, width))

    def forward(self, x_TD):
        return ops.nearest_rows(x_TD, self.weight)

    def extra_repr(self):
        return str(tuple(self.weight.shape))


class MaskDecoder(Module):
    """From codes to maps; `width` is that of the codebook."""

    def __init__(self, width: int):
        super().__init__()
        self.codebook = Embedding(CODES, width, scale=1.0, scale_dtype="run")
        self.enter = Conv2d((CHANNELS, width, 1, 1))
        square, point = (CHANNELS, CHANNELS, 3, 3), (CHANNELS, CHANNELS, 1, 1)
        self.residuals = ModuleList(Residual([square, square, point]) for _ in range(2))
        channels = [CHANNELS, CHANNELS, CHANNELS // 2, CHANNELS // 4, CHANNELS // 8]
        self.enlarge = ModuleList(ConvTranspose2d(*pair) for pair in pairwise(channels))
        self.leave = Conv2d((1, channels[-1], 1, 1))

    def forward(self, codes_T):
        """Codes of masks laid end to end, (B * 16,) integers from 0 to 127, to (B, 64, 64), about -1 to 1."""
        x_BCYX = ops.relu(self.enter(ops.to_grid(self.codebook(codes_T), GRID, GRID)))
        for block in self.residuals:
            x_BCYX = block(x_BCYX)
        for block in self.enlarge:
            x_BCYX = ops.relu(block(x_BCYX))
        return self.leave(x_BCYX).flatten(0, 1)  # of one channel


class MaskEncoder(Module):
    """From masks to codes: to make targets with masks to train on.

    No source gives the widths and kernels of its convolutions but the file of its weights.

    Args:
        shrink: weights of the four convolutions that halve the size.
        residuals: weights of the convolutions of both residual blocks.
        leave: weight of the last convolution, to the width of the codebook.
    """

    def __init__(self, shrink: Sequence[Shape], residuals: Sequence[Sequence[Shape]], leave: Shape):
        super().__init__()
        self.shrink = ModuleList(Conv2d(shape, stride=2) for shape in shrink)
        self.residuals = ModuleList(Residual(shapes) for shapes in residuals)
        self.leave = Conv2d(leave)
        self.codebook = Nearest(CODES, leave[0])

    def forward(self, x_BCYX):
        """Masks (B, 1, 64, 64), -1 outside of the thing and 1 inside, to codes (B * 16,)."""
        for block in self.shrink:
            x_BCYX = ops.relu(block(x_BCYX))
        for block in self.residuals:
            x_BCYX = block(x_BCYX)
        return self.codebook(ops.from_grid(self.leave(x_BCYX)))
