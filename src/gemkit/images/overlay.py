"""Labelled boxes and translucent masks, drawn with Pillow over a copy of the picture.

The order is masks, frames (large ones first), labels, so that nothing small is covered. A frame lies within its box:
its outermost pixels are the box's own. A label keeps its colour from one picture to the next.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gemkit.errors import ImageError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Color = tuple[int, int, int]
Edges = tuple[int, int, int, int]  # left, top, right, bottom in whole pixels; the last two are the first outside

# Far apart in hue or lightness, and none of them close to skin, sky or grass.
COLORS: tuple[Color, ...] = (
    (230, 30, 60), (0, 110, 255), (255, 205, 0), (0, 165, 80), (175, 60, 230), (255, 125, 0),
    (0, 205, 225), (255, 80, 185), (165, 225, 0), (120, 70, 20), (0, 50, 150), (255, 160, 140),
)  # fmt: skip
MASK_OPACITY = 0.45
MAX_LABEL = 200  # characters
MIN_SIZE = 6  # pixels a line of text

# Tried in turn for labels beyond ASCII, which is about all that Pillow's own font knows.
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf")


def overlay(
    pixels_YXC: np.ndarray,
    places: Iterable[tuple[str, Sequence[float]]],
    masks: Sequence[np.ndarray | None] | None = None,
    font: str | os.PathLike[str] | None = None,
) -> Image:
    """The picture with boxes, masks and labels drawn over it.

    Args:
        pixels_YXC: the original picture, (height, width, 3) of uint8; it is not changed.
        places: label and (left, top, right, bottom) in pixels. Parts outside of the picture are cut off.
        masks: for each place (height, width) of bool, or None.
        font: a TrueType or OpenType file for the labels.

    Raises:
        ImageError: if the arrays have other shapes, a box is malformed, or the font cannot be opened.
        MissingExtraError: if Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise MissingExtraError("drawing", "vision") from None

    pixels_YXC = np.asarray(pixels_YXC)
    if pixels_YXC.ndim != 3 or pixels_YXC.shape[2] != 3 or pixels_YXC.dtype != np.uint8 or not pixels_YXC.size:
        raise ImageError(f"a picture is (height, width, 3) of uint8, not {pixels_YXC.shape} of {pixels_YXC.dtype}")
    height, width, _ = pixels_YXC.shape
    places = list(places)
    masks = list(masks) if masks is not None else [None] * len(places)
    if len(masks) != len(places):
        raise ImageError(f"{len(masks)} masks for {len(places)} places; each has one, or None")
    frames = [_on_pixels(label, box, width, height) for label, box in places]
    colors = label_colors(label for label, _ in places)
    line = max(1, round(math.sqrt(width * height) / 220))

    image = Image.fromarray(pixels_YXC)
    for (label, _), mask_YX in zip(places, masks, strict=True):
        if mask_YX is not None:
            _draw_mask(image, _checked(mask_YX, label, width, height), colors[label], max(1, line - 1))
    draw = ImageDraw.Draw(image)
    drawn = [(frame, label) for frame, (label, _) in zip(frames, places, strict=True) if frame is not None]
    for (left, top, right, bottom), label in sorted(drawn, key=lambda item: -_area(item[0])):
        thin = min(right - left, bottom - top) <= 2 * line  # Pillow draws the outline of one row two rows high
        fill = colors[label] if thin else None
        draw.rectangle((left, top, right - 1, bottom - 1), fill, None if thin else colors[label], line)
    for frame, label in drawn:
        _draw_label(draw, frame, label, colors[label], font, width, height)
    return image


