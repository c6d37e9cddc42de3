"""The native executor: a lowered program on the CPU, in C++, without returning to Python between steps. No torch.

`library()` finds and checks the shared library that the installation built; where there was no compiler there is none,
and the torch executor runs everything. `Native` runs a packed model; `NativeState` is what it remembers.

Which instruction set the kernels use is decided when the library is loaded: the best that the processor has, or what
the environment variable GEMKIT_ISA names (avx512, avx2, portable).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemkit import family
from gemkit.errors import ConfigError, ModelError, StateError
from gemkit.program.chunks import check_ids, check_prefix, image_rows
from gemkit.program.pack import Pack

if TYPE_CHECKING:
    from gemkit.program.chunks import Chunk

LIBRARY = "libgemkit_native.so"
_ISAS = ("avx512", "avx2", "portable")
_ABI = 2
_DONE, _STOPPED, _NO_MEMORY, _TOO_LARGE = range(4)


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
    places = [Path(__file__).parents[1] / LIBRARY]
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
        ("gk_pack", i32, [i32, i64, i64, pointer, pointer, i64, i64]),
        ("gk_make_sketch", i32, [i32, pointer, i64, i64, pointer, pointer, i64, i64]),
        ("gk_executor_new", pointer, [pointer, i64] * 4),
        ("gk_read_limit", ctypes.c_double, [i32]),
        ("gk_executor_free", None, [pointer]),
        ("gk_state_new", pointer, [pointer, i64, i64]),
        ("gk_state_free", None, [pointer]),
        ("gk_state_rollback", i32, [pointer, i64, i64]),
        ("gk_state_fork", i32, [pointer, i64, i64]),
        ("gk_state_clear", None, [pointer, i64]),
        ("gk_state_bytes", i64, [pointer]),
        ("gk_state_kept", pointer, [pointer, i32, i64]),
        ("gk_state_cell", i64, [pointer, i32]),
        ("gk_state_keep", None, [pointer, i32, i64, pointer]),
        ("gk_run", i32, [pointer, pointer, i32, *[pointer, i64] * 3, pointer, pointer, i64, *[pointer] * 5]),
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
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return min(count, 64)


def read_limit() -> float:
    """Bytes a second that this machine reads from memory with our threads, measured."""
    return library(free=True).gk_read_limit(threads())


class Tower(Protocol):
    """Whatever turns images into what the decoder sees of them (`weights.native.TorchTower` is one)."""

    @property
    def vision(self) -> family.Vision: ...

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(I * P, D) float32, from images of (3, S, S) in -1 to 1."""
        ...


class NativeState:
    """What the native executor remembers of sequences: the interface of `nn.State`."""

    def __init__(self, executor: Native, slots: int, room: int):
        if slots < 1 or room < 0:
            raise StateError(f"slots={slots} must be at least 1, and room={room} at least 0")
        self._executor = executor  # it must outlive the state
        self._library = library()
        self._handle = self._library.gk_state_new(executor.handle, slots, room)
        self.decoder = executor.decoder
        self.lengths = [0] * slots
        self.room = room

    @property
    def handle(self) -> int:
        return self._handle

    def mark(self, slot: int) -> NativeMark:
        """A place in `slot` that `rollback` returns to."""
        self._checked(slot)
        return NativeMark(slot, self.lengths[slot], self._recurrent(slot))

    def rollback(self, mark: NativeMark, keep: int = 0) -> None:
        """Forget everything since `mark`, but for its first `keep` tokens; with a recurrent layer, those too.

        Raises:
            StateError: if the slot has been shorter since, or a sliding layer had no `room` to keep what is needed.
                Nothing has changed then.
        """
        length = mark.length + (0 if mark.recurrent else keep)
        if length > self.lengths[self._checked(mark.slot)]:
            where = f"the mark is at {mark.length}" + (f", {keep} are to be kept after it" if keep else "")
            raise StateError(f"slot {mark.slot} holds {self.lengths[mark.slot]} tokens, {where}")
        if not self._library.gk_state_rollback(self._handle, mark.slot, length):
            room = self.lengths[mark.slot] - length
            raise StateError(
                f"cannot go back to position {length}: a layer with a window has dropped what its next token must "
                f"see; make the state with room={room} or more"
            )
        for layer, values in mark.recurrent.items():
            self._library.gk_state_keep(self._handle, layer, mark.slot, values.ctypes.data)
        self.lengths[mark.slot] = length

    def fork(self, source: int, target: int) -> None:
        """Make `target` remember what `source` does; the two go their own ways from here."""
        self._library.gk_state_fork(self._handle, self._checked(source), self._checked(target))
        self.lengths[target] = self.lengths[source]

    def free(self, slot: int) -> None:
        """Forget a sequence; the slot is as new."""
        self._library.gk_state_clear(self._handle, self._checked(slot))
        self.lengths[slot] = 0

    @property
    def nbytes(self) -> int:
        return self._library.gk_state_bytes(self._handle)

    def _recurrent(self, slot: int) -> dict[int, np.ndarray]:
        kept = {}
        for i, layer in enumerate(self.decoder.layers):
            if isinstance(layer, family.Recurrent):
                count = self._library.gk_state_cell(self._handle, i)
                address = self._library.gk_state_kept(self._handle, i, slot)
                kept[i] = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,)).copy()
        return kept

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < len(self.lengths):
            raise StateError(f"slot {slot} of a state with slots 0 to {len(self.lengths) - 1}")
        return slot

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.gk_state_free(self._handle)


class NativeMark:
    """A place to come back to: a length, and what recurrent layers held there."""

    def __init__(self, slot: int, length: int, recurrent: dict[int, np.ndarray]):
        self.slot, self.length, self.recurrent = slot, length, recurrent


