"""Boxes and masks as COCO writes them (https://cocodataset.org/#format-data).

A box is [x, y, width, height] in pixels from the top left corner. A mask is {"size": [height, width], "counts": ...}:
the lengths of its runs, column by column from the top left, of pixels outside and inside by turns, outside first.
Counts are a list, or a string of six bits a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemkit.errors import ImageError


def annotation(label: str, box: Sequence[float], mask_YX: np.ndarray | None = None) -> dict[str, Any]:
    """One thing in a picture as COCO describes it, by the name of its category.

    Its area is that of the mask, or of the box without one. It has no score: the model gives none.

    Args:
        box: (left, top, right, bottom) in pixels.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    bbox = [left, top, right - left, bottom - top]
    found: dict[str, Any] = {"category": label, "bbox": bbox, "area": bbox[2] * bbox[3]}
    if mask_YX is not None:
        found |= {"area": float(np.count_nonzero(mask_YX)), "segmentation": to_rle(mask_YX)}
    return found


# ---------------------------------------------------------------- run lengths


def to_rle(mask_YX: np.ndarray, compressed: bool = True) -> dict[str, Any]:
    """A mask (height, width) as run lengths, ready for JSON.

    Raises:
        ImageError: if it has other than two axes.
    """
    mask_YX = np.asarray(mask_YX)
    if mask_YX.ndim != 2:
        raise ImageError(f"a mask is (height, width), not {mask_YX.shape}")
    flat = mask_YX.astype(np.bool_).ravel(order="F")
    turns = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    begins = [0, *turns.tolist()] if not flat[:1].any() else [0, 0, *turns.tolist()]  # the first run is outside
    counts = np.diff([*begins, flat.size]).tolist()
    return {"size": list(mask_YX.shape), "counts": compress(counts) if compressed else counts}


def compress(counts: Sequence[int]) -> str:
    """Run lengths as COCO's string.

    From the fourth on, a count is written as its difference from the one two before it, which has the same colour. A
    number is cut into groups of five bits, the low ones first; a group is the character 48 further on, with bit 6 set
    if more follow. Bit 5 of the last group is the sign.
    """
    text = []
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        while True:
            group, number = number & 31, number >> 5
            if number == (-1 if group & 16 else 0):
                break
            text.append(chr(48 + (group | 32)))
        text.append(chr(48 + group))
    return "".join(text)
