"""The ops that turn codes into a mask: convolutions over a small picture.

B  masks    C  channels    I, O  channels in and out    Y, X  rows and columns    D  width of the codebook
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv2d(x_BIYX: Tensor, weight_OIYX: Tensor, bias_O: Tensor) -> Tensor:
    """Convolution to a picture of the same size, (B, O, Y, X).

    Zeros around the picture are divided between both ends of each axis, an odd one goes to the bottom or right: what
    TensorFlow and XLA call SAME.
    """
    rows, columns = weight_OIYX.shape[2:]
    padding = [(columns - 1) // 2, columns // 2, (rows - 1) // 2, rows // 2]
    return F.conv2d(F.pad(x_BIYX, padding), weight_OIYX, bias_O)


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
