"""Sixteen codes to a mask of 64 x 64: the decoder of the VQ-VAE behind PaliGemma's segmentation tokens.

    codes ─ codebook ─ 4 x 4 ─ conv ─ 2 residuals ─ 4 x (ConvT, relu) ─ conv ─► map    8, 16, 32, 64 pixels a side

    T  codes, 16 a mask, in reading order    B  masks    C  channels    Y, X  rows and columns    D  codebook width

A value of the map is positive where the thing is. The models were trained on masks of OpenImages, within the box of
each thing: `images.masks` puts a map in its place in a picture.

Source: google-research/big_vision, evaluators/proj/paligemma/transfers/segmentation.py, after Ning et al.,
arXiv:2301.02229.
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
    """A convolution that keeps the size; the weight is (out, in, rows, columns)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.weight = Parameter(ops.new_weight(*shape))
        self.bias = Parameter(ops.new_weight(shape[0]))

    def forward(self, x_BCYX):
        return ops.conv2d(x_BCYX, self.weight, self.bias)

    def extra_repr(self):
        return str(tuple(self.weight.shape))


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
