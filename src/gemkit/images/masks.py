"""Masks in a picture from the maps, 64 x 64, that the mask decoder makes of codes.

Boxes are (left, top, right, bottom) in pixels of the original picture, measured from its top left corner.

Source: google-research/big_vision, evaluators/proj/paligemma/transfers/segmentation.py, whose resizing is Pillow's:
the filter below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gemkit.errors import ImageError

SIDE = 64


def mask_in_image(map_YX: np.ndarray, box: Sequence[float], width: int, height: int) -> np.ndarray:
    """A decoded map in its place: (height, width) of bool.

    The edges of the box are cut to whole pixels towards zero, the map is stretched to that many, and what is above
    zero belongs to the thing. A box that has no whole pixel gives an empty mask.

    Raises:
        ImageError: if the map is not a square of floating-point numbers, or the box no four numbers.
    """
    map_YX = np.asarray(map_YX)
    if map_YX.shape != (SIDE, SIDE) or map_YX.dtype.kind != "f":
        raise ImageError(f"a map is ({SIDE}, {SIDE}) of floating-point numbers, not {map_YX.shape} of {map_YX.dtype}")
    left, top, right, bottom = (int(edge) for edge in _finite(box))
    mask_YX = np.zeros((height, width), np.bool_)
    if left < right and top < bottom:
        # of a box that reaches out of the picture only what is in it
        y, x = _within(top, bottom, height), _within(left, right, width)
        rows, columns = _stretch(SIDE, bottom - top, y - top), _stretch(SIDE, right - left, x - left)
        mask_YX[np.ix_(y, x)] = rows @ map_YX @ columns.T > 0
    return mask_YX


def _finite(box: Sequence[float]) -> list[float]:
    edges = [float(edge) for edge in box]
    if len(edges) != 4 or not all(math.isfinite(edge) for edge in edges):
        raise ImageError(f"the box {tuple(box)} is not four numbers: left, top, right, bottom")
    return edges


def _within(low: int, high: int, size: int) -> np.ndarray:
    return np.arange(max(low, 0), max(min(high, size), 0))


def _stretch(before: int, after: int, wanted: np.ndarray | None = None) -> np.ndarray:
    """The matrix (after, before) that resizes an axis bilinearly; of its rows those `wanted`, or all.

    Each new pixel is the mean of the old ones near its centre, weighted by a triangle: one old pixel wide to either
    side, or one new pixel where the axis shrinks, so that no old pixel is passed over.
    """
    scale = before / after
    reach = max(scale, 1.0)
    centers = ((np.arange(after) if wanted is None else wanted)[:, None] + 0.5) * scale
    weights = np.maximum(1.0 - np.abs(np.arange(before) + 0.5 - centers) / reach, 0.0)
    return weights / weights.sum(1, keepdims=True)
