"""The planes of a weight as the native library takes them, and how it makes a quantized weight dense."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from gemkit.executors.native.library import available, library
from gemkit.executors.native.packfile import KINDS
from gemkit.ops.quantized import Quantized, make_dense_by

NAMES = ("codes", "high", "scales", "mins", "super_scales", "super_mins")
_DENSE = (torch.float32, torch.bfloat16)  # as `csrc/weights.h` numbers them


class Planes(ctypes.Structure):
    """`gk::Planes`. What it points into must be held for as long as it is used."""

    _fields_ = [*((name, ctypes.c_void_p) for name in (*NAMES, "dense")), ("dense_type", ctypes.c_int32)]

    @classmethod
    def of(cls, planes: Mapping[str, Tensor]) -> Planes:
        """Of contiguous tensors in memory: those of a `Quantized`, or one named "dense"."""
        given = cls(**{name: plane.data_ptr() for name, plane in planes.items()})
        if "dense" in planes:
            given.dense_type = _DENSE.index(planes["dense"].dtype)
        return given


def dense(weight: Quantized, out: Tensor) -> bool:
    """Fill a float32 array of a weight's shape with its values, to the bits of their definition; False: the library
    cannot."""
    if not (out.is_contiguous() and all(plane.is_contiguous() for plane in weight.planes.values())):
        return False
    given = torch.get_num_threads(), KINDS.index(weight.kind.name), ctypes.byref(Planes.of(weight.planes))
    return bool(library(free=True).gk_dense(*given, *weight.shape, out.data_ptr()))


def use() -> None:
    """Have weights on a CPU made dense by the library from now on, where there is one."""
    if available()[0]:
        make_dense_by(dense)