class Native:
    """Runs a packed model, chunk by chunk."""

    name = "native"
    device = "cpu"

    def __init__(self, decoder: family.Decoder, pack: Pack, tower: Tower | None = None):
        """
        Args:
            tower: makes the features of images; None: the model sees none.

        Raises:
            ModelError: if there is no native library, or the packed model cannot run.
        """
        self.decoder = decoder
        self.pack = pack
        self.tower = tower
        self.threads = threads()
        self._library = library()
        table = np.zeros((len(pack.table), 4), np.int64)
        for row, entry in zip(table, pack.table, strict=True):
            row[0] = entry.kind & 0xFFFFFFFF | entry.rows << 32
            row[1] = entry.cols
            held = pack.bytes_of(entry)
            row[2], row[3] = held.ctypes.data, held.nbytes
        layers = np.array([_layer(layer, decoder) for layer in decoder.layers], np.int32)
        arrays = [(np.ascontiguousarray(a).ctypes.data, len(a)) for a in (pack.steps, pack.buffers, table, layers)]
        self._handle = self._library.gk_executor_new(*[part for pair in arrays for part in pair])
        if not self._handle:
            raise ModelError(f"{pack.path} cannot run: {self._library.gk_error().decode()}")
        self._logits_width = decoder.vocab_size

    @property
    def handle(self) -> int:
        return self._handle

    def about(self) -> str:
        """How it computes, for people."""
        count = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{available()[1]} kernels, {count}; int8 activations, keys and values in float16"

    def new_state(self, slots: int, room: int = 0) -> NativeState:
        return NativeState(self, slots, room)

    def run(self, chunks: Sequence[Chunk], state: NativeState, seconds: np.ndarray | None = None) -> np.ndarray:
        """Compute the chunks, which continue what `state` remembers of their slots.

        Args:
            seconds: (steps,) float64 to which the time of each step is added; the steps then run one by one.

        Returns:
            float32 logits (R, V): for each chunk in order, those of its last `rows` tokens.

        Raises:
            TextError: if a token id is outside the vocabulary.
            ConfigError: if images and the placeholders among the ids do not match, or a chunk cuts its prefix.
            ModelError: if memory runs out, or keys or values are too large for float16.
        """
        ids: list[int] = []
        rows: list[int] = []
        spans: list[tuple[int, int, int, int, int]] = []
        for chunk in chunks:
            first = len(ids)
            ids += chunk.ids
            check_prefix(chunk, state.lengths[chunk.slot])
            spans.append((first, len(ids), chunk.slot, state.lengths[chunk.slot], chunk.prefix))
            rows += range(len(ids) - chunk.rows, len(ids))
        check_ids(ids, self.decoder)
        wanted, kept = _wanted(chunks)
        features, image_rows = self._features(chunks)
        self.computed = np.zeros(len(rows), np.int64)
        logits = np.empty((len(rows), self._logits_width), np.float32)
        given: list[Any] = [np.array(ids, np.int64), np.array(spans, np.int64), np.array(rows, np.int64)]
        result = self._library.gk_run(
            self._handle,
            state.handle,
            self.threads,
            *[part for array in given for part in (array.ctypes.data, len(array))],
            features.ctypes.data,
            image_rows.ctypes.data,
            len(image_rows),
            logits.ctypes.data,
            wanted.ctypes.data,
            kept.ctypes.data,
            self.computed.ctypes.data,
            None if seconds is None else seconds.ctypes.data,
        )
        if result == _NO_MEMORY:
            raise ModelError(f"memory ran out for {len(ids)} tokens of {len(chunks)} sequences: use smaller chunks")
        if result == _TOO_LARGE:
            raise ModelError(
                "keys or values are beyond the range of float16, in which the native executor keeps them; "
                "use the executor torch"
            )
        assert result == _DONE, f"an exception of a signal handler is raised by the call itself, not told by {result}"
        for first, end, slot, position, _ in spans:
            state.lengths[slot] = position + end - first
        return logits

    def _features(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray, np.ndarray]:
        """What the decoder sees of the images of a call, float32 (E, D), and the rows of their placeholders."""
        images = [image for chunk in chunks for image in chunk.images]
        if not images:
            return np.empty((0, self.decoder.width), np.float32), np.empty(0, np.int64)
        rows = image_rows(chunks, None if self.tower is None else self.tower.vision)
        assert self.tower is not None, "image_rows refuses images without a tower"
        return np.ascontiguousarray(self.tower.features(images), np.float32), np.array(rows, np.int64)

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.gk_executor_free(self._handle)


_WANTED = np.dtype([("best", np.int32), ("drop", np.float32), ("kept0", np.int64), ("kept1", np.int64)])


def _wanted(chunks: Sequence[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    """What will be looked at of each row of logits, and the ids of which it is certain, one list after the other."""
    wanted: list[tuple[int, float, int, int]] = []
    kept: list[np.ndarray] = []
    for chunk in chunks:
        for _ in range(chunk.rows):
            if (some := chunk.wanted) is None:
                wanted.append((0, -1.0, 0, 0))
                continue
            first = sum(map(len, kept))
            kept.append(some.kept)
            wanted.append((some.best, -1.0 if some.drop is None else some.drop, first, first + len(some.kept)))
    return np.array(wanted, _WANTED), np.concatenate(kept) if kept else np.empty(0, np.int64)


def _layer(layer: family.Layer, decoder: family.Decoder) -> tuple[int, int, int, int, int, int]:
    match layer:
        case family.Global():
            return 0, decoder.num_kv_heads, decoder.head_dim, 0, 0, 0
        case family.Sliding(window=window):
            return 0, decoder.num_kv_heads, decoder.head_dim, window, 0, 0
        case family.Recurrent(width=width, conv_width=taps):
            return 1, 0, 0, 0, width, taps
