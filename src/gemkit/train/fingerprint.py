"""The identity of a model: digests by which a checkpoint of a run knows it again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from gemkit import family
from gemkit.weights.checkpoint import Checkpoint

_SAMPLE = 1 << 20  # bytes from the beginning and the end of a file of weights


def fingerprint(decoder: family.DecoderConfig, vision: family.Modality | None, checkpoint: Checkpoint | None) -> str:
    """SHA-256 of the architecture, and of the names, sizes and ends of the files of weights."""
    parts = [repr(decoder), repr(vision)]
    if checkpoint is not None:
        entries = checkpoint.reader.entries
        parts += [f"{name} {entry.dtype} {tuple(entry.shape)}" for name, entry in sorted(entries.items())]
        for path in sorted({Path(entry.path) for entry in entries.values()}):
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                parts.append(str(size))
                for begin in (0, max(0, size - _SAMPLE)):
                    file.seek(begin)
                    parts.append(hashlib.sha256(file.read(_SAMPLE)).hexdigest())
    return digest(parts)


def digest(parts: Sequence[str]) -> str:
    """SHA-256 of texts, each ended by a NUL."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() + b"\0")
    return found.hexdigest()
