"""The native executor: runs a packed model on the CPU, in C++, without returning to Python between steps. No torch.

`NativeExecutor` runs it; `NativeState` is what it remembers of sequences.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gemkit import family
from gemkit.errors import ConfigError, ModelError, StateError
from gemkit.executors.interface import Chunk, Output, Outputs, StopFlag, check_ids, image_rows, span_rows
from gemkit.executors.native.library import available, library, threads
from gemkit.executors.native.packfile import Pack

_DONE, _STOPPED, _NO_MEMORY, _TOO_LARGE = range(4)


class Tower(Protocol):
    """Whatever turns images into what the decoder sees of them (`weights.native.TorchTower` is one)."""

    @property
    def vision(self) -> family.Modality: ...

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(I * P, D) float32, from images of (3, S, S) in -1 to 1."""
        ...


class NativeState:
    """What the native executor remembers of sequences: the interface of `nn.State`."""

    def __init__(self, executor: NativeExecutor, slots: int, room: int):
        if slots < 1 or room < 0:
            raise StateError(f"slots={slots} must be at least 1, and room={room} at least 0")
        self._executor = executor  # it must outlive the state
        self._library = library()
        self._handle = self._library.gk_state_new(executor.handle, slots, room)
        self.decoder = executor.decoder
        self.lengths = dict.fromkeys(range(slots), 0)
        self.room = room

    @property
    def handle(self) -> int:
        return self._handle

    def mark(self, slot: int) -> NativeMark:
        """A place in `slot` that `rollback` returns to."""
        self._checked(slot)
        with self._executor.turn:
            return NativeMark(slot, self.lengths[slot], self._recurrent(slot))

    def rollback(self, mark: NativeMark, keep: int = 0) -> None:
        """Forget everything since `mark`, but for its first `keep` tokens; with a recurrent layer, those too.

        Raises:
            StateError: if the slot has been shorter since, or a sliding layer had no `room` to keep what is needed.
                Nothing has changed then.
        """
        with self._executor.turn:
            self._rollback(mark, mark.length + (0 if mark.recurrent else keep), keep)

    def _rollback(self, mark: NativeMark, length: int, keep: int) -> None:
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
        with self._executor.turn:
            self._library.gk_state_fork(self._handle, self._checked(source), self._checked(target))
            self.lengths[target] = self.lengths[source]

    def free(self, slot: int) -> None:
        """Forget a sequence; the slot is as new."""
        with self._executor.turn:
            self._library.gk_state_clear(self._handle, self._checked(slot))
            self.lengths[slot] = 0

    @property
    def nbytes(self) -> int:
        with self._executor.turn:
            return self._library.gk_state_bytes(self._handle)

    def add(self) -> int:
        raise NotImplementedError

    def unique(self, held: object, /) -> int:
        raise NotImplementedError

    def needed(self, slot: int, tokens: int) -> int:
        raise NotImplementedError

    def snapshot(self, slot: int) -> Any:
        raise NotImplementedError

    def restore(self, snapshot: object, slot: int | None = None, *, keep: int = 0) -> int:
        raise NotImplementedError

    def load(self, path: Any) -> Any:
        raise NotImplementedError

    def _recurrent(self, slot: int) -> dict[int, np.ndarray]:
        kept = {}
        for i, layer in enumerate(self.decoder.layers):
            if isinstance(layer.mixer, family.Recurrent):
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


_executors: weakref.WeakSet[NativeExecutor] = weakref.WeakSet()


def _give_turns_anew() -> None:
    """In the child of a fork: the thread that had a turn may exist in the parent alone."""
    for executor in _executors:
        executor.turn = threading.Lock()


os.register_at_fork(after_in_child=_give_turns_anew)


