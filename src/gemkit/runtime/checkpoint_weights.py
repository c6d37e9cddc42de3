"""The weights of a checkpoint, packed for the native executor from where they lie in its files. No torch.

A member's program is saved (`program.saved`), so that nothing of torch is imported; another architecture is traced.
A matrix that is not in the file as it is multiplied (stored transposed, or in a type that the run dtype rounds) is read
by torch and changed as `weights.load` does it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple
from typing import Any

import numpy as np

from gemkit.block_types import KINDS
from gemkit.errors import WeightsError
from gemkit.executors.native.lower import Dora, Frequencies, Lowered, lower
from gemkit.executors.native.writer import Source, has_blocks
from gemkit.program import saved
from gemkit.program.ir import Program, Weight
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.fit import SCORE, TIED_HEADS
from gemkit.weights.formats.base import TensorInfo
from gemkit.weights.maps import Layout, Part

_PIECE = 1 << 24  # bytes that are compared at a time
_RUN = {"F32": "float32", "BF16": "bfloat16"}


class CheckpointWeights:
    """The weights of an open checkpoint, for `executors.native.writer.write_pack`."""

    def __init__(self, checkpoint: Checkpoint):
        self._reader, self._label = checkpoint.reader, checkpoint.label
        self._decoder, self._vision = checkpoint.decoder, checkpoint.vision
        prefix = "" if checkpoint.vision is None else "language_model."
        self._parts = {part.param_name.removeprefix(prefix): part for part in checkpoint.parts}
        stored = {self._entry(part).dtype for part in self._parts.values()}
        self._run = "BF16" if "BF16" in stored else "F32"  # as `weights.load` chooses the run dtype
        self._notes = list(checkpoint.description.notes)
        self._rounded: dict[str, str] = {}  # the type that a weight was stored in, by its name

    def programs(self) -> list[Lowered]:
        """The lowered programs of the decoder and of the image tower, on weights of the kinds of the file."""
        found = saved.programs(self._decoder, self._vision) or self._traced()
        made = [lower(program.of_kinds(self._kinds(program))) for program in found]
        if SCORE in self._reader.entries:
            rows, width = self._reader.entries[SCORE].shape
            made[0].beside.append(Weight(SCORE, (rows, width), "float32", 4 * rows * width))
            whole = Layout((rows, width))
            self._parts[SCORE] = Part(SCORE, SCORE, (rows, width), whole)
        return made

    def heads_are_tied(self) -> bool:
        """Whether each copy of the tied head in the files has the bytes of the embedding. What differs may yet be the
        same numbers in another type: `weights.load` compares those."""
        table = self._entry(self._parts["embed_tokens.weight"])
        heads = [self._reader.entries[name] for name in TIED_HEADS if name in self._reader.entries]
        return all(self._are_equal(table, head) for head in heads)

    def notes(self) -> list[str]:
        counts, run = Counter(self._rounded.values()), _RUN[self._run]
        casts = [f"{count} weights were rounded from {stored} to {run}" for stored, count in counts.items()]
        return [*self._notes, *casts]

    def rows(self, weight: Weight) -> Source:
        part = self._parts[weight.name]
        entry, places = self._entry(part), self._reader.planes(part.file_name)
        at = {name: (self._reader.file(plane).fileno(), plane.offset) for name, plane in places.items()}
        if entry.dtype in KINDS:
            if not part.plain:
                raise WeightsError(
                    f"{part.file_name} is stored as {entry.dtype}; norms and fused matrices are never quantized"
                )
            if "blocks" not in at:
                return Source.of_files(at)
            return Source.blocks(*at["blocks"]) if has_blocks(entry.dtype) else self._read(part)
        widened = (self._run, entry.dtype) == ("F32", "F16")
        if part.layout.transposed or part.layout.plus_one or not (widened or entry.dtype == self._run):
            return self._read(part)
        first = 0 if part.layout.rows is None else part.layout.rows[0]
        file, offset = at["dense"]
        row_bytes = entry.nbytes // part.layout.shape[0]
        return Source.of_files({"dense": (file, offset + first * row_bytes)}, entry.dtype)

    def floats(self, weight: Weight | Dora) -> np.ndarray:
        assert isinstance(weight, Weight), "a file of weights has no adapters"
        part = self._parts[weight.name]
        entry = self._entry(part)
        if entry.dtype in KINDS:
            raise WeightsError(f"{part.file_name} is stored as {entry.dtype}: only matrices are run quantized")
        data = np.empty(entry.nbytes, np.uint8)
        self._reader.file(entry).read_into(data, entry.offset)
        values = _widened(data, entry.dtype).reshape(part.layout.shape)
        if part.layout.rows is not None:
            values = values[slice(*part.layout.rows)]
        if part.layout.transposed:
            values = np.swapaxes(values, -1, -2)
        if part.layout.plus_one:
            values = values - np.float32(1)
        if part.file_name == SCORE or self._run == "F32":
            return values
        rounded = _to_bfloat16(np.ascontiguousarray(values))
        if not np.array_equal(rounded, values):
            stored = "float32" if part.layout.plus_one else {"F32": "float32", "F16": "float16"}[entry.dtype]
            self._rounded[weight.name] = stored
        return rounded

    def frequencies(self, rates: Frequencies) -> np.ndarray:
        found = saved.frequencies(*astuple(rates))
        if found is None:
            from gemkit import ops

            found = ops.rope_frequencies(*astuple(rates)).numpy()
        return found

    def _entry(self, part: Part) -> TensorInfo:
        return self._reader.entries[part.file_name]

    def _kinds(self, program: Program) -> dict[str, tuple[str, int]]:
        """Kind and bytes of every weight of a program, in the run dtype or as the file has it quantized."""
        kinds = {}
        for name, weight in program.weights().items():
            dtype = self._entry(self._parts[name]).dtype
            bits = KINDS[dtype].bits_per_weight if dtype in KINDS else {"F32": 32, "BF16": 16}[self._run]
            kind = dtype if dtype in KINDS else _RUN[self._run]
            kinds[name] = kind, int(math.prod(weight.shape) * bits / 8)
        return kinds

    def _traced(self) -> list[Program]:
        import torch

        from gemkit.nn import build
        from gemkit.program.trace import trace, trace_tower

        with torch.device("meta"):
            module = build(self._decoder, self._vision)
        made = [trace(module.decoder, sees=self._vision is not None)]
        return made if self._vision is None else [*made, trace_tower(module)]

    def _read(self, part: Part) -> Source:
        """A matrix whole in memory, changed to what the model multiplies."""
        import torch

        value: Any = self._reader.read(part.file_name)
        if not isinstance(value, torch.Tensor):
            planes = value.planes
        else:
            taken = part.take(value)
            cast = taken.to(getattr(torch, _RUN[self._run]))
            if cast.dtype != taken.dtype and not torch.equal(cast.to(taken.dtype), taken):
                self._rounded[part.param_name] = str(taken.dtype).removeprefix("torch.")
            planes = {"dense": cast.contiguous()}
        return Source.memory({name: plane.data_ptr() for name, plane in planes.items()}, planes, self._run)

    def _are_equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
            return False
        pieces = ((start, min(_PIECE, one.nbytes - start)) for start in range(0, one.nbytes, _PIECE))
        first, second = self._reader.file(one), self._reader.file(other)
        return all(first.read(n, one.offset + at) == second.read(n, other.offset + at) for at, n in pieces)


def _widened(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a stored type as float32."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, ties to even, in float32."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))
