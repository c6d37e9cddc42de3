"""The native executor: runs a packed model on the CPU, in C++, without returning to Python between steps. No torch.

`NativeExecutor` runs it; its memory between calls is a `NativeState`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, assert_never

import numpy as np

from gemkit import family
from gemkit.errors import ConfigError, ModelError, StateError, Stopped
from gemkit.executors.interface import (
    Chunk,
    LogitsFilter,
    Output,
    Outputs,
    SparseLogits,
    StopFlag,
    check_ids,
    image_rows,
    pool,
    span_rows,
)
from gemkit.executors.native.library import available, library, threads
from gemkit.executors.native.packfile import Pack
from gemkit.executors.native.state import NativeState

SCORE = "score.weight"


class Tower(Protocol):
    """The image tower and its projection: images to features of the decoder (`executors.native.tower.NativeTower`)."""

    @property
    def vision(self) -> family.Modality: ...

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(I * P, D) float32, from images of (3, S, S) in -1 to 1."""
        ...


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
        self.library = library()
        table = pack.pointers()
        layers = np.array([_layer(layer.mixer) for layer in decoder.layers], np.int32)
        self._recurs = bool((layers[:, 0] == 1).any())
        self._looks_ahead = bool(layers[:, 4].any())
        arrays = [(np.ascontiguousarray(a).ctypes.data, len(a)) for a in (pack.steps, pack.buffers, table, layers)]
        self.handle = self.library.gk_executor_new(*[part for pair in arrays for part in pair])
        if not self.handle:
            raise ModelError(f"{pack.path} cannot run: {self.library.gk_error().decode()}")
        shape = np.zeros(4, np.int64)
        self.library.gk_executor_shape(self.handle, shape.ctypes.data)
        width, by_row, self._hidden_width, self._filters = shape.tolist()
        if width != decoder.vocab_size or not by_row:
            raise ModelError(
                f"{pack.path} cannot run: it gives {width} numbers, the model has {decoder.vocab_size} ids"
            )
        self.turn = threading.Lock()
        _executors.add(self)

    def about(self) -> str:
        """How it computes, for people."""
        count = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{available()[1]} kernels, {count}; int8 activations, keys and values in float16"

    def new_state(self, slots: int = 0) -> NativeState:
        """An empty memory, with slots 0 to `slots` - 1 added."""
        return NativeState(self, slots)

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

        Rows of logits with a filter are `SparseLogits`, the same whatever else is computed with them.

        Args:
            output: what the rows of the result are.
            stop: ends this call when it is set, also while it waits for those of other threads.
            seconds: (steps,) float64 to which the time of each step is added; the steps then run one by one.

        Raises:
            TextError: if a token id is outside the vocabulary.
            ConfigError: if images and the placeholders among the ids do not match, a chunk cuts a span, or a slot is in
                two chunks.
            ModelError: if memory runs out, keys or values are too large for float16, or there is no such output.
            StateError: if the state is of another executor or has no such slot, or a sequence goes on whose tokens see
                those after them.
            Stopped: if `stop` was set.
        """
        check_ids([token for chunk in chunks for token in chunk.ids], self.decoder)
        if state.executor is not self:
            raise StateError("the state was made by another executor")
        features = self._features(chunks)
        with self._turn(stop):
            rows = self._run(chunks, state, features, output, stop, seconds)
        match output:
            case "logits" | "hidden":
                return rows
            case "reward":
                return Outputs([self._reward(np.asarray(row)) for row in rows.rows], rows.computed)
            case "pooled":
                return pool(np.array(rows.rows), chunks)
        assert_never(output)

    @contextmanager
    def _turn(self, stop: StopFlag | None) -> Iterator[None]:
        """Hold the executor's turn; a wait for it ends when `stop` is set."""
        turn = self.turn
        while not turn.acquire(timeout=-1 if stop is None else 0.02):
            if stop is not None and stop.is_set():
                raise Stopped("the call was stopped before its turn came")
        try:
            yield
        finally:
            turn.release()

    def _run(
        self,
        chunks: Sequence[Chunk],
        state: NativeState,
        features: tuple[np.ndarray, np.ndarray],
        output: Output,
        stop: StopFlag | None,
        seconds: np.ndarray | None,
    ) -> Outputs:
        ids: list[int] = []
        rows: list[int] = []
        places: list[tuple[int, int, int, int, int, int]] = []
        spans: list[tuple[int, int]] = []
        for chunk in chunks:
            first, position = len(ids), state.lengths[state.checked(chunk.slot)]
            self._check_reach(chunk, position)
            ids += chunk.ids
            rows += range(len(ids) - chunk.rows, len(ids))
            before = len(spans)
            spans += [(position + start, position + end) for start, end in span_rows([chunk], state.lengths)]
            places.append((first, len(ids), chunk.slot, position, before, len(spans)))
        if len({chunk.slot for chunk in chunks}) < len(chunks):
            raise ConfigError(f"slots {[chunk.slot for chunk in chunks]}: each must be in one chunk of a call")
        logits = output == "logits"
        filters, always = _filters(chunks, self.decoder.vocab_size, logits and bool(self._filters))
        full = int(np.count_nonzero(filters["top_n"] == 0)) if logits else len(rows)
        # arrays of this call alone: another thread that replaced one would free it while the library writes to it
        computed = np.zeros(len(rows), np.int64)
        out = np.empty((full, self.decoder.vocab_size if logits else max(1, self._hidden_width)), np.float32)
        arrays = [
            np.array(ids, np.int64),
            np.array(places, np.int64),
            np.array(rows, np.int64),
            np.array(spans, np.int64),
        ]
        tokens, placed, at, spanned = (array.ctypes.data for array in arrays)
        call = np.array(
            [
                *(tokens, len(ids), placed, len(places), spanned, at, len(rows)),
                *(features[0].ctypes.data, features[1].ctypes.data, len(features[1])),
                *(not logits, out.ctypes.data, filters.ctypes.data, always.ctypes.data, computed.ctypes.data),
                0 if seconds is None else seconds.ctypes.data,
            ],
            np.int64,
        )
        flag = None if stop is None else stop.address
        self._expect(
            self.library.gk_run(self.handle, state.handle, self.threads, call.ctypes.data, flag), chunks, output
        )
        for first, end, slot, position, *_ in places:
            state.lengths[slot] = position + end - first
        whole = iter(out)
        found = [self._candidates(i) if top_n and logits else next(whole) for i, top_n in enumerate(filters["top_n"])]
        return Outputs(found, computed)

    def _check_reach(self, chunk: Chunk, position: int) -> None:
        self.decoder.check_length(position + len(chunk.ids))
        if chunk.spans and self._recurs:
            raise ConfigError(f"spans={list(chunk.spans)}: a recurrent layer cannot see what comes after")
        if position and self._looks_ahead:
            raise StateError(
                f"slot {chunk.slot} goes on at position {position}, but its tokens see those after them: compute the "
                "sequence whole, in an empty slot"
            )

    def _expect(self, result: int, chunks: Sequence[Chunk], output: Output) -> None:
        """Raise what the result of a run says (`Executor::Result` of csrc)."""
        tokens = sum(len(chunk.ids) for chunk in chunks)
        match result:
            case 0:
                return
            case 1:
                raise Stopped(f"the call was stopped while it computed {tokens} tokens")
            case 2:
                raise ModelError(f"memory ran out for {tokens} tokens of {len(chunks)} sequences: use smaller chunks")
            case 3:
                raise ModelError(
                    "keys or values are beyond the range of float16, in which the native executor keeps them; "
                    "use the executor torch"
                )
            case _:
                raise ModelError(f"output={output!r}: the packed model has no such output")

    def _candidates(self, row: int) -> SparseLogits:
        """What the filter of a row of the last run left of it; within the same turn."""
        ids, values = ctypes.c_void_p(), ctypes.c_void_p()
        count = self.library.gk_candidates(self.handle, row, ctypes.byref(ids), ctypes.byref(values))
        if not count:
            return SparseLogits(np.empty(0, np.int64), np.empty(0, np.float32))
        return SparseLogits(
            np.ctypeslib.as_array(ctypes.cast(ids, ctypes.POINTER(ctypes.c_int64)), (count,)).copy(),
            np.ctypeslib.as_array(ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), (count,)).copy(),
        )

    def _reward(self, hidden_D: np.ndarray) -> np.ndarray:
        """(1,): the number of the score head, summed in float64, whose order depends on the width alone."""
        score = next((entry for entry in self.pack.table if entry.name == SCORE), None)
        if score is None:
            raise ModelError("the packed model has no score head: it is no reward model")
        weight_D = self.pack.bytes_of(score).view(np.float32)
        return (hidden_D * weight_D.astype(np.float64)).sum(keepdims=True).astype(np.float32)

    def _features(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray, np.ndarray]:
        """The features of the images of a call, float32 (E, D), and the rows of their placeholders."""
        images = [image for chunk in chunks for image in chunk.images]
        if not images:
            return np.empty((0, self.decoder.width), np.float32), np.empty(0, np.int64)
        rows = image_rows(chunks, None if self.tower is None else self.tower.vision)
        assert self.tower is not None, "image_rows refuses images without a tower"
        return np.ascontiguousarray(self.tower.features(images), np.float32), np.array(rows, np.int64)

    def __del__(self):
        if getattr(self, "handle", None):
            self.library.gk_executor_free(self.handle)


