"""Curves drawn: the file is XML, and what is in it stands where mathematics puts it."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from gemkit.errors import ConfigError
from gemkit.inspect.curves import Curve, Panel, draw

SVG = "{http://www.w3.org/2000/svg}"
DEPTHS = (512, 2048, 8192, 32768)


def drawn(*curves: Curve, **options) -> ET.Element:
    text = draw([Panel("rate (tok/s)", curves, lambda y: f"{y:g}")], title="t", x_label="depth (tokens)", **options)
    return ET.fromstring(text)


def lines(root: ET.Element) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]
        for line in root.iter(f"{SVG}polyline")
    ]


def texts(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_every_point_of_every_curve_is_there():
    root = drawn(Curve("flat", [(x, 10) for x in DEPTHS]), Curve("falling", [(x, 5000 / x) for x in DEPTHS]))
    assert [len(line) for line in lines(root)] == [4, 4]
    said = [title.text for title in root.iter(f"{SVG}title")]
    assert "flat: 10 at 32,768" in said
    assert {"flat", "falling", "rate (tok/s)", "depth (tokens)", "512", "32,768"} <= set(texts(root))


def test_x_is_logarithmic_and_y_begins_at_zero():
    (line,) = lines(drawn(Curve("a", [(10, 0), (100, 25), (1000, 50), (100_000, 100)])))
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = line
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.11)  # a decade each; written to a tenth of a unit
    assert x3 - x2 == pytest.approx(2 * (x1 - x0), abs=0.21)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 - y3 == pytest.approx(4 * (y0 - y1), abs=0.3)


@pytest.mark.parametrize("largest", [0.013, 0.99, 1, 14.1, 100, 204e6, 7e9])
def test_ticks_are_round_and_reach_the_largest_value(largest):
    root = drawn(Curve("a", [(1, largest)]))
    ticks = [float(t.text or "") for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    steps = {round(b - a, 12) for a, b in pairwise(ticks)}
    assert ticks[0] == 0
    assert ticks[-2] < largest * (1 + 1e-9)
    assert ticks[-1] >= largest * (1 - 1e-9)
    assert len(steps) == 1
    mantissa = steps.pop()
    mantissa /= 10 ** math.floor(math.log10(mantissa) + 1e-9)
    assert min(abs(mantissa - fine) for fine in (1, 2, 2.5, 5)) < 1e-6


def test_values_at_the_end_do_not_cover_each_other():
    root = drawn(Curve("a", [(1, 50), (2, 100)]), Curve("b", [(1, 70), (2, 99)]), Curve("c", [(1, 1), (2, 98)]))
    ends = [float(text.attrib["y"]) for text in root.iter(f"{SVG}text") if text.text in ("100", "99", "98")]
    ends = sorted(ends)[-3:]
    assert all(b - a >= 13 for a, b in pairwise(ends))  # the size of the letters


def test_names_are_text_and_not_markup():
    root = drawn(Curve('<b> & "it\'s"', [(1, 1)]), notes=["1 < 2"])
    assert '<b> & "it\'s"' in texts(root)
    assert "1 < 2" in texts(root)


def test_all_is_inside_the_picture():
    curves = [Curve(name, [(x, x * x) for x in DEPTHS]) for name in "abcd"]
    root = drawn(*curves, notes=["one", "two"])
    height, width = float(root.attrib["height"]), float(root.attrib["width"])
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.attrib["x"]) < width
        assert 10 < float(text.attrib["y"]) < height
    assert all(0 < x < width and 0 < y < height for line in lines(root) for x, y in line)


@pytest.mark.parametrize("point", [(0, 1), (-1, 1), (1, -1), (1, math.nan), (math.inf, 1)])
def test_what_has_no_place_on_its_axis_is_refused(point):
    with pytest.raises(ConfigError, match="cannot be drawn"):
        drawn(Curve("a", [(1, 1), point]))


def test_too_many_or_no_curves_are_refused():
    with pytest.raises(ConfigError, match="5 curves"):
        drawn(*(Curve(name, [(1, 1)]) for name in "abcde"))
    with pytest.raises(ConfigError, match="0 points"):
        drawn(Curve("a", []))


def test_a_straight_axis_begins_at_zero_with_round_ticks():
    """Of x and of y, the latter around the values: 0 to 100 steps, losses from 2.1 to 2.9."""
    panel = Panel("loss", [Curve("a", [(1, 2.9), (50, 2.5), (97, 2.1)])], lambda y: f"{y:g}", from_zero=False)
    root = ET.fromstring(draw([panel], title="t", x_label="steps", logarithmic=False))
    (line,) = lines(root)
    (x0, y0), (x1, y1), (x2, y2) = line
    assert (x1 - x0) / (x2 - x1) == pytest.approx(49 / 47, rel=0.01)  # written to a tenth of a unit
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert {"0", "20", "100", "2", "2.2", "3"} <= set(texts(root))
    below = Panel("loss", [Curve("a", [(0, -1.5), (5, 0.5)])], lambda y: f"{y:g}", from_zero=False)
    assert {"-1.5", "0.5"} <= set(texts(ET.fromstring(draw([below], title="t", x_label="", logarithmic=False))))


def test_long_curves_are_lines_without_marks():
    curve = Curve("a", [(x, x) for x in range(1, 100)])
    panel = Panel("loss", [curve], lambda y: f"{y:g}")
    root = ET.fromstring(draw([panel], title="t", x_label="steps", logarithmic=False))
    assert [len(line) for line in lines(root)] == [99]
    assert len([*root.iter(f"{SVG}circle")]) == 1  # of the legend
