"""The contract between those who ask for tokens and those who compute a model. No torch.

An `Executor` takes `Chunk`s, the next tokens of some sequences, and gives `Outputs`, one row for each token that was
asked about. What it remembers between calls is a `State`: slots, one a sequence, and immutable `Snapshot`s of them.

A call computes all of its chunks or nothing. Calls of one executor take turns: `run` may be called from any thread, and
`stop` of a call ends that call alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from gemkit.errors import ConfigError, TextError
from gemkit.family import DecoderConfig, Vision


@dataclass(frozen=True, eq=False)
class LogitsFilter:
    """Which logits of a row the sampler can keep. Those are exact; of the others only the ids that are left out of
    consideration is promised, or, in a full row, any value that is not larger, such as -inf."""

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
        prefix: this many of the sequence's tokens, from its first on, see one another; no chunk cuts them.
        images: (3, S, S) float32 in -1 to 1 each, whose placeholders are among `ids`.
        filter: what will be looked at of each row of logits; None: all of it.
    """

    slot: int
    ids: Sequence[int]
    rows: int = 1
    prefix: int = 0
    images: Sequence[np.ndarray] = ()
    filter: LogitsFilter | None = None


class State(Protocol):
    """What a model remembers of several sequences. The loop reads nothing of it but how much that is."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens remembered, for each slot."""
        ...

    @property
    def room(self) -> int:
        """How many tokens can be taken back."""
        ...

    def mark(self, slot: int) -> Any: ...

    def rollback(self, mark: Any, keep: int = 0) -> None:
        """Forget all tokens since the mark but the first `keep`, or those as well; `lengths` then say so."""
        ...


S = TypeVar("S", bound=State)


class Executor(Protocol[S]):
    """Whatever computes a member: torch modules, native kernels, a stand-in in a test."""

    @property
    def decoder(self) -> DecoderConfig: ...

    def new_state(self, slots: int, room: int = 0) -> S:
        """An empty memory for this many sequences, of which `room` tokens can be taken back."""
        ...

    def run(self, chunks: Sequence[Chunk], state: S) -> np.ndarray:
        """Append each chunk to its slot; logits (sum of rows, vocab_size) float32, in the order of the chunks.

        All or nothing: if it raises, by Ctrl-C too, `lengths` are as before and every slot can go on from there.
        """
        ...


def check_ids(ids: Sequence[int], decoder: DecoderConfig) -> None:
    """Raises: TextError, if a token id is outside the vocabulary."""
    limit = decoder.vocab_size
    if not 0 <= min(ids) <= max(ids) < limit:
        raise TextError(f"token ids run from 0 to {limit - 1}; the prompt has {min(ids)} to {max(ids)}")


def check_prefix(chunk: Chunk, position: int) -> None:
    """Raises: ConfigError, if a chunk at this position cuts its prefix."""
    end = position + len(chunk.ids)
    if position < chunk.prefix and (position or end < chunk.prefix):
        raise ConfigError(
            f"a prefix of {chunk.prefix} tokens is cut by a chunk of those from {position} to {end}: it is computed "
            "whole, for each of its tokens sees all others"
        )


def image_rows(chunks: Sequence[Chunk], vision: Vision | None) -> list[int]:
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
            rows = [start + i for i, token in enumerate(chunk.ids) if token == vision.image_token]
            if len(rows) != len(chunk.images) * vision.num_patches:
                raise ConfigError(
                    f"{len(chunk.images)} images of {vision.num_patches} patches each, and {len(rows)} "
                    f"placeholders (id {vision.image_token}) for them: must agree"
                )
            found += rows
        start += len(chunk.ids)
    return found
