"""What every checkpoint format comes down to: named tensors at known places of files.

A reader lists `entries` without touching the data, and reads one tensor at a time, with one copy from the file into
memory of its own: no page of a file stays mapped, so that loading a checkpoint peaks at little more than its size, and
a file that shrinks meanwhile is an error rather than a signal that ends the process.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemkit.errors import WeightsError, nearest
from gemkit.files import DTYPES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from gemkit.ops.quantized import Quantized

MAX_AXES = 8  # more is a corrupt file: no tensor of the family has more than 4
MAX_HEADER = 100_000_000  # bytes of JSON: what the safetensors library accepts too


Format = Literal["safetensors", "gguf", "ckpt"]
_WRAPPERS = re.compile(r"^module\.|^base_model\.model\.(?=model\.|language_model\.|lm_head)|(?:(?<=\.)|^)_orig_mod\.")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, unread."""

    name: str  # as the file has it
    dtype: str  # "F32", "BF16", ... or a block type: "Q4_K"
    shape: tuple[int, ...]  # as in PyTorch: a linear weight is (out, in)
    path: Path
    offset: int  # bytes from the start of the file
    nbytes: int


class Reader(ABC):
    """An open checkpoint of one or several files; also a context manager.

    Attributes:
        format: the name of the format in the name tables.
        path: the file or folder.
        entries: every tensor by its name in the file, in the file's order.
        metadata: what else the format keeps in its files, as plain Python values.
    """

    format: Format

    def __init__(self, path: str | os.PathLike[str]):
        """Open and check everything but the numbers.

        Raises:
            WeightsError: if it is not what this reader reads, or not all there, or contradicts itself.
        """
        self.path = Path(path)
        self.entries: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        self._files: dict[Path, File] = {}
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _scan(self) -> None:
        """Fill `entries`, `metadata` and `_files`."""

    def unwrap(self) -> int:
        """Name tensors as their model does, without what wrappers of training put around a name (torch.compile's
        `_orig_mod.`, data parallelism's `module.`, PEFT's `base_model.model.` and `.base_layer`); how many had one.

        Raises:
            WeightsError: if two tensors then have one name.
        """
        found: dict[str, TensorInfo] = {}
        for name, entry in self.entries.items():
            plain = _WRAPPERS.sub("", name).replace(".base_layer.", ".")
            if plain in found:
                raise WeightsError(f"{self.path}: {found[plain].name!r} and {name!r} are one tensor, {plain!r}")
            found[plain] = entry
        wrapped = len(found.keys() - self.entries.keys())
        self.entries = found
        return wrapped

    def _open(self, path: Path) -> File:
        self._files[path] = File(path)
        return self._files[path]

    def _add(self, entry: TensorInfo) -> None:
        if entry.name in self.entries:
            raise WeightsError(f"{entry.path}: tensor {entry.name!r} appears twice")
        size, end = self._files[entry.path].size, entry.offset + entry.nbytes
        if end > size:
            raise WeightsError(
                f"{entry.path}: the file is {size:,} bytes, tensor {entry.name!r} needs {end:,}: "
                "an incomplete download? Fetch it again."
            )
        self.entries[entry.name] = entry

    def read(self, name: str) -> Tensor | Quantized:
        """The tensor of that name, in fresh memory, in its stored dtype.

        Raises:
            WeightsError: if there is none of that name, or the file has changed since it was opened.
        """
        return self._read_dense(self._entry(name))

    def planes(self, name: str) -> dict[str, TensorInfo]:
        """Where a tensor is: the planes of a quantized weight (`block_types.PLANES`), "blocks" where a file interleaves
        them, or "dense".

        Raises:
            WeightsError: if there is none of that name.
        """
        entry = self._entry(name)
        return {"dense" if entry.dtype in DTYPES else "blocks": entry}

    def file(self, entry: TensorInfo) -> File:
        """The open file that holds a tensor."""
        return self._files[entry.path]

    def check_unchanged(self) -> None:
        """Raises: WeightsError, if a file has changed since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def _entry(self, name: str) -> TensorInfo:
        if name not in self.entries:
            raise WeightsError(f"{self.path}: no tensor {name!r}; {nearest(name, self.entries)}")
        return self.entries[name]

    def _read_dense(self, entry: TensorInfo) -> Tensor:
        import torch

        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._files[entry.path].read_into(data.numpy(), entry.offset)
        return data.view(getattr(torch, DTYPES[entry.dtype][1])).view(entry.shape)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class File:
    """An open file that knows its size and refuses to be read once it is another."""

    def __init__(self, path: Path):
        """Raises: WeightsError, in words, for what people mistake for a checkpoint: see `describe_unknown_file`."""
        self.path = path
        try:
            if not path.is_file():  # opening a pipe would wait for its writer
                raise WeightsError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
            self._raw = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{str(path)!r} cannot be opened: {error}") from None
        self._stamp = self._status()
        self.size = self._stamp[0]
        if found := describe_unknown_file(self.head(), certain=True):
            self.close()
            raise WeightsError(f"{path} is {found}")

    def _status(self) -> tuple[int, int]:
        status = os.fstat(self._raw.fileno())
        return status.st_size, status.st_mtime_ns

    def fileno(self) -> int:
        return self._raw.fileno()

    def head(self) -> bytes:
        """The first 512 bytes, or what there is."""
        return os.pread(self._raw.fileno(), 512, 0)

    def read(self, count: int, offset: int) -> bytes:
        """`count` bytes from `offset`, which the caller has checked to be within `size`."""
        import numpy as np

        data = np.empty(count, np.uint8)
        self.read_into(data, offset)
        return data.tobytes()

    def read_into(self, buffer: np.ndarray, offset: int) -> None:
        """Fill an array of bytes from `offset` on."""
        view, done = buffer.data, 0
        while done < len(view):  # one call reads at most 2 GiB
            count = os.preadv(self._raw.fileno(), [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        if done < len(view):
            raise self._changed()
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raises: WeightsError, if it has changed since it was opened."""
        if self._status() != self._stamp:
            raise self._changed()

    def _changed(self) -> WeightsError:
        return WeightsError(f"{self.path} changed while it was being read; open it again")

    def close(self) -> None:
        self._raw.close()


