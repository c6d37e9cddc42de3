"""GGUF: metadata, tensor infos, then the data; written by the llama.cpp family of tools.

    "GGUF" | version u32 | tensors u64 | keys u64 | key, type, value ... | name, axes, type, offset ... | padding | data

A model may be cut into several such files (`gguf_parts.py`).

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count is checked against the bytes that are
left in the file before anything is allocated or looped over.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gemkit.errors import WeightsError
from gemkit.files import DTYPES, decode_strings
from gemkit.weights.formats import gguf_parts
from gemkit.weights.formats.base import File, Reader, TensorInfo, count_elements

if TYPE_CHECKING:
    from torch import Tensor

    from gemkit.ops.quantized import Quantized

# Tensor types that are read: number in files -> our name, elements a block, bytes a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
}
# Those that are not, so that they can be refused by name. Numbers without a name were given up by the format.
REFUSED_TYPES = {
    9: "Q8_1", 15: "Q8_K", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
# Blocks of several rows interleaved for one kind of processor, which llama.cpp wrote for a few months of 2024.
REPACKED_TYPES = {
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

# Metadata types: number -> struct format of one value. 8 is a string, 9 an array.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_U32, _STRING, _ARRAY = 4, 8, 9

_MAX_NAME = 65_535  # bytes of a key, and of a tensor's name
_MIN_KEY_BYTES, _MIN_TENSOR_BYTES = 14, 33  # a name of one letter; one byte of value, or one axis

_CHUNK = 4 << 20  # bytes of blocks repacked at a time, so that they stay in a cache


class Strings(Sequence[str]):
    """A string array of the metadata, decoded when first asked for: vocabularies have 262,144 of them."""

    def __init__(self, data: bytes, ends: np.ndarray, where: str):
        """`data` is lengths of 8 bytes and strings end to end, checked to be complete; `ends` are the strings'."""
        self._data, self._ends, self._where = data, ends, where

    @cached_property
    def _list(self) -> list[str]:
        starts = 8 + np.concatenate([[0], self._ends])[:-1]
        strings = decode_strings(self._data, starts, self._ends)
        if strings is None:
            strings = []
            try:
                for start, end in zip(starts.tolist(), self._ends.tolist(), strict=True):
                    strings.append(self._data[start:end].decode())
            except UnicodeDecodeError as error:
                raise WeightsError(f"{self._where}[{len(strings)}] is not UTF-8: {error}") from None
        self._data = b""  # megabytes that nothing reads again
        return strings

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._list[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._list)

    def __repr__(self) -> str:
        return f"<{len(self):,} strings>"


