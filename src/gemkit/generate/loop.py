"""The plain generation loop: the definition that every faster engine must agree with, token for token.

Prompts are computed in chunks (a prefix that sees itself whole is never cut), then every unfinished sequence grows by
one token a step. All sequences of a step are one ragged batch, without padding, and none of them can tell what else was
in it: a request gives the same result alone, in any batch, with any chunk size, and from a state that holds a part of
it already.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemkit.errors import ConfigError, ContextError, StateError
from gemkit.executors.interface import Chunk, Executor, S, State
from gemkit.family.schema import DecoderConfig
from gemkit.generate.result import Event, FinishReason, Result, Score, Timings, TokenLogprob
from gemkit.generate.sampler import GREEDY, Sampling, check_ids, logits_filter, sample, token_logprob
from gemkit.generate.speculate import Drafts, SpeculationController, draft_limit, room_for
from gemkit.generate.stops import StopStrings


class TextStream(Protocol):
    """Turns ids to text as they come; holds back bytes that are not yet a whole character (`text.StreamDecoder`)."""

    def push(self, token: int, /) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True)
class Request:
    """One sequence to be continued.

    Args:
        ids: the whole sequence so far. If `slot` holds its beginning, only the rest is computed.
        sampling: how tokens are chosen.
        max_tokens: tokens to generate at most, from 1; None goes on to a stop or to the end of the context.
        stop_ids: tokens that end the answer; they are the last of the ids and never in the text.
        stop_strings: texts that end the answer, in the sense of `StopStrings`.
        logprobs: None for none; otherwise each token comes with its log-probability and this many alternatives.
        slot: the sequence's slot in the state that is passed to `generate`; None if none is passed.
        prefix: so many of `ids`, from the first on, see one another, as a member with images was trained; they are
            computed in one call. A slot that holds the beginning holds all of them, computed with the same `prefix`.
        images: preprocessed, (3, S, S) float32 each; their placeholders are within the prefix.
    """

    ids: Sequence[int]
    sampling: Sampling = GREEDY
    max_tokens: int | None = None
    stop_ids: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    logprobs: int | None = None
    slot: int | None = None
    prefix: int = 0
    images: Sequence[np.ndarray] = ()


def generate(
    executor: Executor[S],
    requests: Sequence[Request],
    *,
    text_stream: Callable[[], TextStream] | None = None,
    state: S | None = None,
    chunk: int = 512,
    beyond_context: bool = False,
    speculate: int | bool = False,
) -> Generator[Event, None, None]:
    """Continue all requests as one batch; events come as tokens are drawn, the last of each request with its `Result`.

    Prompt and answer together have at most `executor.decoder.max_context` tokens: a request that reaches that many
    ends with reason "context". A stop counts before `max_tokens`, and that before the context.

    Ctrl-C ends every unfinished request with reason "interrupted" and all that it has, then the iterator ends as
    usual. A `KeyboardInterrupt` that reached the caller between two events has the same effect when it is handed on
    with the iterator's `throw`.

    Args:
        text_stream: makes the decoder of one answer, such as `tokenizer.stream`; without it the texts
            are empty.
        state: what the executor remembers from before. A request's slot must hold the beginning of its ids and not
            the whole of them; a fresh slot holds nothing. Without a state the batch makes and drops its own.
        chunk: prompt tokens a call at most, over all requests. A longer prefix is a call of its own.
        beyond_context: do not stop at the context the model was trained on; every request then needs `max_tokens`.
        speculate: draft up to so many tokens from what was there before and verify them in one step, where that pays
            (`generate.speculate`); True leaves the number to us. The answers are the same. A state that is passed
            must have the room to take a draft back (`room_for`).

    Raises:
        ConfigError: a request or setting that cannot be.
        ContextError: a prompt longer than the context.
        StateError: a slot that does not exist, already holds as much as the request, or ends inside of its prefix; no
            room to speculate.
        ModelError: while iterating, logits that nothing can be drawn from.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1 token")
    for index, request in enumerate(requests):
        try:
            _check(request, executor.decoder, text_stream is not None, beyond_context)
        except (ConfigError, ContextError) as error:
            raise type(error)(f"request {index}: {error}" if len(requests) > 1 else str(error)) from None
    slots = _slots(requests, state)
    most, room = draft_limit(speculate), room_for(speculate)
    state = executor.new_state(max(1, len(requests)), room) if state is None else state
    if room and state.room < room:
        raise StateError(f"speculate={most} takes back up to {room} tokens: make the state with room={room} or more")
    limit = None if beyond_context else executor.decoder.max_context
    stream = text_stream or _NoText
    answers = [
        _Answer(i, request, slot, state, limit, stream(), most)
        for i, (request, slot) in enumerate(zip(requests, slots, strict=True))
    ]
    return _run(executor, state, answers, chunk, SpeculationController(most) if most else None)


