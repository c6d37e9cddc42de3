"""Where things are in a picture, as PaliGemma says it: tokens for a box, tokens for a mask, and a label.

    <loc0256><loc0128><loc0767><loc0639> cat ; <loc0300><loc0700><loc0512><loc0900> sleeping dog
    <loc0256><loc0128><loc0767><loc0639><seg012>...<seg101> cat

Four location tokens are a box, in the order y_min, x_min, y_max, x_max, as fractions of the picture's sides: a side is
divided into 1023 equal bins whose 1024 borders have a token each. Sixteen segmentation tokens are a mask within the
box, as codes of `nn.mask_decoder`. The label follows, and ` ; ` stands between two places.

Source: google-research/big_vision, evaluators/proj/paligemma/transfers/segmentation.py, which reads token n as n/1023,
and pp/proj/paligemma/segmentation.py, which writes v as `round(v * 1023)`. Another reading is in circulation: a public
demo of PaliGemma takes n/1024, and so boxes up to a thousandth of a side smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gemkit.errors import TextError

BINS = 1023
CODES = 128  # rows of the mask decoder's codebook
CODES_PER_MASK = 16

_TOKEN = r"<(?:loc[0-9]{4}|seg[0-9]{3})>"
# tokens that stand together, and the text that belongs to them: up to a semicolon or to more tokens
_ITEM = re.compile(rf"(?P<tokens>(?:{_TOKEN})+)(?P<label>(?:(?!{_TOKEN})[^;])*);?")
_PLACE = re.compile(r"((?:<loc[0-9]{4}>){4})((?:<seg[0-9]{3}>){16})?")


@dataclass(frozen=True)
class Box:
    """A rectangle, as fractions of the picture's sides: 0 is the top or left edge, 1 the bottom or right one."""

    y_min: float
    x_min: float
    y_max: float
    x_max: float

    def pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in a picture of that size, measured from its top left corner.

        The size is the original picture's: the model sees it squeezed into a square, and fractions do not change.
        """
        return self.x_min * width, self.y_min * height, self.x_max * width, self.y_max * height

    @classmethod
    def from_pixels(cls, left: float, top: float, right: float, bottom: float, width: int, height: int) -> Box:
        """The inverse of `pixels`."""
        return cls(top / height, left / width, bottom / height, right / width)


@dataclass(frozen=True)
class Place:
    """A thing and where it is."""

    label: str  # empty if the model named none
    box: Box
    codes: tuple[int, ...] = ()  # 16 codes of a mask, or none


@dataclass(frozen=True)
class Parsed:
    """The places in a text, and the text between them."""

    places: tuple[Place, ...]
    rest: str


def parse(text: str) -> Parsed:
    """Read what a model wrote.

    A place is exactly four location tokens, then exactly sixteen segmentation tokens or none, then its label. Whatever
    is no place stays in `rest` as it was written: text, a token too few or too many, a number that is no token's, a
    box without area. Which tokens of a malformed run were meant is not guessed. No text raises an error.
    """
    places: list[Place] = []
    rest: list[str] = []
    end = 0
    for item in _ITEM.finditer(text):
        place = _place(item["tokens"], item["label"].strip())
        if place is None:
            continue  # it stays between `end` and the next place
        places.append(place)
        rest.append(text[end : item.start()].strip())
        end = item.end()
    rest.append(text[end:].strip())
    return Parsed(tuple(places), " ".join(filter(None, rest)))


def _place(tokens: str, label: str) -> Place | None:
    match = _PLACE.fullmatch(tokens)
    if match is None:
        return None
    y_min, x_min, y_max, x_max = _numbers(match[1])
    codes = _numbers(match[2] or "")
    if y_max <= y_min or x_max <= x_min or max(y_max, x_max) > BINS or max(codes, default=0) >= CODES:
        return None
    return Place(label, Box(y_min / BINS, x_min / BINS, y_max / BINS, x_max / BINS), codes)


def _numbers(tokens: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall("[0-9]+", tokens))


def write(places: Iterable[Place]) -> str:
    """Places in the model's own form, as targets to train on; `parse` reads them back.

    What reaches out of the picture is cut off. A side that is too short to begin and end in different bins is written
    outwards, so that a box with an area comes back with one: no edge moves by more than a bin.

    Raises:
        TextError: if a box has no area within the picture, a label cannot be told from what follows it, or there are
            other than 16 codes or none.
    """
    return " ; ".join(_written(place) for place in places)


def _written(place: Place) -> str:
    label, box, codes = place.label, place.box, place.codes
    if label != label.strip() or ";" in label or re.search(_TOKEN, label):
        raise TextError(
            f"the label {label!r} cannot be written: no semicolon, no <loc> or <seg> token and no space around it"
        )
    if len(codes) not in (0, CODES_PER_MASK) or not all(0 <= code < CODES for code in codes):
        raise TextError(f"{label!r} has the mask codes {codes}; {CODES_PER_MASK} from 0 to {CODES - 1} are a mask")
    y_min, y_max = _bins(box.y_min, box.y_max, place)
    x_min, x_max = _bins(box.x_min, box.x_max, place)
    tokens = "".join(f"<loc{n:04}>" for n in (y_min, x_min, y_max, x_max)) + "".join(f"<seg{n:03}>" for n in codes)
    return f"{tokens} {label}".rstrip()


def _bins(low: float, high: float, place: Place) -> tuple[int, int]:
    low, high = (min(max(edge, 0.0), 1.0) * BINS if math.isfinite(edge) else math.nan for edge in (low, high))
    if not low < high:
        raise TextError(
            f"{place.label!r} has no area within the picture: {place.box}; edges are fractions of its sides, min < max"
        )
    first, last = round(low), round(high)
    return (first, last) if first < last else (math.floor(low), math.ceil(high))
