"""The ops that turn codes into a mask and back: convolutions over a small picture, and the codebook's nearest row.

B  masks    C  channels    I, O  channels in and out    Y, X  rows and columns    D  width of the codebook
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(x_BIYX: Tensor, weight_OIYX: Tensor, bias_O: Tensor, stride: int = 1) -> Tensor:
    """Convolution to (B, O, ceil(Y / stride), ceil(X / stride)).

    Zeros around the picture are divided between both ends of each axis, an odd one goes to the bottom or right: what
    TensorFlow and XLA call SAME.
    """
    padding = []
    for size, kernel in zip(x_BIYX.shape[:1:-1], weight_OIYX.shape[:1:-1], strict=True):  # F.pad begins with the last
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x_BIYX, padding), weight_OIYX, bias_O, stride)


def conv_transpose2d(x_BIYX: Tensor, weight_IOYX: Tensor, bias_O: Tensor, stride: int, padding: int) -> Tensor:
    """Each input pixel adds its copy of the kernel to the result, `stride` pixels from its neighbour's.

    `padding` rows and columns are cut off at every edge: (B, O, (Y - 1) * stride + kernel - 2 * padding, ...).
    """
    return F.conv_transpose2d(x_BIYX, weight_IOYX, bias_O, stride, padding)


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`."""
    return F.relu(x)


def to_grid(x_TD: Tensor, rows: int, columns: int) -> Tensor:
    """Vectors in reading order to pictures of their channels: (B * Y * X, D) to (B, D, Y, X)."""
    return x_TD.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 2)


def from_grid(x_BDYX: Tensor) -> Tensor:
    """The inverse of `to_grid`."""
    return x_BDYX.permute(0, 2, 3, 1).flatten(0, 2)


def nearest_rows(x_TD: Tensor, table_VD: Tensor) -> Tensor:
    """The row of the table with the smallest Euclidean distance to each vector: (T,) ids; the first of equals."""
    # |x - row|^2 without |x|^2, which all rows share
    distance_TV = table_VD.square().sum(-1) - 2.0 * x_TD @ table_VD.T
    return torch.argmin(distance_TV, -1)
