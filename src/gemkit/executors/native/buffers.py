"""Buffer allocation by liveness: where each value of a Program is while it is needed. No torch.

A value lives from the node that computes it to the last node that reads it, or a name of it; then its buffer is free
for another of the same form. Splitting and merging heads renames a value and moves nothing, and a result may take the
place of an operand that nobody reads again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gemkit.program.ir import Program, Value

RENAMES = ("split_heads", "merge_heads", "in_dtype_of")  # move nothing: all floats of the executor are float32


@dataclass(frozen=True)
class Slice:
    """Columns of a buffer."""

    buffer: int
    offset: int
    width: int


@dataclass(frozen=True)
class Buffer:
    width: int
    rows: str  # "T" or "R"
    kind: str = "floats"  # or "quantized", or "logits": the caller's array of results


class Allocation:
    """The buffers of a program, and where its values are as its nodes are lowered one by one."""

    def __init__(self, program: Program):
        self.buffers: list[Buffer] = []
        self._places: dict[int, Slice] = {}  # of values, by number
        self._quantized: dict[int, Slice] = {}
        self._roots: dict[int, int] = {}  # a value that only renames another -> that one
        self._free: list[int] = []
        for node in program.nodes:
            if node.op in RENAMES:
                self._roots[node.result.number] = self.root(next(node.values()))
        self._last: dict[int, int] = {}  # the last node that reads a value, or a name of it
        for i, node in enumerate(program.nodes):
            for value in node.values():
                self._last[self.root(value)] = i
        self._last[self.root(program.output)] = len(program.nodes)
        self._results = {program.output.number}  # values that are in the caller's array: also what is capped in place
        self._results |= {
            n.operands["x"].number for n in program.nodes if n.op == "softcap" and n.result == program.output
        }

    def root(self, value: Value) -> int:
        """The number of the value that this one is, or renames."""
        return self._roots.get(value.number, value.number)

    def is_result(self, value: Value) -> bool:
        """Whether it is computed in the caller's array."""
        return value.number in self._results

    def at(self, value: Value) -> Slice:
        """Where a value is."""
        return self._places[self.root(value)]

    def put(self, value: Value, at: Slice) -> Slice:
        """Say where a value is."""
        self._places[value.number] = at
        return at

    def new(self, width: int, rows: str, kind: str = "floats") -> int:
        """A buffer, a free one of the same form if there is one."""
        wanted = Buffer(width, rows, kind)
        for buffer in self._free:
            if self.buffers[buffer] == wanted:
                self._free.remove(buffer)
                return buffer
        self.buffers.append(wanted)
        return len(self.buffers) - 1

    def place(self, value: Value) -> Slice:
        """A buffer for a new value."""
        width = math.prod(size for size in value.shape if isinstance(size, int))
        buffer = self.new(width, str(value.shape[0]), "logits" if self.is_result(value) else "floats")
        return self.put(value, Slice(buffer, 0, width))

    def over(self, i: int, source: Value, result: Value) -> Slice:
        """The place of node `i`'s result: that of its source, if nobody reads the source again."""
        at = self.at(source)
        in_results = self.buffers[at.buffer].kind == "logits"
        if self._last.get(self.root(source)) == i and in_results == self.is_result(result):
            del self._places[self.root(source)]
            return self.put(result, at)
        return self.place(result)

    def quantized(self, value: Value, rows: str) -> tuple[Slice, bool]:
        """Where a value is quantized, and whether it has yet to be."""
        root = self.root(value)
        if root in self._quantized:
            return self._quantized[root], False
        width = self.at(value).width
        self._quantized[root] = Slice(self.new(width, rows, "quantized"), 0, width)
        return self._quantized[root], True

    def release(self, i: int) -> None:
        """Free the buffers in which nothing is left that a node after `i` reads."""
        for places in (self._places, self._quantized):
            for number in [n for n in places if self._last.get(n, -1) <= i]:
                del places[number]
        used = {at.buffer for at in self._live()}
        self._free = [b for b, buffer in enumerate(self.buffers) if b not in used and buffer.kind != "logits"]

    def _live(self) -> Iterator[Slice]:
        yield from self._places.values()
        yield from self._quantized.values()
