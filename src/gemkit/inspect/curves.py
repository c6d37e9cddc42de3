"""Curves by matplotlib as SVG or PNG: a few panels under one another over one axis, logarithmic or not.

Curves differ in colour and in the shape of their points, so that they can be told apart in grey, and each ends in its
last value. Needs the extra `plot`.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemkit.errors import ConfigError, MissingExtraError

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A name for the legend, and (x, y) in the order of x. Curves of one name look the same in every panel."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """The label of the y axis, its unit included, and the curves."""

    label: str
    curves: Sequence[Curve]
    written: Callable[[float], str]  # a value of the y axis as text
    from_zero: bool = True  # the axis begins at 0; else it reaches around the values


# blue and vermilion of Okabe and Ito's palette, which colour-blind readers tell apart, then its green and purple
_STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "D"), ("#aa4499", "^"))
_MARKED = 40  # points of a curve; with more it is a line alone


def draw(
    panels: Sequence[Panel],
    *,
    title: str,
    x_label: str,
    notes: Sequence[str] = (),
    logarithmic: bool = True,
    kind: Literal["svg", "png"] = "svg",
) -> bytes:
    """The panels as the content of a file.

    Args:
        logarithmic: the x axis is, and has a tick at every x of a point. False: it begins at 0, with round ticks.
        kind: the format of the file.

    Raises:
        ConfigError: if there is nothing to draw, or a number that cannot be on its axis.
        MissingExtraError: without matplotlib.
    """
    names = _check(panels, logarithmic)
    require()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # text stays text in an SVG, and equal curves make equal files
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gemkit", "font.size": 10}):
        figure = Figure(figsize=(8, 1.2 + 2.8 * len(panels) + 0.2 * len(notes)))
        figure.suptitle(title, weight="bold")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _panel(axis, panel, names, logarithmic)
        axes[-1].set_xlabel("\n".join([x_label, *notes]))
        handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
        axes[0].legend([handles[name] for name in names], names, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
        file = io.BytesIO()
        # tight: a long name or note makes the picture larger, never the axes smaller
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(file, format=kind, metadata=metadata, dpi=110, bbox_inches="tight")
    return file.getvalue()


def require() -> None:
    """Check early that curves can be drawn, before figures are measured for them. Raises: MissingExtraError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("drawing curves", "plot")


def _check(panels: Sequence[Panel], logarithmic: bool) -> list[str]:
    """The names of all curves."""
    points = [(panel, point) for panel in panels for curve in panel.curves for point in curve.points]
    for panel, (x, y) in points:
        on_axes = (x > 0 or (x == 0 and not logarithmic)) and (y >= 0 or not panel.from_zero)
        if not (on_axes and math.isfinite(x) and math.isfinite(y)):
            raise ConfigError(
                f"the point ({x}, {y}) cannot be drawn: x must be positive, y at least 0 on an axis from there, "
                "both finite"
            )
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    if not points or len(names) > len(_STYLES):
        raise ConfigError(f"{len(names)} curves with {len(points)} points: 1 to {len(_STYLES)} curves can be drawn")
    return names


def _panel(axis: Any, panel: Panel, names: Sequence[str], logarithmic: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for curve in panel.curves:
        colour, marker = _STYLES[names.index(curve.name)]
        marked = marker if len(curve.points) <= _MARKED else None
        axis.plot(
            *zip(*curve.points, strict=True),
            color=colour,
            marker=marked,
            label=curve.name,
            linewidth=2,
            gid=f"curve {curve.name}",
        )
        last = curve.points[-1]
        axis.annotate(panel.written(last[1]), last, (6, 0), textcoords="offset points", color=colour, va="center")
    axis.set_title(panel.label, loc="right", fontsize=10)
    axis.grid(axis="y", alpha=0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: panel.written(y)))
    if logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sorted({x for curve in panel.curves for x, _ in curve.points})))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}" if x < 1e6 else f"{x:.3g}"))
    else:
        axis.set_xlim(left=0)
    if panel.from_zero:
        axis.set_ylim(bottom=0)