class GGUFReader(Reader):
    """A `.gguf` file, a part of one, or a folder with one.

    `metadata` maps keys to numbers, bools, strings, NumPy arrays (of the file's dtype) and `Strings`. Shapes are
    reversed to PyTorch's order. `read` gives a Tensor for dense types and a `Quantized` for blocks.
    """

    format = "gguf"
    version: int

    def _scan(self) -> None:
        path = gguf_parts.in_folder(self.path) if self.path.is_dir() else self.path
        given = _Header(self._open(path))
        for number, part in enumerate(parts := gguf_parts.parts(path, given.metadata)):
            header = given if part == path else _Header(self._open(part))
            if gguf_parts.split_of(part, header.metadata) != (number, len(parts)):
                raise WeightsError(f"{part} is not part {number + 1} of {len(parts)} of the GGUF of {path.name}")
            if number == 0:
                self.version, self.metadata = header.version, header.metadata
            self._add_tensors(header)
        promised = self.metadata.get("split.tensors.count", len(self.entries))
        if promised != len(self.entries):
            raise WeightsError(f"{path}: {len(self.entries)} tensors in {len(parts)} files, {promised} are promised")

    def _add_tensors(self, header: _Header) -> None:
        file, start = header.file, header.start
        added = []
        for name, type_id, shape, offset in header.infos:
            if offset % header.alignment:
                raise WeightsError(
                    f"{file.path}: tensor {name!r} is at {offset}, off the alignment of {header.alignment}"
                )
            dtype, nbytes = _measure(f"{file.path}: tensor {name!r}", type_id, shape)
            added.append(TensorInfo(name, dtype, shape, file.path, start + offset, nbytes))
            self._add(added[-1])
        end, last = start, ""
        for entry in sorted(added, key=lambda entry: entry.offset):
            if entry.offset < end:
                raise WeightsError(f"{file.path}: tensors {last!r} and {entry.name!r} overlap")
            end, last = entry.offset + entry.nbytes, entry.name

    def read(self, name: str) -> Tensor | Quantized:
        entry = self._entry(name)
        if entry.dtype in DTYPES:
            return self._read_dense(entry)
        if len(entry.shape) != 2:
            raise WeightsError(f"{entry.path}: tensor {name!r} is {entry.dtype} of shape {entry.shape}, not a matrix")
        from gemkit.block_types import KINDS
        from gemkit.ops.quantized import Quantized
        from gemkit.weights.formats.gguf_blocks import load_blocks

        rows, columns = entry.shape
        weight = Quantized.empty(KINDS[entry.dtype], (rows, columns))
        row_bytes = entry.nbytes // rows
        step = min(rows, max(1, _CHUNK // row_bytes))
        buffer = np.empty(step * row_bytes, np.uint8)
        for start in range(0, rows, step):
            length = min(step, rows - start)
            data = buffer[: length * row_bytes]
            self._files[entry.path].read_into(data, entry.offset + start * row_bytes)
            load_blocks(weight.narrow_rows(start, length), data)
        return weight


class _Header:
    """All of a file but its data."""

    def __init__(self, file: File):
        self.file = file
        self.metadata: dict[str, Any] = {}
        with mmap.mmap(file.fileno(), file.size, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, file)
            self.version, num_tensors, num_keys = _read_prologue(cursor)
            for _ in range(num_keys):
                key = cursor.string("a metadata key", _MAX_NAME)
                if not key or key in self.metadata:
                    raise WeightsError(f"{file.path}: metadata key {key!r} " + ("appears twice" if key else "is empty"))
                self.metadata[key] = _read_value(cursor, key)
            self.infos = [_read_info(cursor) for _ in range(num_tensors)]
            self.alignment = self._alignment()
            self.start = -(-cursor.at // self.alignment) * self.alignment  # of the data

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise WeightsError(f"{self.file.path}: general.alignment={alignment!r} is not a power of two from 8")
        return alignment


class _Cursor:
    """A place in the file that never leaves it."""

    def __init__(self, data: mmap.mmap, file: File):
        self.data, self.path, self.size, self.at = data, file.path, file.size, 0

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes; where they start."""
        start = self.at
        if count > self.left:
            raise WeightsError(
                f"{self.path}: the file is {self.size:,} bytes, {what} at byte {start:,} needs {start + count:,}: "
                "an incomplete download, or corrupt"
            )
        self.at += count
        return start

    def number(self, format: str, what: str) -> Any:
        return struct.unpack_from(format, self.data, self.take(struct.calcsize(format), what))[0]

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("<Q", what)
        if limit is not None and length > limit:
            raise WeightsError(f"{self.path}: {what} at byte {self.at:,} is {length:,} bytes long, more than {limit:,}")
        start = self.take(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path}: {what} at byte {start:,} is not UTF-8: {error}") from None

    def count(self, what: str, each: int) -> int:
        """A number of things of at least `each` bytes."""
        count = self.number("<Q", what)
        if count * each > self.left:
            raise WeightsError(f"{self.path}: {what} is {count:,}, but only {self.left:,} bytes follow")
        return count

    def skip_strings(self, count: int, what: str) -> np.ndarray:
        """Step over lengths and strings; where each ends, from here."""
        # the vocabulary's 262,144 lengths stand between us and the next key: the one loop here that must be quick
        data, size, start = self.data, self.size, self.at
        at, ends = start, []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                self.take(at + 8 - start, what)
            at += 8 + unpack(data, at)[0]
            ends.append(at)
        self.take(at - start, what)
        return np.array(ends, np.int64) - start


def _read_prologue(cursor: _Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    magic = cursor.data[cursor.take(4, "the magic number") : 4]
    if magic != b"GGUF":
        raise WeightsError(f"{cursor.path} starts with {magic!r}, not with GGUF")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        which = f"{swapped}, big-endian" if swapped in (1, 2, 3) else f"{version}"
        way_out = ": `gguf-convert-endian FILE little` of the gguf package turns it" if swapped in (1, 2, 3) else ""
        raise WeightsError(f"{cursor.path} is GGUF version {which}; versions 2 and 3, little-endian, are read{way_out}")
    num_tensors = cursor.count("the number of tensors", _MIN_TENSOR_BYTES)
    return version, num_tensors, cursor.count("the number of metadata keys", _MIN_KEY_BYTES)


def _read_value(cursor: _Cursor, key: str) -> Any:
    what = f"metadata {key}"
    type_id = cursor.number("<I", what)
    if key == "general.alignment" and type_id != _U32:
        raise WeightsError(f"{cursor.path}: {what} must be an unsigned 32-bit number, not of the type {type_id}")
    if type_id == _STRING:
        return cursor.string(what)
    if type_id in _NUMBERS:
        return cursor.number(_NUMBERS[type_id], what)
    if type_id != _ARRAY:
        raise WeightsError(f"{cursor.path}: {what} has the unknown type {type_id}")
    element = cursor.number("<I", what)
    if element == _STRING:
        count = cursor.count(f"the length of {what}", 8)
        start = cursor.at
        ends = cursor.skip_strings(count, what)
        return Strings(cursor.data[start : cursor.at], ends, f"{cursor.path}: {what}")
    if element not in _NUMBERS:
        raise WeightsError(f"{cursor.path}: {what} is an array of the type {element}; numbers and strings are read")
    dtype = np.dtype(_NUMBERS[element])
    count = cursor.count(f"the length of {what}", dtype.itemsize)
    start = cursor.take(count * dtype.itemsize, what)
    return np.frombuffer(cursor.data[start : cursor.at], dtype)


def _read_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type, shape in PyTorch's order, offset in the data."""
    name = cursor.string("a tensor's name", _MAX_NAME)
    if not name:
        raise WeightsError(f"{cursor.path}: the tensor info that ends at byte {cursor.at:,} has no name")
    what = f"tensor {name!r}"
    num_axes = cursor.number("<I", what)
    if not 1 <= num_axes <= 4:
        raise WeightsError(f"{cursor.path}: {what} has {num_axes} axes; GGUF knows 1 to 4")
    axes = [cursor.number("<Q", what) for _ in range(num_axes)]
    return name, cursor.number("<I", what), tuple(reversed(axes)), cursor.number("<Q", what)


def _measure(where: str, type_id: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """Name of a tensor's type and its bytes."""
    if type_id in REPACKED_TYPES:
        name = REPACKED_TYPES[type_id]
        raise WeightsError(
            f"{where} is of the type {name}, interleaved for one kind of processor; llama.cpp gave these types up too. "
            f"Take the {name.rsplit('_', 2)[0]} file of the same model"
        )
    if type_id not in TYPES:
        name = REFUSED_TYPES.get(type_id, f"number {type_id}")
        readable = ", ".join(name for name, _, _ in TYPES.values())
        raise WeightsError(f"{where} is of the type {name}, which is not read; these are: {readable}")
    name, elements, nbytes = TYPES[type_id]
    if 0 in shape:
        raise WeightsError(f"{where} has the shape {shape}, with an empty axis")
    count = count_elements(shape, where)
    if shape[-1] % elements:
        raise WeightsError(f"{where} is {name}, but its rows of {shape[-1]:,} are not a multiple of {elements}")
    return name, count // elements * nbytes
