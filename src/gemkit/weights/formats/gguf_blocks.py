"""Blocks of GGUF files <-> the planes of `block_types.py`, without loss in either direction.

A block holds 32 or 256 elements of a row: its scales beside its codes. Taking it apart is cutting out fields and, where
a field's codes are packed over another span than ours, packing them again. Such a type is a row of `BLOCKS`; those that
choose several codes at once from a grid are in `gguf_grids.py`.

In NumPy, on one thread: many small steps on a busy machine spend more time waiting for torch's threads than working.

Source: the block structures of ggml (ggml-common.h in https://github.com/ggml-org/ggml).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from gemkit.block_types import KINDS, Kind
from gemkit.ops.quantized import Quantized
from gemkit.weights.formats import gguf_grids


class Field(NamedTuple):
    plane: str  # of ours; "packed" for scales and minima in one
    nbytes: int
    span: int = 0  # elements that a field of codes is packed over (see `_respan`)


BLOCKS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (Field("scales", 2), Field("codes", 16, 32)),
    "Q4_1": (Field("scales", 2), Field("mins", 2), Field("codes", 16, 32)),
    "Q5_0": (Field("scales", 2), Field("high", 4, 8), Field("codes", 16, 32)),
    "Q5_1": (Field("scales", 2), Field("mins", 2), Field("high", 4, 8), Field("codes", 16, 32)),
    "Q8_0": (Field("scales", 2), Field("codes", 32, 32)),
    "Q2_K": (Field("packed", 16), Field("codes", 64, 128), Field("super_scales", 2), Field("super_mins", 2)),
    "Q3_K": (Field("high", 32, 256), Field("codes", 64, 128), Field("packed", 12), Field("super_scales", 2)),
    "Q4_K": (Field("super_scales", 2), Field("super_mins", 2), Field("packed", 12), Field("codes", 128, 64)),
    "Q5_K": (
        *(Field("super_scales", 2), Field("super_mins", 2), Field("packed", 12)),
        *(Field("high", 32, 256), Field("codes", 128, 64)),
    ),
    "Q6_K": (Field("codes", 128, 128), Field("high", 64, 128), Field("scales", 16), Field("super_scales", 2)),
    "IQ4_NL": (Field("scales", 2), Field("codes", 16, 32)),
    "IQ4_XS": (Field("super_scales", 2), Field("packed", 6), Field("codes", 128, 32)),
}


def block_bytes(name: str) -> int:
    """Bytes of one block."""
    if name in gguf_grids.LAYOUTS:
        return gguf_grids.block_bytes(name)
    return sum(field.nbytes for field in BLOCKS[name])


def load_blocks(weight: Quantized, data: np.ndarray) -> None:
    """Fill a weight's planes (on the CPU) from the bytes of a file: uint8, the blocks of all rows end to end."""
    kind, planes = weight.kind, _as_bytes(weight)
    blocks = data.reshape(weight.shape[0], -1, block_bytes(kind.name))
    if kind.name in gguf_grids.LAYOUTS:
        _load_points(kind, planes, blocks.reshape(-1, blocks.shape[-1]))
        return
    start = 0
    for plane, nbytes, span in BLOCKS[kind.name]:
        field = blocks[..., start : start + nbytes]
        start += nbytes
        if plane == "packed":
            for name, values in _PACKED[kind.name].unpack(field).items():
                planes[name][:] = values.reshape(planes[name].shape)
            continue
        if span:
            field = _respan(field, _bits(kind, plane), span, 32)
        elif plane == "mins":
            field = _negated(field)
        planes[plane].reshape(blocks.shape[0], -1, nbytes)[:] = field.reshape(blocks.shape[0], -1, nbytes)


def to_blocks(weight: Quantized) -> np.ndarray:
    """The bytes that a file holds for a weight: uint8, one axis; the inverse of `load_blocks`."""
    kind, planes = weight.kind, _as_bytes(weight)
    if kind.name in gguf_grids.LAYOUTS:
        return _store_points(kind, planes)
    fields = []
    for plane, nbytes, span in BLOCKS[kind.name]:
        if plane == "packed":
            field = _PACKED[kind.name].pack(planes)
        elif span:
            field = _respan(planes[plane], _bits(kind, plane), 32, span)
        else:
            field = _negated(planes[plane]) if plane == "mins" else planes[plane]
        fields.append(field.reshape(weight.shape[0], -1, nbytes))
    return np.concatenate(fields, -1).reshape(-1)


