"""A weight that stays quantized: its planes (laid out as `gemkit.block_types` says), and how they become floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemkit.block_types import KINDS, PLANES, Kind
from gemkit.errors import WeightsError

# Elements made dense at a time: codes and floats stay in the last cache between the passes. A quarter and twice as many
# were slower.
_CHUNK = 1 << 20

# Bits are moved in words of 4 or 8 bytes; this times a byte's mask discards what shifts carry over between bytes.
_ONE_IN_EACH_BYTE = 0x0101010101010101


@dataclass(frozen=True, eq=False, repr=False)
class Quantized:
    """A (rows, columns) weight kept quantized. It holds its planes and makes floats of them, nothing else."""

    kind: Kind
    planes: Mapping[str, Tensor]
    shape: tuple[int, int]

    def __post_init__(self):
        for name, (shape, dtype) in self.kind.layout(*self.shape).items():
            plane = self.planes.get(name)
            if plane is None or tuple(plane.shape) != shape or plane.dtype != getattr(torch, dtype):
                found = "missing" if plane is None else f"{tuple(plane.shape)} {plane.dtype}"
                raise WeightsError(f"{self!r}: plane {name} is {found}, must be {shape} torch.{dtype}")

    @classmethod
    def empty(cls, kind: Kind, shape: tuple[int, int]) -> Quantized:
        """Planes that wait to be filled."""
        layout = kind.layout(*shape).items()
        planes = {name: torch.empty(size, dtype=getattr(torch, dtype)) for name, (size, dtype) in layout}
        return cls(kind, planes, shape)

    @property
    def device(self) -> torch.device:
        return self.planes["codes"].device

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes.values())

    def __repr__(self) -> str:
        return f"Quantized({self.kind.name}, shape={self.shape})"

    def to(self, device: torch.device | str) -> Quantized:
        return Quantized(self.kind, {name: plane.to(device) for name, plane in self.planes.items()}, self.shape)

    def narrow_rows(self, start: int, length: int) -> Quantized:
        """Rows `start` to `start + length`, sharing this weight's memory."""
        planes = {name: plane.narrow(0, start, length) for name, plane in self.planes.items()}
        return Quantized(self.kind, planes, (length, self.shape[1]))

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows that `index` (any shape, integers) names, made dense: (*index.shape, columns)."""
        flat = index.reshape(-1)
        planes = {name: plane.index_select(0, flat) for name, plane in self.planes.items()}
        picked = Quantized(self.kind, planes, (flat.numel(), self.shape[1]))
        return picked.dequantize(dtype).view(*index.shape, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The whole weight made dense by `gemkit::dequantize`: computed in float32, then rounded.

        Args:
            out: where to write it, of this shape and dtype; None takes new memory.
        """
        rows, columns = self.shape
        dense = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        if dense.dtype == torch.float32:
            self._fill(dense)
            return dense
        step = max(1, _CHUNK // max(1, columns))
        room = torch.empty(min(step, rows), columns, dtype=torch.float32, device=self.device)
        for start in range(0, rows, step):
            length = min(step, rows - start)
            self.narrow_rows(start, length)._fill(room[:length])
            dense[start : start + length] = room[:length]
        return dense

    def pieces(self, step: int) -> Iterator[tuple[slice, Tensor]]:
        """`step` rows at a time, dense in float32, and which they are. The next takes the memory of the last."""
        rows, columns = self.shape
        room = torch.empty(min(step, rows), columns, dtype=torch.float32, device=self.device)
        for start in range(0, rows, step):
            length = min(step, rows - start)
            yield slice(start, start + length), self.narrow_rows(start, length).dequantize(out=room[:length])

    def _fill(self, out: Tensor) -> None:
        planes = (self.planes.get(name) for name in PLANES)
        torch.ops.gemkit.dequantize(*planes, self.kind.name, out)


# An operator of torch's, so that a faster way takes its place on the device that has one, and a tracer, such as
# torch.compile's, sees one call. (`torch.library.custom_op` says it in fewer words, but costs 2.9 s of imports
# at the first call and 63 us at each.)
_library = torch.library.Library("gemkit", "DEF")
_library.define(
    "dequantize(Tensor codes, Tensor? high, Tensor scales, Tensor? mins, Tensor? super_scales, Tensor? super_mins, "
    "str kind, Tensor(a!) out) -> ()"
)


def define(
    codes: Tensor,
    high: Tensor | None,
    scales: Tensor,
    mins: Tensor | None,
    super_scales: Tensor | None,
    super_mins: Tensor | None,
    kind: str,
    out: Tensor,
) -> None:
    """The definition of `gemkit::dequantize` on any device: `out`, (rows, columns) float32, is filled with the values.

    Float32 operations one by one: a fused multiply-add would round differently from the published definition.
    """
    block = KINDS[kind]
    step = max(1, _CHUNK // max(1, out.shape[1]))
    for start in range(0, out.shape[0], step):
        rows = slice(start, start + step)
        values = unpack_codes(codes[rows], block.bits[0])
        if high is not None:
            bits = unpack_codes(high[rows], block.bits[1])
            values = values.view(torch.int64).bitwise_or_(bits.view(torch.int64) << block.bits[0]).view(torch.int8)
        if block.values is not None:
            values = torch.tensor(block.values, dtype=torch.int8, device=values.device)[values.int()]
        elif block.zero:
            values = values.sub_(block.zero)
        codes_RGE = values.to(torch.float32).unflatten(-1, (-1, block.group))
        dense_RGE = out[rows].unflatten(-1, (-1, block.group))
        torch.mul(codes_RGE, _per_group(block, scales, super_scales, rows), out=dense_RGE)
        if mins is not None:
            dense_RGE.sub_(_per_group(block, mins, super_mins, rows))


def _per_group(block: Kind, small: Tensor, super_: Tensor | None, rows: slice) -> Tensor:
    """Scales or minima of some rows in float32, (rows, groups, 1)."""
    found = small[rows].to(torch.float32)
    if super_ is not None:
        assert block.superblock is not None
        found = found.unflatten(-1, (-1, block.superblock // block.group))
        found = ((super_[rows].to(torch.float32) * block.unit)[..., None] * found).flatten(-2)
    return found[..., None]


_library.impl("dequantize", define, "CompositeExplicitAutograd")
torch.library.register_fake("gemkit::dequantize", lambda *args: None, lib=_library)


def unpack_codes(plane: Tensor, bits: int) -> Tensor:
    """Codes of a packed plane, one int8 each, in the order of the elements: (rows, bytes) to (rows, elements).

    The result is fresh memory, unless `bits` is 8.
    """
    if bits == 8:
        return plane
    runs = plane.unflatten(-1, (-1, 4 * bits)).view(torch.int32 if bits == 1 else torch.int64)
    codes = torch.cat([runs >> shift for shift in range(0, 8, bits)], -1).flatten(-2).view(torch.int64)
    return codes.bitwise_and_(_ONE_IN_EACH_BYTE * ((1 << bits) - 1)).view(torch.int8)