def describe_unknown_file(head: bytes, *, certain: bool = False) -> str | None:
    """A file that no reader here reads, in words, with the way out; None if its first bytes are not known.

    Args:
        certain: tell only of what can be the beginning of no format, whichever reader opens it.
    """
    text = head.lstrip().lower()
    if not head:
        return "empty (0 bytes): an interrupted download? Fetch it again."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: a login or error page was saved under this name. Fetch it again, with access."
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves: run `git lfs pull` in its folder."
    if certain:
        return None
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras weights)"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a bare pickle, which can run code when it is loaded and is never opened"
    if head.startswith(b"FUGG"):
        return "a byte-swapped GGUF file"
    return None


def count_elements(shape: Sequence[int], where: str) -> int:
    """Product of a shape that comes from a file.

    Raises:
        WeightsError: if it is no shape, or one that 64 bits do not count.
    """
    if len(shape) > MAX_AXES:
        raise WeightsError(f"{where} has {len(shape)} axes, more than {MAX_AXES}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise WeightsError(f"{where} has the shape {list(shape)}: sizes are whole numbers from 0")
    if math.prod(size for size in shape if size) >= 2**60:  # an empty tensor's strides must fit too
        raise WeightsError(f"{where} has the shape {list(shape)}, more elements than memory can hold")
    return math.prod(shape)


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises:
        WeightsError: if it is not UTF-8, not JSON, not an object, nested too deep, or repeats a key (most parsers
            silently take the last one, so that two tools see two different files).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise WeightsError(f"{where} repeats the key {key!r}")
            found[key] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise WeightsError(f"{where} is nested too deep to be genuine") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise WeightsError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{where} is JSON, but a {type(value).__name__} where an object should be")
    return value


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches.

    Raises:
        WeightsError: if there are several, or none.
    """
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:4]) or "none"
        raise WeightsError(f"{folder}: one {pattern} file is needed, found {names}; name the file itself")
    return files[0]
