"""The contract between those who ask for tokens and those who compute a model. No torch.

An `Executor` takes `Chunk`s, the next tokens of some sequences, and gives `Outputs`, one row for each token that was
asked about. Its memory between calls is a `State`: slots, one a sequence, and immutable `Snapshot`s of them.

A call computes all of its chunks or nothing. Calls of one executor take turns: `run` may be called from any thread, and
a `StopFlag` ends the call that it was given to, and that call alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from gemkit.errors import ConfigError, TextError
from gemkit.family import DecoderConfig, Modality


@dataclass(frozen=True, eq=False)
class LogitsFilter:
    """Which logits of a row the sampler can keep. Those are exact; the others may be left out of the output."""

    top_n: int  # this many of the largest, not counting `always`
    max_gap: float | None = None  # also all that are at most this much below the largest
    # (K,) int64: ids that are kept whatever their logits: a bias or a penalty moves them
    always: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence.

    Args:
        slot: the sequence's slot in the state.
        ids: at least one token id.
        rows: the last this many of `ids` give a row of output: 0 inside a prompt, all for scoring.
        spans: (start, end) positions in the sequence whose tokens see one another, ascending and disjoint. A span lies
            whole in one chunk; those wholly before or after this one do not matter to it.
        images: (3, S, S) float32 in -1 to 1 each, whose placeholders are among `ids`.
        filter: the logits of each row that will be looked at; None: all of them.
    """

    slot: int
    ids: Sequence[int]
    rows: int = 1
    spans: Sequence[tuple[int, int]] = ()
    images: Sequence[np.ndarray] = ()
    filter: LogitsFilter | None = None


class SparseLogits(NamedTuple):
    """The logits of one row that a `LogitsFilter` leaves, exact."""

    ids: np.ndarray  # (K,) int64, ascending
    values: np.ndarray  # (K,) float32


Output = Literal["logits", "hidden", "reward", "pooled"]


@dataclass(frozen=True, eq=False)
class Outputs:
    """The results of a call, in the order of its chunks.

    Args:
        rows: by the kind of output that was asked for,
            "logits": for each output row (V,) float32, or `SparseLogits` where the chunk had a filter and the executor
            used it, so that a step of many filtered sequences makes no (R, V) array;
            "hidden": for each output row (D,) float32, the hidden state after the last norm;
            "reward": for each output row (1,) float32, the number of the score head;
            "pooled": for each chunk with output rows (D,) float32, the mean of their hidden states.
        computed: (len(rows),) int64: logits that were computed for each row; 0 where the output is none.
    """

    rows: Sequence[np.ndarray | SparseLogits]
    computed: np.ndarray


def pool(hidden: np.ndarray, chunks: Sequence[Chunk]) -> Outputs:
    """The "pooled" output of the hidden states (R, D) of a call: means in float64, of the chunks that have rows."""
    counts = [chunk.rows for chunk in chunks if chunk.rows]
    parts = np.split(hidden, np.cumsum(counts)[:-1]) if counts else []
    means = [part.mean(0, dtype=np.float64).astype(np.float32) for part in parts]
    return Outputs(means, np.zeros(len(means), np.int64))


class Snapshot(Protocol):
    """The memory of one sequence at one moment. Immutable; it shares pages with slots and other snapshots."""

    @property
    def length(self) -> int:
        """Tokens remembered."""
        ...

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with a manifest, atomically; `State.load` reads it, in another process too.

        Raises:
            StateError: if it cannot be written.
        """
        ...


class State(Protocol):
    """The memory of sequences between calls: slots, one a sequence, in pages that slots and snapshots share."""

    @property
    def lengths(self) -> Mapping[int, int]:
        """Tokens remembered by each live slot."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held by slots and snapshots, a shared page counted once."""
        ...

    def add(self) -> int:
        """A new, empty slot. The number of one that was freed may come back."""
        ...

    def free(self, slot: int) -> None:
        """End a slot; what no snapshot and no other slot shares with it is given back."""
        ...

    def unique(self, held: Any, /) -> int:
        """Bytes that freeing this slot, or dropping this snapshot, would give back."""
        ...

    def needed(self, slot: int, tokens: int) -> int:
        """Bytes that a chunk of this many tokens would newly take, copies of shared pages included."""
        ...

    def snapshot(self, slot: int) -> Snapshot:
        """The memory of a slot as it is now."""
        ...

    def restore(self, snapshot: Any, slot: int | None = None, *, keep: int = 0) -> int:
        """Put what a snapshot holds into a new slot (None), or in place of what `slot` holds.

        Args:
            keep: of the tokens that `slot` computed since the snapshot was taken of it, the first `keep` stay where
                every layer can keep them (attention can); a member with recurrent layers keeps none. `lengths` say how
                many were kept.

        Returns:
            the slot.

        Raises:
            StateError: if the snapshot is of another model or executor, or `slot` has not computed `keep` tokens since
                the snapshot was taken of it. Nothing has changed then.
        """
        ...

    def load(self, path: str | os.PathLike[str]) -> Snapshot:
        """A snapshot that was saved, in this process or another.

        Raises:
            StateError: if the file is damaged, or of another architecture or executor.
        """
        ...


