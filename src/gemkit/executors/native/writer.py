"""A packed model is written: places for its weights, which the native library fills on all threads. No torch.

Rows go from where they are (a file, or memory) to their place in the packed file piece by piece: no weight is ever
whole in memory, and the pages of neither file are mapped. A packed model that is kept nowhere is filled in memory.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemkit.block_types import PLANES
from gemkit.errors import ModelError, WeightsError
from gemkit.executors.native import screening
from gemkit.executors.native.library import library, threads
from gemkit.executors.native.lower import (
    OPS,
    STEP_WEIGHTS,
    Dora,
    Frequencies,
    Ids,
    Lowered,
    Plain,
    ScaledRows,
    Signs,
    Sketch,
    Slice,
    packed_weights,
    plain_name,
    plain_weights,
)
from gemkit.executors.native.packfile import (
    ALIGN,
    BUFFER_KINDS,
    KINDS,
    MAGIC,
    PLAIN,
    STEP_NUMBERS,
    STEP_WORDS,
    VERSION,
    Entry,
    Pack,
    checksum,
)
from gemkit.files import atomic_file
from gemkit.program.ir import Weight

NOT_KEPT = "the packed weights are in memory alone, made anew the next time: {why}; GEMKIT_CACHE names another folder"

Progress = Callable[[int, int], Any]  # (bytes packed, bytes in all)

_DENSE = ("F32", "BF16", "F16")  # stored types, as `csrc/weights.h` numbers them
_IN_MEMORY, _IN_FILES, _IN_BLOCKS = range(3)  # `Form` of `csrc/packing.h`
_PIECE = 64_000_000  # packed bytes of one call, between which progress is told and an interruption is seen
_SKETCHING = 3  # how many times longer than packing a byte takes making a byte of a sketch


class Planes(ctypes.Structure):
    """`gk::Planes`. What it points into must be held for as long as it is used."""

    _fields_ = [*((name, ctypes.c_void_p) for name in (*PLANES, "dense")), ("dense_type", ctypes.c_int32)]


class Source(ctypes.Structure):
    """`gk::Source`: where the rows of a weight are. Made by one of the class methods; it holds what it points into."""

    _fields_ = [
        ("planes", Planes),
        ("form", ctypes.c_int32),
        ("files", ctypes.c_int32 * 7),
        ("offsets", ctypes.c_int64 * 7),
    ]

    @classmethod
    def memory(cls, planes: Mapping[str, int], held: Any, dense: str = "F32") -> Source:
        """Planes at addresses, each contiguous; "dense" of the stored type `dense`."""
        source = cls(form=_IN_MEMORY, planes=Planes(**planes, dense_type=_DENSE.index(dense)))
        source.held = held
        return source

    @classmethod
    def of_files(cls, planes: Mapping[str, tuple[int, int]], dense: str = "F32") -> Source:
        """Planes at (file descriptor, byte)."""
        source = cls(form=_IN_FILES, planes=Planes(dense_type=_DENSE.index(dense)))
        for i, name in enumerate((*PLANES, "dense")):
            source.files[i], source.offsets[i] = planes.get(name, (-1, 0))
        return source

    @classmethod
    def blocks(cls, file: int, offset: int) -> Source:
        """The blocks of a GGUF file, row by row."""
        source = cls(form=_IN_BLOCKS)
        source.files[0], source.offsets[0] = file, offset
        return source


class Target(ctypes.Structure):
    """`gk::Target`."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("weight", ctypes.c_int64),
        ("sketch", ctypes.c_int64),
        ("signs", ctypes.c_void_p),
        ("file", ctypes.c_int32),
    ]


class WeightSource(Protocol):
    """The numbers of a model's weights, which a packed one is made from."""

    def rows(self, weight: Weight) -> Source:
        """A weight that is multiplied, in its kind.

        Raises:
            WeightsError: if there is none in a form that can be packed.
        """
        ...

    def floats(self, weight: Weight | Dora) -> np.ndarray:
        """Another weight in float32, or what an adapter of a module makes of some."""
        ...

    def notes(self) -> list[str]:
        """What a user should know of how the weights were read; asked for when all of them were."""
        ...

    def frequencies(self, rates: Frequencies) -> np.ndarray:
        """Radians a position of a rotary embedding, as `ops.rope_frequencies` defines them: (rotated / 2,) float32."""
        ...


def has_blocks(kind: str) -> bool:
    """Whether the blocks that GGUF files hold of a kind can be packed as they lie."""
    return kind in KINDS and library().gk_block_bytes(KINDS.index(kind)) > 0


