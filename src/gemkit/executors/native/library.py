"""The native library: found, checked and declared to ctypes; how many threads it may use. No torch.

Where the installation had no compiler there is none, and the torch executor runs everything. Which instruction set the
kernels use is decided when the library is loaded: the best that the processor has, or what the environment variable
GEMKIT_ISA names (avx512, avx2, portable).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from gemkit.errors import ConfigError, ModelError
from gemkit.memory import processors

LIBRARY = "libgemkit_native.so"
_ISAS = ("avx512", "avx2", "portable")
_ABI = 6


@cache
def library(*, free: bool = False) -> ctypes.CDLL:
    """The native library.

    Args:
        free: whether its functions are called without Python's lock, so that several threads can. A run is called with
            it: it gives the lock up itself, and takes it to let signals be seen.

    Raises:
        ModelError: if the installation has none, or one of another version.
    """
    path = os.environ.get("GEMKIT_NATIVE") or _installed()
    if path is None:
        raise ModelError(
            "this installation has no native executor: it was built without a C++ compiler. "
            "Install one (g++ 11 or newer) and reinstall gemkit, or use the executor torch"
        )
    try:
        loaded = (ctypes.CDLL if free else ctypes.PyDLL)(str(path))
        version = loaded.gk_version()
    except (OSError, AttributeError) as error:
        raise ModelError(f"{path} cannot be used as the native executor: {error}") from error
    if version != _ABI:
        raise ModelError(f"{path} is of version {version}, this gemkit needs {_ABI}: reinstall gemkit")
    _declare(loaded)
    return loaded


def _installed() -> Path | None:
    """Beside this package, or, of an editable installation, where its built files are."""
    places = [Path(__file__).parents[2] / LIBRARY]
    with contextlib.suppress(PackageNotFoundError):
        places.append(Path(str(distribution("gemkit").locate_file(f"gemkit/{LIBRARY}"))))
    return next((place for place in places if place.is_file()), None)


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        ("gk_error", ctypes.c_char_p, []),
        ("gk_isa", ctypes.c_char_p, []),
        ("gk_has_isa", i32, [ctypes.c_char_p]),
        ("gk_packed_bytes", ctypes.c_size_t, [i32, i64, i64]),
        ("gk_dense", i32, [i32, i32, pointer, i64, i64, pointer]),
        ("gk_block_bytes", i64, [i32]),
        ("gk_pack", i32, [i32, i32, i64, i64, pointer, pointer, i64, i64, pointer, pointer]),
        ("gk_executor_new", pointer, [pointer, i64] * 4),
        ("gk_read_limit", ctypes.c_double, [i32]),
        ("gk_executor_free", None, [pointer]),
        ("gk_executor_shape", None, [pointer, pointer]),
        ("gk_encode", i32, [pointer, i32, pointer, i64, i64, pointer, i64]),
        ("gk_state_new", pointer, [pointer]),
        ("gk_state_delete", None, [pointer]),
        ("gk_state_add", i64, [pointer]),
        ("gk_state_free", None, [pointer, i64]),
        ("gk_state_bytes", i64, [pointer]),
        ("gk_state_unique", i64, [pointer, i64]),
        ("gk_state_needed", i64, [pointer, i64, i64]),
        ("gk_state_restore", i64, [pointer, i64, pointer, i32, i64]),
        ("gk_snapshot_new", pointer, [pointer, i64]),
        ("gk_snapshot_delete", None, [pointer, pointer]),
        ("gk_snapshot_unique", i64, [pointer, pointer]),
        ("gk_snapshot_pages", i64, [pointer, pointer, i32, pointer]),
        ("gk_snapshot_get", None, [pointer, pointer, i32, pointer]),
        ("gk_snapshot_make", pointer, [pointer, i64]),
        ("gk_snapshot_put", i32, [pointer, pointer, i32, i64, i64, pointer]),
        ("gk_run", i32, [pointer, pointer, i32, pointer, pointer]),
        ("gk_candidates", i64, [pointer, i64, pointer, pointer]),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def available() -> tuple[bool, str]:
    """Whether the native executor can run here, and which kernels it uses or why not.

    Raises:
        ConfigError: if GEMKIT_ISA asks for kernels that this machine or build does not have.
    """
    try:
        isa = library().gk_isa()
    except ModelError as error:
        return False, str(error)
    if not isa:
        here = [name for name in _ISAS if library().gk_has_isa(name.encode())]
        raise ConfigError(f"GEMKIT_ISA={os.environ.get('GEMKIT_ISA')!r}: the kernels here are {', '.join(here)}")
    return True, isa.decode()


def threads() -> int:
    """Threads to compute with: GEMKIT_THREADS, else the processors that this process may use, by affinity and quota."""
    if asked := os.environ.get("GEMKIT_THREADS"):
        if not asked.isdigit() or not 1 <= int(asked) <= 256:
            raise ConfigError(f"GEMKIT_THREADS={asked!r} must be a whole number from 1 to 256")
        return int(asked)
    return min(processors(), 64)


def read_limit() -> float:
    """Bytes a second that this machine reads from memory with our threads, measured."""
    return library(free=True).gk_read_limit(threads())
