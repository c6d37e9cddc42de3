"""A checkpoint for the native executor: packed once, kept in a cache, mapped from then on.

The first time, the weights are read into torch's modules, traced and packed (`executors.native.packer`), and the
result is kept; from then on opening the model maps that file, and torch is not even imported. What the file was made
from stands in it: another file, size, time of change, or version of the format makes another.

`GEMKIT_CACHE` names the folder (default: `gemkit` in the user's cache folder). The file used longest ago is dropped
where all of them together are larger than the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemkit import family
from gemkit.errors import WeightsError
from gemkit.executors.native import packfile as packs
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packfile import Pack
from gemkit.runtime.options import LoadOptions
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.report import Report

if TYPE_CHECKING:
    from gemkit.weights.load import Progress

LIMIT = 32_000_000_000  # bytes of all kept files
_SPARE = 5_000_000_000  # bytes of disk that are never taken
_TOWER = ("vision_tower.", "multi_modal_projector.")


def load_native(
    checkpoint: Checkpoint, options: LoadOptions, *, progress: Progress | None = None
) -> tuple[NativeExecutor, Report]:
    """The native executor of a checkpoint, from the cache of packed models where it holds this one.

    Raises:
        ModelError: if there is no native executor here, or it cannot run this model.
        WeightsError, ConfigError: as `weights.load.load_module`.
    """
    start = time.perf_counter()
    source = fingerprint(checkpoint, options)
    path = cache_folder() / (hashlib.sha256(source.encode()).hexdigest()[:32] + ".gkpack")
    pack, tower = _kept(path, source), None
    if pack is None:
        from gemkit.executors.native.packer import pack as make
        from gemkit.nn import PaliGemma
        from gemkit.weights.load import load_module

        module, report = load_module(checkpoint, **options.storage, progress=progress)
        target = path if _has_room(report.nbytes) else None
        notes = list(report.notes)
        decoder: Any = module
        if isinstance(module, PaliGemma):
            tower, decoder = TorchTower(module), module.language_model
        pack = make(decoder, target, source, notes, sees=tower is not None)
        if target is not None:
            _drop_oldest(path)
    elif checkpoint.vision is not None:
        from gemkit.weights.load import load_module

        tower = TorchTower(load_module(checkpoint, only=_TOWER, progress=progress)[0])
    report = Report(nbytes=pack.nbytes + (tower.nbytes if tower else 0), notes=list(pack.notes))
    native = NativeExecutor(checkpoint.decoder, pack, tower)
    report.seconds = time.perf_counter() - start
    return native, report


def fingerprint(checkpoint: Checkpoint, options: LoadOptions) -> str:
    """The key of a packed model: version of the format, files (size, time of change), architecture, options."""
    files = []
    for path in sorted({entry.path for entry in checkpoint.reader.entries.values()}):
        status = path.stat()
        files.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    decoder = hashlib.sha256(repr(checkpoint.decoder).encode()).hexdigest()
    return json.dumps([packs.VERSION, files, decoder, options.storage])


def cache_folder() -> Path:
    """Where packed models are kept."""
    if given := os.environ.get("GEMKIT_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gemkit"


def kept_bytes() -> int:
    """Bytes of all packed models that are kept."""
    return sum(size for _, size, _ in _all(cache_folder()))


def _kept(path: Path, source: str) -> Pack | None:
    """The packed model at a place, if it is there, whole and of this source."""
    if not path.is_file():
        return None
    try:
        pack = Pack(path)
    except WeightsError:  # cut short by a full disk or another version's: it is made anew
        return None
    if pack.source != source:
        return None
    with contextlib.suppress(OSError):  # a cache that is only read, such as another user's
        os.utime(path)  # used now
    return pack


def _has_room(nbytes: int) -> bool:
    folder = cache_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free - 2 * nbytes > _SPARE and nbytes < LIMIT // 2
    except OSError:
        return False


def _drop_oldest(newest: Path) -> None:
    """Keep the limit: the files used longest ago go first, the newest never."""
    found = _all(newest.parent)
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= LIMIT:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size


def _all(folder: Path) -> list[tuple[float, int, Path]]:
    """When each kept file was used last, its bytes, its place."""
    found = []
    for path in folder.glob("*.gkpack"):
        with contextlib.suppress(OSError):  # another process has just dropped it
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    return found


class TorchTower:
    """The image tower of a PaliGemma, in torch: what the native executor asks for features."""

    def __init__(self, module: Any):
        self.vision: family.Vision = module.vision
        self._tower, self._projector = module.vision_tower, module.multi_modal_projector
        self.nbytes = sum(p.nbytes for part in (self._tower, self._projector) for p in part.parameters())

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(I * P, D) float32, from images of (3, S, S) in -1 to 1."""
        import torch

        with torch.inference_mode():
            features = self._projector(self._tower(torch.from_numpy(np.stack(images))))
        return features.float().numpy()
