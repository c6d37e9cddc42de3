"""The format of a file or a folder, recognised by its content, and the reader for it."""

from __future__ import annotations

import os
from pathlib import Path

from gemkit.errors import WeightsError
from gemkit.weights.formats.base import MAX_HEADER, File, Format, Reader, describe_unknown_file
from gemkit.weights.formats.gguf import GGUFReader
from gemkit.weights.formats.safetensors import SafetensorsReader
from gemkit.weights.formats.torch_checkpoint import CkptReader

_READERS: dict[Format, type[Reader]] = {reader.format: reader for reader in (SafetensorsReader, GGUFReader, CkptReader)}


def open_reader(path: str | os.PathLike[str]) -> Reader:
    """The open checkpoint at a path.

    Raises:
        WeightsError: if it is none that is read here, or is damaged.
    """
    return _READERS[sniff(path)](path)


def sniff(path: str | os.PathLike[str]) -> Format:
    """Which format a file or a folder holds, by its content.

    Raises:
        WeightsError: if it is none that is read here; the message says what it is instead, and the way out.
    """
    path = Path(path)
    if path.is_dir():
        return _sniff_folder(path)
    file = File(path)
    try:
        head = file.head()
    finally:
        file.close()
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK\x03\x04"):
        return "ckpt"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if path.name.endswith(".index.json"):
        return "ckpt" if ".bin." in path.name else "safetensors"
    found = describe_unknown_file(head) or f"of an unknown format (it starts with {head[:8]!r})"
    raise WeightsError(f"{path} is {found}; safetensors, GGUF and gemma_pytorch .ckpt files are read")


def _sniff_folder(folder: Path) -> Format:
    kinds: tuple[tuple[Format, tuple[str, ...]], ...] = (
        ("safetensors", ("*.safetensors", "*.safetensors.index.json")),
        ("gguf", ("*.gguf",)),
        ("ckpt", ("*.ckpt", "*.bin", "*.bin.index.json", "*.pt")),
    )
    for format, patterns in kinds:
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return format
    raise WeightsError(f"{folder} holds no safetensors, GGUF or .ckpt files")
