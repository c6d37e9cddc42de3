"""From a module with its weights to a packed model: traced, lowered, and its weights laid out for the kernels."""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemkit import ops
from gemkit.errors import ModelError, WeightsError
from gemkit.executors.native import dequantize, screening
from gemkit.executors.native.dequantize import Planes
from gemkit.executors.native.library import library, threads
from gemkit.executors.native.lower import (
    Frequencies,
    Plain,
    Signs,
    Sketch,
    lower,
    packed_weights,
    plain_name,
    plain_weights,
)
from gemkit.executors.native.packfile import KINDS, PLAIN, Entry, Pack, Writer
from gemkit.nn import LanguageModel
from gemkit.program.ir import Weight
from gemkit.program.trace import trace, trace_tower

dequantize.enable()

_TOWER = ("vision_tower.", "multi_modal_projector.")


def pack(
    module: LanguageModel,
    target: Path | None = None,
    source: str = "",
    notes: Sequence[str] = (),
    *,
    over: Pack | None = None,
    changed: Collection[str] = (),
) -> Pack:
    """The packed model of a decoder, or of one with its image tower.

    Args:
        target: where the file is kept. None, or a place that cannot be written: it is kept nowhere, and its memory is
            given back with the result.
        source: what it was made from; a file that says something else is not this one.
        notes: what a user should know of how the weights were read.
        over: a packed model of the same module, from before it was changed. What has not changed is not packed again.
        changed: names of the weights of `over` that have.

    Raises:
        ModelError: if the native executor cannot run the module.
        WeightsError: if there is no room for the file anywhere.
    """
    tower = lower(trace_tower(module)) if module.vision is not None else None
    lowered = lower(trace(module.decoder, sees=tower is not None))
    if (score := module.decoder.score) is not None:  # of a reward model: read beside the program
        lowered.beside.append(Weight("score.weight", tuple(score.weight.shape), "float32", score.weight.nbytes))
    programs = [lowered] if tower is None else [lowered, tower]
    sizes: dict[Any, tuple[int, int, int, int]] = {}
    for weight in packed_weights(*programs):
        kind = _kind(weight)
        rows, cols = weight.shape
        sizes[weight] = kind, rows, cols, library().gk_packed_bytes(kind, rows, cols)
    for plain in plain_weights(*programs):
        count = _floats(plain)
        sizes[plain] = PLAIN, 1, count, 4 * count
    if over is not None:
        kept = {e.name: (e.kind, e.rows, e.cols) for e in over.table} | dict.fromkeys(changed)
        for weight, (kind, rows, cols, _) in sizes.items():
            of_table = weight.table.name if isinstance(weight, Sketch) else None
            if kept.get(plain_name(weight)) == (kind, rows, cols) and of_table not in changed:
                sizes[weight] = kind, rows, cols, 0
    notes = list(notes)
    if target is not None:
        try:
            return _written(module, Writer(lowered, tower, sizes, source, notes), target, over)
        except OSError as error:
            notes.append(f"the packed weights could not be kept at {target}: {error.strerror or error}")
    writer = Writer(lowered, tower, sizes, source, notes)
    try:
        with tempfile.TemporaryDirectory(prefix="gemkit-") as folder:
            return _written(module, writer, Path(folder) / "model", over)  # stays mapped when its name is gone
    except OSError as error:
        raise WeightsError(f"there is no room for {writer.total:,} bytes of packed weights: {error}") from error


def _written(module: LanguageModel, writer: Writer, target: Path, over: Pack | None) -> Pack:
    with writer.file(target) as whole, ThreadPoolExecutor(threads()) as pool:
        places = {entry.name: entry for entry in writer.entries}
        for weight, entry in zip(writer.order, writer.entries, strict=True):
            if not entry.nbytes:  # of the packed model below
                continue
            room = writer.room(whole, entry)
            if isinstance(weight, Weight) and entry.kind != PLAIN:
                _pack_one(weight, _held(module, weight.name), room, pool.map)
            elif isinstance(weight, Sketch):
                _sketch(places[weight.table.name], writer.room(whole, places[weight.table.name]), room, pool.map)
            else:
                room[:] = _values(module, weight).view(np.uint8)
    return Pack(target, over)


def _kind(weight: Weight) -> int:
    if weight.kind not in KINDS or len(weight.shape) != 2:
        raise ModelError(f"{weight.name} is {weight.kind} {weight.shape}: no kind of the native executor")
    return KINDS.index(weight.kind)


def _pack_one(weight: Weight, value: Any, room: np.ndarray, each: Callable[..., Any]) -> None:
    planes = value.planes if isinstance(value, ops.Quantized) else {"dense": value.detach()}
    held = {name: plane.cpu().contiguous() for name, plane in planes.items()}
    given = Planes.of(held)
    rows, cols = weight.shape
    step = max(16, (1 << 22) // cols // 16 * 16)  # whole tiles, some megabytes of them

    def part(start: int) -> None:
        end = min(rows, start + step)
        if not library(free=True).gk_pack(_kind(weight), rows, cols, ctypes.byref(given), room.ctypes.data, start, end):
            raise WeightsError(f"{weight.name} of kind {weight.kind} and shape {weight.shape} cannot be packed")

    list(each(part, range(0, rows, step)))


def _sketch(table: Entry, packed: np.ndarray, room: np.ndarray, each: Callable[..., Any]) -> None:
    signs = screening.signs(table.cols)
    tiles = -(-table.rows // screening.TILE)

    def part(start: int) -> None:
        given = table.kind, packed.ctypes.data, table.rows, table.cols, signs.ctypes.data, room.ctypes.data
        made = library(free=True).gk_make_sketch(*given, start, min(tiles, start + 256))
        assert made, "the library was found to have kernels before"

    list(each(part, range(0, tiles, 256)))


def _held(module: LanguageModel, name: str) -> Any:
    """A weight by its name in a program: the decoder's are named from the decoder on."""
    return module.get_param(name) if name.startswith(_TOWER) else module.decoder.get_param(name)


def _floats(plain: Plain) -> int:
    match plain:
        case Weight(shape=shape):
            return math.prod(shape)
        case Frequencies(rotated=rotated):
            return rotated // 2
        case Sketch(table=table):
            return screening.nbytes(*table.shape) // 4
        case Signs(columns=columns):
            return columns


def _values(module: LanguageModel, plain: Plain) -> np.ndarray:
    match plain:
        case Frequencies(rotated, base, factor, ramp):
            return ops.rope_frequencies(rotated, base, factor, ramp).numpy()
        case Signs(columns=columns):
            return screening.signs(columns)
        case Weight(name=name):
            value: Tensor = _held(module, name)
            return value.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().reshape(-1)
    raise AssertionError(f"{plain} is packed elsewhere")
