"""A checkpoint for the native executor: packed once, kept in a cache (`runtime.pack_cache`), mapped from then on.

The first time, the weights go from the files of the checkpoint to a packed file, piece by piece; from then on opening
the model maps that file. Neither imports torch, unless weights are quantized on the way. What the file was made from
stands in it: another file, size, time of change, or version of the format makes another.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gemkit import family
from gemkit.errors import WeightsError
from gemkit.executors.native import packfile
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packfile import Pack
from gemkit.executors.native.tower import NativeTower
from gemkit.runtime import pack_cache
from gemkit.runtime.options import LoadOptions
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.report import Report

if TYPE_CHECKING:
    from gemkit.executors.native.writer import Progress

_GROWTH = 1.25  # a packed model at most, by the bytes of its tensors


def load_native(
    checkpoint: Checkpoint, options: LoadOptions, *, progress: Progress | None = None
) -> tuple[NativeExecutor, Report]:
    """The native executor of a checkpoint, from the cache of packed models where it holds this one.

    Args:
        progress: is called with (bytes packed, bytes in all).

    Raises:
        ModelError: if there is no native executor here, or it cannot run this model.
        WeightsError, ConfigError: as `weights.load.load_module`.
    """
    start = time.perf_counter()
    source = fingerprint(checkpoint, options)
    name = hashlib.sha256(source.encode()).hexdigest()[:32]
    pack = pack_cache.find(name, source) or _packed(checkpoint, options, name, source, progress)
    report = Report(nbytes=pack.nbytes, notes=list(pack.notes))
    native = executor_of(pack, checkpoint.decoder, checkpoint.vision)
    report.seconds = time.perf_counter() - start
    return native, report


def _packed(checkpoint: Checkpoint, options: LoadOptions, name: str, source: str, progress: Progress | None) -> Pack:
    """Pack a checkpoint, and keep it where there is a place; another process that packs it is waited for."""
    from gemkit.executors.native.writer import NOT_KEPT

    with pack_cache.turn(name):
        if found := pack_cache.find(name, source):
            return found
        nbytes = int(_GROWTH * sum(entry.nbytes for entry in checkpoint.reader.entries.values()))
        target, why = pack_cache.place(name, nbytes)
        pack = _made(checkpoint, options, target, source, progress)
        try:
            checkpoint.reader.check_unchanged()
        except WeightsError:
            if target is not None:
                target.unlink(missing_ok=True)
            raise
        if why:
            pack.notes.append(NOT_KEPT.format(why=why))
        return pack


def _made(
    checkpoint: Checkpoint, options: LoadOptions, target: Path | None, source: str, progress: Progress | None
) -> Pack:
    """A checkpoint packed from its files, or as modules whose weights were quantized."""
    from gemkit.runtime.checkpoint_weights import CheckpointWeights

    weights = CheckpointWeights(checkpoint)
    if options.weights is None and weights.heads_are_tied():
        from gemkit.executors.native.writer import write_pack

        return write_pack(weights.programs(), weights, target, source, progress=progress)
    from gemkit.executors.native.packer import pack
    from gemkit.weights.load import load_module

    module, report = load_module(checkpoint, **options.storage, progress=progress)
    return pack(module, target, source, report.notes)


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
    return json.dumps([packfile.VERSION, files, members, options.storage])
