"""`gemkit::dequantize` by the native library on a CPU, to the bits of its definition (`ops.quantized.define`)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gemkit.block_types import PLANES
from gemkit.executors.native.library import available, library
from gemkit.executors.native.packfile import KINDS
from gemkit.executors.native.writer import Planes
from gemkit.ops.quantized import define

_library: torch.library.Library | None = None
_enabled = False


def enable() -> None:
    """Register the library's implementation for tensors on a CPU; it is used where there is a library."""
    global _library, _enabled
    _enabled = True
    if _library is None:
        _library = torch.library.Library("gemkit", "IMPL")
        _library.impl("dequantize", _dequantize, "CPU")


@contextlib.contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Within the block, weights on a CPU are made dense by the library, or by the definition alone."""
    global _enabled
    before = _enabled
    if on:
        enable()
    else:
        _enabled = False
    try:
        yield
    finally:
        _enabled = before


def _dequantize(*args) -> None:
    *given, kind, out = args
    planes = {name: plane for name, plane in zip(PLANES, given, strict=True) if plane is not None}
    contiguous = out.is_contiguous() and all(plane.is_contiguous() for plane in planes.values())
    if not (_enabled and contiguous and available()[0] and _dense(planes, kind, out)):
        define(*args)


def _dense(planes: Mapping[str, Tensor], kind: str, out: Tensor) -> bool:
    pointers = Planes(**{name: plane.data_ptr() for name, plane in planes.items()})
    given = torch.get_num_threads(), KINDS.index(kind), ctypes.byref(pointers)
    return bool(library(free=True).gk_dense(*given, *out.shape, out.data_ptr()))
