"""From a module with its weights to a packed model: traced, lowered, and its weights laid out for the kernels."""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemkit import ops
from gemkit.errors import ModelError, WeightsError
from gemkit.nn import Decoder
from gemkit.program.ir import Weight
from gemkit.program.lower import Frequencies, Plain, lower, packed_weights, plain_weights
from gemkit.program.native import library, threads
from gemkit.program.pack import KINDS, PLAIN, Pack, Writer
from gemkit.program.trace import trace

PLANES = ("codes", "high", "scales", "mins", "super_scales", "super_mins")


def pack(module: Decoder, target: Path | None, source: str, notes: list[str]) -> Pack:
    """The packed model of a decoder.

    Args:
        target: where the file is kept. None, or a place that cannot be written: it is kept nowhere, and its memory is
            given back with the result.
        source: what it was made from; a file that says something else is not this one.
        notes: what a user should know of how the weights were read.

    Raises:
        ModelError: if the native executor cannot run the module.
        WeightsError: if there is no room for the file anywhere.
    """
    lowered = lower(trace(module))
    sizes: dict[Any, tuple[int, int, int, int]] = {}
    for weight in packed_weights(lowered):
        kind = _kind(weight)
        rows, cols = weight.shape
        sizes[weight] = kind, rows, cols, library().gk_packed_bytes(kind, rows, cols)
    for plain in plain_weights(lowered):
        count = len(_values(module, plain)) if isinstance(plain, Frequencies) else math.prod(plain.shape)
        sizes[plain] = PLAIN, 1, count, 4 * count
    writer = Writer(lowered, sizes, source, notes)
    if target is not None:
        try:
            return _written(module, writer, target)
        except OSError as error:
            notes.append(f"the packed weights could not be kept at {target}: {error.strerror or error}")
    try:
        with tempfile.TemporaryDirectory(prefix="gemkit-") as folder:
            return _written(module, writer, Path(folder) / "model")  # stays mapped when its name is gone
    except OSError as error:
        raise WeightsError(f"there is no room for {writer.total:,} bytes of packed weights: {error}") from error


def _written(module: Decoder, writer: Writer, target: Path) -> Pack:
    with writer.file(target) as whole, ThreadPoolExecutor(threads()) as pool:
        for weight, entry in zip(writer.order, writer.entries, strict=True):
            room = writer.room(whole, entry)
            if isinstance(weight, Weight) and entry.kind != PLAIN:
                _pack_one(weight, _held(module, weight.name), room, pool.map)
            else:
                room[:] = _values(module, weight).view(np.uint8)
    return Pack(target)


def _kind(weight: Weight) -> int:
    if weight.kind not in KINDS or len(weight.shape) != 2:
        raise ModelError(f"{weight.name} is {weight.kind} {weight.shape}: no kind of the native executor")
    return KINDS.index(weight.kind)


def _pack_one(weight: Weight, value: Any, room: np.ndarray, each: Callable[..., Any]) -> None:
    planes = value.planes if isinstance(value, ops.Quantized) else {"codes": value.detach()}
    held = [planes[name].cpu().contiguous() if name in planes else None for name in PLANES]
    pointers = (ctypes.c_void_p * len(PLANES))(*[None if plane is None else plane.data_ptr() for plane in held])
    rows, cols = weight.shape
    step = max(16, (1 << 22) // cols // 16 * 16)  # whole tiles, some megabytes of them

    def part(start: int) -> None:
        if library().gk_pack(_kind(weight), rows, cols, pointers, room.ctypes.data, start, min(rows, start + step)):
            raise WeightsError(f"{weight.name}: {library().gk_error().decode()}")

    list(each(part, range(0, rows, step)))


def _held(module: Decoder, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _values(module: Decoder, plain: Plain) -> np.ndarray:
    if isinstance(plain, Frequencies):
        return ops.rope_frequencies(plain.rope, plain.head_dim).numpy()
    value: Tensor = _held(module, plain.name)
    return value.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().reshape(-1)
