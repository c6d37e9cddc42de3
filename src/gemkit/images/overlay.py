"""Labelled boxes and translucent masks, drawn over the original picture.

    masks, then frames with the large ones first, then labels: what is small or text is never covered

A frame is drawn within its box: its outermost pixels are the box's own. A thin line of the opposite lightness inside it
keeps it visible on any ground. A label keeps its colour from one picture to
the next, and stands on a plate that stays in the picture and keeps clear of others where it can.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gemkit.errors import ImageError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Color = tuple[int, int, int]

# Far apart in hue or lightness, and none of them close to skin, sky or grass.
COLORS: tuple[Color, ...] = (
    (230, 30, 60),
    (0, 110, 255),
    (255, 205, 0),
    (0, 165, 80),
    (175, 60, 230),
    (255, 125, 0),
    (0, 205, 225),
    (255, 80, 185),
    (165, 225, 0),
    (120, 70, 20),
    (0, 50, 150),
    (255, 160, 140),
)
MASK_OPACITY = 0.45
MAX_LABEL = 200  # characters
MIN_SIZE = 6  # pixels a line of text

# Tried in turn where Pillow's own font, which knows little more than ASCII, lacks a letter of a label.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "msgothic.ttc",
)


class _Frame(NamedTuple):
    """A box on whole pixels: the first of each axis, and the one after the last."""

    left: int
    top: int
    right: int
    bottom: int


def overlay(
    pixels_YXC: np.ndarray,
    places: Iterable[tuple[str, Sequence[float]]],
    masks: Sequence[np.ndarray | None] | None = None,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """The picture with what was found in it.

    Args:
        pixels_YXC: the original picture, (height, width, 3) of uint8; it is left as it is.
        places: label and (left, top, right, bottom) in pixels. What reaches out of the picture is cut off.
        masks: for each place (height, width) of bool, or None.
        font: a TrueType or OpenType file for the labels; None: one that has their letters, if there is one.

    Raises:
        ImageError: if the arrays have other shapes, a box is no box, or the font cannot be opened.
        MissingExtraError: if Pillow is not installed.
    """
    try:
        from PIL import Image
        from PIL.ImageDraw import Draw
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

    canvas_YXC = pixels_YXC.copy()
    for (label, _), mask_YX in zip(places, masks, strict=True):
        if mask_YX is not None:
            _tint(canvas_YXC, _checked(mask_YX, label, width, height), colors[label], max(1, line - 1))
    drawn = [(frame, label) for frame, (label, _) in zip(frames, places, strict=True) if frame is not None]
    for frame, label in sorted(drawn, key=lambda item: -_area(item[0])):
        _draw_frame(canvas_YXC, frame, colors[label], line)

    image = Image.fromarray(canvas_YXC)
    _draw_labels(Draw(image), drawn, colors, font, width, height)
    return image


def save(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG file, whatever the path ends with: other formats blur the edges of boxes.

    Raises:
        ImageError: if it cannot be written.
    """
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise ImageError(f"cannot write {os.fspath(path)}: {error}") from error


def label_colors(labels: Iterable[str]) -> dict[str, Color]:
    """A colour for each label, the same in every picture unless two labels of one picture meet on it.

    More labels than there are colours share them.
    """
    chosen: dict[str, int] = {}
    for label in sorted(set(labels)):
        first = zlib.crc32(label.encode("utf-8", "replace"))
        options = [(first + step) % len(COLORS) for step in range(len(COLORS))]
        used = list(chosen.values())
        chosen[label] = min(options, key=used.count)  # the first of the least used
    return {label: COLORS[number] for label, number in chosen.items()}


# ---------------------------------------------------------------- boxes and masks


def _on_pixels(label: str, box: Sequence[float], width: int, height: int) -> _Frame | None:
    """Edges rounded to whole pixels, at least one pixel, cut to the picture; None if nothing is left."""
    edges = [float(edge) for edge in box]
    if len(edges) != 4 or not all(map(math.isfinite, edges)) or edges[2] < edges[0] or edges[3] < edges[1]:
        raise ImageError(f"the box of {label!r} is {tuple(box)}; need left <= right and top <= bottom")
    left, right = _span(edges[0], edges[2], width)
    top, bottom = _span(edges[1], edges[3], height)
    return _Frame(left, top, right, bottom) if left < right and top < bottom else None


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    if high < 0 or low > size:
        return 0, 0
    first, last = math.floor(low + 0.5), math.floor(high + 0.5)
    if first == last:  # narrower than a pixel: the one that its middle is in
        first = min(max(math.floor((low + high) / 2), 0), size - 1)
        last = first + 1
    return max(first, 0), min(last, size)


def _contrast(color: Color) -> Color:
    """Black on what is light, white on what is dark."""
    return (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)


def _area(frame: _Frame) -> int:
    return (frame.right - frame.left) * (frame.bottom - frame.top)


def _draw_frame(canvas_YXC: np.ndarray, frame: _Frame, color: Color, line: int) -> None:
    inside = canvas_YXC[frame.top : frame.bottom, frame.left : frame.right]
    kept = inside[line:-line, line:-line].copy()
    inside[:] = color
    inside[line:-line, line:-line] = kept // 2 + np.array(_contrast(color), np.uint8) // 2
    inside[line + 1 : -line - 1, line + 1 : -line - 1] = kept[1:-1, 1:-1]


def _checked(mask_YX: np.ndarray, label: str, width: int, height: int) -> np.ndarray:
    mask_YX = np.asarray(mask_YX)
    if mask_YX.shape != (height, width) or mask_YX.dtype != np.bool_:
        raise ImageError(
            f"the mask of {label!r} is {mask_YX.shape} of {mask_YX.dtype}; need ({height}, {width}) of bool"
        )
    return mask_YX


