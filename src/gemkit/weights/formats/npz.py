"""NumPy archives (`.npz`): a zip file with one `.npy` record an array.

A record is a magic word, a header that spells dtype, order and shape as a Python literal, and the numbers. The headers
are matched, not evaluated, and their sizes compared with the archive's, before `numpy.load` reads an array: it would
take a header's word for how much memory to allocate. An array of Python objects, a pickle, is refused by its dtype.

Source: the NEP 1 format, https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from typing import IO, TYPE_CHECKING

from gemkit.errors import WeightsError
from gemkit.files import DTYPES
from gemkit.weights.formats.base import File, Reader, TensorInfo, count_elements

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 10_000  # characters; one of a plain array has about 60
MAX_RATIO = 1032  # how much deflate can shrink (https://zlib.net/zlib_tech.html); more is a false promise

_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']*)',\s*'fortran_order':\s*(?:True|False),\s*'shape':\s*\(((?:\d{1,20},\s*)*(?:\d{1,20})?)\)"
    r",?\s*\}\s*",
    re.ASCII,
)
_DTYPES = {
    "<f8": "F64",
    "<f4": "F32",
    "<f2": "F16",
    "|V2": "BF16",  # NumPy has no bf16: JAX's is stored as two bytes without a meaning
    "<i8": "I64",
    "<i4": "I32",
    "<i2": "I16",
    "|i1": "I8",
    "|u1": "U8",
}
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)


class NpzReader(Reader):
    """An `.npz` file, stored or deflated. An entry's offset is where its record begins in the archive."""

    def _scan(self) -> None:
        file = self._open(self.path)
        if not file.head().startswith(b"PK"):
            raise WeightsError(f"{self.path} is no NumPy archive: it starts with {file.head()[:8]!r}")
        try:
            with open(file.fileno(), "rb", closefd=False) as raw, zipfile.ZipFile(raw) as archive:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        self._scan_record(archive, info, file)
        except _DAMAGE as error:
            raise WeightsError(f"{self.path}: incomplete download, or corrupt: {error}") from None
        if not self.entries:
            raise WeightsError(f"{self.path} is a zip archive, but holds no arrays")

    def _scan_record(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: File) -> None:
        name = info.filename.removesuffix(".npy")
        where = f"{self.path}: array {name!r}"
        if name in self.entries:
            raise WeightsError(f"{where} appears twice")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise WeightsError(f"{where} is encrypted or compressed in a way that NumPy does not use")
        if info.compress_size > file.size or info.file_size > MAX_RATIO * (info.compress_size + 1):
            raise WeightsError(f"{where} promises {info.file_size:,} bytes from a file of {file.size:,}")
        with archive.open(info) as record:
            descr, shape, header = _read_header(record, where)
        if "O" in descr:
            raise WeightsError(f"{where} holds Python objects, a pickle, which can run code and is never opened")
        if descr not in _DTYPES:
            raise WeightsError(f"{where} has the dtype {descr!r}; these are read: {', '.join(_DTYPES)}")
        dtype = _DTYPES[descr]
        nbytes = count_elements(shape, where) * DTYPES[dtype][0]
        if header + nbytes != info.file_size:
            raise WeightsError(f"{where} of shape {shape} needs {header + nbytes:,} bytes, not {info.file_size:,}")
        self.entries[name] = TensorInfo(name, dtype, shape, self.path, info.header_offset, nbytes)

    def read(self, name: str) -> Tensor:
        """The array of that name as a tensor in fresh memory, in its stored dtype, rows first.

        Raises:
            WeightsError: if there is none of that name, or its record is damaged.
        """
        import numpy as np
        import torch

        info, file = self._entry(name), self._files[self.path]
        try:
            with open(file.fileno(), "rb", closefd=False) as raw:
                raw.seek(0)
                with np.load(raw, allow_pickle=False) as archive:
                    array = archive[name].copy(order="C")  # at the end of a record its checksum is compared
        except _DAMAGE as error:
            raise WeightsError(f"{self.path}: array {name!r} is damaged: {error}") from None
        if array.shape != info.shape:
            raise WeightsError(f"{self.path}: array {name!r} is {array.shape}, its header said {info.shape}")
        data = torch.from_numpy(array.reshape(-1).view(np.uint8))
        return data.view(getattr(torch, DTYPES[info.dtype][1])).view(info.shape)


def _read_header(record: IO[bytes], where: str) -> tuple[str, tuple[int, ...], int]:
    """(dtype as NumPy spells it, shape, bytes before the numbers)."""
    magic = record.read(8)
    width = {1: 2, 2: 4, 3: 4}.get(magic[6] if magic.startswith(b"\x93NUMPY") and len(magic) == 8 else 0)
    if width is None:
        raise WeightsError(f"{where} is no .npy record: it starts with {magic!r}")
    length = int.from_bytes(record.read(width), "little")
    if length > MAX_HEADER:
        raise WeightsError(f"{where} has a header of {length:,} bytes, more than {MAX_HEADER:,}")
    text = record.read(length).decode("latin-1")
    match = _HEADER.fullmatch(text)
    if match is None:
        raise WeightsError(f"{where} is no plain array: its header is {text[:120]!r}")
    shape = tuple(int(size) for size in re.findall(r"\d+", match[2], re.ASCII))
    return match[1], shape, 8 + width + length
