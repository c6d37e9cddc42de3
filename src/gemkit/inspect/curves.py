"""Curves as an SVG file, written by hand: a few panels under one another over one axis, logarithmic or not.

The file needs nothing: no script, no font of its own, no style sheet. Curves differ in colour and in the shape of
their points, so that they can be told apart in grey, and each ends in its last value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from gemkit.errors import ConfigError

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A name for the legend, and (x, y) in the order of x. Curves of one name look the same in every panel."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """What is on the y axis, its unit included, and the curves."""

    label: str
    curves: Sequence[Curve]
    written: Callable[[float], str]  # a value of the y axis as text
    from_zero: bool = True  # where the axis begins; else it reaches around the values


# blue and vermilion of Okabe and Ito's palette, which colour-blind readers tell apart, then its green and purple
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499")
_INK, _SOFT, _GRID = "#1f2328", "#59636e", "#e4e8ec"
_WIDTH, _LEFT, _RIGHT = 760, 84, 92
_INSET = 18  # between the ends of the axis and the first and last x
_TOP, _PANEL, _GAP, _FOOT = 120, 208, 72, 92
_MARKED = 40  # points of a curve; with more it is a line alone
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"


def draw(
    panels: Sequence[Panel], *, title: str, x_label: str, notes: Sequence[str] = (), logarithmic: bool = True
) -> str:
    """The panels as the text of an SVG file.

    Args:
        logarithmic: the x axis is, and has a tick at every x of a point. False: it begins at 0, with round ticks.

    Raises:
        ConfigError: if there is nothing to draw, or a number that cannot be on its axis.
    """
    points = [point for panel in panels for curve in panel.curves for point in curve.points]
    for panel in panels:
        for x, y in (point for curve in panel.curves for point in curve.points):
            on_axes = (x > 0 or (x == 0 and not logarithmic)) and (y >= 0 or not panel.from_zero)
            if not (on_axes and math.isfinite(x) and math.isfinite(y)):
                raise ConfigError(
                    f"the point ({x}, {y}) cannot be drawn: x must be positive, y at least 0 on an axis from there, "
                    "both finite"
                )
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    if not points or len(names) > len(_COLOURS):
        raise ConfigError(f"{len(names)} curves with {len(points)} points: 1 to {len(_COLOURS)} curves can be drawn")
    xs = _ticks(0, max(x for x, _ in points)) if not logarithmic else sorted({x for x, _ in points})
    height = _TOP + len(panels) * (_PANEL + _GAP) + _FOOT - _GAP + 16 * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="{_FONT}" font-size="13" fill="{_INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 40, title, size=18, weight=600),
        *_legend(names),
    ]
    for i, panel in enumerate(panels):
        last = i == len(panels) - 1
        parts += _panel(panel, _TOP + i * (_PANEL + _GAP), xs, names, x_label if last else "", logarithmic)
    foot = height - 16 * len(notes) - 4
    parts += [_text(_LEFT, foot + 16 * i, note, size=11, colour=_SOFT) for i, note in enumerate(notes)]
    return "\n".join([*parts, "</svg>", ""])


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], float(_LEFT)
    for i, name in enumerate(names):
        parts.append(f'<path d="M{x:.1f} 66h26" stroke="{_COLOURS[i]}" stroke-width="2.5"/>')
        parts.append(_marker(i, x + 13, 66))
        parts.append(_text(x + 34, 70.5, name))
        x += 34 + 7.2 * len(name) + 28  # text cannot be measured here: 7.2 is a wide letter at this size
    return parts


def _panel(
    panel: Panel, top: float, xs: Sequence[float], names: Sequence[str], x_label: str, logarithmic: bool
) -> list[str]:
    ys = [y for curve in panel.curves for _, y in curve.points]
    ticks = _ticks(0 if panel.from_zero else min(ys), max(ys))
    first, right, bottom = _LEFT + _INSET, _WIDTH - _RIGHT, top + _PANEL
    scale = math.log if logarithmic else float
    low, high = scale(xs[0]), scale(xs[-1])

    def place(x: float, y: float) -> Point:
        along = (scale(x) - low) / (high - low) if high > low else 0.5
        up = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return first + along * (right - _INSET - first), bottom - up * _PANEL

    parts = [_text(_LEFT, top - 14, panel.label, weight=600)]
    for tick in ticks:
        _, y = place(xs[0], tick)
        colour = _SOFT if tick == ticks[0] else _GRID
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="{colour}"/>')
        round_value = re.sub(r"\.0+(?!\d)", "", panel.written(tick))  # 50 MB, not 50.0 MB
        parts.append(_text(_LEFT - 10, y + 4.5, round_value, anchor="end", colour=_SOFT))
    for x in xs:
        along, _ = place(x, 0)
        parts.append(f'<path d="M{along:.1f} {bottom}v5" stroke="{_SOFT}"/>')
        parts.append(_text(along, bottom + 21, f"{x:,g}" if x < 1e6 else f"{x:.3g}", anchor="middle", colour=_SOFT))
    if x_label:
        parts.append(_text((_LEFT + right) / 2, bottom + 44, x_label, anchor="middle", colour=_SOFT))
    ends = []
    for curve in panel.curves:
        i = names.index(curve.name)
        placed = [place(*point) for point in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f"<g aria-label={quoteattr(f'{curve.name}, {panel.label}')}>")
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{_COLOURS[i]}" stroke-width="2.5" stroke-linejoin="round"/>'
        )
        for (x, y), (at, value) in zip(placed, curve.points, strict=True):
            if len(placed) > _MARKED:
                break
            said = escape(f"{curve.name}: {panel.written(value)} at {at:,g}")
            parts.append(_marker(i, x, y, f"<title>{said}</title>"))
        parts.append("</g>")
        if placed:
            ends.append((placed[-1][1], panel.written(curve.points[-1][1]), _COLOURS[i]))
    above = -math.inf
    for y, value, colour in sorted(ends):  # from the top down, each clear of the one above
        above = max(y, above + 16)
        parts.append(_text(right + 12, above + 4.5, value, colour=colour, weight=600))
    return parts


def _ticks(smallest: float, largest: float) -> list[float]:
    """Round steps from below the smallest value (0 for 0) to the largest: three to seven of them."""
    if largest == smallest:
        return [0, 1] if not largest else sorted([0, 2 * largest])
    rough = (largest - smallest) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    begin, end = math.floor(smallest / step + 1e-9), math.ceil(largest / step - 1e-9)
    return [step * i for i in range(begin, end + 1)]


def _marker(i: int, x: float, y: float, inside: str = "") -> str:
    """Circle, square, diamond or triangle, ringed in white so that lines end before it."""
    shape = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"',
        f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"',
        f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 10h-11z"',
    )[i]
    name = shape[1:].partition(" ")[0]
    return f'{shape} fill="{_COLOURS[i]}" stroke="#ffffff" stroke-width="1.5">{inside}</{name}>'


def _text(
    x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", colour: str = _INK, weight: int = 400
) -> str:
    how = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {how}>{escape(text)}</text>'
