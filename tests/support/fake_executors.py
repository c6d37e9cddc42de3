"""Stand-ins for a model and a tokenizer: small enough to reason about, strict about how they are called."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np

from gemkit.executors.interface import Chunk, LogitsFilter, Outputs, SparseLogits, span_rows
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


class FakeState:
    """Whole histories; with `recurrent` it can go back to a mark only, and never by more than `room` tokens."""

    def __init__(self, slots: int, room: int = 0, recurrent: bool = False):
        assert slots >= 1
        self.histories: list[list[int]] = [[] for _ in range(slots)]
        self.room, self.recurrent = room, recurrent

    @property
    def lengths(self) -> list[int]:
        return [len(history) for history in self.histories]

    def mark(self, slot: int) -> tuple[int, int]:
        return slot, len(self.histories[slot])

    def rollback(self, mark: tuple[int, int], keep: int = 0) -> None:
        slot, length = mark
        length += 0 if self.recurrent else keep
        assert 0 <= len(self.histories[slot]) - length <= self.room
        del self.histories[slot][length:]


class HashModel:
    """Its logits are a hash of all ids of the sequence: anything that leaks, is lost or comes twice changes them."""

    def __init__(self, max_context: int = 64, recurrent: bool = False):
        self.decoder = tiny_decoder(max_context)
        self.recurrent = recurrent
        self.calls: list[list[Chunk]] = []
        self.longest = 0

    def new_state(self, slots: int, room: int = 0) -> FakeState:
        return FakeState(slots, room, self.recurrent)

    def logits(self, history: Sequence[int]) -> np.ndarray:
        rng = np.random.default_rng(history)
        return 3 * rng.standard_normal(self.decoder.vocab_size, dtype=np.float32)

    def run(self, chunks: Sequence[Chunk], state: FakeState) -> Outputs:
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        self.calls.append(list(chunks))
        rows = []
        for chunk in chunks:
            assert chunk.ids
            assert 0 <= chunk.rows <= len(chunk.ids)
            held = len(state.histories[chunk.slot])
            span_rows([chunk], dict(enumerate(state.lengths)))  # none is cut
            assert not (held and len(chunk.images))  # shown once
            for at, i in enumerate(chunk.ids):
                state.histories[chunk.slot].append(i)
                if at >= len(chunk.ids) - chunk.rows:
                    rows.append(self.logits(state.histories[chunk.slot]))
            self.longest = max(self.longest, len(state.histories[chunk.slot]))
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
