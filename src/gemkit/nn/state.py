"""What a model remembers of sequences between calls: explicit, handed in and out, never kept on a module.

    state = model.new_state(slots=2)
    logits = model(Batch.of([prompt_a, prompt_b]), state)
    mark = state.mark(0)
    logits = model(Batch.of([draft], offsets=state.lengths[:1], slots=[0]), state)
    state.rollback(0, mark)                      # as if the draft had never been

A state has `slots`, one a sequence, and one entry a layer by the layer's kind. Callers know nothing of how the entries
store what they store. Keys are remembered after rotation, with absolute positions, so nothing is ever rotated again.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gemkit import family
from gemkit.errors import ModelError, StateError


@dataclass
class _Span:
    """Keys and values of consecutive positions of one sequence, in buffers with room to grow at the end."""

    k_CKH: Tensor
    v_CKH: Tensor
    first: int  # position of row 0
    count: int  # rows in use

    @property
    def end(self) -> int:
        return self.first + self.count


class KeysValues:
    """What one attention layer remembers: every position, or those that the window of a coming token can reach.

    A sliding layer keeps `window - 1 + room` positions when its buffer is compacted, where `room` is how many tokens
    may be taken back. Compaction copies that many rows once every `window` tokens or so, and in between a read is a
    view: the rows are always in the order of their positions.
    """

    def __init__(self, slots: int, window: int | None, room: int):
        self._window = window
        self._room = room
        self._spans: list[_Span | None] = [None] * slots

    def append(self, slot: int, position: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Remember the tokens from `position` on; whatever was there from `position` on is forgotten."""
        if k_TKH.requires_grad or v_TKH.requires_grad:
            raise StateError(
                "a State was handed to a forward pass that records gradients: train without a State, "
                "or run under torch.inference_mode()"
            )
        span = self._spans[slot]
        if span is None:
            span = _Span(k_TKH[:0], v_TKH[:0], position, 0)
        self._cut(span, position)
        new = k_TKH.shape[0]
        if span.count + new > span.k_CKH.shape[0]:
            span = self._grown(span, new)
        self._spans[slot] = span
        span.k_CKH[span.count : span.count + new] = k_TKH
        span.v_CKH[span.count : span.count + new] = v_TKH
        span.count += new

    def read(self, slot: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values (S, K, H), and the position of the first of them."""
        span = self._spans[slot]
        assert span is not None, "read before append"
        return span.k_CKH[: span.count], span.v_CKH[: span.count], span.first

    def check(self, slot: int, length: int) -> None:
        """Refuse to go back to `length` tokens if what their next token must see was dropped."""
        span = self._spans[slot]
        if span is not None and length < span.end:
            self._cut(_Span(span.k_CKH, span.v_CKH, span.first, span.count), length)

    def rollback(self, slot: int, length: int) -> None:
        span = self._spans[slot]
        if span is not None and length < span.end:
            self._cut(span, length)

    def fork(self, source: int, target: int) -> None:
        span = self._spans[source]
        self._spans[target] = span and _Span(span.k_CKH.clone(), span.v_CKH.clone(), span.first, span.count)

    def free(self, slot: int) -> None:
        self._spans[slot] = None

    @property
    def nbytes(self) -> int:
        return sum(s.k_CKH.nbytes + s.v_CKH.nbytes for s in self._spans if s is not None)

    def _needed(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _cut(self, span: _Span, position: int) -> None:
        if span.first > self._needed(position):
            raise StateError(
                f"cannot go back to position {position}: a layer with a window of {self._window} has dropped "
                f"positions before {span.first}; make the state with room={span.end - position} or more"
            )
        assert position <= span.end, "a gap in a sequence"
        span.count = position - span.first

    def _grown(self, span: _Span, new: int) -> _Span:
        """A copy of what must be kept, in a buffer with room for `new` rows and a while beyond."""
        drop = 0
        if self._window is not None:
            drop = max(0, span.count - (self._window - 1 + self._room))
        kept = span.count - drop
        # twice the window, or half as much again, makes the cost of copying a constant per token
        capacity = kept + max(new, self._window or max(256, kept // 2))
        buffers = []
        for old in (span.k_CKH, span.v_CKH):
            buffer = old.new_empty((capacity, *old.shape[1:]))
            buffer[:kept] = old[drop : span.count]
            buffers.append(buffer)
        return _Span(buffers[0], buffers[1], span.first + drop, kept)


@dataclass(frozen=True)
class Mark:
    """A place to come back to."""

    slot: int
    length: int


class State:
    """The memory of a decoder for `slots` sequences.

    Args:
        decoder: the architecture; a state serves this one only.
        slots: sequences it can hold.
        room: how many tokens a `rollback` may take back at most; sliding layers keep that many more positions.
    """

    def __init__(self, decoder: family.Decoder, slots: int, room: int = 0):
        if slots < 1 or room < 0:
            raise StateError(f"slots={slots} must be at least 1, and room={room} at least 0")
        self.decoder = decoder
        self.lengths = [0] * slots  # tokens remembered in each slot: layers may hold fewer
        self.layers = [_entry(layer, slots, room) for layer in decoder.layers]

    def mark(self, slot: int) -> Mark:
        """A place in `slot` that `rollback` returns to."""
        return Mark(self._checked(slot), self.lengths[slot])

    def rollback(self, mark: Mark) -> None:
        """Forget everything since `mark`.

        Raises:
            StateError: if the slot has been shorter since, or a sliding layer had no `room` to keep what is needed.
                Nothing has changed then.
        """
        if mark.length > self.lengths[self._checked(mark.slot)]:
            raise StateError(f"slot {mark.slot} holds {self.lengths[mark.slot]} tokens, the mark is at {mark.length}")
        for entry in self.layers:
            entry.check(mark.slot, mark.length)
        for entry in self.layers:
            entry.rollback(mark.slot, mark.length)
        self.lengths[mark.slot] = mark.length

    def fork(self, source: int, target: int) -> None:
        """Make `target` remember what `source` does; the two go their own ways from here."""
        self._checked(source)
        self._checked(target)
        for entry in self.layers:
            entry.fork(source, target)
        self.lengths[target] = self.lengths[source]

    def free(self, slot: int) -> None:
        """Forget a sequence; the slot is as new."""
        self._checked(slot)
        for entry in self.layers:
            entry.free(slot)
        self.lengths[slot] = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, the buffers' spare room included."""
        return sum(entry.nbytes for entry in self.layers)

    def expect(self, decoder: family.Decoder, spans: list[tuple[int, int, int, int]]) -> None:
        """Check that new tokens continue what is remembered, before any layer is touched."""
        if decoder != self.decoder:
            raise StateError("this state was made for another model: make one with model.new_state()")
        for _, _, slot, position in spans:
            if position != self.lengths[self._checked(slot)]:
                raise StateError(
                    f"slot {slot} remembers {self.lengths[slot]} tokens but the batch continues at position {position}"
                )

    def advance(self, spans: list[tuple[int, int, int, int]]) -> None:
        """All layers have appended these tokens: they count from now on. An interrupted forward pass never gets here,
        and the next one writes over what it left."""
        for first, end, slot, _ in spans:
            self.lengths[slot] += end - first

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < len(self.lengths):
            raise StateError(f"slot {slot} of a state with slots 0 to {len(self.lengths) - 1}")
        return slot


def _entry(layer: family.Layer, slots: int, room: int) -> KeysValues:
    match layer:
        case family.Global():
            return KeysValues(slots, None, room)
        case family.Sliding(window=window):
            return KeysValues(slots, window, room)
        case _:
            raise ModelError(f"no state is defined for a layer of kind {type(layer).__name__}")
