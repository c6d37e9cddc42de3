"""The log of a run as JSON lines, one step of it as a line for people, and its loss curve as a picture."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemkit.errors import TrainingError
from gemkit.inspect import curves
from gemkit.inspect.units import memory
from gemkit.train.checkpoint import replace_bytes

POINTS = 400  # of a curve: a picture is no wider


@dataclass(frozen=True)
class Progress:
    """The figures of one step."""

    step: int  # steps taken, this one included
    steps: int
    loss: float
    lr: float
    grad_norm: float  # of all gradients, before clipping
    tokens: int
    seconds: float
    peak_memory: int  # bytes, of the process or the device
    metrics: Mapping[str, float] = field(default_factory=dict)
    left: float = 0.0  # seconds to the end, at the pace of the steps so far

    def __str__(self) -> str:
        metrics = "".join(f"  {name} {value:.4g}" for name, value in self.metrics.items())
        minutes, seconds = divmod(round(self.left), 60)
        return (
            f"step {self.step:>{len(str(self.steps))}}/{self.steps} ({self.step / self.steps:.0%})  "
            f"loss {self.loss:.4f}{metrics}  lr {self.lr:.1e}  {1000 * self.seconds:,.0f} ms  "
            f"{self.tokens / max(self.seconds, 1e-9):,.0f} tok/s  peak {memory(self.peak_memory)}  "
            f"eta {minutes}m{seconds:02d}s"
        )

    def entry(self) -> dict[str, Any]:
        """The step as an entry of the log."""
        left_out = ("left", "steps", "metrics")
        return {**{k: v for k, v in self.__dict__.items() if k not in left_out}, **self.metrics}


class Log:
    """Events of a run in order, an object a line. Without a path they are kept in memory alone."""

    def __init__(self, path: Path | None):
        self._path = path
        self.entries: list[dict[str, Any]] = []

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self._path is not None:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # the run is worth more than its log
                    raise TrainingError(f"cannot write {self._path}: {error.strerror}") from error

    def sync(self) -> None:
        """Flush to the disk, before the checkpoint that the entries belong to."""
        if self._path is not None and self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Read the entries up to a step, and forget those after it: they will come again."""
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the process died while it wrote this line
                continue
            if isinstance(entry, dict) and entry.get("step", 0) <= step and entry.get("event") != "stopped":
                self.entries.append(entry)
        replace_bytes(self._path, "".join(json.dumps(entry) + "\n" for entry in self.entries).encode())

    def last_evaluation(self) -> dict[str, float]:
        return next((e["held_out"] for e in reversed(self.entries) if "held_out" in e), {})


def draw(entries: Sequence[Mapping[str, Any]], title: str, kind: Literal["svg", "png"]) -> bytes | None:
    """The losses of a log, and under them the learning rate, as a picture; None if there are none.

    Raises:
        MissingExtraError: without matplotlib.
    """
    losses = [(e["step"], e["loss"]) for e in entries if "loss" in e and math.isfinite(e["loss"])]
    held_out = [(e["step"], e["held_out"]["loss"]) for e in entries if "held_out" in e]
    held_out = [(step, loss) for step, loss in held_out if math.isfinite(loss)]
    rates = [(e["step"], e["lr"]) for e in entries if "lr" in e]
    if not losses:
        return None
    drawn = [curves.Curve("training", thinned(losses))]
    if held_out:
        drawn.append(curves.Curve("held out", held_out))
    panels = [
        curves.Panel("loss", drawn, lambda y: f"{y:.3g}", from_zero=False),
        curves.Panel("learning rate", [curves.Curve("training", thinned(rates))], lambda y: f"{y:.2g}"),
    ]
    each = math.ceil(len(losses) / POINTS)
    notes = [f"training: means of {each} steps"] if each > 1 else []
    return curves.draw(panels, title=title, x_label="steps", notes=notes, logarithmic=False, kind=kind)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS`, each the mean of as many neighbours, at the last of them."""
    each = math.ceil(len(points) / POINTS)
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
