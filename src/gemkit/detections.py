"""Detections: an answer about a picture read as things with boxes and masks, in the picture's own pixels.

`text.places` reads the tokens, `nn.mask_decoder` turns codes into masks, `images` draws and writes what was found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gemkit.errors import WeightsError
from gemkit.generate import Result
from gemkit.images import coco, masks, overlay
from gemkit.images.read import Picture
from gemkit.text import places
from gemkit.text.places import Place

if TYPE_CHECKING:
    import PIL.Image

    from gemkit.nn.mask_decoder import MaskDecoder

VARIABLE = "GEMKIT_MASKS"  # names the file of the mask decoder
NO_MASKS = (
    "boxes only: masks need the published decoder of their codes, vae-oid.npz of google-research/big_vision, to be had "
    f"at gs://big_vision/paligemma/vae-oid.npz; name the file with masks=PATH (--masks), or in {VARIABLE}"
)


@dataclass(frozen=True, eq=False)
class Detection:
    """Something in a picture."""

    label: str  # as the model calls it; empty if it did not say
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the picture
    mask: np.ndarray | None = None  # (height, width) of bool; None: the model gave none, or it was not decoded

    def __str__(self) -> str:
        left, top, right, bottom = (round(edge) for edge in self.box)
        return f"{self.label or '(no label)'} at {left},{top} to {right},{bottom}"


@dataclass(frozen=True, eq=False)
class Detections(Sequence[Detection]):
    """The things that a model found in a picture, in the order in which it named them; a sequence of `Detection`s."""

    picture: Picture
    things: tuple[Detection, ...]
    rest: str  # of the answer, what names no place: a model may also answer in words
    result: Result  # the answer as it was given

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Detection]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.things[index]

    def __len__(self) -> int:
        return len(self.things)

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.things)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.things), *([self.rest] if self.rest else [])])

    def coco(self) -> list[dict[str, Any]]:
        """Each thing as COCO describes one: `bbox` in pixels, `segmentation` as run lengths. Plain data for JSON."""
        return [coco.annotation(thing.label, thing.box, thing.mask) for thing in self.things]

    def overlay(self) -> PIL.Image.Image:
        """The picture with what was found drawn over it. Raises MissingExtraError without Pillow."""
        boxes = [(thing.label, thing.box) for thing in self.things]
        return overlay.overlay(self.picture.pixels, boxes, [thing.mask for thing in self.things])

    def save_overlay(self, path: str | os.PathLike[str]) -> None:
        """Write `overlay` as a PNG file.

        Raises:
            ImageError: if it cannot be written.
        """
        overlay.save(self.overlay(), path)


def read(picture: Picture, result: Result, decoder: MaskDecoder | None = None) -> Detections:
    """An answer as things. Text that names no place stays text.

    Args:
        decoder: turns codes into masks. None: things have boxes alone.
    """
    parsed = places.parse(result.text)
    decoded = {} if decoder is None else _masks([place for place in parsed.places if place.codes], picture, decoder)
    things = tuple(
        Detection(place.label, place.box.pixels(picture.width, picture.height), decoded.get(id(place)))
        for place in parsed.places
    )
    return Detections(picture, things, parsed.rest, result)


def _masks(found: list[Place], picture: Picture, decoder: MaskDecoder) -> dict[int, np.ndarray]:
    """The mask of each place, by its identity."""
    import torch

    if not found:
        return {}
    with torch.inference_mode():
        maps = decoder(torch.tensor([code for place in found for code in place.codes])).numpy()
    width, height = picture.width, picture.height
    return {
        id(place): masks.mask_in_image(map_YX, place.box.pixels(width, height), width, height)
        for place, map_YX in zip(found, maps, strict=True)
    }


def find_masks(path: str | os.PathLike[str] | None = None) -> MaskDecoder | None:
    """The mask decoder in that file, or in the one that the environment names; None if neither is given.

    Raises:
        WeightsError: if it is no such file.
    """
    named = path if path is not None else os.environ.get(VARIABLE) or None
    if named is None:
        return None
    from gemkit.weights.mask_decoder import load_mask_decoder

    try:
        return load_mask_decoder(named)
    except WeightsError as error:
        if path is None:
            raise WeightsError(f"{error} ({VARIABLE} names it)") from error
        raise
