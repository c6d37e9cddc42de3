"""`kernels.cpp` compiled for one instruction set, and NumPy arrays around its functions."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
PAGE = 64
FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
STRICT = ("-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")


def runs_here(isa: str) -> bool:
    found = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    has = set(found.group(1).split()) if found else set()
    return {flag.removeprefix("-m") for flag in FLAGS[isa]} <= has


ISAS = [isa for isa in FLAGS if runs_here(isa)]
I64, F32 = ctypes.c_int64, ctypes.c_float
ALL = 2**63 - 1


class Attend(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_stride", I64),
        ("tokens", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("position", I64),
        ("end", I64),
        ("before", I64),
        ("after", I64),
        ("spans", ctypes.c_void_p),
        ("n_spans", I64),
        ("scale", F32),
        ("softcap", F32),
    ]


class Pair(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p)]


class Triple(ctypes.Structure):
    _fields_ = [("most", ctypes.c_void_p), ("total", ctypes.c_void_p), ("sum", ctypes.c_void_p)]


def at(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def misaligned(array: np.ndarray, by: int) -> np.ndarray:
    """A copy that begins `by` bytes after a multiple of 64."""
    room = np.zeros(array.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + by
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Kernels:
    def __init__(self, isa: str, folder: Path):
        self.isa, library = isa, folder / f"{isa}.so"
        command = [os.environ.get("CXX", "c++"), *STRICT, *FLAGS[isa], f"-I{SOURCES}", str(HERE / "kernels.cpp")]
        subprocess.run([*command, "-o", str(library)], check=True)
        self.lib = ctypes.CDLL(str(library))
        self.lib.t_magnitude.restype = F32
        self.lib.t_below.restype = ctypes.c_int64
        self.lib.t_scratch_bytes.restype = ctypes.c_size_t

    def call(self, name: str, *args):
        """Arrays by address, integers as 64 bits, floats as 32."""

        def passed(arg):
            if isinstance(arg, np.ndarray):
                return at(arg)
            if isinstance(arg, bool):
                return ctypes.c_bool(arg)
            if isinstance(arg, int):
                return I64(arg)
            return F32(arg) if isinstance(arg, float) else arg

        return getattr(self.lib, f"t_{name}")(*map(passed, args))

    def map(self, name: str, x: np.ndarray) -> np.ndarray:
        """A function of each number."""
        y = np.full_like(x, 7)
        self.call(name, x, x.size, y)
        return y


@dataclass
class Memory:
    """Keys and values of one head, (S, H), in pages; `hole` pages at the start are null."""

    kernel: Kernels
    k_SH: np.ndarray
    v_SH: np.ndarray
    hole: int = 0
    keys: np.ndarray = field(init=False)
    values: np.ndarray = field(init=False)

    def __post_init__(self):
        length, head_dim = self.k_SH.shape
        pages = -(-length // PAGE)
        # slots that nothing was put into are not numbers: whoever looks at one shows it
        self.keys = np.full((pages, head_dim, PAGE), 0x7E00, np.uint16)
        self.values = np.full((pages, PAGE, head_dim), 0x7E00, np.uint16)
        for s in range(self.hole * PAGE, length):
            self.kernel.call("put_key", self.k_SH[s], head_dim, s % PAGE, self.keys[s // PAGE])
            self.kernel.call("put_value", self.v_SH[s], head_dim, s % PAGE, self.values[s // PAGE])

        def table(pages: np.ndarray) -> np.ndarray:
            return np.array([0 if i < self.hole else p.ctypes.data for i, p in enumerate(pages)], np.uint64)

        self.tables = table(self.keys), table(self.values)


class Partial:
    def __init__(self, rows: int, head_dim: int):
        self.most, self.total = np.full(rows, np.nan, np.float32), np.full(rows, np.nan, np.float32)
        self.sum = np.full((rows, head_dim), np.nan, np.float32)

    @property
    def pointers(self) -> Triple:
        return Triple(at(self.most), at(self.total), at(self.sum))


def attend(
    memory: Memory,
    q_TGH: np.ndarray,
    position: int,
    *,
    pages: tuple[int, int],
    partial: Partial | None = None,
    end: int | None = None,
    before: int | None = None,
    after: int | None = 0,
    spans: Sequence[tuple[int, int]] = (),
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Partial:
    """A tile over a range of pages, into `partial` or a new one; the sequence ends with it, or at `end`."""
    kernel, (tokens, group, head_dim) = memory.kernel, q_TGH.shape
    end, held = position + tokens if end is None else end, np.array(spans, np.int64)
    seen = [ALL if count is None else count for count in (before, after)]
    shape = at(q_TGH), group * head_dim, tokens, group, head_dim, position
    a = Attend(*shape, end, *seen, at(held), len(spans), scale, softcap)
    size = kernel.call("scratch_bytes", tokens, group, head_dim)
    scratch = np.full(size + 64, 0xFF, np.uint8)  # not numbers, and what lies behind must stay
    p = partial or Partial(tokens * group, head_dim)
    byref, tables = ctypes.byref, Pair(*map(at, memory.tables))
    kernel.call("attend", byref(a), byref(tables), *pages, partial is None, byref(p.pointers), scratch[1:])
    assert (scratch[1 + size :] == 0xFF).all()
    return p


def finish(kernel: Kernels, p: Partial, group: int) -> np.ndarray:
    rows, head_dim = p.sum.shape
    out = np.full((rows // group, group, head_dim), np.nan, np.float32)
    kernel.call("finish", ctypes.byref(p.pointers), rows, head_dim, out, group * head_dim, group)
    return out


def merge(kernel: Kernels, earlier: Partial, later: Partial) -> None:
    kernel.call("merge", ctypes.byref(earlier.pointers), ctypes.byref(later.pointers), *earlier.sum.shape)
