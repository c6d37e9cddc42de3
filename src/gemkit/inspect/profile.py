"""The story of one token: every op of a forward pass, with what it reads and computes, and how long it took.

Tracing needs torch; the rest does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gemkit.family import DecoderConfig
from gemkit.inspect import units
from gemkit.program.ir import Cost, Node, Program, Weight

if TYPE_CHECKING:
    import numpy as np

    from gemkit.executors.native.lower import Lowered


def traced(decoder: DecoderConfig, kinds: dict[str, tuple[str, int]] | None = None, kind: str = "bfloat16") -> Program:
    """The program of an architecture, without weights.

    Args:
        kinds: of each weight, by name, what it is stored as and in how many bytes.
        kind: what the others are stored as.
    """
    import torch

    from gemkit.nn import Decoder as Module
    from gemkit.program.trace import trace

    with torch.device("meta"):
        program = trace(Module(decoder))

    def stored(operand):
        if not isinstance(operand, Weight):
            return operand
        size = {"float32": 4, "bfloat16": 2}[kind] * math.prod(operand.shape)
        found, nbytes = (kinds or {}).get(operand.name, (kind, size))
        return replace(operand, kind=found, nbytes=nbytes)

    nodes = tuple(replace(n, operands={k: stored(o) for k, o in n.operands.items()}) for n in program.nodes)
    return replace(program, nodes=nodes)


@dataclass(frozen=True)
class Line:
    """One op: its result, what it is, what it reads and how much, what it computes."""

    result: str
    op: str
    reads: str
    shape: str
    cost: Cost


def story(program: Program, context: int) -> list[Line]:
    """Every op in order, for one token at the end of `context` tokens."""
    return [_line(node, context) for node in program.nodes]


def _line(node: Node, context: int) -> Line:
    read = [str(value) for value in node.values()]
    read += [f"{weight.name} ({weight.kind})" for weight in node.weights()]
    read += [str(node.memory)] if node.memory else []
    results = ", ".join(map(str, node.results))
    shape = " x ".join(map(str, node.result.shape))
    return Line(results, node.op, ", ".join(read), shape, node.cost(context=context))


@dataclass(frozen=True)
class Timed:
    """One step of the native executor, and what it took."""

    op: str
    what: str
    seconds: float
    nbytes: int  # of weights and of what is remembered
    flops: int


def profile(
    lowered: Lowered, seconds: Sequence[float] | np.ndarray, tokens: int, rows: int, context: int
) -> list[Timed]:
    """The steps with their measured times, for a call of `tokens` tokens that ends at `context`."""
    timed = []
    for step, taken in zip(lowered.steps, seconds, strict=True):
        cost = sum((node.cost(tokens, rows, context) for node in step.nodes), Cost())
        what = " + ".join(weight.name for node in step.nodes for weight in node.weights())
        if not what and step.nodes and (memory := step.nodes[0].memory):
            what = str(memory)
        timed.append(Timed(step.op, what, float(taken), cost.weight_bytes + cost.state_bytes, cost.flops))
    return timed


def by_op(timed: Sequence[Timed]) -> Iterator[Timed]:
    """One row for each kind of step, the longest first."""
    groups: dict[str, list[Timed]] = {}
    for step in timed:
        groups.setdefault(step.op, []).append(step)
    rows = []
    for op, steps in groups.items():
        seconds, nbytes, flops = (sum(getattr(s, name) for s in steps) for name in ("seconds", "nbytes", "flops"))
        rows.append(Timed(op, f"{len(steps)} steps", seconds, nbytes, flops))
    return iter(sorted(rows, key=lambda row: -row.seconds))


def rates(step: Timed, read_limit: float) -> tuple[str, str, str]:
    """Milliseconds; GB/s with its share of what memory gives; GFLOP/s."""
    ms = f"{1e3 * step.seconds:.3f}"
    if not step.seconds or not step.nbytes:
        return ms, "", ""
    rate = step.nbytes / step.seconds
    return ms, f"{rate / 1e9:.1f} ({100 * rate / read_limit:.0f} %)", f"{step.flops / step.seconds / 1e9:,.0f}"


def sizes(line: Line) -> tuple[str, str]:
    """Bytes and operations of a line, as printed."""
    nbytes = line.cost.weight_bytes + line.cost.state_bytes
    return units.memory(nbytes) if nbytes else "", units.flops(line.cost.flops) if line.cost.flops else ""
