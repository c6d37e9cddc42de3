"""Writing a GGUF: header, metadata and tensor infos, then the tensors, one in memory at a time; see `gguf.py`."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemkit.errors import WeightsError
from gemkit.files import Sink
from gemkit.weights.formats.gguf import TYPES

VERSION, ALIGNMENT = 3, 32
_NUMBERS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}
_STRING, _ARRAY = 8, 9
_TYPE_IDS = {name: (number, elements, nbytes) for number, (name, elements, nbytes) in TYPES.items()}


class TensorSpec(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: str  # "F32", "BF16", ... or a block type: "Q4_K"
    shape: tuple[int, ...]  # as in PyTorch

    @property
    def nbytes(self) -> int:
        """Bytes in the file.

        Raises:
            WeightsError: if GGUF has no such type, or a row is no whole number of blocks.
        """
        if self.dtype not in _TYPE_IDS:
            raise WeightsError(f"{self.name}: GGUF has no type {self.dtype}; it has {', '.join(_TYPE_IDS)}")
        _, elements, nbytes = _TYPE_IDS[self.dtype]
        if self.shape[-1] % elements:
            raise WeightsError(
                f"{self.name}: rows of {self.shape[-1]:,} are no multiple of {elements}, as {self.dtype} is"
            )
        return int(np.prod(self.shape, dtype=np.int64)) // elements * nbytes


def write_gguf(
    file: Sink, metadata: Mapping[str, Any], tensors: Sequence[TensorSpec], contents: Iterable[np.ndarray]
) -> None:
    """Write a GGUF of version 3 at the beginning of a file.

    Args:
        metadata: keys to values: bool, int (as 32-bit where it fits), float (as float32), str, NumPy arrays (of their
            dtype) and sequences of strings.
        contents: the bytes of each tensor, in the order of `tensors`: arrays of uint8.

    Raises:
        WeightsError: for a type or a value that GGUF cannot hold.
    """
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    offset = 0
    for spec in tensors:
        nbytes, axes = spec.nbytes, spec.shape[::-1]
        parts += [
            _string(spec.name),
            struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, _TYPE_IDS[spec.dtype][0], offset),
        ]
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    file.write(header + bytes(-len(header) % ALIGNMENT))
    for spec, content in zip(tensors, contents, strict=True):
        assert content.nbytes == spec.nbytes, f"{spec} of {content.nbytes:,} bytes"
        file.write(content.data)
        file.write(bytes(-content.nbytes % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """A value behind its type."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            for number, format, low, high in ((4, "I", 0, 2**32), (5, "i", -(2**31), 0), (10, "Q", 0, 2**64)):
                if low <= value < high:
                    return struct.pack(f"<I{format}", number, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case np.ndarray() if value.ndim == 1 and value.dtype.str[1:] in _NUMBERS:
            data = value.astype(value.dtype.newbyteorder("<")).tobytes()
            return struct.pack("<IIQ", _ARRAY, _NUMBERS[value.dtype.str[1:]], len(value)) + data
        case Sequence() if all(isinstance(text, str) for text in value):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    raise WeightsError(f"metadata {key}={value!r} is nothing that GGUF can hold")
