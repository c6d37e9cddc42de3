"""The coarse copy of an output table that the native executor screens rows with (`csrc/screening.cpp`). No torch.

Of the 262,144 rows of a table a few hundred can still be the best for a given hidden state; reading 2 bits a weight of
all of them tells which. The copy is of the table turned by a random rotation: signs, then a Walsh-Hadamard transform of
blocks, which leaves every inner product as it is. What rounding to 2 bits leaves of a row then has no direction of its
own, so for a hidden state x the product's error is close to a normal variable of standard deviation
|x| |left| / sqrt(columns).
"""

from __future__ import annotations

import numpy as np

TILE = 16
_SEED = 0x67656D6D61


def signs(columns: int) -> np.ndarray:
    """(columns,) float32 of 1 and -1: the random part of the rotation, the same every time."""
    generator = np.random.Generator(np.random.Philox(_SEED))
    return generator.choice(np.array([-1.0, 1.0], np.float32), columns)


def tile_bytes(columns: int) -> int:
    return 64 + -(-columns // 16) * 64


def nbytes(rows: int, columns: int) -> int:
    return -(-rows // TILE) * tile_bytes(columns)
