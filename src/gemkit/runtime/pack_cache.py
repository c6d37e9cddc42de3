"""The cache of packed models: a folder of files that can all be made again, the least recently used of which go first.

`GEMKIT_CACHE` names the folder (default: `gemkit` in the user's cache folder), `GEMKIT_CACHE_LIMIT` the bytes that all
files together may have ("20GB", "512MiB"; default: 32GB). A packed model appears under its name when it is whole. A
process that packs one holds the turn of its name, so that another waits for it instead of making the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemkit.errors import ConfigError, WeightsError
from gemkit.executors.native.packfile import Pack
from gemkit.files import is_unfinished

LIMIT = 32_000_000_000  # bytes of all kept files
SPARE = 1_000_000_000  # bytes of disk that are never taken
_SUFFIX, _TURN = ".gkpack", ".turn"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Kept:
    """A file of the cache: a packed model, or what is left of one that was never finished."""

    path: Path
    nbytes: int
    used: float  # when it was used last, in seconds since 1970
    unfinished: bool = False

    @property
    def sources(self) -> list[str]:
        """The files that it was made from; empty if it does not say."""
        try:
            return [str(path) for path, *_ in json.loads(Pack(self.path).source)[1]]
        except (WeightsError, ValueError, TypeError, IndexError):
            return []


def folder() -> Path | None:
    """Where packed models are kept; None if neither a variable nor a home names a place."""
    if given := os.environ.get("GEMKIT_CACHE"):
        return Path(os.path.expanduser(given))
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "gemkit"
    try:
        return Path.home() / ".cache" / "gemkit"
    except RuntimeError:  # an account without an entry, as containers have
        return None


def limit() -> int:
    """Bytes that all files of the cache may have together.

    Raises:
        ConfigError: if GEMKIT_CACHE_LIMIT is no size.
    """
    text = os.environ.get("GEMKIT_CACHE_LIMIT", "")
    if not text:
        return LIMIT
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"GEMKIT_CACHE_LIMIT={text!r} is no size: write 20GB, 512MiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def find(name: str, source: str) -> Pack | None:
    """The packed model of that name, if it is there, whole and made from `source`; it was used now."""
    home = folder()
    if home is None or not (path := home / (name + _SUFFIX)).is_file():
        return None
    try:
        pack = Pack(path)
    except WeightsError:  # cut short, or another version's: it is made anew
        return None
    if pack.source != source:
        return None
    with contextlib.suppress(OSError):  # a cache that is only read, such as another user's
        os.utime(path)
    return pack


def place(name: str, nbytes: int) -> tuple[Path | None, str]:
    """Where a new packed model of at most `nbytes` is written, and if nowhere why. The least recently used ones go.

    Raises:
        ConfigError: as `limit`.
    """
    home, most = folder(), limit()
    if home is None:
        return None, "there is no home folder"
    if nbytes > most:
        return None, f"up to {nbytes:,} bytes are more than GEMKIT_CACHE_LIMIT={most:,}"
    files = kept()
    with contextlib.suppress(OSError):
        for file in [file for file in files if file.unfinished and is_unfinished(file.path, name)]:
            file.path.unlink(missing_ok=True)  # of a process that was killed: the turn is ours
            files.remove(file)
    files = [file for file in files if not file.unfinished and file.path.stem != name]
    try:
        free = shutil.disk_usage(_existing(home)).free
    except OSError:
        free = nbytes + SPARE
    total = sum(file.nbytes for file in files)
    if nbytes + SPARE > free + total:
        return None, f"{home} has {free:,} bytes of disk left"
    for file in files:  # used longest ago first
        if total + nbytes <= most and nbytes + SPARE <= free:
            break
        with contextlib.suppress(OSError):
            file.path.unlink(missing_ok=True)
            total, free = total - file.nbytes, free + file.nbytes
    return home / (name + _SUFFIX), ""


@contextlib.contextmanager
def turn(name: str) -> Iterator[None]:
    """Within the block no other process is in one of the same name. Where the cache cannot be written nobody waits."""
    home, handle = folder(), None
    path = None if home is None else home / (name + _TURN)
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if handle is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None and path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(handle)


def kept() -> list[Kept]:
    """The files of the cache, used longest ago first."""
    home, found = folder(), []
    with contextlib.suppress(OSError):
        for path in [] if home is None else home.iterdir():
            unfinished = is_unfinished(path) and _SUFFIX in path.name
            if unfinished or path.suffix == _SUFFIX:
                with contextlib.suppress(OSError):  # another process has just dropped it
                    status = path.stat()
                    found.append(Kept(path, status.st_size, status.st_mtime, unfinished))
    return sorted(found, key=lambda file: file.used)


def damage(file: Kept) -> str:
    """What is wrong with a packed model, which is read whole; empty if it is what was written."""
    try:
        names = Pack(file.path).damaged()
    except WeightsError as error:
        return str(error)
    return "" if not names else f"{len(names)} weights differ from their checksums, first {names[0]}"


def clear() -> list[Kept]:
    """Remove every packed model that is kept, and what was never finished; what was removed. Those in use stay mapped.

    Raises:
        OSError: if one cannot be removed.
    """
    gone = []
    for file in kept():
        if file.unfinished and not _is_abandoned(file.path):
            continue
        file.path.unlink(missing_ok=True)
        gone.append(file)
    return gone


def _is_abandoned(path: Path) -> bool:
    """Whether nobody has the turn to write the packed model whose unfinished file this is."""
    name = path.name.split(".")[1]
    try:
        handle = os.open(path.with_name(name + _TURN), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
