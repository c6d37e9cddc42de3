"""Atomic files and folders, and the safetensors writer: the one way to write. The text of a file that people edit.

A file or folder is written under a temporary name beside its target and renamed when it is complete: a reader of the
target sees the old content or the new one, and never a part. With `durable` (the default) content and name
are flushed to the disk (fsync) in that order, so that this also holds if the power fails.

Every function raises the `OSError` of the system: a caller says what could not be saved, and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from gemkit.errors import TextError

if TYPE_CHECKING:
    import numpy as np

# Dense dtypes by their name in safetensors headers: bytes of an element, name in torch (and, but for those that it
# lacks, in NumPy).
DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "C64": (8, "complex64"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
CHUNK_OF_STRINGS = 1 << 14  # of a vocabulary, read or written at once: what that takes stays small
_NAMES = {name: dtype for dtype, (_, name) in DTYPES.items()}


class Sink(Protocol):
    """A file that is written to, or what passes the bytes on to one."""

    def write(self, data: Any, /) -> Any: ...


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the name `path` when the block ends without an error.

    It replaces a file of that name and keeps its permissions; a new one has those of the process' umask. If the block
    raises, nothing is left behind. A process that is killed leaves a hidden file `.NAME.*`.

    Args:
        durable: False skips the flushes to the disk, for what can be made again, such as a cache.
    """
    target = Path(path)
    work = _beside(target)
    file = open(os.open(work, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w+b")  # noqa: SIM115
    try:
        with file:
            with suppress(FileNotFoundError):
                os.chmod(file.fileno(), target.stat().st_mode & 0o777)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(work, target)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    if durable:
        _sync(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder that takes the name `path` when the block ends without an error; missing parents are made.

    If the block raises, nothing is left behind. A process that is killed leaves a hidden folder `.NAME.*`.

    Raises:
        FileExistsError: if there is a file of that name, or a folder that is not empty: it is never touched.
    """
    target = Path(path)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _beside(target)
    work.mkdir()
    try:
        yield work
        for folder, _, names in os.walk(work):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        os.replace(work, target)  # of an empty folder too; the system refuses another
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _sync(target.parent)


def decode_text(data: bytes) -> str:
    """A text file as editors of all systems write it: UTF-8, with or without a mark at its head, or UTF-16 with one.

    The mark is left out; line ends stay as they are.

    Raises:
        TextError: for what is neither, with the line.
    """
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise TextError("it is UTF-32; save it as UTF-8")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise TextError(f"it is UTF-16 with a mistake at byte {error.start}; save it as UTF-8") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data:
        kind = "UTF-16 without a mark? Save it as UTF-8" if data.count(0) > len(data) // 4 else "it is no text"
        raise TextError(f"a NUL byte at {data.index(0)}: the file is damaged, or {kind}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02X} in line {line} is not UTF-8"
        raise TextError(f"{found} (is it Latin-1 or Windows-1252?); save it as UTF-8") from None


def decode_strings(data: bytes, starts: np.ndarray, ends: np.ndarray) -> list[str] | None:
    """The UTF-8 strings at these places of `data`, decoded at once: a vocabulary has 262,144 of them.

    None if one is not UTF-8 or holds a NUL: what is wrong with it is found by looking at them one by one.
    """
    import numpy as np

    array, strings = np.frombuffer(data, np.uint8), list[str]()
    for first in range(0, len(starts), CHUNK_OF_STRINGS):
        start, end = starts[first : first + CHUNK_OF_STRINGS], ends[first : first + CHUNK_OF_STRINGS]
        sizes = end - start + 1  # with a NUL after each
        after = np.cumsum(sizes)
        index = np.repeat(start - (after - sizes), sizes) + np.arange(sizes.sum())
        index[after - 1] = 0
        text = array[index]
        text[after - 1] = 0
        try:
            found = text.tobytes().decode().split("\0")[:-1]
        except UnicodeDecodeError:
            return None
        if len(found) != len(sizes):
            return None
        strings += found
    return strings


def refuse_existing(path: Path) -> None:
    """Raises: FileExistsError, if there is a file of that name, or a folder that is not empty."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists and is not empty", str(path))


def is_unfinished(path: Path, target: str = "") -> bool:
    """Whether a process that was killed left this file or folder while it wrote; of `target` alone, if one is given."""
    return path.name.startswith(f".{target}") and path.name.endswith(_WRITING)


_WRITING = ".writing"


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}{_WRITING}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_safetensors(file: Sink, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the safetensors format, with a copy of one of them in memory at a time.

    Args:
        file: written to from its position on.
        tensors: torch tensors, of any device and strides, or NumPy arrays; several may share memory.
        metadata: the header's `__metadata__`.

    Raises:
        KeyError: for a dtype that the format has no name for.

    Source: https://github.com/huggingface/safetensors (format).
    """
    # the widest dtypes first, as the library does: every tensor is then aligned to its own element
    ordered = sorted(tensors.items(), key=lambda item: -DTYPES[_dtype(item[1])][0])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, value in ordered:
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _dtype(value), "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)
    for _, value in ordered:
        file.write(_bytes(value))


def _dtype(value: Any) -> str:
    return _NAMES[str(value.dtype).removeprefix("torch.")]


def _bytes(value: Any) -> memoryview:
    """The elements of a tensor or an array in C order."""
    import numpy as np

    if not isinstance(value, np.ndarray):
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