def write_pack(
    programs: Sequence[Lowered],
    weights: WeightSource,
    target: Path | None = None,
    source: str = "",
    *,
    over: Pack | None = None,
    changed: Collection[str] = (),
    progress: Progress | None = None,
) -> Pack:
    """The packed model of lowered programs: a decoder's, then its image tower's if it sees.

    Args:
        target: where the file is kept. None, or a place that cannot be written: it is in memory alone.
        source: what it was made from; a file that says something else is not this one.
        over: a packed model of the same programs, from before weights were changed. The others are not packed again.
        changed: names of the weights of `over` that were.
        progress: is called with (bytes packed, bytes in all).

    Raises:
        ModelError: for a weight of a kind that the native executor does not have.
        WeightsError: if a weight cannot be read or packed, or there is no memory for it.
    """
    layout = Layout(programs, over, changed)
    failed = ""
    if target is not None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target, durable=False) as file:  # a cache: what the power takes is packed anew
                sink = Target(file=file.fileno())
                layout.fill(sink, weights, progress)
                for offset, data in layout.ends(source, weights.notes()):
                    os.pwrite(sink.file, data, offset)
            return Pack(target, over)
        except OSError as error:
            failed = f"cannot write to {target.parent}: {error.strerror or error}"
    try:
        mapped = mmap.mmap(-1, layout.most_bytes(source))
    except (OSError, ValueError) as error:
        raise WeightsError(f"there is no memory for {layout.total:,} bytes of packed weights: {error}") from error
    whole = np.frombuffer(mapped, np.uint8)
    layout.fill(Target(memory=whole.ctypes.data), weights, progress)
    for offset, data in layout.ends(source, ()):
        mapped[offset : offset + len(data)] = data
    made = Pack(target or Path("the packed weights"), over, mapped=mapped)
    made.notes = weights.notes()
    if failed:
        made.notes.append(NOT_KEPT.format(why=failed))
    return made


