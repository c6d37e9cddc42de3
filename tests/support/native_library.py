"""The native library that is installed (or that GEMKIT_NATIVE names), and its test functions on NumPy arrays."""

import ctypes
import functools

import numpy as np

from gemkit import block_types
from gemkit.executors.native import library as native
from gemkit.executors.native import screening
from gemkit.executors.native.writer import Planes, Source, Target

ISAS = ("portable", "avx2", "avx512")
KINDS = ["F32", "BF16", *block_types.KINDS]  # enum Kind of csrc/kernels/table.h
DENSE = {"float32": 0, "bfloat16": 1, "float16": 2}  # enum Dense of csrc/weights.h
PLANES = (*block_types.PLANES, "dense")


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(native.library(free=True)._name)  # an object of its own, with its own types of arguments
    p, i, n, s = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p
    lib.gk_packed_bytes.argtypes, lib.gk_packed_bytes.restype = (i, n, n), ctypes.c_size_t
    lib.gk_activation_bytes.argtypes, lib.gk_activation_bytes.restype = (i, n, n), ctypes.c_size_t
    lib.gk_pack.argtypes = (i, i, n, n, ctypes.POINTER(Source), ctypes.POINTER(Target), n, n, p, p)
    lib.gk_unpack.argtypes = (i, n, n, p, ctypes.POINTER(Planes), n, n)
    lib.gk_has_isa.argtypes = (s,)
    lib.gk_isa.restype = s
    lib.gk_test_quantize.argtypes = (s, p, n, n, n, n, p)
    lib.gk_test_linear.argtypes = (s, i, p, n, n, p, p, n, p, n, n, n)
    lib.gk_test_dense.argtypes = (s, i, ctypes.POINTER(Planes), n, n, n, p)
    lib.gk_test_row.argtypes = (s, i, p, n, n, n, p)
    return lib


def isas() -> list[str]:
    """Those that this machine can run."""
    return [isa for isa in ISAS if library().gk_has_isa(isa.encode())]


def aligned(nbytes: int, offset: int = 0) -> np.ndarray:
    """Bytes that begin `offset` behind a multiple of 64, filled with what no one should read."""
    memory = np.full(nbytes + 64 + offset, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + nbytes]


def planes_of(arrays: dict[str, np.ndarray], dense_type: str = "float32") -> Planes:
    return Planes(*(arrays[name].ctypes.data if name in arrays else None for name in PLANES), DENSE[dense_type])


def packed_bytes(kind: str, rows: int, cols: int) -> int:
    return library().gk_packed_bytes(KINDS.index(kind), rows, cols)


def pack(kind: str, rows: int, cols: int, arrays: dict[str, np.ndarray], dense_type: str = "float32", cuts=()):
    """The packed weight, filled in the ranges of rows that `cuts` makes; None where the library refuses."""
    return pack_from(kind, rows, cols, Source(planes_of(arrays, dense_type)), cuts)[0]


def pack_from(kind: str, rows: int, cols: int, source: Source, cuts=(), signs: np.ndarray | None = None, threads=1):
    """The packed weight, its sketch (if there are signs), and the checksums of both; Nones where it is refused."""
    out = aligned(packed_bytes(kind, rows, cols))
    sketch = None if signs is None else aligned(screening.nbytes(rows, cols))
    target, sums, error = Target(memory=out.ctypes.data), (ctypes.c_uint64 * 2)(), ctypes.c_int32()
    if signs is not None:
        target.signs, target.sketch = signs.ctypes.data, sketch.ctypes.data - out.ctypes.data
    for row0, row1 in zip((0, *cuts), (*cuts, rows), strict=True):
        shape = KINDS.index(kind), rows, cols
        if library().gk_pack(threads, *shape, source, target, row0, row1, sums, ctypes.byref(error)):
            return None, None, None
    return out, sketch, list(sums)


def unpack(kind: str, rows: int, cols: int, packed: np.ndarray, like: dict[str, np.ndarray], dense_type="float32"):
    arrays = {name: np.empty_like(array) for name, array in like.items()}
    assert library().gk_unpack(
        KINDS.index(kind), rows, cols, packed.ctypes.data, planes_of(arrays, dense_type), 0, rows
    )
    return arrays


def quantize(isa: str, x_TD: np.ndarray, cuts=()) -> np.ndarray:
    """Activations as the kernels read them: raw bytes."""
    tokens, cols = x_TD.shape
    out = aligned(library().gk_activation_bytes(KINDS.index("Q4_0"), tokens, cols))
    for token0, token1 in zip((0, *cuts), (*cuts, tokens), strict=True):
        assert library().gk_test_quantize(isa.encode(), x_TD.ctypes.data, tokens, cols, token0, token1, out.ctypes.data)
    return out


def linear(
    isa: str, kind: str, packed: np.ndarray, rows: int, x_TD: np.ndarray, cuts=(), offset: int = 0
) -> np.ndarray:
    """(T, rows): `x_TD @ weight.T`, computed in the ranges of tiles that `cuts` makes."""
    tokens, cols = x_TD.shape
    quantized = quantize(isa, x_TD) if kind not in ("F32", "BF16") else None
    stride = rows + 3
    y = aligned(tokens * stride * 4, offset).view(np.float32).reshape(tokens, stride)
    y[:] = 77
    tiles = -(-rows // 16)
    for tile0, tile1 in zip((0, *cuts), (*cuts, tiles), strict=True):
        assert library().gk_test_linear(
            *(isa.encode(), KINDS.index(kind), packed.ctypes.data, rows, cols, x_TD.ctypes.data),
            *(quantized.ctypes.data if quantized is not None else None, tokens, y.ctypes.data, stride, tile0, tile1),
        )
    assert (y[:, rows:] == 77).all(), "rows that the weight does not have were written"
    return y[:, :rows]


def row(isa: str, kind: str, packed: np.ndarray, rows: int, cols: int, index: int) -> np.ndarray:
    out = np.full(cols + 1, 77, np.float32)
    assert library().gk_test_row(
        isa.encode(), KINDS.index(kind), packed.ctypes.data, rows, cols, index, out.ctypes.data
    )
    assert out[cols] == 77
    return out[:cols]


def dense(
    isa: str, kind: str, arrays: dict[str, np.ndarray], rows: int, cols: int, cuts=(), offset: int = 0
) -> np.ndarray:
    """(rows, cols) of the planes, in the ranges of rows that `cuts` makes."""
    out = aligned((rows * cols + 1) * 4, offset).view(np.float32)
    out[:] = 77
    for row0, row1 in zip((0, *cuts), (*cuts, rows), strict=True):
        given = isa.encode(), KINDS.index(kind), planes_of(arrays), row0, row1, cols, out.ctypes.data
        assert library().gk_test_dense(*given)
    assert out[-1] == 77
    return out[:-1].reshape(rows, cols)
