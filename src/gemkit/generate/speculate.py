"""Speculation by prompt lookup decoding: what followed the last few tokens the time before is a guess at what follows.

    ... the cat sat on the mat. Then the cat ┐ the last three ids were there before:
        ─────────── sat on the mat           ┘ draft "sat on the mat"

The model computes a draft behind the last token in one step, which reads its weights once for all of it, and the loop
draws at each position as it always does. As long as it draws what was drafted, the next row of logits is already there;
from the first other token on, the state forgets. So a draft changes what is computed when, and nothing else: a draw is
a function of its logits, seed and position, and the tokens are those of the plain loop, under sampling too. (To the bit
if the executor's logits do not depend on how many tokens a step has; else up to near-ties, as with any batch.)

Texts that repeat their prompt (edits, quotes, summaries, code) gain; others lose what verifying costs.
`SpeculationController` measures both on the way and stops where it loses.

Source: prompt lookup decoding (Saxena, github.com/apoorvumang/prompt-lookup-decoding, 2023), a form of speculative
decoding (Leviathan et al., arXiv:2211.17192) whose drafts come from the text itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from gemkit.errors import ConfigError
from gemkit.executors.interface import Chunk, Outputs, Snapshot, State

DRAFT = 8  # tokens at most, where the caller says no number
_CONTEXTS = 3, 2  # this many last ids must have been there before; the longest match is tried first
_FIRST_DRAFT = 4


def draft_limit(speculate: int | bool) -> int:
    """Tokens to draft at most, from what a caller may say: True is a good number, False and 0 are none.

    Raises:
        ConfigError: if it is neither a bool nor a whole number from 0.
    """
    if not isinstance(speculate, int) or speculate < 0:
        raise ConfigError(f"speculate={speculate!r} must be True, or how many tokens to draft at most; 0 is off")
    return DRAFT if speculate is True else int(speculate)


class Lookup:
    """An index of n-grams: what followed the last few ids of a sequence the time before.

    Args:
        ids: the sequence; its owner appends to it.
    """

    def __init__(self, ids: Sequence[int]):
        self._ids = ids
        self._follows: dict[tuple[int, ...], int] = {}  # where the token after the last occurrence of these ids is
        self._known = 0  # every group of ids that ends up to this place is in there

    def draft(self, most: int) -> list[int]:
        """`most` ids that may come next; none if the end of the sequence does not occur earlier."""
        ids = self._ids
        for end in range(self._known + 1, len(ids)):
            for size in _CONTEXTS:
                if end >= size:
                    self._follows[tuple(ids[end - size : end])] = end
        self._known = len(ids) - 1
        for size in _CONTEXTS:
            start = self._follows.get(tuple(ids[-size:]))
            if start is not None:
                period = len(ids) - start  # a draft that reaches the end goes on with itself
                return [ids[start + i % period] for i in range(most)]
        return []


class Drafts:
    """The drafts of one sequence: made, compared with what is drawn, and taken from the state again.

    A draft is longer after one that was right to its end, and as short as the right part of the last one otherwise.

    Args:
        ids: the sequence; its owner appends to it.
        most: tokens to draft at most.
    """

    def __init__(self, ids: Sequence[int], most: int):
        self._ids = ids
        self._lookup = Lookup(ids)
        self._most, self._size = most, min(most, _FIRST_DRAFT)
        self._draft: list[int] = []
        self._before: tuple[State, int, Snapshot] | None = None  # the slot, and what it held before the draft
        self.taken = 0  # how many of the draft were drawn
        self.drafted, self.accepted = 0, 0  # of all drafts

    def begin(self, state: State, slot: int, most: int) -> list[int]:
        """A draft for the step to come, of at most this many tokens."""
        self.taken = 0
        self._draft = self._lookup.draft(min(most, self._size)) if most > 0 and self._most else []
        if self._draft:
            self.drafted += len(self._draft)
            self._before = state, slot, state.snapshot(slot)
        return self._draft

    def confirm(self) -> bool:
        """Whether the last id, just drawn, is the next of the draft, so that the next row of logits follows it."""
        if self.taken == len(self._draft) or self._ids[-1] != self._draft[self.taken]:
            return False
        self.taken += 1
        self.accepted += 1
        return True

    def rollback_rejected(self) -> None:
        """Let the state forget what was drafted and not drawn. The token that was drawn last counts as not run yet."""
        if self._before is None:
            return
        state, slot, before = self._before
        if state.lengths[slot] >= len(self._ids):
            state.restore(before, slot, keep=len(self._ids) - 1 - before.length)
        self._size = min(2 * self._size, self._most) if self.taken == len(self._draft) else max(1, self.taken)
        self._before = None


class SpeculationController:
    """Whether drafts pay, from the seconds that steps take: those with drafts against those without.

    A drafted token that was drawn is worth its sequence's share of a plain step; what a step with drafts takes longer
    is the price. Past gains fade, and when a plain step's worth is lost, drafting pauses, each time twice as long as
    the time before. So a text without repetition loses little: a step or so in every pause.
    """

    def __init__(self, most: int):
        self._most = most
        self._plain: deque[float] = deque(maxlen=5)  # seconds of the last steps without drafts
        self._sequences = 0  # that were in them
        self._step: tuple[float, int] | None = None  # seconds and tokens of the one on its way
        self._balance = 0.0  # seconds gained and lost lately
        self._wait, self._pause = 0, _PAUSE  # plain steps until the next try, and the length of the next pause

    @property
    def most(self) -> int:
        """How many tokens each sequence may draft in the next step."""
        return self._most if len(self._plain) >= _ENOUGH and not self._wait else 0

    def timed(self, run: Callable[..., Outputs]) -> Callable[..., Outputs]:
        """`Executor.run` of a step that decodes, with an eye on the clock."""

        def timed(chunks: Sequence[Chunk], state: State, **options: Any) -> Outputs:
            if len(chunks) != self._sequences:
                self._sequences = len(chunks)
                self._plain.clear()
            start = time.perf_counter()
            outputs = run(chunks, state, **options)
            self._step = time.perf_counter() - start, sum(len(chunk.ids) for chunk in chunks)
            return outputs

        return timed

    def learn(self, accepted: int) -> None:
        """The step is over, and `accepted` drafted tokens were drawn."""
        if self._step is None:  # a part of a prompt
            return
        (seconds, tokens), self._step = self._step, None
        if tokens == self._sequences:
            self._plain.append(seconds)
            self._wait = max(0, self._wait - 1)
        elif self._plain:  # drafts, or what a recurrent member computes again after one
            plain = median(self._plain)
            self._balance = _FADE * self._balance + plain * accepted / self._sequences - (seconds - plain)
            if self._balance > 0:
                self._pause = _PAUSE
            elif self._balance < (-plain if self._pause == _PAUSE else 0):  # a second chance must pay at once
                self._balance, self._wait, self._pause = 0.0, self._pause, min(2 * self._pause, _LONGEST_PAUSE)


_ENOUGH = 3  # plain steps to know what one takes
_FADE = 0.8
_PAUSE, _LONGEST_PAUSE = 16, 256
