"""Text to places and back: examples by hand, and properties of any text."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import TextError
from gemkit.text.places import BINS, Box, Parsed, Place, parse, write

LOC = "<loc0256><loc0128><loc0767><loc0639>"
BOX = Box(256 / 1023, 128 / 1023, 767 / 1023, 639 / 1023)
CODES = tuple(range(112, 128))
SEG = "".join(f"<seg{code:03}>" for code in CODES)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (f"{LOC} cat", [Place("cat", BOX)]),
        (f"{LOC} sleeping cat ; {LOC} dog", [Place("sleeping cat", BOX), Place("dog", BOX)]),
        (f"{LOC}{SEG} cat", [Place("cat", BOX, CODES)]),
        (f"{LOC}{SEG}", [Place("", BOX, CODES)]),
        (f"{LOC} ; {LOC};{LOC}", [Place("", BOX)] * 3),
        (f"{LOC} cat ; {LOC}{SEG} dog", [Place("cat", BOX), Place("dog", BOX, CODES)]),
        (f"{LOC}cat{LOC}dog", [Place("cat", BOX), Place("dog", BOX)]),
        (f"{LOC}  chat noir ;\n{LOC} 黒い猫 🐈 ; ", [Place("chat noir", BOX), Place("黒い猫 🐈", BOX)]),
        (f"{LOC} a <b> & c > d <3", [Place("a <b> & c > d <3", BOX)]),
        ("<loc0000><loc0000><loc1023><loc1023> all", [Place("all", Box(0, 0, 1, 1))]),
        ("", []),
    ],
)
def test_places_are_read(text, places):
    assert parse(text) == Parsed(tuple(places), "")


@pytest.mark.parametrize(
    "text",
    [
        "a cat on a mat; it sleeps",
        "<loc0256><loc0128><loc0767> cat",  # three
        "<loc0256><loc0128><loc0767><loc0639><loc0000> cat",  # five
        f"{LOC}{LOC} cat",  # eight
        f"{LOC}<seg001><seg002> cat",  # two of sixteen
        f"{LOC}{SEG}<seg001> cat",  # seventeen
        f"{SEG}{LOC} cat",  # in another order
        f"{SEG} cat",
        "<loc0256><loc0128><loc0767><loc1024> cat",  # 1024 is no token
        f"{LOC}{SEG[:-8]}<seg128> cat",
        "<loc0256><loc0128><loc0256><loc0639> flat",
        "<loc0256><loc0639><loc0767><loc0639> thin",
        "<loc0767><loc0128><loc0256><loc0639> upside down",
        "<loc0256><loc0639><loc0767><loc0128> reversed",
        "<loc256><loc128><loc767><loc639> cat",
        "<loc٠٢٥٦><loc0128><loc0767><loc0639> digits that are not ASCII",
        "<loc0256> <loc0128> <loc0767> <loc0639> apart",
        "<LOC0256>",
        "<loc0256",
        ";;; ; <seg",
    ],
)
def test_what_is_no_place_stays_as_text(text):
    assert parse(text) == Parsed((), text)


def test_places_among_other_text():
    parsed = parse(f"I see: {LOC} cat ; <loc0001> dog ; {LOC} bird ; <seg001> and nothing else")
    assert [place.label for place in parsed.places] == ["cat", "bird"]
    assert parsed.rest == "I see: <loc0001> dog ; <seg001> and nothing else"


FRAGMENTS = st.sampled_from(
    [LOC, SEG, "<loc0000>", "<loc1023>", "<loc9999>", "<seg000>", "<seg999>", "<loc", "<", ">", ";", " ; ", " ", "cat"]
)
TEXTS = st.one_of(
    st.text(), st.lists(FRAGMENTS).map("".join), st.lists(st.one_of(FRAGMENTS, st.text(max_size=3))).map("".join)
)


def letters(text: str) -> Counter:
    """How often each character occurs, those aside that only stand between places."""
    return Counter(re.sub(r"[\s;]", "", text))


@given(TEXTS)
def test_no_text_is_an_error_and_nothing_is_lost(text):
    parsed = parse(text)
    assert letters(text) == letters(parsed.rest) + letters(write(parsed.places))
    assert parse(parsed.rest) == Parsed((), parsed.rest)  # the rest holds no place
    assert parse(write(parsed.places)) == Parsed(parsed.places, "")  # exactly
    for place in parsed.places:
        assert 0 <= place.box.y_min < place.box.y_max <= 1
        assert 0 <= place.box.x_min < place.box.x_max <= 1
        assert len(place.codes) in (0, 16)
        assert all(0 <= code < 128 for code in place.codes)


def test_long_texts_take_linear_time():  # a quadratic parser takes hours, beyond the limit of any test
    for text in (
        LOC * 20_000,
        f"{LOC} cat ; " * 20_000,
        "<" * 500_000,
        f"{LOC} " + "x" * 500_000,
        "<loc0001 " * 50_000,
    ):
        parse(text)


# ---------------------------------------------------------------- writing


LABELS = st.text().map(str.strip).filter(lambda label: ";" not in label)
FRACTIONS = st.floats(0, 1)


@st.composite
def boxes(draw):
    y_min, y_max = sorted(draw(st.tuples(FRACTIONS, FRACTIONS).filter(lambda pair: pair[0] != pair[1])))
    x_min, x_max = sorted(draw(st.tuples(FRACTIONS, FRACTIONS).filter(lambda pair: pair[0] != pair[1])))
    return Box(y_min, x_min, y_max, x_max)


CODE = st.integers(0, 127)
PLACES = st.builds(Place, LABELS, boxes(), st.one_of(st.just(()), st.tuples(*[CODE] * 16)))


def edges(box: Box) -> np.ndarray:
    return np.array([box.y_min, box.x_min, box.y_max, box.x_max])


@given(st.lists(PLACES, max_size=4))
def test_written_places_are_read_back(places):
    parsed = parse(write(places))
    assert parsed.rest == ""
    assert [(p.label, p.codes) for p in parsed.places] == [(p.label, p.codes) for p in places]
    for got, place in zip(parsed.places, places, strict=True):
        assert np.abs(edges(got.box) - edges(place.box)).max() <= 1 / BINS + 1e-12  # one bin
        if min(place.box.y_max - place.box.y_min, place.box.x_max - place.box.x_min) > 1 / BINS:
            assert np.abs(edges(got.box) - edges(place.box)).max() <= 0.5 / BINS + 1e-12  # rounded to the nearest


def test_the_numbers_are_those_of_big_vision():
    """`clip(round(v * 1023), 0, 1023)`, halves to the even number, as NumPy and TensorFlow round."""
    for v in [0.0, 0.2, 1.5 / 1023, 2.5 / 1023, 0.9996, 1.0, 1.2]:
        expected = int(np.clip(np.round(v * 1023), 0, 1023))
        assert write([Place("", Box(-0.1, -7, v + 0.01, max(v, 0.1)))]).startswith("<loc0000><loc0000>")
        if v > 0:
            assert write([Place("", Box(0, 0, v, 1))]) == f"<loc0000><loc0000><loc{expected:04}><loc1023>"


def test_a_side_shorter_than_a_bin_is_written_outwards():
    thin = Box(0.5, 0.25, 0.5 + 1e-9, 0.75)
    assert write([Place("hair", thin)]) == "<loc0511><loc0256><loc0512><loc0767> hair"
    last = Box(1 - 1e-9, 0, 1, 1)
    assert write([Place("", last)]) == "<loc1022><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place("a;b", BOX), "no semicolon"),
        (Place(" cat", BOX), "no space around it"),
        (Place("cat <loc0001>", BOX), "no <loc> or <seg> token"),
        (Place("cat", BOX, (1, 2)), r"16 from 0 to 127"),
        (Place("cat", BOX, (128,) * 16), r"16 from 0 to 127"),
        (Place("cat", Box(0.5, 0, 0.5, 1)), "no area within the picture"),
        (Place("cat", Box(0, 0.6, 1, 0.5)), "no area within the picture"),
        (Place("cat", Box(0, 1.5, 1, 2)), "no area within the picture"),
        (Place("cat", Box(math.nan, 0, 1, 1)), "no area within the picture"),
        (Place("cat", Box(0, 0, 1, math.inf)), "no area within the picture"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(place, message):
    with pytest.raises(TextError, match=message):
        write([place])


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (1, 1), (10_000, 3), (3, 10_000), (224, 224)])
def test_boxes_in_pictures_of_any_shape(width, height):
    left, top, right, bottom = width * 0.125, height * 0.25, width * 0.625, height * 0.75
    box = Box.from_pixels(left, top, right, bottom, width, height)
    assert box == Box(0.25, 0.125, 0.75, 0.625)
    assert box.pixels(width, height) == (left, top, right, bottom)
    (place,) = parse(write([Place("x", box)])).places
    moved = np.abs(np.subtract(place.box.pixels(width, height), (left, top, right, bottom)))
    assert (moved <= np.array([width, height, width, height]) / BINS / 2 + 1e-9).all()
