"""A sequence: one request on its way, from its prompt to its result. It knows nothing of others.

    Sequence(request) ─ place(state, slot) ─┬─ chunk ─ run ─ accept ─┬─ finish: the last event, with the result
                              ▲             └────────────────────────┤
                              └──────── any time later ─────────── leave: set aside

What was drawn, the text, what stop strings hold back, and the drafts belong to the sequence; keys and values to the
state. So it can leave its slot at any time and go on in another one, of which it needs nothing but that it holds a
beginning of the same ids, or nothing: the rest is computed again.
"""

from __future__ import annotations

import time
from array import array
from collections import abc

import numpy as np

from gemkit.errors import ConfigError, ModelError, StateError
from gemkit.executors.interface import Chunk, SparseLogits, State
from gemkit.generate.request import Request, TextStream
from gemkit.generate.result import Event, FinishReason, Result, Timings, TokenLogprob
from gemkit.generate.sampler import logits_filter, sample, token_logprob
from gemkit.generate.speculate import Drafts
from gemkit.generate.stops import StopStrings


class NoText:
    """The text stream of a caller who wants ids alone."""

    def push(self, token: int, /) -> str:
        return ""

    def finish(self) -> str:
        return ""


class Sequence:
    """One request on its way: what has been drawn, where a state holds it, and whether it is over.

    Args:
        request: checked (`Request.check`). Its `slot` is not read: `place` says where the sequence is.
        index: names the sequence in its events.
        limit: tokens of prompt and answer at most; None for no limit.
        stream: makes the text; without one it is empty.
        most: tokens to draft at most in a step; 0 for no speculation.
    """

    def __init__(
        self,
        request: Request,
        *,
        index: int = 0,
        limit: int | None = None,
        stream: TextStream | None = None,
        most: int = 0,
    ):
        self.index, self.request, self.limit = index, request, limit
        self.sampling = request.sampling.seeded()
        self.ids = array("q", request.ids)  # prompt and answer, in the form that NumPy reads without a copy
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.drafts = Drafts(self.ids, most)
        self.state: State | None = None
        self.slot = -1
        self.prefilled = False  # since it was placed a row was computed for it: it decodes
        self.cached: int | None = None  # tokens that the first slot held
        self.started = time.perf_counter()
        self.first: float | None = None  # when the first and the last token came
        self.last = 0.0
        self.result: Result | None = None
        self.error: ModelError | None = None  # that ended it, with reason "error"
        self._stream, self._stops = stream or NoText(), StopStrings(request.stop_strings)

    def place(self, state: State, slot: int) -> None:
        """Go on in this slot, which holds a beginning of the sequence, or nothing.

        Raises:
            StateError: it holds as many tokens as the sequence has, or a part of a span.
        """
        held, name = state.lengths[slot], f"request {self.index}: slot {slot} holds {state.lengths[slot]} tokens"
        if held >= len(self.ids):
            raise StateError(
                f"{name} and the request has {len(self.ids)}; pass the whole sequence with at least one new token, or "
                "free the slot"
            )
        for start, end in self.request.spans:
            if start < held < end:
                raise StateError(
                    f"{name}, which cuts the span of tokens {start} to {end}: it is computed whole or not at all, so "
                    "free the slot"
                )
        self.state, self.slot, self.prefilled = state, slot, False
        self.cached = held if self.cached is None else self.cached

    def leave(self) -> int:
        """Give up the slot, which then holds a beginning of the sequence and no draft; its number."""
        self.rollback_rejected()
        slot, self.state, self.slot, self.prefilled = self.slot, None, -1, False
        return slot

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def computed(self) -> int:
        """Tokens that the slot holds."""
        return 0 if self.state is None else self.state.lengths[self.slot]

    @property
    def pending(self) -> int:
        """Tokens of the sequence that the slot does not hold."""
        return len(self.ids) - self.computed

    @property
    def drawn(self) -> int:
        return len(self.ids) - len(self.request.ids)

    @property
    def is_full(self) -> bool:
        return self.limit is not None and len(self.ids) >= self.limit

    @property
    def unit(self) -> int:
        """How many of the next tokens go in one chunk at least: a span, or 1."""
        position = self.computed
        return next((end - start for start, end in self.request.spans if start == position), 1)

    def fit(self, tokens: int) -> int:
        """How many of the next tokens make the longest chunk of at most `tokens` that cuts no span, or 0."""
        position = self.computed
        until = min(position + tokens, len(self.ids))
        for start, end in self.request.spans:
            if start < until < end:
                until = start
        return max(0, until - position)

    def chunk(self, tokens: int, most: int = 0) -> Chunk:
        """The next `tokens` of it, and behind the last token of an answer a draft of at most `most`.

        Raises:
            ConfigError: a count that a plan must not have; see `fit`.
        """
        if self.finished or self.state is None:
            why = "is over" if self.finished else "has no slot"
            raise ConfigError(f"request {self.index} {why} and cannot be in a plan")
        if tokens < 1 or self.fit(tokens) != tokens:
            raise ConfigError(
                f"the plan computes {tokens} tokens of request {self.index}, which waits for {self.pending}: 1 to that "
                "many can be, and no part of a span"
            )
        start, is_last = self.computed, tokens == self.pending
        part = self.ids[start : start + tokens].tolist()
        if not self.prefilled or self.pending > 1:
            most = 0
        if self.request.max_tokens is not None:  # what could not be drawn need not be computed
            most = min(most, self.request.max_tokens - self.drawn - 1)
        if self.limit is not None:
            most = min(most, self.limit - len(self.ids) - 1)
        draft = self.drafts.begin(self.state, self.slot, most)
        rows = int(is_last) + len(draft)
        some = logits_filter(self.sampling, self.ids) if rows and self.request.logprobs is None else None
        inside = [n for n, span in enumerate(self.request.spans) if start <= span[0] < start + tokens]
        spans = [self.request.spans[n] for n in inside]
        return Chunk(self.slot, part + draft, rows, spans, self._images(inside), some)

    def _images(self, inside: abc.Sequence[int]) -> abc.Sequence[np.ndarray]:
        """The images whose placeholders are in these spans."""
        images = self.request.images
        if len(self.request.spans) == 1:
            return images if inside else ()
        return [images[n] for n in inside] if len(images) else ()

    def accept(self, rows: abc.Sequence[np.ndarray | SparseLogits]) -> abc.Iterator[Event]:
        """Draw from each row for as long as the token that it was computed after is the one that was drawn.

        Logits that nothing can be drawn from end the sequence with reason "error", and it alone.
        """
        self.prefilled = self.prefilled or len(rows) > 0
        for row in rows:
            if self.finished:  # cancelled before this event, or between two
                return
            try:
                event = self._draw(row)
            except ModelError as error:
                self.error = error
                event = self.finish("error")
            yield event
            if self.finished or not self.drafts.confirm():
                return

    def rollback_rejected(self) -> None:
        """Let the state forget what was drafted and not drawn."""
        self.drafts.rollback_rejected()

    def cancel(self) -> Event | None:
        """End it here, with reason "cancelled"; None if it is over already."""
        return None if self.finished else self.finish("cancelled")

    def finish(
        self,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        logprob: TokenLogprob | None = None,
        *,
        stopped_by: int | None = None,
    ) -> Event:
        """The last event: `text` and what was held back until now, with the result."""
        rest = self._stops.push(self._stream.finish()) + self._stops.finish()
        self.text += rest
        self.rollback_rejected()
        if self._stops.matched is not None:  # also if the last, incomplete character made up a stop string
            reason = "stop"
        first = self.first
        self.result = Result(
            text=self.text,
            ids=tuple(self.ids[len(self.request.ids) :]),
            finish_reason=reason,
            stopped_by=self._stops.matched if self._stops.matched is not None else stopped_by,
            logprobs=None if self.request.logprobs is None else tuple(self.logprobs),
            computed_tokens=self.computed,
            seed=self.sampling.seed if self.sampling.temperature else None,
            timings=Timings(
                prompt_tokens=len(self.request.ids),
                cached_tokens=self.cached or 0,
                generated_tokens=self.drawn,
                first_token_seconds=None if first is None else first - self.started,
                decode_seconds=0.0 if first is None else self.last - first,
                drafted_tokens=self.drafts.drafted,
                accepted_tokens=self.drafts.accepted,
            ),
        )
        return Event(self.index, token, text + rest, logprob, self.result)

    def _draw(self, row: np.ndarray | SparseLogits) -> Event:
        """Draw the next token and see whether it ends the answer."""
        token = sample(row, self.sampling, self.ids)
        logprob = None
        if self.request.logprobs is not None:
            logprob = token_logprob(row, token, self.request.logprobs)
            self.logprobs.append(logprob)
        self.ids.append(token)
        self.last = time.perf_counter()
        self.first = self.last if self.first is None else self.first
        if token in self.request.stop_ids:
            return self.finish("stop", token, "", logprob, stopped_by=token)
        text = self._stops.push(self._stream.push(token))
        self.text += text
        if self._stops.matched is not None:
            return self.finish("stop", token, text, logprob)
        if self.drawn == self.request.max_tokens:
            return self.finish("length", token, text, logprob)
        if self.is_full:
            return self.finish("context", token, text, logprob)
        return Event(self.index, token, text, logprob)
