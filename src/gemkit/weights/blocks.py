"""Blocks of GGUF files <-> the planes of `ops/quantized.py`, without loss in either direction.

A block holds 32 or 256 elements of a row: its scales beside its codes. Taking it apart is cutting out fields and, where
a field's codes are packed over another span than ours, packing them again. Every type is a row of `BLOCKS`.

Source: the block structures of ggml (ggml-common.h in https://github.com/ggml-org/ggml); 6-bit scales as drawn below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gemkit.ops.quantized import KINDS, Kind, Quantized, pack_codes, unpack_codes


class Field(NamedTuple):
    plane: str  # of ours; "packed" for scales and minima in one
    nbytes: int
    span: int = 0  # elements that a field of codes is packed over (see `unpack_codes`)


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
}


def block_bytes(name: str) -> int:
    """Bytes of one block."""
    return sum(field.nbytes for field in BLOCKS[name])


def from_blocks(kind: Kind, data: Tensor, shape: tuple[int, int]) -> Quantized:
    """Planes from the bytes of a file: `data` is uint8, the blocks of all rows end to end."""
    rows, columns = shape
    blocks = data.view(rows, columns // kind.row_multiple, block_bytes(kind.name))
    planes: dict[str, Tensor] = {}
    start = 0
    for plane, nbytes, span in BLOCKS[kind.name]:
        field = blocks[..., start : start + nbytes].flatten(-2)
        start += nbytes
        if plane == "packed":
            planes |= _PACKED[kind.name].unpack(field.unflatten(-1, (-1, nbytes)))
        elif span:
            planes[plane] = _respan(field, _bits(kind, plane), span, 32)
        else:
            planes[plane] = field
    layout = kind.layout(rows, columns)
    planes = {name: planes[name].contiguous().view(dtype) for name, (_, dtype) in layout.items()}
    _flip_flat_minima(kind, planes)
    return Quantized(kind, planes, shape)


def to_blocks(weight: Quantized) -> Tensor:
    """The bytes that a file holds for a weight: uint8, one axis; the inverse of `from_blocks`."""
    kind, (rows, columns) = weight.kind, weight.shape
    planes = dict(weight.planes)
    _flip_flat_minima(kind, planes)
    fields = []
    for plane, nbytes, span in BLOCKS[kind.name]:
        if plane == "packed":
            field = _PACKED[kind.name].pack(planes)
        elif span:
            field = _respan(planes[plane].view(torch.uint8), _bits(kind, plane), 32, span)
        else:
            field = planes[plane].view(torch.uint8)
        fields.append(field.reshape(rows, columns // kind.row_multiple, nbytes))
    return torch.cat(fields, -1).flatten()


def _bits(kind: Kind, plane: str) -> int:
    return kind.bits[("codes", "high").index(plane)]


def _respan(field: Tensor, bits: int, old: int, new: int) -> Tensor:
    return field if old == new else pack_codes(unpack_codes(field, bits, old), bits, new)


def _flip_flat_minima(kind: Kind, planes: dict[str, Tensor]) -> None:
    """Files add the minimum of Q4_1 and Q5_1 and subtract that of the K types; here all are subtracted."""
    if kind.minima and not kind.superblock:
        planes["mins"] = (planes["mins"].view(torch.int16) ^ -0x8000).view(torch.float16)  # the sign bit alone


# Scales and minima of the K types, packed into bytes p of a block: axes (rows, blocks, bytes) on the one side, planes
# (rows, groups) on the other.


def _unpack_nibbles(p: Tensor) -> dict[str, Tensor]:
    """Q2_K: scale in the low half of each byte, minimum in the high half."""
    return {"scales": (p & 15).flatten(-2), "mins": (p >> 4).flatten(-2)}


def _pack_nibbles(planes: dict[str, Tensor]) -> Tensor:
    return planes["scales"] | (planes["mins"] << 4)


def _unpack_six_bit_pairs(p: Tensor) -> dict[str, Tensor]:
    """Q4_K, Q5_K: eight scales S and minima M; letters are bits, high ones left.

    byte    0-3: S4..7 high 2 bits, S0..3        4-7: M4..7 high 2 bits, M0..3        8-11: M4..7, S4..7 low 4 bits
    """
    scale, low, both = p.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((scale & 63, (both & 15) | ((scale >> 6) << 4)), -1)
    mins = torch.cat((low & 63, (both >> 4) | ((low >> 6) << 4)), -1)
    return {"scales": scales.flatten(-2), "mins": mins.flatten(-2)}


def _pack_six_bit_pairs(planes: dict[str, Tensor]) -> Tensor:
    scale_a, scale_b = planes["scales"].unflatten(-1, (-1, 2, 4)).unbind(-2)
    min_a, min_b = planes["mins"].unflatten(-1, (-1, 2, 4)).unbind(-2)
    both = (scale_b & 15) | ((min_b & 15) << 4)
    return torch.cat((scale_a | ((scale_b >> 4) << 6), min_a | ((min_b >> 4) << 6), both), -1)


def _unpack_six_bit_signed(p: Tensor) -> dict[str, Tensor]:
    """Q3_K: sixteen scales around 32, their low 4 bits in 8 bytes and their high 2 bits in 4, packed as codes are."""
    low = unpack_codes(p[..., :8].flatten(-2), 4, span=16)
    high = unpack_codes(p[..., 8:].flatten(-2), 2, span=16)
    return {"scales": (low | (high << 4)) - 32}


def _pack_six_bit_signed(planes: dict[str, Tensor]) -> Tensor:
    scales = planes["scales"] + 32
    low, high = pack_codes(scales & 15, 4, span=16), pack_codes(scales >> 4, 2, span=16)
    return torch.cat((low.unflatten(-1, (-1, 8)), high.unflatten(-1, (-1, 4))), -1)


class _Packing(NamedTuple):
    unpack: Callable[[Tensor], dict[str, Tensor]]
    pack: Callable[[dict[str, Tensor]], Tensor]


_PACKED = {
    "Q2_K": _Packing(_unpack_nibbles, _pack_nibbles),
    "Q3_K": _Packing(_unpack_six_bit_signed, _pack_six_bit_signed),
    "Q4_K": _Packing(_unpack_six_bit_pairs, _pack_six_bit_pairs),
    "Q5_K": _Packing(_unpack_six_bit_pairs, _pack_six_bit_pairs),
}

assert BLOCKS.keys() == KINDS.keys()
