"""Quantization types: the block types of published files, as plain data without torch.

Every published block type is the same idea: small codes, and for each group of 16 or 32 codes along a row a scale and
perhaps a minimum. A code is a number itself, or the place of one in a short list of `values`. The types differ in how
files interleave these, not in what they say, so here each type is one row of data (`KINDS`) over one planar layout:

    codes, high     the code bits, low ones first; a plane of b bits spends n = 4 * b bytes on a run of 32 elements,
                    element e sits in byte e % n at bit b * (e // n); a plane of 8 bits is plain int8
    scales, mins    one a group: float16, or small integers where there is a second level
    super_scales,   one float16 a superblock of 256: what the small integers are multiples of
    super_mins

    value = scale * (code - zero) - min        scale = super_scale * scale, min = super_min * min, in float32
    value = scale * values[code]               scale = super_scale * unit * scale

The IQ types choose 4 or 8 codes at once from a published grid of such groups (`weights.formats.gguf_grids`); in memory
each code stands for itself, in 3 or 4 bits.

Planes are 2-D, row by row, so a slice of a weight's rows is a slice of each plane. Readers, weights in memory
(`ops.quantized`), packed models and the C++ kernels (`csrc/weights.h`) follow this table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gemkit.errors import WeightsError

PLANES = ("codes", "high", "scales", "mins", "super_scales", "super_mins")


@dataclass(frozen=True)
class Plane:
    """One array of a quantized weight."""

    name: str  # of PLANES
    dtype: str  # "uint8", "int8" or "float16"
    elements: int  # of the plane ...
    columns: int  # ... for each this many columns of the weight, which divide


@dataclass(frozen=True)
class Kind:
    """One block type, named as in GGUF files."""

    name: str
    bits: tuple[int, ...]  # bits of each plane of codes, low ones first: `codes`, then `high`
    group: int  # elements that share a scale
    zero: int  # the code that stands for 0
    minima: bool  # is a minimum subtracted?
    superblock: int | None = None  # elements that share a float16 scale of the scales
    scale_dtype: str = "float16"
    values: tuple[int, ...] | None = None  # the numbers that codes stand for, instead of code - zero
    unit: float = 1.0  # what a super scale of 1 is: a power of two

    @property
    def row_multiple(self) -> int:
        """Columns come in multiples of this."""
        return self.superblock or 32

    def planes(self) -> Iterator[Plane]:
        """Its planes, in the order of PLANES but that a super plane follows its own."""
        for name, bits in zip(("codes", "high"), self.bits, strict=False):
            yield Plane(name, "int8" if bits == 8 else "uint8", bits, 8)
        for name in ("scales", "mins")[: 1 + self.minima]:
            yield Plane(name, self.scale_dtype, 1, self.group)
            if self.superblock:
                yield Plane("super_" + name, "float16", 1, self.superblock)

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], str]]:
        """Shape and dtype of each plane of a (rows, columns) weight.

        Raises:
            WeightsError: where rows do not divide into blocks.
        """
        if columns % self.row_multiple:
            raise WeightsError(f"{self.name}: rows of {columns} are not a multiple of {self.row_multiple}")
        return {p.name: ((rows, columns * p.elements // p.columns), p.dtype) for p in self.planes()}

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage for each weight, scales and minima included."""
        itemsize = {"uint8": 1, "int8": 1, "float16": 2}
        return sum(8 * itemsize[plane.dtype] * plane.elements / plane.columns for plane in self.planes())


# Published codebooks; the sign of a magnitude is its highest bit (ggml-common.h in https://github.com/ggml-org/ggml).
_FOUR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_THREE_XXS = (4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62)
_THREE_S = (1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15)
_TWO = (8, 25, 43, 0, -8, -25, -43, 0)
_ONE = (-7, 1, 9, 0, -9, -1, 7, 0)  # eighths: -1, 0 or 1, and an eighth more or less


def _grid(name: str, bits: tuple[int, ...], group: int, values: tuple[int, ...], unit: float = 1.0) -> Kind:
    return Kind(name, bits, group, 0, minima=False, superblock=256, scale_dtype="int8", values=values, unit=unit)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("Q4_0", bits=(4,), group=32, zero=8, minima=False),
        Kind("Q4_1", bits=(4,), group=32, zero=0, minima=True),
        Kind("Q5_0", bits=(4, 1), group=32, zero=16, minima=False),
        Kind("Q5_1", bits=(4, 1), group=32, zero=0, minima=True),
        Kind("Q8_0", bits=(8,), group=32, zero=0, minima=False),
        Kind("Q2_K", bits=(2,), group=16, zero=0, minima=True, superblock=256, scale_dtype="uint8"),
        Kind("Q3_K", bits=(2, 1), group=16, zero=4, minima=False, superblock=256, scale_dtype="int8"),
        Kind("Q4_K", bits=(4,), group=32, zero=0, minima=True, superblock=256, scale_dtype="uint8"),
        Kind("Q5_K", bits=(4, 1), group=32, zero=0, minima=True, superblock=256, scale_dtype="uint8"),
        Kind("Q6_K", bits=(4, 2), group=16, zero=32, minima=False, superblock=256, scale_dtype="int8"),
        Kind("IQ4_NL", bits=(4,), group=32, zero=0, minima=False, values=_FOUR),
        _grid("IQ4_XS", (4,), 32, _FOUR),
        _grid("IQ3_XXS", (4,), 32, _THREE_XXS, unit=1 / 4),
        _grid("IQ3_S", (4,), 32, _THREE_S),
        _grid("IQ2_XXS", (2, 1), 32, _TWO, unit=1 / 8),
        _grid("IQ2_XS", (2, 1), 16, _TWO, unit=1 / 8),
        _grid("IQ2_S", (2, 1), 16, _TWO, unit=1 / 8),
        _grid("IQ1_S", (2, 1), 32, _ONE, unit=1 / 8),
        _grid("IQ1_M", (2, 1), 16, _ONE, unit=1 / 8),
    )
}
