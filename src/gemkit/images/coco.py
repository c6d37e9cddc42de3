"""Boxes and masks as COCO writes them (https://cocodataset.org/#format-data), both ways.

A box is [x, y, width, height] in pixels from the top left corner. A mask is {"size": [height, width], "counts": ...}:
the lengths of its runs, column by column from the top left, of pixels outside and inside by turns, outside first.
Counts are a list, or a string of six bits a character. COCO's third form, polygons, is refused: how they are filled
is a matter of their library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from gemkit.errors import ImageError

MAX_PIXELS = 1 << 28  # of a mask that a file describes: its runs are short however many pixels they promise

Found = tuple[str, Sequence[float], "np.ndarray | None"]  # label, (left, top, right, bottom), mask (height, width)


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


def read_annotation(found: Mapping[str, Any], categories: Mapping[int, str] | None = None) -> Found:
    """(label, (left, top, right, bottom), mask or None): the inverse of `annotation`.

    Args:
        categories: names by id, for an annotation that has a `category_id`.

    Raises:
        ImageError: if the box, the mask or the category is missing or malformed.
    """
    label, category_id = found.get("category"), found.get("category_id")
    if label is None and isinstance(category_id, int):
        label = (categories or {}).get(category_id)
    if not isinstance(label, str):
        raise ImageError(f"no category of that name or id: {found.get('category', category_id)!r}")
    bbox = found.get("bbox")
    if not _numbers(bbox) or len(bbox) != 4:
        raise ImageError(f"{label!r}: bbox is {bbox!r}; need [x, y, width, height]")
    x, y, width, height = (float(number) for number in bbox)
    segmentation = found.get("segmentation")
    return label, (x, y, x + width, y + height), None if segmentation is None else from_rle(segmentation)


def document(pictures: Iterable[tuple[str, int, int, Iterable[Found]]]) -> dict[str, Any]:
    """A whole data set in COCO's form: `images`, `categories`, `annotations`, with ids from 1.

    Args:
        pictures: (file name, width, height, what is in it). Masks are marked `iscrowd`, as COCO marks run lengths.
    """
    images, annotations = [], []
    ids: dict[str, int] = {}
    for image_id, (name, width, height, things) in enumerate(pictures, 1):
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for label, box, mask_YX in things:
            entry = annotation(label, box, mask_YX)
            category_id = ids.setdefault(entry.pop("category"), len(ids) + 1)
            entry |= {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
            annotations.append(entry | {"iscrowd": int(mask_YX is not None)})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "categories": categories, "annotations": annotations}


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


def from_rle(rle: Any) -> np.ndarray:
    """The mask (height, width) of bool that run lengths describe, given as a list or a string.

    Raises:
        ImageError: if they are anything else, or do not fill their size exactly.
    """
    if isinstance(rle, list):
        raise ImageError("a segmentation of polygons is not read: turn it into run lengths (pycocotools: annToRLE)")
    size, counts = (rle.get("size"), rle.get("counts")) if isinstance(rle, Mapping) else (None, None)
    if not _numbers(size, whole=True) or len(size) != 2 or min(size) < 0 or size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"the size of a mask is [height, width] of at most {MAX_PIXELS:,} pixels, not {size!r}")
    if isinstance(counts, str | bytes):
        counts = decompress(counts)
    if not _numbers(counts, whole=True):
        raise ImageError(f"the counts of a mask are a string or a list of whole numbers, not {type(counts).__name__}")
    height, width = size
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ImageError(f"the counts of a mask of {height} x {width} add up to {sum(counts):,}, or one is negative")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(height, width, order="F")


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


def decompress(text: str | bytes) -> list[int]:
    """The inverse of `compress`.

    Raises:
        ImageError: if a character is none of these 64, or the last number is not complete.
    """
    counts: list[int] = []
    number = shift = 0
    for code in text if isinstance(text, bytes) else map(ord, text):
        group = code - 48
        if not 0 <= group < 64:
            raise ImageError(f"{chr(code)!r} is no character of a compressed mask")
        number |= (group & 31) << shift
        shift += 5
        if shift > 40:
            raise ImageError("a run of a compressed mask is longer than any picture")
        if not group & 32:
            if group & 16:
                number -= 1 << shift
            counts.append(number + counts[-2] if len(counts) > 2 else number)
            number = shift = 0
    if shift:
        raise ImageError("a compressed mask ends within a number")
    return counts


def _numbers(value: Any, whole: bool = False) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list of finite numbers, as JSON brings them."""
    if not isinstance(value, list | tuple):
        return False
    kinds = (int,) if whole else (int, float)
    return all(isinstance(v, kinds) and not isinstance(v, bool) and abs(v) < 2**53 for v in value)