# `LogitsFilter` of csrc
_FILTER = np.dtype([("top_n", np.int32), ("max_gap", np.float32), ("always0", np.int64), ("always1", np.int64)])


def _filters(chunks: Sequence[Chunk], vocab_size: int, used: bool) -> tuple[np.ndarray, np.ndarray]:
    """The filter of each row of logits, and the ids that they keep always, one ascending list after the other.

    Args:
        used: False gives rows without a filter.
    """
    filters: list[tuple[int, float, int, int]] = []
    always: list[np.ndarray] = []
    total = 0
    for chunk in chunks:
        if chunk.filter is None or not used or not chunk.rows:
            filters += [(0, -1.0, 0, 0)] * chunk.rows
            continue
        some: LogitsFilter = chunk.filter
        kept = np.unique(np.asarray(some.always, np.int64))
        if some.top_n < 1 or (len(kept) and not 0 <= kept[0] <= kept[-1] < vocab_size):
            raise ConfigError(f"a filter keeps at least 1 logit and ids from 0 to {vocab_size - 1}, not {some}")
        gap = -1.0 if some.max_gap is None else some.max_gap
        filters += [(min(some.top_n, vocab_size), gap, total, total + len(kept))] * chunk.rows
        always.append(kept)
        total += len(kept)
    return np.array(filters, _FILTER), np.concatenate(always) if always else np.empty(0, np.int64)


def _layer(mixer: family.Mixer) -> tuple[int, int, int, int, int, int, int]:
    """`Layer` of csrc: kind, key/value heads, head size, tokens seen before and after (-1: all), width, taps."""
    match mixer:
        case family.Attention(kv_heads=heads, head_dim=head_dim, window=window, reach=reach):
            before = -1 if window is None else window - 1
            return 0, heads, head_dim, before, 0 if reach == "past" else before, 0, 0
        case family.Recurrent(width=width, conv_width=taps):
            return 1, 0, 0, 0, 0, width, taps
