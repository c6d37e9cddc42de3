"""Stand-ins for a model and a tokenizer: small enough to reason about, strict about how they are called."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemkit.errors import Stopped
from gemkit.executors.interface import Chunk, LogitsFilter, Output, Outputs, SparseLogits, StopFlag, span_rows
from gemkit.family import DecoderConfig, Global, Mlp, repeat

BOS, END = 0, 1
# A vocabulary whose pieces overlap, with a character that takes two tokens (bytes c3 a9 are "é").
PIECES = [b"", b"", b"a", b"b", b"c", b"ab", b"bc", b"abc", b" ", b"\xc3", b"\xa9", b"ca"]


def tiny_decoder(max_context: int = 64, vocab_size: int = len(PIECES)) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        width=4,
        layers=repeat(Global(heads=1, kv_heads=1, head_dim=4, scale=0.5), ffw=Mlp(4), total=1),
        max_context=max_context,
    )


@dataclass(frozen=True)
class FakeSnapshot:
    history: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.history)

    def save(self, path: Any) -> Path:
        raise NotImplementedError


class FakeState:
    """Whole histories of live slots; one byte a token. With `recurrent` a slot keeps none of the tokens since a
    snapshot."""

    def __init__(self, slots: int = 0, recurrent: bool = False):
        self.histories: dict[int, list[int]] = {}
        self.recurrent = recurrent
        self.snapshots = 0  # that were taken
        for _ in range(slots):
            self.add()

    @property
    def lengths(self) -> dict[int, int]:
        return {slot: len(history) for slot, history in self.histories.items()}

    @property
    def nbytes(self) -> int:
        return sum(self.lengths.values())

    def add(self) -> int:
        slot = next(n for n in range(len(self.histories) + 1) if n not in self.histories)
        self.histories[slot] = []
        return slot

    def free(self, slot: int) -> None:
        del self.histories[slot]

    def unique(self, held: Any, /) -> int:
        return held.length if isinstance(held, FakeSnapshot) else len(self.histories[held])

    def needed(self, slot: int, tokens: int) -> int:
        return tokens

    def snapshot(self, slot: int) -> FakeSnapshot:
        self.snapshots += 1
        return FakeSnapshot(tuple(self.histories[slot]))

    def restore(self, snapshot: FakeSnapshot, slot: int | None = None, *, keep: int = 0) -> int:
        kept: list[int] = []
        if slot is None:
            assert not keep
            slot = self.add()
        elif keep:
            now, before = self.histories[slot], list(snapshot.history)
            assert now[: len(before)] == before, "the snapshot was taken of another sequence"
            assert len(now) >= len(before) + keep
            kept = [] if self.recurrent else now[len(before) : len(before) + keep]
        assert slot in self.histories
        self.histories[slot] = [*snapshot.history, *kept]
        return slot

    def load(self, path: Any) -> FakeSnapshot:
        raise NotImplementedError


class HashModel:
    """Its logits are a hash of all ids of the sequence: anything that leaks, is lost or comes twice changes them.

    With `sparse` it leaves of a row what the chunk's filter promises, and not one logit more.
    """

    def __init__(self, max_context: int = 64, recurrent: bool = False, sparse: bool = False):
        self.decoder = tiny_decoder(max_context)
        self.recurrent, self.sparse = recurrent, sparse
        self.calls: list[list[Chunk]] = []
        self.states: list[FakeState] = []
        self.longest = 0

    def new_state(self, slots: int = 0) -> FakeState:
        self.states.append(FakeState(slots, self.recurrent))
        return self.states[-1]

    def logits(self, history: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng(history)
        return 3 * rng.standard_normal(self.decoder.vocab_size, dtype=np.float32)

    def run(
        self, chunks: Sequence[Chunk], state: FakeState, *, output: Output = "logits", stop: StopFlag | None = None
    ) -> Outputs:
        assert output == "logits"
        assert chunks
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        if stop is not None and stop.is_set():
            raise Stopped("stopped by its flag")
        self.calls.append(list(chunks))
        rows: list[np.ndarray | SparseLogits] = []
        for chunk in chunks:
            assert chunk.ids
            assert 0 <= chunk.rows <= len(chunk.ids)
            history = state.histories[chunk.slot]
            spans = span_rows([chunk], state.lengths)  # none is cut
            assert len(spans) == len(chunk.spans), "spans of other chunks"
            assert not chunk.images or spans, "images are shown with their placeholders"
            for at, i in enumerate(chunk.ids):
                history.append(i)
                if at >= len(chunk.ids) - chunk.rows:
                    logits = self.logits(history)
                    rows.append(filtered(logits, chunk.filter) if self.sparse and chunk.filter else logits)
            self.longest = max(self.longest, len(history))
        return Outputs(rows, np.full(len(rows), self.decoder.vocab_size))


def ranks(values: np.ndarray) -> list[int]:
    """All ids, best first: by value, and of equal values by id."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def filtered(logits: np.ndarray, some: LogitsFilter) -> SparseLogits:
    """By definition: what a filter promises, and not one logit more."""
    always = set(some.always.tolist())
    others = [i for i in ranks(logits) if i not in always]
    near = [i for i in others if some.max_gap is not None and logits[others[0]] - logits[i] <= some.max_gap]
    ids = np.array(sorted({*others[: some.top_n], *near, *always}), np.int64)
    return SparseLogits(ids, logits[ids])


class Script(HashModel):
    """Says the given ids one after the other, whatever is asked; the prompt must have `prompt` tokens."""

    def __init__(self, says: Sequence[int], prompt: int = 1, max_context: int = 64):
        super().__init__(max_context)
        self.says, self.prompt = list(says), prompt

    def logits(self, history: Sequence[int]) -> np.ndarray:
        logits = np.zeros(self.decoder.vocab_size, np.float32)
        step = len(history) - self.prompt
        logits[self.says[step] if 0 <= step < len(self.says) else 2] = 9
        return logits


class ByteStream:
    """Text of ids as they come, complete characters only."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, /) -> str:
        return self._utf8.decode(PIECES[token])

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def text_of(ids: Sequence[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")
