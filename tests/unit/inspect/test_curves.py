"""Curves drawn by matplotlib: what is in the file stands where mathematics puts it."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from gemkit.errors import ConfigError, MissingExtraError
from gemkit.inspect import curves
from gemkit.inspect.curves import Curve, Panel, draw

SVG = "{http://www.w3.org/2000/svg}"
DEPTHS = (512, 2048, 8192, 32768)


def drawn(*of: Curve, from_zero: bool = True, **options) -> ET.Element:
    panel = Panel("rate (tok/s)", of, lambda y: f"{y:g}", from_zero=from_zero)
    return ET.fromstring(draw([panel], title="t", x_label="depth (tokens)", **options))


def lines(root: ET.Element) -> list[list[tuple[float, float]]]:
    found = [g.find(f"{SVG}path") for g in root.iter(f"{SVG}g") if g.get("id", "").startswith("curve ")]
    paths = [path.attrib["d"] for path in found if path is not None]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", d)] for d in paths]


def texts(root: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_every_point_of_every_curve_is_there():
    root = drawn(Curve("flat", [(x, 10) for x in DEPTHS]), Curve("falling", [(x, 5000 / x) for x in DEPTHS]))
    assert [len(line) for line in lines(root)] == [4, 4]
    assert {"flat", "falling", "rate (tok/s)", "depth (tokens)", "512", "32,768", "t"} <= set(texts(root))


def test_x_is_logarithmic_and_y_begins_at_zero():
    (line,) = lines(drawn(Curve("a", [(10, 0), (100, 25), (1000, 50), (100_000, 100)])))
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = line
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.01)  # a decade each
    assert x3 - x2 == pytest.approx(2 * (x1 - x0), abs=0.02)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.01)
    assert y0 - y3 == pytest.approx(4 * (y0 - y1), abs=0.03)


def test_a_straight_axis_begins_at_zero():
    """Of x and of y, the latter around the values: 0 to 100 steps, losses from 2.1 to 2.9."""
    root = drawn(Curve("a", [(1, 2.9), (50, 2.5), (97, 2.1)]), from_zero=False, logarithmic=False)
    (line,) = lines(root)
    (x0, y0), (x1, y1), (x2, y2) = line
    assert (x1 - x0) / (x2 - x1) == pytest.approx(49 / 47, rel=1e-3)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.01)
    assert {"0", "2.2", "2.8"} <= set(texts(root))
    assert "0.5" in texts(drawn(Curve("a", [(0, -1.5), (5, 0.5)]), from_zero=False, logarithmic=False))


def test_values_of_the_axis_are_written_by_the_panel():
    panel = Panel("memory", [Curve("a", [(1, 2e6), (2, 3e6)])], lambda y: f"{y / 1e6:g} MB")
    said = texts(ET.fromstring(draw([panel], title="t", x_label="x")))
    assert {"0 MB", "2 MB", "3 MB"} <= set(said)


def test_names_are_text_and_not_markup():
    root = drawn(Curve('<b> & "it\'s"', [(1, 1)]), notes=["1 < 2"])
    assert '<b> & "it\'s"' in texts(root)
    assert "1 < 2" in texts(root)


def test_panels_stand_under_one_another():
    one, two = (Panel(name, [Curve("a", [(1, 1), (2, 3)])], str) for name in ("loss", "rate"))
    first, second = lines(ET.fromstring(draw([one, two], title="t", x_label="x")))
    assert [x for x, _ in first] == pytest.approx([x for x, _ in second])
    assert max(y for _, y in first) < min(y for _, y in second)
    assert all(a < b for (a, _), (b, _) in pairwise(first))


def test_long_curves_are_lines_without_marks():
    marks = [len([*drawn(Curve("a", [(x, x) for x in range(1, n)])).iter(f"{SVG}use")]) for n in (30, 100)]
    assert marks[0] >= 29
    assert marks[1] < marks[0] + 70  # the ticks alone


def test_equal_curves_make_equal_files_and_a_png_is_one():
    panel = Panel("loss", [Curve("a", [(1, 1), (2, 3)])], str)
    assert draw([panel], title="t", x_label="x") == draw([panel], title="t", x_label="x")
    assert draw([panel], title="t", x_label="x", kind="png").startswith(b"\x89PNG")


@pytest.mark.parametrize("point", [(0, 1), (-1, 1), (1, -1), (1, math.nan), (math.inf, 1)])
def test_what_has_no_place_on_its_axis_is_refused(point):
    with pytest.raises(ConfigError, match="cannot be drawn"):
        drawn(Curve("a", [(1, 1), point]))


def test_too_many_or_no_curves_are_refused():
    with pytest.raises(ConfigError, match="5 curves"):
        drawn(*(Curve(name, [(1, 1)]) for name in "abcde"))
    with pytest.raises(ConfigError, match="0 points"):
        drawn(Curve("a", []))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"gemkit\[plot\]"):
        drawn(Curve("a", [(1, 1)]))
