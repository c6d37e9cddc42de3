"""A weight that stays quantized: how its numbers are laid out, and how they become floats.

Every published block type is the same idea: small integer codes, and for each group of 16 or 32 codes along a row a
scale and perhaps a minimum. The types differ in how files interleave these, not in what they say, so here each kind
is one row of data (`KINDS`) over one planar layout:

    codes, high     the code bits, low ones first; a plane of b bits spends n = 4 * b bytes on a run of 32 elements,
                    element e sits in byte e % n at bit b * (e // n); a plane of 8 bits is plain int8
    scales, mins    one a group: float16, or small integers where there is a second level
    super_scales,   one float16 a superblock of 256: what the small integers are multiples of
    super_mins

    value = scale * (code - zero) - min        scale = super_scale * scale, min = super_min * min, in float32

Planes are 2-D, row by row, so a slice of a weight's rows is a slice of each plane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemkit.errors import WeightsError

# Elements made dense at a time: codes and floats stay in the last cache between the passes. A quarter and twice as many
# were slower.
_CHUNK = 1 << 20

# Bits are moved in words of 4 or 8 bytes; this times a byte's mask discards what shifts carry over between bytes.
_ONE_IN_EACH_BYTE = 0x0101010101010101


@dataclass(frozen=True)
class Kind:
    """One block type, named as in GGUF files."""

    name: str
    bits: tuple[int, ...]  # bits of each plane of codes, low ones first: `codes`, then `high`
    group: int  # elements that share a scale
    zero: int  # the code that stands for 0
    minima: bool  # is a minimum subtracted?
    superblock: int | None = None  # elements that share a float16 scale of the scales
    scale_dtype: torch.dtype = torch.float16

    @property
    def row_multiple(self) -> int:
        """Columns come in multiples of this."""
        return self.superblock or 32

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of each plane of a (rows, columns) weight, in the order of the module's docstring.

        Raises:
            WeightsError: where rows do not divide into blocks.
        """
        if columns % self.row_multiple:
            raise WeightsError(f"{self.name}: rows of {columns} are not a multiple of {self.row_multiple}")
        planes = {}
        for name, bits in zip(("codes", "high"), self.bits, strict=False):
            planes[name] = (rows, columns * bits // 8), torch.int8 if bits == 8 else torch.uint8
        for name in ("scales", "mins")[: 1 + self.minima]:
            planes[name] = (rows, columns // self.group), self.scale_dtype
            if self.superblock:
                planes["super_" + name] = (rows, columns // self.superblock), torch.float16
        return planes


KINDS = {
    kind.name: kind
    for kind in (
        Kind("Q4_0", bits=(4,), group=32, zero=8, minima=False),
        Kind("Q4_1", bits=(4,), group=32, zero=0, minima=True),
        Kind("Q5_0", bits=(4, 1), group=32, zero=16, minima=False),
        Kind("Q5_1", bits=(4, 1), group=32, zero=0, minima=True),
        Kind("Q8_0", bits=(8,), group=32, zero=0, minima=False),
        Kind("Q2_K", bits=(2,), group=16, zero=0, minima=True, superblock=256, scale_dtype=torch.uint8),
        Kind("Q3_K", bits=(2, 1), group=16, zero=4, minima=False, superblock=256, scale_dtype=torch.int8),
        Kind("Q4_K", bits=(4,), group=32, zero=0, minima=True, superblock=256, scale_dtype=torch.uint8),
        Kind("Q5_K", bits=(4, 1), group=32, zero=0, minima=True, superblock=256, scale_dtype=torch.uint8),
        Kind("Q6_K", bits=(4, 2), group=16, zero=32, minima=False, superblock=256, scale_dtype=torch.int8),
    )
}


@dataclass(frozen=True, eq=False, repr=False)
class Quantized:
    """A (rows, columns) weight kept quantized. It holds its planes and makes floats of them, nothing else."""

    kind: Kind
    planes: Mapping[str, Tensor]
    shape: tuple[int, int]

    def __post_init__(self):
        for name, (shape, dtype) in self.kind.layout(*self.shape).items():
            plane = self.planes.get(name)
            if plane is None or tuple(plane.shape) != shape or plane.dtype != dtype:
                found = "missing" if plane is None else f"{tuple(plane.shape)} {plane.dtype}"
                raise WeightsError(f"{self!r}: plane {name} is {found}, must be {shape} {dtype}")

    @classmethod
    def empty(cls, kind: Kind, shape: tuple[int, int]) -> Quantized:
        """Planes that wait to be filled."""
        planes = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in kind.layout(*shape).items()}
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
        """The whole weight made dense: computed in float32, exactly as the block type is published, then rounded.

        Args:
            out: where to write it, of this shape and dtype; None takes new memory.
        """
        rows, columns = self.shape
        dense = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        if dense.dtype == torch.float32 and self._filled(dense):
            return dense
        step = max(1, _CHUNK // max(1, columns))
        for start in range(0, rows, step):
            length = min(step, rows - start)
            piece = self.narrow_rows(start, length)
            room = torch.empty(piece.shape, dtype=torch.float32, device=self.device)
            dense[start : start + length] = room if piece._filled(room) else piece._defined()
        return dense

    def pieces(self, step: int) -> Iterator[tuple[slice, Tensor]]:
        """`step` rows at a time, dense in float32, and which they are. The next takes the memory of the last."""
        rows, columns = self.shape
        room = torch.empty(min(step, rows), columns, dtype=torch.float32, device=self.device)
        for start in range(0, rows, step):
            length = min(step, rows - start)
            yield slice(start, start + length), self.narrow_rows(start, length).dequantize(out=room[:length])

    def _filled(self, out: Tensor) -> bool:
        """Whether somebody has filled an array with the values who does it sooner."""
        return (
            _otherwise is not None
            and self.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and _otherwise(self, out)
        )

    def _defined(self) -> Tensor:
        """The definition, in float32."""
        kind = self.kind
        codes = unpack_codes(self.planes["codes"], kind.bits[0])
        if "high" in self.planes:
            high = unpack_codes(self.planes["high"], kind.bits[1])
            codes = codes.view(torch.int64).bitwise_or_(high.view(torch.int64) << kind.bits[0]).view(torch.int8)
        if kind.zero:
            codes = codes.sub_(kind.zero)
        # float32 operations one by one: a fused multiply-add would round differently from the published definition
        values = codes.to(torch.float32).unflatten(-1, (-1, kind.group)).mul_(self._per_group("scales"))
        if kind.minima:
            values.sub_(self._per_group("mins"))
        return values.flatten(-2)

    def _per_group(self, name: str) -> Tensor:
        """Scales or minima in float32, (rows, groups, 1)."""
        small = self.planes[name].to(torch.float32)
        if self.kind.superblock:
            small = small.unflatten(-1, (-1, self.kind.superblock // self.kind.group))
            small = (self.planes["super_" + name].to(torch.float32)[..., None] * small).flatten(-2)
        return small[..., None]


# What fills an array on a CPU to the same bits sooner, or says that it cannot.
_otherwise: Callable[[Quantized, Tensor], bool] | None = None


def make_dense_by(way: Callable[[Quantized, Tensor], bool] | None) -> None:
    """Make weights dense by other means from now on: the native library's, which stands above this room
    (`executors.native.dequantize`). None: by the definition alone."""
    global _otherwise
    _otherwise = way


def unpack_codes(plane: Tensor, bits: int) -> Tensor:
    """Codes of a packed plane, one int8 each, in the order of the elements: (rows, bytes) to (rows, elements).

    The result is fresh memory, unless `bits` is 8.
    """
    if bits == 8:
        return plane
    runs = plane.unflatten(-1, (-1, 4 * bits)).view(torch.int32 if bits == 1 else torch.int64)
    codes = torch.cat([runs >> shift for shift in range(0, 8, bits)], -1).flatten(-2).view(torch.int64)
    return codes.bitwise_and_(_ONE_IN_EACH_BYTE * ((1 << bits) - 1)).view(torch.int8)
