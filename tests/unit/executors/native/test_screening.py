"""The sketch of an output table: its rotation is the same every time, its size what the kernels read."""

import numpy as np

from gemkit.executors.native import screening


def test_signs_are_ones_the_same_every_time():
    signs = screening.signs(2048)
    assert signs.dtype == np.float32
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.1
    assert np.array_equal(signs, screening.signs(2048))
    assert np.array_equal(signs[:640], screening.signs(640))


def test_bytes_of_a_sketch():
    """For 16 rows: a scale each, and 2 bits a weight in whole vectors."""
    assert screening.tile_bytes(640) == 64 + 640 * 16 * 2 // 8
    assert screening.nbytes(33, 640) == 3 * screening.tile_bytes(640)
