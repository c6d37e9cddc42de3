"""Checkpoints that survive anything that can happen to a process: complete under their name, or not there.

    checkpoints/step-00000100/
        weights.safetensors      what is trained
        optimizer.safetensors    moments, counts, float32 masters
        state.json               the step, the position in the data, what the run was made of
        manifest.json            size and SHA-256 of the others

They are written to a hidden folder, the manifest last, flushed to the disk and then renamed (`files.atomic_folder`): a
folder of that name is whole, whenever the process dies. Those before it are deleted after that. Nothing in one is ever
executed: tensors and JSON only.

Random numbers need no file. Those of a step come from the seed and the number of the step alone (`step.seeded`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from gemkit.errors import NoSpaceError, TrainingError
from gemkit.files import atomic_file, atomic_folder, is_unfinished, write_safetensors
from gemkit.inspect.units import memory
from gemkit.train.process import Process

_NAME = re.compile(r"step-(\d{8,})")
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """The contents of a checkpoint."""

    step: int  # steps that were taken
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


class Checkpoints(Protocol):
    """The checkpoints of one run, as the loop uses them."""

    def steps(self) -> list[int]:
        """The steps that a checkpoint was written after, ascending."""
        ...

    def save(self, saved: Saved) -> Any:
        """Write one; every process of the run calls it, each with its part of the tensors."""
        ...

    def newest(self) -> Saved:
        """The newest that is whole."""
        ...


class FileCheckpoints:
    """Checkpoints as folders of safetensors files, whole tensors in one file, written by the main process.

    Args:
        folder: of all of them; it is made when the first is written.
        keep: the number of the newest that stay, one at least.
        process: this process among those of the run. None: the only one.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2, process: Process | None = None):
        assert keep >= 1
        self.folder, self.keep, self.process = Path(folder), keep, process or Process()

    def steps(self) -> list[int]:
        """The steps that a checkpoint was written after, ascending."""
        if not self.folder.is_dir():
            return []
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if (path / MANIFEST).is_file()]
        return sorted(int(name[1]) for name in found if name)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, saved: Saved) -> Path:
        """Write one, then delete those that are too old. Only the main process writes.

        Raises:
            NoSpaceError: if the disk has no room for it; what was there before stays.
            TrainingError: if a number in it is not finite, which would spoil every run that goes on from it.
        """
        if not self.process.main:
            return self.path(saved.step)
        for kind, tensors in (("weight", saved.weights), ("optimizer's", saved.optimizer)):
            for name, value in tensors.items():
                if not is_finite(value):
                    raise TrainingError(
                        f"step {saved.step}: the {kind} {name} has numbers that are not finite; it is not saved. "
                        "A smaller optimizer.learning_rate, or going on from the checkpoint before, may help"
                    )
        target = self.path(saved.step)
        if saved.step in self.steps():  # the same step of the same run is the same checkpoint
            return target
        self._sweep()
        sizes = [sum(value.nbytes for value in tensors.values()) for tensors in (saved.weights, saved.optimizer)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _room(self.folder, sum(sizes) + (1 << 16)), atomic_folder(target) as work:
                self._write(work, saved)
        finally:
            self._sweep()
        for step in self.steps()[: -self.keep]:
            remove(self.path(step))
        return target

    def _write(self, work: Path, saved: Saved) -> None:
        state = {"format": FORMAT, "step": saved.step, **saved.state}
        contents = {
            "weights.safetensors": write_tensors(work / "weights.safetensors", saved.weights),
            "optimizer.safetensors": write_tensors(work / "optimizer.safetensors", saved.optimizer),
            "state.json": write_bytes(work / "state.json", json.dumps(state, indent=1).encode()),
        }
        write_bytes(work / MANIFEST, json.dumps({"format": FORMAT, "files": contents}, indent=1).encode())

    def _sweep(self) -> None:
        """Remove what a process that was killed left unfinished, here or while it was deleted."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if is_unfinished(path) or (_NAME.fullmatch(path.name) and not (path / MANIFEST).exists()):
                    shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Saved:
        """The newest that is whole; warns of those that are not, and are passed over.

        Raises:
            TrainingError: if there is none.
        """
        found = self.steps()
        damaged = []
        for step in reversed(found):
            try:
                saved = self.load(step)
            except TrainingError as error:
                warnings.warn(f"{error}; the checkpoint before it is taken", stacklevel=2)
                damaged.append(step)
                continue
            for other in damaged:  # the run will come to that step again
                remove(self.path(other))
            return saved
        raise TrainingError(f"there is no complete checkpoint in {self.folder}, of {len(found)}: start the run anew")

    def load(self, step: int) -> Saved:
        """One, after comparing every byte with the manifest.

        Raises:
            TrainingError: if it is damaged.
        """
        folder = self.path(step)
        files = _json(folder / MANIFEST).get("files", {})
        for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
            expected = files.get(name) if isinstance(files, dict) else None
            if not isinstance(expected, dict):
                raise TrainingError(f"{folder / MANIFEST} does not list {name}")
            check(folder / name, expected)
        state = _json(folder / "state.json")
        if state.get("format") != FORMAT:
            raise TrainingError(f"{folder} is of format {state.get('format')}; this gemkit reads {FORMAT}")
        return Saved(
            step,
            read_tensors(folder / "weights.safetensors"),
            read_tensors(folder / "optimizer.safetensors"),
            state,
        )


def is_finite(value: Tensor) -> bool:
    """Whether all of its numbers are: then their sum in float64 is, and only then."""
    return not value.is_floating_point() or math.isfinite(sum(part.sum().item() for part in wide_parts(value)))


def wide_parts(value: Tensor) -> Iterator[Tensor]:
    """Its numbers in float64, some at a time: all at once would be twice a model in float32."""
    for part in value.detach().reshape(-1).split(1 << 22):
        yield part.double()


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A safetensors file, one tensor in memory twice at a time; its size and SHA-256."""
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        write_safetensors(hashed, tensors)
    return hashed.entry()


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """A file; its size and SHA-256."""
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        hashed.write(data)
    return hashed.entry()


def replace_bytes(path: Path, data: bytes) -> None:
    """A file in place of the one of that name, which is there until the new one is whole.

    Raises:
        NoSpaceError: if the disk has no room for it.
    """
    with _room(path.parent, len(data)), atomic_file(path) as file:
        file.write(data)


class _Hashed:
    """A file with the size and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def entry(self) -> dict[str, Any]:
        """Their line in a manifest."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


@contextlib.contextmanager
def _room(folder: Path, needed: int) -> Iterator[None]:
    """Refuse what will not fit, and say it in the same words if the disk fills while it is written."""

    def refuse() -> NoSpaceError:
        left = shutil.disk_usage(folder).free
        return NoSpaceError(f"no space in {folder}: needs {memory(needed)}, {memory(left)} free")

    if shutil.disk_usage(folder).free < needed:
        raise refuse()
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise refuse() from error
        raise TrainingError(f"cannot write to {folder}: {error}") from error


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: what is left if the process dies meanwhile is not taken for one."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


def check(path: Path, expected: Mapping[str, Any]) -> None:
    """Compare a file with its manifest's entry.

    Raises:
        TrainingError: if it differs.
    """
    try:
        size = path.stat().st_size
        if size != expected.get("bytes"):
            raise TrainingError(f"{path} has {size:,} bytes, its manifest says {expected.get('bytes'):,}")
        if sha256(path) != expected.get("sha256"):
            raise TrainingError(f"{path} is damaged: its SHA-256 is not the manifest's")
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise TrainingError(f"{path} is no JSON object")
    return value