class StopFlag:
    """Ends the call that it was given to: `set` may be called from any thread, at any time."""

    def __init__(self):
        self._word = np.zeros(1, np.int32)

    def set(self) -> None:
        self._word[0] = 1

    def is_set(self) -> bool:
        return bool(self._word[0])

    @property
    def address(self) -> int:
        """Where an int32 is that is not 0 once the flag is set, for native code; valid while the flag lives."""
        return self._word.ctypes.data


class Executor(Protocol):
    """Computes a member: torch modules, native kernels, a stand-in in a test."""

    @property
    def decoder(self) -> DecoderConfig: ...

    def new_state(self, slots: int = 0) -> State:
        """An empty memory, with slots 0 to `slots` - 1 added."""
        ...

    def run(
        self, chunks: Sequence[Chunk], state: Any, *, output: Output = "logits", stop: StopFlag | None = None
    ) -> Outputs:
        """Append each chunk to its slot of a state that this executor made.

        All or nothing: if it raises, by Ctrl-C too, `lengths` are as before and every slot can go on from there. A call
        waits for those of other threads.

        Args:
            output: what `Outputs.rows` are.
            stop: ends this call when it is set.

        Raises:
            TextError: if a token id is outside the vocabulary.
            ConfigError: if a chunk cuts a span, or images and placeholders do not match.
            ModelError: if the model has no such output.
            StateError: if the state is of another executor, or has no such slot.
            Stopped: if `stop` was set.
        """
        ...


def check_ids(ids: Sequence[int], decoder: DecoderConfig) -> None:
    """Raises: TextError, if a token id is outside the vocabulary."""
    limit = decoder.vocab_size
    if not 0 <= min(ids) <= max(ids) < limit:
        raise TextError(f"token ids run from 0 to {limit - 1}; the prompt has {min(ids)} to {max(ids)}")


def span_rows(chunks: Sequence[Chunk], lengths: Mapping[int, int]) -> list[tuple[int, int]]:
    """The spans that lie in these chunks, as (first, end) rows counted over all chunks.

    Args:
        lengths: tokens that each chunk's slot remembers.

    Raises:
        ConfigError: if a chunk cuts a span, or spans are empty, overlap or do not ascend.
    """
    found: list[tuple[int, int]] = []
    row = 0
    for chunk in chunks:
        position, last = lengths[chunk.slot], 0
        until = position + len(chunk.ids)
        for start, end in chunk.spans:
            if not last <= start < end:
                raise ConfigError(
                    f"spans={[tuple(span) for span in chunk.spans]} must be (start, end) with start < end, ascending "
                    "and disjoint"
                )
            last = end
            if end <= position or until <= start:
                continue
            if start < position or until < end:
                raise ConfigError(
                    f"the span of tokens {start} to {end} is cut by a chunk of those from {position} to {until}: it is "
                    "computed whole, for each of its tokens sees all others"
                )
            found.append((row + start - position, row + end - position))
        row += len(chunk.ids)
    return found


def image_rows(chunks: Sequence[Chunk], vision: Modality | None) -> list[int]:
    """The rows of the placeholders of the chunks that bring images, counted over all chunks.

    Raises:
        ConfigError: if there are images for a model that sees none, or of several resolutions, or if placeholders and
            patches do not match.
    """
    found: list[int] = []
    start = 0
    if len(shapes := {image.shape for chunk in chunks for image in chunk.images}) > 1:
        raise ConfigError(f"images of the shapes {sorted(shapes)} in one batch: a tower sees one resolution")
    for chunk in chunks:
        if len(chunk.images):
            if vision is None:
                raise ConfigError(f"{len(chunk.images)} images for a model without an image tower")
            rows = [start + i for i, token in enumerate(chunk.ids) if token == vision.placeholder]
            if len(rows) != len(chunk.images) * vision.tokens:
                raise ConfigError(
                    f"{len(chunk.images)} images of {vision.tokens} patches each, and {len(rows)} "
                    f"placeholders (id {vision.placeholder}) for them: must agree"
                )
            found += rows
        start += len(chunk.ids)
    return found
