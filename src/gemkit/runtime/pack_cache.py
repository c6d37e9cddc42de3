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
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gemkit import family
from gemkit.errors import WeightsError
from gemkit.executors.native import packfile as packs
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packfile import Pack
from gemkit.executors.native.tower import NativeTower
from gemkit.runtime.options import LoadOptions
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.report import Report

if TYPE_CHECKING:
    from gemkit.weights.load import Progress

LIMIT = 32_000_000_000  # bytes of all kept files
_SPARE = 5_000_000_000  # bytes of disk that are never taken


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
    pack = _kept(path, source)
    if pack is None:
        from gemkit.executors.native.packer import pack as make
        from gemkit.weights.load import load_module

        module, report = load_module(checkpoint, **options.storage, progress=progress)
        target = path if _has_room(report.nbytes) else None
        pack = make(module, target, source, list(report.notes))
        if target is not None:
            _drop_oldest(path)
    report = Report(nbytes=pack.nbytes, notes=list(pack.notes))
    native = executor_of(pack, checkpoint.decoder, checkpoint.vision)
    report.seconds = time.perf_counter() - start
    return native, report


def executor_of(pack: Pack, decoder: family.DecoderConfig, vision: family.Modality | None) -> NativeExecutor:
    """The executor of a packed model, with its image tower if it sees.

    Raises:
        ModelError: if the packed model cannot run.
    """
    tower = None if vision is None else NativeTower(vision, decoder.width, pack)
    return NativeExecutor(decoder, pack, tower)


def fingerprint(checkpoint: Checkpoint, options: LoadOptions) -> str:
    """The key of a packed model: version of the format, files (size, time of change), architecture, options."""
    files = []
    for path in sorted({entry.path for entry in checkpoint.reader.entries.values()}):
        status = path.stat()
        files.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    members = hashlib.sha256(repr((checkpoint.decoder, checkpoint.vision)).encode()).hexdigest()
    return json.dumps([packs.VERSION, files, members, options.storage])


def cache_folder() -> Path:
    """Where packed models are kept."""
    if given := os.environ.get("GEMKIT_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):  # an account without a home, as containers have
        return Path(tempfile.gettempdir()) / f"gemkit-{os.getuid()}"
    return Path(home) / "gemkit"


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
