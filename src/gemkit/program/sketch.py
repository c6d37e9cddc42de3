"""The coarse copy of an output table that the native executor screens rows with (`csrc/kernels/sketch.h`).

Of the 262,144 rows of a table a few hundred can still be the best for a given hidden state; reading 2 bits a weight of
all of them tells which. The copy is of the table turned by a random rotation: signs, then a Walsh-Hadamard transform of
blocks, which is its own inverse up to the signs and leaves every inner product as it is. What rounding to 2 bits leaves of
a row then has no direction of its own, so for a hidden state x the product's error is close to a normal variable of
standard deviation |x| |left| / sqrt(columns).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gemkit.ops import Quantized

TILE = 16
_SEED = 0x67656D6D61
# The spacing of four levels that leaves the least of a normal variable: 0.9957 of its standard deviation
# (J. Max, Quantizing for minimum distortion, 1960, table II).
_SPACING = 0.9957
_PIECE = 1 << 23  # elements turned at a time


def block(columns: int) -> int:
    """Length of the blocks of the transform: the largest power of two that divides the columns."""
    return columns & -columns


def signs(columns: int) -> np.ndarray:
    """(columns,) float32 of 1 and -1: the random part of the rotation, the same every time."""
    generator = np.random.Generator(np.random.Philox(_SEED))
    return generator.choice(np.array([-1.0, 1.0], np.float32), columns)


def tile_bytes(columns: int) -> int:
    return 64 + -(-columns // 16) * 64


def nbytes(rows: int, columns: int) -> int:
    return -(-rows // TILE) * tile_bytes(columns)


def rotate(x: Tensor) -> Tensor:
    """The rotation of the last axis, float32."""
    columns = x.shape[-1]
    size = block(columns)
    y = (x.float() * torch.from_numpy(signs(columns))).unflatten(-1, (-1, size))
    width = 1
    while width < size:  # butterflies at distances 1, 2, 4, ...
        pairs = y.unflatten(-1, (-1, 2, width))
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    return (y / size**0.5).flatten(-2)


def sketch(table: Tensor | Quantized) -> Iterator[np.ndarray]:
    """The tiles of a table's copy, some at a time, as bytes (tiles, tile_bytes)."""
    rows, columns = table.shape
    step = max(TILE, _PIECE // columns // TILE * TILE)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = table.narrow_rows(start, count).dequantize() if isinstance(table, Quantized) else table[start : start + count]
        yield _tiles(rotate(part.float()))


def _tiles(turned: Tensor) -> np.ndarray:
    rows, columns = turned.shape
    spacing = _SPACING * turned.square().mean(-1, keepdim=True).sqrt()
    levels = torch.floor(turned / torch.where(spacing > 0, spacing, 1.0) + 2.0).clamp_(0, 3) - 1.5
    # Levels that are nearest to a row are shorter than it, and a product with what it points to comes out too small. The
    # scale that makes what is left orthogonal to the row itself does not err on the rows that matter.
    along = (turned * levels).sum(-1, keepdim=True)
    scale = (turned.square().sum(-1, keepdim=True) / torch.where(along > 0, along, 1.0)).half().float()
    codes, left = levels + 1.5, turned - scale * levels
    # rounded up: a bound must not be too small
    error = (left.square().sum(-1).sqrt() / columns**0.5 * (1 + 2**-10)).half()
    tiles, chunks = -(-rows // TILE), -(-columns // 16)
    padded = np.zeros((tiles * TILE, chunks * 16), np.uint8)
    padded[:rows, :columns] = codes.to(torch.uint8).numpy()
    # (tile, row, chunk, part of the chunk, column of the part) -> (tile, chunk, row, column), a part for each 2 bits
    parts = padded.reshape(tiles, TILE, chunks, 4, 4).transpose(3, 0, 2, 1, 4)
    packed = parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6
    out = np.zeros((tiles, tile_bytes(columns)), np.uint8)
    for at, values in ((0, scale[:, 0].half()), (32, error)):
        halves = np.zeros(tiles * TILE, np.float16)
        halves[:rows] = values.numpy()
        out[:, at : at + 32] = halves.reshape(tiles, TILE).view(np.uint8)
    out[:, 64:] = packed.reshape(tiles, -1)
    return out