def _load_points(kind: Kind, planes: dict[str, np.ndarray], blocks: np.ndarray) -> None:
    codes, scales, super_scales = gguf_grids.load(kind.name, blocks)
    first = 0
    for plane, bits in zip(("codes", "high"), kind.bits, strict=False):
        part = np.ascontiguousarray((codes >> first) & ((1 << bits) - 1))
        planes[plane][:] = _packed(part, bits).reshape(planes[plane].shape)
        first += bits
    planes["scales"][:] = scales.reshape(planes["scales"].shape)
    planes["super_scales"][:] = super_scales.reshape(planes["super_scales"].shape)


def _store_points(kind: Kind, planes: dict[str, np.ndarray]) -> np.ndarray:
    count, codes, first = planes["super_scales"].size // 2, np.uint8(0), 0
    for plane, bits in zip(("codes", "high"), kind.bits, strict=False):
        codes = codes | _unpacked(planes[plane], bits).reshape(count, 256) << first
        first += bits
    scales, super_scales = planes["scales"].reshape(count, -1), planes["super_scales"].reshape(count, 2)
    return gguf_grids.store(kind.name, np.asarray(codes), scales, super_scales).reshape(-1)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, a byte each, as a plane of so many bits: element e of 32 is in byte e % n at bit `bits * (e // n)`."""
    runs = codes.reshape(-1, 8 // bits, 4 * bits)
    return np.bitwise_or.reduce(runs << np.arange(0, 8, bits, dtype=np.uint8)[:, None], axis=1)


def _unpacked(plane: np.ndarray, bits: int) -> np.ndarray:
    runs = plane.reshape(-1, 1, 4 * bits) >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return runs & np.uint8((1 << bits) - 1)


def _as_bytes(weight: Quantized) -> dict[str, np.ndarray]:
    """The planes as (rows, bytes), sharing their memory."""
    return {name: plane.view(torch.uint8).numpy() for name, plane in weight.planes.items()}


def _bits(kind: Kind, plane: str) -> int:
    return kind.bits[("codes", "high").index(plane)]


def _negated(field: np.ndarray) -> np.ndarray:
    """float16 with the sign flipped: files add the minimum of Q4_1 and Q5_1, and subtract that of the K types."""
    return (np.ascontiguousarray(field).view(np.uint16) ^ 0x8000).view(np.uint8)


def _respan(field: np.ndarray, bits: int, old: int, new: int) -> np.ndarray:
    """Pack codes over another span.

    Packed over a span: element e of it is in byte e % n at bit `bits * (e // n)`, n = span * bits / 8 bytes.
    """
    if old == new:
        return field
    fields = 8 // bits
    codes = np.empty((field.size // (old * bits // 8), fields, old * bits // 8), np.uint8)
    words, packed = _words(codes), _words(np.ascontiguousarray(field).reshape(len(codes), -1))
    for i in range(fields):
        words[:, i] = packed >> (i * bits)
    codes &= (1 << bits) - 1
    words = _words(codes.reshape(-1, fields, new * bits // 8))
    packed = words[:, 0].copy()
    for i in range(1, fields):
        packed |= words[:, i] << (i * bits)
    return packed.view(np.uint8)


def _words(x: np.ndarray) -> np.ndarray:
    """Bytes of the last axis as the widest integers that divide it: shifting them takes as many times fewer steps."""
    return x.view(f"u{min(8, x.shape[-1])}")


# Scales and minima of the K types, packed into the bytes p of a block: (rows, blocks, bytes) on the one side, planes of
# (rows, groups) on the other.


def _unpack_nibbles(p: np.ndarray) -> dict[str, np.ndarray]:
    """Q2_K: scale in the low half of each byte, minimum in the high half."""
    return {"scales": p & 15, "mins": p >> 4}


def _pack_nibbles(planes: dict[str, np.ndarray]) -> np.ndarray:
    return planes["scales"] | (planes["mins"] << 4)


def _unpack_six_bit_pairs(p: np.ndarray) -> dict[str, np.ndarray]:
    """Q4_K, Q5_K: eight scales S and eight minima M of 6 bits.

    bytes 0-3: low 6 bits S0..3, high 2 bits those of S4..7; bytes 4-7: the same of M; bytes 8-11: low 4 bits of S4..7
    in the low half, of M4..7 in the high half.
    """
    scale, low, both = p[..., :4], p[..., 4:8], p[..., 8:]
    return {
        "scales": np.concatenate((scale & 63, (both & 15) | ((scale >> 6) << 4)), -1),
        "mins": np.concatenate((low & 63, (both >> 4) | ((low >> 6) << 4)), -1),
    }


def _pack_six_bit_pairs(planes: dict[str, np.ndarray]) -> np.ndarray:
    scales, mins = (planes[name].reshape(-1, 8) for name in ("scales", "mins"))
    scale, low = (x[:, :4] | ((x[:, 4:] >> 4) << 6) for x in (scales, mins))
    both = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    return np.concatenate((scale, low, both), -1)


def _unpack_six_bit_signed(p: np.ndarray) -> dict[str, np.ndarray]:
    """Q3_K: sixteen scales of 6 bits around 32: low 4 bits in bytes 0-7, high 2 bits in bytes 8-11, packed as codes."""
    low, high = p[..., :8], p[..., 8:]
    low = np.concatenate((low & 15, low >> 4), -1)
    high = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    return {"scales": (low | (high << 4)) - np.uint8(32)}  # wraps: the plane is int8


def _pack_six_bit_signed(planes: dict[str, np.ndarray]) -> np.ndarray:
    scales = planes["scales"].reshape(-1, 16) + np.uint8(32)
    low = (scales[:, :8] & 15) | (scales[:, 8:] << 4)
    high = (scales >> 4).reshape(-1, 4, 4) << np.array([[0], [2], [4], [6]], np.uint8)
    return np.concatenate((low, np.bitwise_or.reduce(high, axis=1)), -1)


def _unpack_six_bit_halves(p: np.ndarray) -> dict[str, np.ndarray]:
    """IQ4_XS: eight scales of 6 bits around 32: their high 2 bits in bytes 0-1, low 4 bits in bytes 2-5, two a byte."""
    high = np.concatenate([(p[..., :2] >> shift) & 3 for shift in (0, 2, 4, 6)], -1)  # 0 4 1 5 2 6 3 7
    high = high[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    low = np.stack((p[..., 2:] & 15, p[..., 2:] >> 4), -1).reshape(high.shape)
    return {"scales": (low | (high << 4)) - np.uint8(32)}  # wraps: the plane is int8


def _pack_six_bit_halves(planes: dict[str, np.ndarray]) -> np.ndarray:
    scales = planes["scales"].reshape(-1, 8) + np.uint8(32)
    high = (scales >> 4).reshape(-1, 2, 4) << np.array([0, 2, 4, 6], np.uint8)
    low = (scales[:, ::2] & 15) | (scales[:, 1::2] << 4)
    return np.concatenate((np.bitwise_or.reduce(high, axis=-1), low), -1)


class _Packing(NamedTuple):
    unpack: Callable[[np.ndarray], dict[str, np.ndarray]]
    pack: Callable[[dict[str, np.ndarray]], np.ndarray]


_PACKED = {
    "Q2_K": _Packing(_unpack_nibbles, _pack_nibbles),
    "Q3_K": _Packing(_unpack_six_bit_signed, _pack_six_bit_signed),
    "Q4_K": _Packing(_unpack_six_bit_pairs, _pack_six_bit_pairs),
    "Q5_K": _Packing(_unpack_six_bit_pairs, _pack_six_bit_pairs),
    "IQ4_XS": _Packing(_unpack_six_bit_halves, _pack_six_bit_halves),
}

assert BLOCKS.keys() | gguf_grids.LAYOUTS.keys() == KINDS.keys()