def complete(executor: Executor[S], requests: Sequence[Request], **options) -> list[Result]:
    """`generate` to its end: the result of each request, in their order. Takes the same options."""
    results = {e.request: e.result for e in generate(executor, requests, **options) if e.result is not None}
    return [results[i] for i in range(len(requests))]


def score(
    executor: Executor[S],
    ids: Sequence[int],
    *,
    top: int = 0,
    chunk: int = 128,
    beyond_context: bool = False,
    prefix: int = 0,
    images: Sequence[np.ndarray] = (),
) -> Score:
    """Log-probability of each of `ids` after those before it.

    Logits are held for one chunk at a time: 128 rows of 262,144 are 134 MB.

    Args:
        top: how many of the most likely tokens to list at each position.
        prefix, images: as of a `Request`. Tokens of a prefix have seen one another, so that only those after it are
            predicted.

    Raises:
        ConfigError, ContextError: as for `generate`.
        ModelError: logits with NaN.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1 token")
    request = Request(ids, logprobs=top, max_tokens=1, prefix=prefix, images=images)
    _check(request, executor.decoder, False, beyond_context)
    state = executor.new_state(1)
    known = max(1, prefix)  # ids that nothing predicts
    entries: list[TokenLogprob | None] = [None] * known
    start, last = 0, len(ids) - 1 if known < len(ids) else 0  # the last id is predicted and need not be run
    while start < last:
        part = ids[start : min(start + max(chunk, prefix - start), last)]
        rows = start + len(part) - max(start, known - 1)
        logits_TV = executor.run([Chunk(0, part, rows, prefix, () if start else images)], state)
        start += len(part)
        for row, logits_V in enumerate(logits_TV, start - rows + 1):
            entries.append(token_logprob(logits_V, int(ids[row]), top))
    return Score(tuple(entries))


def _run(
    executor: Executor[S], state: S, answers: list[_Answer], chunk: int, pace: SpeculationController | None
) -> Generator[Event, None, None]:
    started = time.perf_counter()
    for answer in answers:
        answer.started = started
    try:
        for answer in answers:
            if answer.is_full:
                yield answer.finish("context")
        while live := [answer for answer in answers if not answer.finished]:
            most = pace.most if pace else 0
            parts = [(answer, answer.chunk(count, most)) for answer, count in _share(live, chunk)]
            run = pace.timed(executor.run) if pace and parts[0][0].first is not None else executor.run
            logits_RV, row = run([part for _, part in parts], state), 0
            for answer, part in parts:
                yield from answer.accept(logits_RV[row : row + part.rows])
                row += part.rows
            if pace:
                pace.learn(sum(answer.drafts.taken for answer, _ in parts))
    except KeyboardInterrupt:
        for answer in answers:
            if not answer.finished:
                yield answer.finish("interrupted")
    finally:
        for answer in answers:
            answer.drafts.settle()


def _share(live: list[_Answer], chunk: int) -> list[tuple[_Answer, int]]:
    """How many tokens of which sequence the next step computes: prompts come first, at most `chunk` tokens of them.

    A prefix is computed whole: if there is no room left for it, it waits for a step that it can begin, however long
    it is.
    """
    counts, left = [], chunk
    for answer in live:
        if answer.first is None and left > 0 and (answer.uncut <= left or not counts):
            counts.append((answer, max(answer.uncut, min(answer.pending, left))))
            left -= counts[-1][1]
    return counts or [(answer, answer.pending) for answer in live]


class _Answer:
    """One request on its way: what has been drawn, what of it the state holds, and whether it is over."""

    def __init__(
        self,
        index: int,
        request: Request,
        slot: int,
        state: State,
        limit: int | None,
        stream: TextStream,
        most: int,
    ):
        self.index, self.request, self.slot, self.state = index, request, slot, state
        self.sampling = request.sampling.seeded()
        self.ids = array("q", request.ids)  # prompt and answer, in the form that NumPy reads without a copy
        self.cached = self.in_state
        self.limit = limit
        self.stream, self.stops = stream, StopStrings(request.stop_strings)
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.started = 0.0
        self.first: float | None = None  # when the first and the last token came
        self.last = 0.0
        self.finished = False
        self.drafts = Drafts(self.ids, state, slot, most)
        if self.pending < 1:
            raise StateError(
                f"request {index}: slot {slot} holds {self.cached} tokens and the request has {len(self.ids)}; "
                "pass the whole sequence with at least one new token, or free the slot"
            )
        if 0 < self.cached < request.prefix:
            raise StateError(
                f"request {index}: slot {slot} holds {self.cached} tokens of a prefix of {request.prefix}, which is "
                "computed whole or not at all: free the slot"
            )

    @property
    def drawn(self) -> int:
        return len(self.ids) - len(self.request.ids)

    @property
    def in_state(self) -> int:
        return self.state.lengths[self.slot]

    @property
    def pending(self) -> int:
        return len(self.ids) - self.in_state

    @property
    def uncut(self) -> int:
        """How many of the next tokens go in one call."""
        return 1 if self.in_state else max(1, self.request.prefix)

    @property
    def is_full(self) -> bool:
        return self.limit is not None and len(self.ids) >= self.limit

    def chunk(self, count: int, most: int) -> Chunk:
        """The next `count` tokens, and behind the last of an answer a draft of at most `most`."""
        part = self.ids[self.in_state : self.in_state + count].tolist()
        if self.first is None or self.pending > 1:
            most = 0
        if self.request.max_tokens is not None:  # what could not be drawn need not be computed
            most = min(most, self.request.max_tokens - self.drawn - 1)
        if self.limit is not None:
            most = min(most, self.limit - len(self.ids) - 1)
        draft = self.drafts.begin(most)
        rows = int(count == self.pending) + len(draft)
        images = () if self.in_state else self.request.images
        some = logits_filter(self.sampling, self.ids) if rows and self.request.logprobs is None else None
        return Chunk(self.slot, part + draft, rows, self.request.prefix, images, some)

    def accept(self, logits_RV: np.ndarray) -> Iterator[Event]:
        """Draw from each row for as long as the token that it was computed after is the one that was drawn."""
        for logits_V in logits_RV:
            yield self.draw(logits_V)
            if self.finished or not self.drafts.confirm():
                break
        self.drafts.settle()

    def draw(self, logits_V: np.ndarray) -> Event:
        """Draw the next token and see whether it ends the answer."""
        token = sample(logits_V, self.sampling, self.ids)
        logprob = None
        if self.request.logprobs is not None:
            logprob = token_logprob(logits_V, token, self.request.logprobs)
            self.logprobs.append(logprob)
        self.ids.append(token)
        self.last = time.perf_counter()
        self.first = self.last if self.first is None else self.first
        if token in self.request.stop_ids:
            return self.finish("stop", token, "", logprob, stopped_by=token)
        text = self.stops.push(self.stream.push(token))
        self.text += text
        if self.stops.matched is not None:
            return self.finish("stop", token, text, logprob)
        if self.drawn == self.request.max_tokens:
            return self.finish("length", token, text, logprob)
        if self.is_full:
            return self.finish("context", token, text, logprob)
        return Event(self.index, token, text, logprob)

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
        rest = self.stops.push(self.stream.finish()) + self.stops.finish()
        self.text += rest
        self.finished = True
        self.drafts.settle()
        if self.stops.matched is not None:  # also if the last, incomplete character made up a stop string
            reason = "stop"
        first = self.first
        result = Result(
            text=self.text,
            ids=tuple(self.ids[len(self.request.ids) :]),
            finish_reason=reason,
            stopped_by=self.stops.matched if self.stops.matched is not None else stopped_by,
            logprobs=None if self.request.logprobs is None else tuple(self.logprobs),
            in_state=self.in_state,
            seed=self.sampling.seed if self.sampling.temperature else None,
            timings=Timings(
                prompt_tokens=len(self.request.ids),
                cached_tokens=self.cached,
                generated_tokens=self.drawn,
                first_token_seconds=None if first is None else first - self.started,
                decode_seconds=0.0 if first is None else self.last - first,
                drafted_tokens=self.drafts.drafted,
                accepted_tokens=self.drafts.accepted,
            ),
        )
        return Event(self.index, token, text + rest, logprob, result)


class _NoText:
    """The text stream of a caller who wants ids alone."""

    def push(self, token: int, /) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _check(request: Request, decoder: DecoderConfig, has_text: bool, beyond_context: bool) -> None:
    vocab, most = decoder.vocab_size, decoder.max_context
    if not len(request.ids):
        raise ConfigError("ids is empty: a prompt has at least one token, usually <bos>")
    check_ids("ids", request.ids, vocab)
    check_ids("stop_ids", request.stop_ids, vocab)
    check_ids("logit_bias", request.sampling.logit_bias, vocab)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise ConfigError(f"max_tokens={request.max_tokens} must be at least 1; to rate a text as it is, use score")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocab:
        raise ConfigError(f"logprobs={request.logprobs} must be between 0 and the {vocab} tokens of the vocabulary")
    if not 0 <= request.prefix <= len(request.ids):
        raise ConfigError(f"prefix={request.prefix} must be between 0 and the {len(request.ids)} ids of the prompt")
    if len(request.images) and not request.prefix:
        raise ConfigError(f"{len(request.images)} images without a prefix, which they are part of")
    if request.stop_strings and not has_text:
        raise ConfigError("stop_strings need a text_stream to be found in")
    if beyond_context and request.max_tokens is None:
        raise ConfigError("beyond_context lifts the limit of the context, so max_tokens must be set")
    if len(request.ids) > most and not beyond_context:
        raise ContextError(
            f"the prompt has {len(request.ids)} tokens and the model was trained on {most}; "
            "shorten it, or see with beyond_context=True (--beyond-context) what it does there"
        )


def _slots(requests: Sequence[Request], state: State | None) -> list[int]:
    """The slot of each request: the named ones of a state that was passed, or 0, 1, 2, ... of a new one."""
    if state is None:
        for index, request in enumerate(requests):
            if request.slot is not None:
                raise ConfigError(f"request {index}: slot={request.slot} names a slot, but no state is passed")
        return list(range(len(requests)))
    slots: list[int] = []
    for index, request in enumerate(requests):
        if request.slot is None:
            raise ConfigError(f"request {index}: a state is passed, so slot must name one of its {len(state.lengths)}")
        if not 0 <= request.slot < len(state.lengths):
            raise StateError(
                f"request {index}: slot={request.slot}, but the state has slots 0 to {len(state.lengths) - 1}"
            )
        if request.slot in slots:
            raise StateError(f"request {index}: slot={request.slot} is taken by request {slots.index(request.slot)}")
        slots.append(request.slot)
    return slots