def save(image: Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG file, whatever the path ends with: other formats blur the edges of boxes.

    Raises:
        ImageError: if it cannot be written.
    """
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise ImageError(f"cannot write {os.fspath(path)}: {error}") from error


def label_colors(labels: Iterable[str]) -> dict[str, Color]:
    """A colour for each label, the same in every picture unless two labels of one picture have the same hash.

    More labels than there are colours share them.
    """
    chosen: dict[str, int] = {}
    for label in sorted(set(labels)):
        first = zlib.crc32(label.encode("utf-8", "replace"))
        options = [(first + step) % len(COLORS) for step in range(len(COLORS))]
        used = list(chosen.values())
        chosen[label] = min(options, key=used.count)  # the first of the least used
    return {label: COLORS[number] for label, number in chosen.items()}


def _on_pixels(label: str, box: Sequence[float], width: int, height: int) -> Edges | None:
    """Edges rounded to whole pixels, at least one pixel, cut to the picture; None if nothing is left."""
    edges = [float(edge) for edge in box]
    if len(edges) != 4 or not all(map(math.isfinite, edges)) or edges[2] < edges[0] or edges[3] < edges[1]:
        raise ImageError(f"the box of {label!r} is {tuple(box)}; need left <= right and top <= bottom")
    left, right = _span(edges[0], edges[2], width)
    top, bottom = _span(edges[1], edges[3], height)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    if high < 0 or low > size:
        return 0, 0
    first, last = math.floor(low + 0.5), math.floor(high + 0.5)
    if first == last:  # narrower than a pixel: the one that its middle is in
        first = min(max(math.floor((low + high) / 2), 0), size - 1)
        last = first + 1
    return max(first, 0), min(last, size)


def _area(frame: Edges) -> int:
    return (frame[2] - frame[0]) * (frame[3] - frame[1])


def _checked(mask_YX: np.ndarray, label: str, width: int, height: int) -> np.ndarray:
    mask_YX = np.asarray(mask_YX)
    if mask_YX.shape != (height, width) or mask_YX.dtype != np.bool_:
        raise ImageError(
            f"the mask of {label!r} is {mask_YX.shape} of {mask_YX.dtype}; need ({height}, {width}) of bool"
        )
    return mask_YX


def _draw_mask(image: Image, mask_YX: np.ndarray, color: Color, line: int) -> None:
    """Mix the colour into the masked pixels, and draw their outline inwards; the picture's edge is no outline."""
    from PIL import Image

    inner_YX = mask_YX
    for _ in range(line):
        wide_YX = np.pad(inner_YX, 1, constant_values=True)
        inner_YX = inner_YX & wide_YX[:-2, 1:-1] & wide_YX[2:, 1:-1] & wide_YX[1:-1, :-2] & wide_YX[1:-1, 2:]
    tinted = Image.blend(image, Image.new("RGB", image.size, color), MASK_OPACITY)
    image.paste(color, mask=Image.fromarray(mask_YX))
    image.paste(tinted, mask=Image.fromarray(inner_YX))


def _draw_label(
    draw, frame: Edges, label: str, color: Color, font: str | os.PathLike[str] | None, width: int, height: int
) -> None:
    """The label on a plate above its box, or in it where there is no room, within the picture."""
    size = min(max(round(math.sqrt(width * height) / 38), 12), height // 2)
    text = _readable(label)
    if size < MIN_SIZE or not text:
        return
    face = _font(os.fspath(font), size) if font is not None else _font_for(text, size)
    if face is None:
        raise ImageError(f"the font {font} cannot be opened")
    ascent, descent = face.getmetrics()
    padding = max(2, ascent // 4)
    while face.getlength(text) > width - 2 * padding:
        text = text.removesuffix("…")[:-1].rstrip() + "…"
        if text == "…":
            return
    plate_width, plate_height = math.ceil(face.getlength(text)) + 2 * padding, ascent + descent + padding // 2
    left, top = min(frame[0], width - plate_width), frame[1] - plate_height
    if top < 0:
        top = min(frame[1], height - plate_height)
    draw.rectangle((left, top, left + plate_width - 1, top + plate_height - 1), fill=color)
    light = np.dot(color, (0.299, 0.587, 0.114)) > 140
    draw.text((left + padding, top + ascent + padding // 4), text, "black" if light else "white", face, anchor="ls")


def _readable(label: str) -> str:
    """One line of at most `MAX_LABEL` characters, without control characters."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    return text if len(text) <= MAX_LABEL else text[:MAX_LABEL] + "…"


def _font_for(text: str, size: int) -> FreeTypeFont:
    if not text.isascii():
        for name in FONTS:
            if (face := _font(name, size)) is not None:
                return face
    from PIL import ImageFont

    return ImageFont.load_default(size)  # type: ignore[return-value]  # with a size it is a FreeTypeFont


@lru_cache(64)
def _font(name: str, size: int) -> FreeTypeFont | None:
    """A font by the path of its file, or by a name that Pillow looks for in the system's folders."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None
