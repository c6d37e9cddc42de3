"""A snapshot as a file: safetensors, with a manifest in its header."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from gemkit import family
from gemkit.errors import StateError
from gemkit.files import atomic_file, write_safetensors

Tensors = dict[str, Tensor]

_MANIFEST = "gemkit.state"  # its key in the header
_VERSION = 2


def write(path: Path, decoder: family.DecoderConfig, length: int, tensors: Tensors) -> Path:
    """Write the memory of `length` tokens.

    Raises:
        StateError: if it cannot be written.
    """
    manifest = {"version": _VERSION, "executor": "torch", "decoder": _fingerprint(decoder), "length": length}
    try:
        with atomic_file(path) as file:
            write_safetensors(file, tensors, {_MANIFEST: json.dumps(manifest)})
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}") from error
    return path


def read(path: Path, decoder: family.DecoderConfig) -> tuple[int, Tensors]:
    """Length and tensors of a snapshot of a model of this architecture.

    Raises:
        StateError: if the file is another model's or executor's, or damaged, or no snapshot.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_MANIFEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path} cannot be read as a snapshot: {error}") from None
    if text is None:
        raise StateError(f"{path} is a safetensors file, but no snapshot of a state: Snapshot.save writes them")
    try:
        manifest = json.loads(text)
        version, executor = manifest["version"], manifest["executor"]
        length, made_by = manifest["length"], manifest["decoder"]
    except (ValueError, TypeError, KeyError):
        raise StateError(f"{path}: its manifest is damaged") from None
    if version != _VERSION:
        raise StateError(f"{path} is of version {version!r} of the format; this version of gemkit reads {_VERSION}")
    if executor != "torch":
        raise StateError(f"{path} is a snapshot of the executor {executor!r}, and this one is torch")
    if type(length) is not int or length < 0 or not isinstance(made_by, str):
        raise StateError(f"{path}: its manifest is damaged")
    if made_by != _fingerprint(decoder):
        raise StateError(f"{path} is of another model: a snapshot serves only the architecture that it was taken of")
    return length, tensors


def expect_names(tensors: Tensors, names: tuple[str, str], where: str) -> None:
    """Raises: StateError, unless these are the tensors of a layer."""
    if set(tensors) != set(names):
        raise StateError(f"{where}: holds {sorted(tensors)}, must hold {sorted(names)}")


def expect(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> None:
    """Raises: StateError, unless a tensor is of this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise StateError(f"{where} is {tuple(tensor.shape)} {tensor.dtype}, must be {shape} {dtype}")


def _fingerprint(decoder: family.DecoderConfig) -> str:
    """Equal for equal architectures; it says nothing of the weights."""
    return hashlib.sha256(repr(decoder).encode()).hexdigest()
