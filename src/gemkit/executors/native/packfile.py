"""A packed model: a lowered program and its weights in one file, as the native executor wants them in memory. No torch.

    8 bytes    GKPACK02
    8 bytes    where the header begins
    data       steps, buffers and weights, each at a multiple of 64 bytes
    header     JSON: what it was made from, steps and buffers of each program, a table of weights with their places and
               checksums

The file is mapped, not read: opening one costs its header, and its pages are shared by all processes. It is a cache:
what it was made from is in the header, and one that was made from something else, or by another version, is made anew.
A file is trusted with nothing: every place must be within it, and the executor checks each step before it runs any.

The header is written last: a file that was cut short has none. The checksum of a weight is the sum over its 64-bit
words, modulo 2^64, of word i times 2 i + 1: one changed word changes it for certain, and threads sum their pieces.

A model that sees has a second program, its image tower's, over the same table of weights.

A packed model can be made over another: of the weights that both have it holds no bytes, and they are read from there.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemkit.block_types import KINDS as BLOCK_TYPES
from gemkit.errors import WeightsError
from gemkit.executors.native.lower import DENSE, STEP_WEIGHTS

MAGIC = b"GKPACK02"
VERSION = 3  # of the layout of everything in the file, the weights' included
ALIGN = 64
MAX_HEADER = 1 << 26
STEP_NUMBERS, STEP_SCALARS = 6, 3
STEP_WORDS = 1 + 4 * 3 + STEP_WEIGHTS + STEP_NUMBERS + STEP_SCALARS
BUFFER_KINDS = ("floats", "quantized", "logits")

KINDS = (*DENSE, *BLOCK_TYPES)  # as `csrc/kernels/table.h` numbers them
_PIECE = 1 << 22  # bytes that are summed at a time
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
    checksum: int = 0  # of 64 bits


class Pack:
    """An open packed model. Its arrays are views of the mapped file."""

    def __init__(self, path: Path, over: Pack | None = None, *, mapped: mmap.mmap | None = None):
        """
        Args:
            over: the packed model that this one was made over.
            mapped: the bytes, if they are in no file; `path` is then a name for messages.

        Raises:
            WeightsError: if it is no packed model of this version, or its places are not within it.
        """
        self.path = path
        self._below = {} if over is None else {entry.name: (over, entry) for entry in over.table}
        self._map = _mapped(path) if mapped is None else mapped
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
            numbers = (entry.kind, entry.rows, entry.cols, entry.offset, entry.nbytes, entry.checksum)
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
        start = int.from_bytes(self._map[8:16], "little")
        if self._map[:8] != MAGIC or not 16 <= start < len(self._map) <= start + MAX_HEADER:
            raise WeightsError(f"{self.path} is no packed model")
        try:
            header = json.loads(self._map[start:].rstrip(b"\0"))
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
        found = np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset)
        found.flags.writeable = False
        return found

    def damaged(self) -> list[str]:
        """Names of the weights whose bytes are not those that were written. It reads all of them."""
        return [entry.name for entry in self.table if entry.nbytes and checksum(self.bytes_of(entry)) != entry.checksum]

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


def _mapped(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be mapped: {error}") from None


def checksum(data: np.ndarray) -> int:
    """The checksum of the bytes of a weight, as `csrc/packing.cpp` sums it; the last word is filled up with zeros."""
    total = 0
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        words = np.concatenate([piece, np.zeros(-len(piece) % 8, np.uint8)]).view(np.uint64)
        factors = np.arange(start // 8, start // 8 + len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        total += int((words * factors).sum(dtype=np.uint64))
    return total & 0xFFFF_FFFF_FFFF_FFFF
