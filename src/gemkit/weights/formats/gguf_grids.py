"""Blocks of the IQ1, IQ2 and IQ3 types of GGUF files <-> codes and scales, without loss in either direction.

A block holds 256 elements of a row as points of a published grid: each index stands for the magnitudes of 8 elements
(of 4 in IQ3). A mark beside them is a bit for each element: its sign, or in IQ1 whether an eighth is added or taken. A
code is the place of the magnitude with the mark above it (`block_types.KINDS` has the numbers that codes stand for), a
scale 2 s + 1 of the bits s in the file.

The grids, in `gguf_grids.npz`, are those that the types were published with (ggml-common.h in
https://github.com/ggml-org/ggml, MIT): of each point the places of its magnitudes, 2 bits each (3 in IQ3), low ones
first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemkit.block_types import KINDS


class Blocks(NamedTuple):
    """What blocks say: (blocks, ...) arrays of uint8."""

    super_scales: np.ndarray  # (blocks, 2), a float16 each
    scales: np.ndarray  # (blocks, groups): 2 s + 1
    points: np.ndarray  # (blocks, points) uint16: places in the grid
    marks: np.ndarray  # (blocks, 32): a bit an element


class _Layout(NamedTuple):
    nbytes: int
    grid: str
    unpack: Callable[[np.ndarray], Blocks]
    pack: Callable[[Blocks], tuple[np.ndarray, ...]]  # the fields of a block in their order, as bytes


def block_bytes(name: str) -> int:
    """Bytes of one block."""
    return LAYOUTS[name].nbytes


def load(name: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (blocks, 256), scales (blocks, groups) and the bytes of super scales (blocks, 2) of blocks (n, bytes)."""
    layout = LAYOUTS[name]
    found = layout.unpack(blocks)
    grid = _grid(layout.grid)
    codes = grid[found.points].view(np.uint8).reshape(len(blocks), 256)
    codes |= np.unpackbits(found.marks, axis=-1, bitorder="little") << _magnitude_bits(name)
    return codes, found.scales, found.super_scales


def store(name: str, codes: np.ndarray, scales: np.ndarray, super_scales: np.ndarray) -> np.ndarray:
    """The inverse of `load`: (blocks, bytes)."""
    layout, bits = LAYOUTS[name], _magnitude_bits(name)
    marks = np.packbits(codes >> bits, axis=-1, bitorder="little")
    grid = _grid(layout.grid)
    points = np.ascontiguousarray(codes & ((1 << bits) - 1)).view(grid.dtype)
    order = np.argsort(grid)
    places = order[np.searchsorted(grid, points, sorter=order)].astype(np.uint16)
    fields = layout.pack(Blocks(super_scales, scales, places, marks))
    return np.concatenate([np.ascontiguousarray(field).view(np.uint8).reshape(len(codes), -1) for field in fields], -1)


def _magnitude_bits(name: str) -> int:
    return sum(KINDS[name].bits) - 1


@cache
def _grid(name: str) -> np.ndarray:
    """Each point as one integer of as many bytes as it has elements: a magnitude's place a byte."""
    with np.load(Path(__file__).with_name("gguf_grids.npz"), allow_pickle=False) as grids:
        packed = grids[name]
    bits, elements = (3, 4) if name.startswith("IQ3") else (2, 8)
    places = (packed[:, None] >> (bits * np.arange(elements, dtype=np.uint16))) & ((1 << bits) - 1)
    return np.ascontiguousarray(places.astype(np.uint8)).view(f"u{elements}").reshape(-1)


# Where signs are stored in 7 bits, the eighth makes their number even.
_EVEN = np.array([s | (s.bit_count() & 1) << 7 for s in range(128)], np.uint8)