class NativeExecutor:
    """Runs a packed model, chunk by chunk. Calls of several threads, and what they do to states, take turns."""

    name = "native"
    device = "cpu"

    def __init__(self, decoder: family.DecoderConfig, pack: Pack, tower: Tower | None = None):
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
        table = pack.pointers()
        layers = np.array([_layer(layer.mixer) for layer in decoder.layers], np.int32)
        arrays = [(np.ascontiguousarray(a).ctypes.data, len(a)) for a in (pack.steps, pack.buffers, table, layers)]
        self._handle = self._library.gk_executor_new(*[part for pair in arrays for part in pair])
        if not self._handle:
            raise ModelError(f"{pack.path} cannot run: {self._library.gk_error().decode()}")
        self._logits_width = decoder.vocab_size
        self.turn = threading.Lock()
        _executors.add(self)

    @property
    def handle(self) -> int:
        return self._handle

    def about(self) -> str:
        """How it computes, for people."""
        count = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{available()[1]} kernels, {count}; int8 activations, keys and values in float16"

    def new_state(self, slots: int = 0, room: int = 0) -> NativeState:
        return NativeState(self, slots, room)

    def run(
        self,
        chunks: Sequence[Chunk],
        state: NativeState,
        *,
        output: Output = "logits",
        stop: StopFlag | None = None,
        seconds: np.ndarray | None = None,
    ) -> Outputs:
        """Compute the chunks, which continue what `state` remembers of their slots.

        Args:
            seconds: (steps,) float64 to which the time of each step is added; the steps then run one by one.

        Raises:
            TextError: if a token id is outside the vocabulary.
            ConfigError: if images and the placeholders among the ids do not match, or a chunk cuts a span.
            ModelError: if memory runs out, or keys or values are too large for float16.
        """
        check_ids([token for chunk in chunks for token in chunk.ids], self.decoder)
        features = self._features(chunks)
        with self.turn:
            return self._run(chunks, state, features, seconds)

    def _run(
        self,
        chunks: Sequence[Chunk],
        state: NativeState,
        features: tuple[np.ndarray, np.ndarray],
        seconds: np.ndarray | None,
    ) -> Outputs:
        ids: list[int] = []
        rows: list[int] = []
        spans: list[tuple[int, int, int, int, int]] = []
        for chunk in chunks:
            first = len(ids)
            ids += chunk.ids
            held = span_rows([chunk], state.lengths)
            prefix = held[0][1] if held else 0
            if len(held) > 1 or (held and (held[0][0] or state.lengths[chunk.slot])):
                raise ConfigError(f"spans={chunk.spans}: the native executor computes one, from the first token on")
            spans.append((first, len(ids), chunk.slot, state.lengths[chunk.slot], prefix))
            rows += range(len(ids) - chunk.rows, len(ids))
        filters, always = _filters(chunks)
        # arrays of this call alone: another thread that replaced one would free it while the library writes to it
        computed = np.zeros(len(rows), np.int64)
        logits = np.empty((len(rows), self._logits_width), np.float32)
        given: list[Any] = [np.array(ids, np.int64), np.array(spans, np.int64), np.array(rows, np.int64)]
        result = self._library.gk_run(
            self._handle,
            state.handle,
            self.threads,
            *[part for array in given for part in (array.ctypes.data, len(array))],
            *[array.ctypes.data for array in features],
            len(features[1]),
            logits.ctypes.data,
            filters.ctypes.data,
            always.ctypes.data,
            computed.ctypes.data,
            None if seconds is None else seconds.ctypes.data,
            None,
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
        return Outputs(list(logits), computed)

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


# `Executor::Filter` of csrc
_FILTER = np.dtype([("top_n", np.int32), ("max_gap", np.float32), ("always0", np.int64), ("always1", np.int64)])


def _filters(chunks: Sequence[Chunk]) -> tuple[np.ndarray, np.ndarray]:
    """The filter of each row of logits, and the ids that they keep always, one list after the other."""
    filters: list[tuple[int, float, int, int]] = []
    always: list[np.ndarray] = []
    for chunk in chunks:
        for _ in range(chunk.rows):
            if (some := chunk.filter) is None:
                filters.append((0, -1.0, 0, 0))
                continue
            first = sum(map(len, always))
            always.append(some.always)
            gap = -1.0 if some.max_gap is None else some.max_gap
            filters.append((some.top_n, gap, first, first + len(some.always)))
    return np.array(filters, _FILTER), np.concatenate(always) if always else np.empty(0, np.int64)


def _layer(mixer: family.Mixer) -> tuple[int, int, int, int, int, int]:
    match mixer:
        case family.Attention(kv_heads=heads, head_dim=head_dim, window=window):
            return 0, heads, head_dim, window or 0, 0, 0
        case family.Recurrent(width=width, conv_width=taps):
            return 1, 0, 0, 0, width, taps
