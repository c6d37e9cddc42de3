"""A packed model: a lowered program and its weights in one file, as the native executor wants them in memory. No torch.

    8 bytes    GKPACK01
    8 bytes    length of the header
    header     JSON: what it was made from, steps and buffers of each program, a table of weights with their places
    data       steps, buffers and weights, each at a multiple of 64 bytes

The file is mapped, not read: opening one costs its header, and its pages are shared by all processes. It is a cache:
what it was made from is in the header, and one that was made from something else, or by another version, is made anew.
A file is trusted with nothing: every place must be within it, and the executor checks each step before it runs any.

A model that sees has a second program, its image tower's, over the same table of weights.

A packed model can be made over another: of the weights that both have it holds no bytes, and they are read from there.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemkit.block_types import KINDS as BLOCK_TYPES
from gemkit.errors import WeightsError
from gemkit.executors.native.lower import (
    DENSE,
    OPS,
    STEP_WEIGHTS,
    Lowered,
    Slice,
    packed_weights,
    plain_name,
    plain_weights,
)
from gemkit.files import atomic_file

MAGIC = b"GKPACK01"
VERSION = 2  # of the layout of everything in the file, the weights' included
ALIGN = 64
MAX_HEADER = 1 << 26
STEP_NUMBERS, STEP_SCALARS = 6, 3
STEP_WORDS = 1 + 4 * 3 + STEP_WEIGHTS + STEP_NUMBERS + STEP_SCALARS
BUFFER_KINDS = ("floats", "quantized", "logits")

KINDS = (*DENSE, *BLOCK_TYPES)  # as `csrc/kernels/table.h` numbers them
PLAIN = -1  # an array of float32, which is not multiplied tile by tile


@dataclass(frozen=True)
class Entry:
    """A weight of the file: `kind` is an index of KINDS, or PLAIN. No bytes: those of the packed model below."""

    name: str
    kind: int
    rows: int
    cols: int
    offset: int
    nbytes: int


class Pack:
    """An open packed model. Its arrays are views of the mapped file."""

    def __init__(self, path: Path, over: Pack | None = None):
        """
        Args:
            over: the packed model that this one was made over.

        Raises:
            WeightsError: if it is no packed model of this version, or its places are not within it.
        """
        self.path = path
        self._below = {} if over is None else {entry.name: (over, entry) for entry in over.table}
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} cannot be mapped: {error}") from None
        header = self._header()
        try:
            self.source: str = header["source"]
            self.notes: list[str] = header["notes"]
            self.steps, self.buffers = self._program(header["decoder"])
            self.tower = None if header["tower"] is None else self._program(header["tower"])
            self.table = [Entry(*entry) for entry in header["table"]]
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path}: its header is damaged: {error!r}") from None
        for entry in self.table:
            numbers = (entry.kind, entry.rows, entry.cols, entry.offset, entry.nbytes)
            if not all(type(n) is int for n in numbers) or not PLAIN <= entry.kind < len(KINDS):
                raise WeightsError(f"{path}: {entry.name} is described by {numbers}")
            if min(entry.rows, entry.cols) < 1 or max(entry.rows, entry.cols) >= 2**31:
                raise WeightsError(f"{path}: {entry.name} has the shape {entry.rows, entry.cols}")
            if not entry.nbytes and not self._is_below(entry):
                raise WeightsError(f"{path}: {entry.name} has no bytes")
            self._check(entry.offset, entry.nbytes)

    def _is_below(self, entry: Entry) -> bool:
        _, other = self._below.get(entry.name, (None, None))
        return other is not None and (other.kind, other.rows, other.cols) == (entry.kind, entry.rows, entry.cols)

    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._map[8:16], "little")
        if self._map[:8] != MAGIC or not 2 <= length <= min(MAX_HEADER, len(self._map) - 16):
            raise WeightsError(f"{self.path} is no packed model")
        try:
            header = json.loads(self._map[16 : 16 + length])
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{self.path}: its header is damaged: {error}") from None
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise WeightsError(f"{self.path} is a packed model of another version")
        return header

    def _check(self, offset: int, nbytes: int) -> None:
        if offset % ALIGN or not 0 <= offset <= offset + nbytes <= len(self._map):
            raise WeightsError(f"{self.path}: {nbytes} bytes at {offset} are not in the file of {len(self._map)}")

    def _program(self, places: Any) -> tuple[np.ndarray, np.ndarray]:
        """Steps and buffers, as `csrc/executor.h` has them."""
        steps, buffers = places
        return self._array(steps, STEP_WORDS), self._array(buffers, 3)

    def _array(self, place: Any, columns: int) -> np.ndarray:
        offset, rows = place
        if type(offset) is not int or type(rows) is not int or not 0 < rows < 1 << 20:
            raise WeightsError(f"{self.path}: {place} is no place")
        self._check(offset, rows * columns * 4)
        return np.frombuffer(self._map, np.int32, rows * columns, offset).reshape(rows, columns)

    def bytes_of(self, entry: Entry) -> np.ndarray:
        """An entry's bytes, which cannot be written."""
        if not entry.nbytes:
            below, other = self._below[entry.name]
            return below.bytes_of(other)
        return np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset)

    def pointers(self) -> np.ndarray:
        """The table as `csrc/executor.h` has it, (entries, 4) int64: kind and rows, columns, address, bytes. The pack
        must outlive whoever reads there."""
        table = np.zeros((len(self.table), 4), np.int64)
        for row, entry in zip(table, self.table, strict=True):
            held = self.bytes_of(entry)
            row[:] = entry.kind & 0xFFFFFFFF | entry.rows << 32, entry.cols, held.ctypes.data, held.nbytes
        return table

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, wherever they are."""
        return sum(self.bytes_of(entry).nbytes for entry in self.table)


class Writer:
    """Writes a packed model. The weights' bytes are filled in place, one weight at a time, by whoever packs them."""

    def __init__(
        self,
        lowered: Lowered,
        tower: Lowered | None,
        sizes: dict[Any, tuple[int, int, int, int]],
        source: str,
        notes: list[str],
    ):
        """
        Args:
            lowered, tower: the decoder's program and the image tower's, if there is one.
            sizes: of each weight (kind, rows, cols, bytes).
        """
        programs = [lowered] if tower is None else [lowered, tower]
        self.order = [*packed_weights(*programs), *plain_weights(*programs)]
        numbers = {weight: i for i, weight in enumerate(self.order)}
        arrays = [array for p in programs for array in (_encoded_steps(p, numbers), _encoded_buffers(p))]
        self.entries: list[Entry] = []
        # the header's own length decides where the data begin, so places are counted from there and moved at the end
        at = 0
        places = []
        for array in arrays:
            places.append((at, len(array)))
            at = _aligned(at + array.nbytes)
        for weight in self.order:
            kind, rows, cols, nbytes = sizes[weight]
            name = plain_name(weight)
            self.entries.append(Entry(name, kind, rows, cols, at, nbytes))
            at = _aligned(at + nbytes)
        self.total = at

        def header(base: int) -> bytes:
            moved = [(e.name, e.kind, e.rows, e.cols, e.offset + base, e.nbytes) for e in self.entries]
            of_program = [[start + base, rows] for start, rows in places]
            described = {"decoder": of_program[:2], "tower": of_program[2:] or None, "table": moved}
            return json.dumps({"version": VERSION, "source": source, "notes": notes, **described}).encode()

        self.base = _aligned(16 + len(header(1 << 40)))
        text = header(self.base)
        self.head = MAGIC + len(text).to_bytes(8, "little") + text
        self._arrays = [(place[0], array) for place, array in zip(places, arrays, strict=True)]

    @contextlib.contextmanager
    def file(self, target: Path) -> Iterator[np.ndarray]:
        """The whole file as bytes to be filled; it appears under its name when the block is left in order.

        Raises:
            OSError: where it cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target, durable=False) as file:  # a cache: what the power takes is packed anew
            os.posix_fallocate(file.fileno(), 0, self.base + self.total)  # a full disk says so here, not by a signal
            yield self._begun(mmap.mmap(file.fileno(), self.base + self.total))  # unmapped with its last array

    def _begun(self, mapped: mmap.mmap) -> np.ndarray:
        mapped[: len(self.head)] = self.head
        for offset, array in self._arrays:
            start = self.base + offset
            mapped[start : start + array.nbytes] = array.tobytes()
        return np.frombuffer(mapped, np.uint8)

    def room(self, whole: np.ndarray, entry: Entry) -> np.ndarray:
        """Where an entry's bytes go."""
        start = self.base + entry.offset
        return whole[start : start + entry.nbytes]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _encoded_steps(lowered: Lowered, numbers: dict[Any, int]) -> np.ndarray:
    """(steps, words): op, three slices read, one written, weights, numbers, scalars as their bits."""
    words = np.zeros((len(lowered.steps), STEP_WORDS), np.int32)
    for row, step in zip(words, lowered.steps, strict=True):
        row[0] = OPS.index(step.op)
        slices = [*step.reads, *[Slice(0, 0, 0)] * (3 - len(step.reads)), step.writes or Slice(0, 0, 0)]
        row[1:13] = [n for at in slices for n in (at.buffer, at.offset, at.width)]
        weights, plain = [numbers[weight] for weight in step.weights], [numbers[plain] for plain in step.plain]
        given = list(step.numbers)
        if step.op == "linear":  # what it screens with stands among its numbers, from 1 on
            given, plain = given + [number + 1 for number in plain], []
        weights += plain
        row[13 : 13 + STEP_WEIGHTS] = weights + [-1] * (STEP_WEIGHTS - len(weights))
        start = 13 + STEP_WEIGHTS
        row[start : start + len(given)] = given
        start += STEP_NUMBERS
        row[start : start + len(step.scalars)] = np.array(step.scalars, np.float32).view(np.int32)
    return words


def _encoded_buffers(lowered: Lowered) -> np.ndarray:
    return np.array([(b.width, int(b.rows == "R"), BUFFER_KINDS.index(b.kind)) for b in lowered.buffers], np.int32)