def _cut(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Fields of blocks, of so many bytes each."""
    ends = np.cumsum(sizes)
    return [np.ascontiguousarray(blocks[:, end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def _spread(field: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """The bits at each of `shifts` of every number of a (blocks, n) field: (blocks, n * shifts)."""
    return ((field[..., None] >> np.array(shifts, field.dtype)) & field.dtype.type(mask)).reshape(len(field), -1)


def _join(parts: np.ndarray, shifts: tuple[int, ...], dtype: type) -> np.ndarray:
    """The inverse of `_spread`."""
    parts = parts.reshape(len(parts), -1, len(shifts)).astype(dtype) << np.array(shifts, dtype)
    return np.bitwise_or.reduce(parts, axis=-1)


_SEVENS, _NIBBLES, _BITS = (0, 7, 14, 21), (0, 4), (0, 1, 2, 3, 4, 5, 6, 7)
_PAIRS, _TRIPLES = (0, 2, 4, 6), (0, 3, 6, 9)


def _odd(s: np.ndarray) -> np.ndarray:
    return (2 * s + 1).astype(np.uint8)


def _signs_and_scale(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, 8) uint32, one for 32 elements: four times 7 bits of signs, and a scale of 4 bits above them."""
    return _EVEN[_spread(words, _SEVENS, 127)], _odd(words >> np.uint32(28))


def _to_signs_and_scale(b: Blocks) -> np.ndarray:
    return _join(b.marks & 127, _SEVENS, np.uint32) | (b.scales.astype(np.uint32) >> 1) << np.uint32(28)


def _iq2_xxs(blocks: np.ndarray) -> Blocks:
    supers, rest = _cut(blocks, 2, 64)
    words = rest.view(np.uint32).reshape(-1, 8, 2)
    marks, scales = _signs_and_scale(words[..., 1])
    points = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    return Blocks(supers, scales, points.astype(np.uint16), marks)


def _to_iq2_xxs(b: Blocks) -> tuple[np.ndarray, ...]:
    points = b.points.astype(np.uint8).view(np.uint32)
    return b.super_scales, np.stack((points, _to_signs_and_scale(b)), -1)


def _iq2_xs(blocks: np.ndarray) -> Blocks:
    supers, words, scales = _cut(blocks, 2, 64, 8)
    both = words.view(np.uint16)
    return Blocks(supers, _odd(_spread(scales, _NIBBLES, 15)), both & np.uint16(511), _EVEN[both >> 9])


def _to_iq2_xs(b: Blocks) -> tuple[np.ndarray, ...]:
    words = b.points | (b.marks & 127).astype(np.uint16) << np.uint16(9)
    return b.super_scales, words, _join(b.scales >> 1, _NIBBLES, np.uint8)


def _iq2_s(blocks: np.ndarray) -> Blocks:
    supers, low, marks, high, scales = _cut(blocks, 2, 32, 32, 8, 8)
    points = low.astype(np.uint16) | _spread(high, _PAIRS, 3).astype(np.uint16) << np.uint16(8)
    return Blocks(supers, _odd(_spread(scales, _NIBBLES, 15)), points, marks)


def _to_iq2_s(b: Blocks) -> tuple[np.ndarray, ...]:
    high = _join(b.points >> 8, _PAIRS, np.uint8)
    return b.super_scales, b.points.astype(np.uint8), b.marks, high, _join(b.scales >> 1, _NIBBLES, np.uint8)


def _iq3_xxs(blocks: np.ndarray) -> Blocks:
    supers, points, words = _cut(blocks, 2, 64, 32)
    marks, scales = _signs_and_scale(words.view(np.uint32))
    return Blocks(supers, scales, points.astype(np.uint16), marks)


def _to_iq3_xxs(b: Blocks) -> tuple[np.ndarray, ...]:
    return b.super_scales, b.points.astype(np.uint8), _to_signs_and_scale(b)


def _iq3_s(blocks: np.ndarray) -> Blocks:
    supers, low, high, marks, scales = _cut(blocks, 2, 64, 8, 32, 4)
    points = low.astype(np.uint16) | _spread(high, _BITS, 1).astype(np.uint16) << np.uint16(8)
    return Blocks(supers, _odd(_spread(scales, _NIBBLES, 15)), points, marks)


def _to_iq3_s(b: Blocks) -> tuple[np.ndarray, ...]:
    high = _join(b.points >> 8, _BITS, np.uint8)
    return b.super_scales, b.points.astype(np.uint8), high, b.marks, _join(b.scales >> 1, _NIBBLES, np.uint8)


def _iq1_s(blocks: np.ndarray) -> Blocks:
    supers, low, high = _cut(blocks, 2, 32, 16)
    words = high.view(np.uint16)  # one for 32 elements
    points = low.astype(np.uint16) | _spread(words, _TRIPLES, 7) << np.uint16(8)
    marks = np.repeat((words >> 15).astype(np.uint8) * np.uint8(255), 4, axis=-1)
    return Blocks(supers, _odd((words >> 12) & 7), points, marks)


def _to_iq1_s(b: Blocks) -> tuple[np.ndarray, ...]:
    words = _join(b.points >> 8, _TRIPLES, np.uint16) | (b.scales.astype(np.uint16) >> 1) << np.uint16(12)
    return b.super_scales, b.points.astype(np.uint8), words | (b.marks[:, ::4] & 1).astype(np.uint16) << np.uint16(15)


def _iq1_m(blocks: np.ndarray) -> Blocks:
    low, high, rest = _cut(blocks, 32, 16, 8)
    words = rest.view(np.uint16)  # the float16 has a nibble on top of each of the four
    supers = np.bitwise_or.reduce((words >> 12) << np.array([0, 4, 8, 12], np.uint16), axis=-1)
    both = _spread(high, _NIBBLES, 15)
    points = low.astype(np.uint16) | (both & 7).astype(np.uint16) << np.uint16(8)
    scales = _odd(_spread(words, _TRIPLES, 7))
    return Blocks(supers.view(np.uint8).reshape(-1, 2), scales, points, (both >> 3) * np.uint8(255))


def _to_iq1_m(b: Blocks) -> tuple[np.ndarray, ...]:
    supers = np.ascontiguousarray(b.super_scales).view(np.uint16)
    nibbles = (supers >> np.array([0, 4, 8, 12], np.uint16)) & np.uint16(15)
    words = _join(b.scales >> 1, _TRIPLES, np.uint16) | nibbles << np.uint16(12)
    high = (b.points >> 8).astype(np.uint8) | (b.marks & 1) << 3
    return b.points.astype(np.uint8), _join(high, _NIBBLES, np.uint8), words


LAYOUTS = {
    "IQ3_XXS": _Layout(98, "IQ3_XXS", _iq3_xxs, _to_iq3_xxs),
    "IQ3_S": _Layout(110, "IQ3_S", _iq3_s, _to_iq3_s),
    "IQ2_XXS": _Layout(66, "IQ2_XXS", _iq2_xxs, _to_iq2_xxs),
    "IQ2_XS": _Layout(74, "IQ2_XS", _iq2_xs, _to_iq2_xs),
    "IQ2_S": _Layout(82, "IQ2_S", _iq2_s, _to_iq2_s),
    "IQ1_S": _Layout(50, "IQ1_S", _iq1_s, _to_iq1_s),
    "IQ1_M": _Layout(56, "IQ1_S", _iq1_m, _to_iq1_m),
}