def _tint(canvas_YXC: np.ndarray, mask_YX: np.ndarray, color: Color, line: int) -> None:
    """Mix the colour into what is masked, and draw its outline, inwards."""
    inner_YX = mask_YX
    for _ in range(line):
        inner_YX = _eroded(inner_YX)
    outline_YX = mask_YX & ~inner_YX
    for channel, ink in enumerate(color):
        plane_YX = canvas_YXC[..., channel]
        mixed = np.rint((1 - MASK_OPACITY) * np.arange(256) + MASK_OPACITY * ink).astype(np.uint8)  # by what is there
        np.copyto(plane_YX, mixed[plane_YX], where=inner_YX)
        plane_YX[outline_YX] = ink


def _eroded(mask_YX: np.ndarray) -> np.ndarray:
    """Without the pixels that have a neighbour outside; the picture's edge is no outside."""
    inner_YX = mask_YX.copy()
    inner_YX[1:] &= mask_YX[:-1]
    inner_YX[:-1] &= mask_YX[1:]
    inner_YX[:, 1:] &= mask_YX[:, :-1]
    inner_YX[:, :-1] &= mask_YX[:, 1:]
    return inner_YX


# ---------------------------------------------------------------- labels


def _draw_labels(
    draw: ImageDraw,
    places: Sequence[tuple[_Frame, str]],
    colors: Mapping[str, Color],
    path: str | os.PathLike[str] | None,
    width: int,
    height: int,
) -> None:
    texts = [_readable(label) for _, label in places]
    size = min(max(round(math.sqrt(width * height) / 38), 12), height // 2)
    if size < MIN_SIZE:
        return
    font = _font_for(texts, path, size)
    taken: list[_Frame] = []
    for (frame, label), text in zip(places, texts, strict=True):
        plate = _fit(text, font, width, height)
        if plate is None:
            continue
        at = _place_plate(plate, frame, width, height, taken)
        taken.append(at)
        draw.rectangle((at.left, at.top, at.right - 1, at.bottom - 1), fill=colors[label])
        corner = at.left + plate.padding, at.top + plate.baseline
        draw.text(corner, plate.text, _contrast(colors[label]), font, anchor="ls")


class _Plate(NamedTuple):
    text: str
    width: int
    height: int
    padding: int
    baseline: int  # from the top


def _readable(label: str) -> str:
    """One line, not endless, of nothing that no font can have, such as control characters."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    return text if len(text) <= MAX_LABEL else text[:MAX_LABEL] + "…"


def _fit(text: str, font: FreeTypeFont, width: int, height: int) -> _Plate | None:
    """As much of the label as fits into the picture; None if that is nothing."""
    ascent, descent = font.getmetrics()
    padding = max(2, ascent // 4)
    plate_height = ascent + descent + padding // 2

    def plate_width(text: str) -> int:
        return math.ceil(font.getlength(text)) + 2 * padding

    if not text or plate_height > height:
        return None
    while plate_width(text) > width:
        shorter = text.removesuffix("…")[:-1].rstrip()
        if not shorter:
            return None
        text = shorter + "…"
    return _Plate(text, plate_width(text), plate_height, padding, ascent + padding // 4)


def _place_plate(plate: _Plate, frame: _Frame, width: int, height: int, taken: Sequence[_Frame]) -> _Frame:
    """Above the box, in it or below it, where the plate covers the least of others; always within the picture."""
    best, least = None, math.inf
    for top in (frame.top - plate.height, frame.top, frame.bottom, frame.bottom - plate.height):
        for left in (frame.left, frame.right - plate.width):
            if not 0 <= top <= height - plate.height:
                continue
            left = min(max(left, 0), width - plate.width)
            where = _Frame(left, top, left + plate.width, top + plate.height)
            covered = sum(_common(where, other) for other in taken)
            if covered < least:
                best, least = where, covered
    if best is None:  # every side of the box is too close to an edge of the picture
        left, top = min(frame.left, width - plate.width), min(frame.top, height - plate.height)
        best = _Frame(left, top, left + plate.width, top + plate.height)
    return best


def _common(a: _Frame, b: _Frame) -> int:
    across = min(a.right, b.right) - max(a.left, b.left)
    down = min(a.bottom, b.bottom) - max(a.top, b.top)
    return max(across, 0) * max(down, 0)


def _font_for(texts: Iterable[str], path: str | os.PathLike[str] | None, size: int) -> FreeTypeFont:
    """One font for all labels of a picture: that of the file, or the first of ours with the most of their letters."""
    if path is not None:
        font = _font(os.fspath(path), size)
        if font is None:
            raise ImageError(f"the font {os.fspath(path)} cannot be opened")
        return font
    letters = sorted(set("".join(texts)) - {" "})
    best = _own_font(size)
    fewest = _missing(best, letters)
    for name in FONTS:
        font = _font(name, size) if fewest else None
        if font is not None and (missing := _missing(font, letters)) < fewest:
            best, fewest = font, missing
    return best


def _own_font(size: int) -> FreeTypeFont:
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


def _missing(font: FreeTypeFont, letters: Iterable[str]) -> int:
    """How many of these letters the font draws as it draws what is no character."""

    def shape(letter: str) -> bytes:
        return bytes(font.getmask(letter))  # type: ignore[arg-type]  # it has a buffer

    nothing = shape("\uffff")
    return sum(shape(letter) == nothing for letter in letters)