class Layout:
    """What is in a packed model, and where."""

    def __init__(self, programs: Sequence[Lowered], over: Pack | None = None, changed: Collection[str] = ()):
        """Args: as `write_pack`."""
        packed = list(packed_weights(*programs))
        order: list[Any] = [*packed, *plain_weights(*programs)]
        numbers = {weight: i for i, weight in enumerate(order)}
        self._arrays = [array for p in programs for array in (_encoded_steps(p, numbers), _encoded_buffers(p))]
        self._places = []
        at = ALIGN
        for array in self._arrays:
            self._places.append((at, len(array)))
            at = _aligned(at + array.nbytes)
        kept = {} if over is None else {e.name: (e.kind, e.rows, e.cols) for e in over.table} | dict.fromkeys(changed)
        self.entries: dict[Any, Entry] = {}
        for i, weight in enumerate(order):
            kind, rows, cols, nbytes = _size(weight, i < len(packed))
            fresh = not any(source.name in changed for source in _sources(weight))
            if kept.get(plain_name(weight)) == (kind, rows, cols) and fresh:
                nbytes = 0
            self.entries[weight] = Entry(plain_name(weight), kind, rows, cols, at, nbytes)
            at = _aligned(at + nbytes)
        self.total = at

    def fill(self, sink: Target, weights: WeightSource, progress: Progress | None) -> None:
        """Put every weight in its place.

        Raises:
            OSError: if the file cannot be written.
            WeightsError: as `write_pack`.
        """
        sketches = {weight.table: entry for weight, entry in self.entries.items() if isinstance(weight, Sketch)}
        self._work = sum(e.nbytes * (_SKETCHING if isinstance(w, Sketch) else 1) for w, e in self.entries.items())
        self._done, self._progress = 0, progress
        for weight, entry in self.entries.items():
            if not entry.nbytes or isinstance(weight, Sketch):  # of the packed model below; made with its table
                continue
            if entry.kind == PLAIN:
                values = np.ascontiguousarray(_floats(weight, weights)).view(np.uint8).reshape(-1)
                _put(sink, values, entry.offset)
                self.entries[weight] = replace(entry, checksum=checksum(values))
                self._advance(entry.nbytes)
            else:
                self._fill_packed(sink, weight, weights.rows(weight), sketches.get(weight))

    def _fill_packed(self, sink: Target, weight: Weight, source: Source, sketch: Entry | None) -> None:
        entry = self.entries[weight]
        signs = screening.signs(entry.cols) if sketch is not None and sketch.nbytes else None
        to = Target(sink.memory, entry.offset, 0 if sketch is None else sketch.offset, None, sink.file)
        if signs is not None:
            to.signs = signs.ctypes.data
        sums, error = (ctypes.c_uint64 * 2)(), ctypes.c_int32()
        tiles = -(-entry.rows // screening.TILE)
        work = entry.nbytes + (0 if signs is None or sketch is None else _SKETCHING * sketch.nbytes)
        step = screening.TILE * max(1, _PIECE * tiles // work)
        for row in range(0, entry.rows, step):
            end = min(entry.rows, row + step)
            given = threads(), entry.kind, entry.rows, entry.cols, ctypes.byref(source), ctypes.byref(to), row, end
            result = library(free=True).gk_pack(*given, sums, ctypes.byref(error))
            if result:
                _raise(result, error.value, weight)
            self._advance(work * end // entry.rows - work * row // entry.rows)
        self.entries[weight] = replace(entry, checksum=sums[0])
        if signs is not None and sketch is not None:
            self.entries[Sketch(weight)] = replace(sketch, checksum=sums[1])

    def _advance(self, work: int) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(min(self._done, self._work), self._work)

    def ends(self, source: str, notes: Sequence[str]) -> list[tuple[int, bytes]]:
        """What is written after the weights, each with its offset: programs, the header, the first bytes."""
        arrays = [(place, array.tobytes()) for (place, _), array in zip(self._places, self._arrays, strict=True)]
        described = {"decoder": self._places[:2], "tower": self._places[2:] or None}
        table = [astuple(entry) for entry in self.entries.values()]
        header = {"version": VERSION, "source": source, "notes": list(notes), **described, "table": table}
        return [*arrays, (self.total, json.dumps(header).encode()), (0, MAGIC + self.total.to_bytes(8, "little"))]

    def most_bytes(self, source: str) -> int:
        """Bytes of the whole, without notes, whatever the checksums are."""
        return self.total + 20 * len(self.entries) + sum(len(data) for _, data in self.ends(source, ()))


def _raise(result: int, number: int, weight: Weight) -> None:
    match result:
        case 3:
            raise OSError(number, os.strerror(number))
        case 2:
            why = "its file ends before it" if number < 0 else os.strerror(number)
            raise WeightsError(f"{weight.name} cannot be read: {why}")
    raise WeightsError(f"{weight.name} of kind {weight.kind} and shape {weight.shape} cannot be packed")


def _put(sink: Target, data: np.ndarray, offset: int) -> None:
    if sink.memory is not None:
        ctypes.memmove(sink.memory + offset, data.ctypes.data, data.nbytes)
    elif (count := os.pwrite(sink.file, data.data, offset)) < data.nbytes:
        raise OSError(28, f"only {count} of {data.nbytes} bytes could be written")


def _size(weight: Any, packed: bool) -> tuple[int, int, int, int]:
    """Kind, rows, columns and bytes of a weight in its place.

    Args:
        packed: it is multiplied; otherwise it is an array of floats.
    """
    if not packed:
        count = _count(weight)
        return PLAIN, 1, count, 4 * count
    if weight.kind not in KINDS or len(weight.shape) != 2:
        raise ModelError(f"{weight.name} is {weight.kind} {weight.shape}: no kind of the native executor")
    kind, (rows, cols) = KINDS.index(weight.kind), weight.shape
    return kind, rows, cols, library().gk_packed_bytes(kind, rows, cols)


def _sources(made: Any) -> tuple[Weight, ...]:
    """The weights that something is made from."""
    match made:
        case Sketch(table=table):
            return (table,)
        case ScaledRows(rows=rows):
            return (rows,)
        case Dora():
            return made.sources
    return ()


def _count(plain: Plain) -> int:
    match plain:
        case Ids(ids=ids):
            return len(ids)
        case ScaledRows(rows=rows):
            return math.prod(rows.shape)
        case Dora(magnitude=magnitude):
            return magnitude.shape[0]
        case Weight(shape=shape):
            return math.prod(shape)
        case Frequencies(rotated=rotated):
            return rotated // 2
        case Sketch(table=table):
            return screening.nbytes(*table.shape) // 4
        case Signs(columns=columns):
            return columns


def _floats(plain: Plain, weights: WeightSource) -> np.ndarray:
    match plain:
        case Frequencies():
            return weights.frequencies(plain)
        case Signs(columns=columns):
            return screening.signs(columns)
        case Ids(ids=ids):
            return np.array(ids, np.float32)
        case ScaledRows(rows, scale):
            return weights.floats(rows) * np.float32(scale)
        case Weight() | Dora():
            return weights.floats(plain)
    raise AssertionError(f"{plain} is made with its table")


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
