"""The plain generation loop: the definition that every faster engine must agree with, token for token.

`step` advances any set of sequences by one call of an executor. All sequences of a step are one ragged batch, without
padding, and none of them can tell what else was in it: a request gives the same result alone, in any batch, under any
policy, and from a state that holds a part of it already. `generate` steps until all of its requests are finished.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

import numpy as np

from gemkit.errors import ConfigError, ContextError, StateError, Stopped
from gemkit.executors.interface import Chunk, Executor, State, StopFlag
from gemkit.generate.policy import Plan, Policy, PromptsFirst
from gemkit.generate.request import Request, TextStream
from gemkit.generate.result import Event, Result, Score, TokenLogprob
from gemkit.generate.sampler import token_logprob
from gemkit.generate.sequence import Sequence
from gemkit.generate.speculate import SpeculationController, draft_limit


def step(
    executor: Executor,
    state: State,
    plan: Plan,
    *,
    speculation: SpeculationController | None = None,
    stop: StopFlag | None = None,
) -> Generator[Event, None, None]:
    """Advance the sequences of a plan by one call, all of whose slots are in `state`; events come as tokens are drawn.

    If the call raises, or the iterator is dropped on its way, every sequence can go on from where it is. A sequence
    that nothing can be drawn for ends with reason "error" and its `error`; the others do not notice.

    Args:
        plan: unfinished sequences, each with a count of its next tokens that `Sequence.fit` allows.
        speculation: says how many tokens each sequence may draft where all of the plan decode, and learns from it.
        stop: ends the call when it is set.

    Raises:
        ConfigError: a plan that cannot be.
        Stopped: `stop` was set.
    """
    decoding = speculation if all(sequence.prefilled for sequence, _ in plan) else None
    most = decoding.most if decoding else 0
    try:
        chunks = [sequence.chunk(tokens, most) for sequence, tokens in plan]
        run = decoding.timed(executor.run) if decoding else executor.run
        rows, at = run(chunks, state, stop=stop).rows, 0
        for (sequence, _), chunk in zip(plan, chunks, strict=True):
            yield from sequence.accept(rows[at : at + chunk.rows])
            at += chunk.rows
    finally:
        for sequence, _ in plan:
            sequence.rollback_rejected()
    if decoding:
        decoding.learn(sum(sequence.drafts.taken for sequence, _ in plan))


def generate(
    executor: Executor,
    requests: abc.Sequence[Request],
    *,
    text_stream: Callable[[], TextStream] | None = None,
    state: State | None = None,
    chunk: int = 512,
    policy: Policy | None = None,
    beyond_context: bool = False,
    speculate: int | bool = False,
    stop: StopFlag | None = None,
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
        chunk: prompt tokens a call at most, over all requests. A longer span is a call of its own.
        policy: which requests go next, and with how many tokens; None: `PromptsFirst(chunk)`. It changes no result.
        beyond_context: do not stop at the context the model was trained on; every request then needs `max_tokens`.
        speculate: draft up to this many tokens from what was there before and verify them in one step, where that pays
            (`generate.speculate`); True leaves the number to us. The answers are the same.
        stop: set from any thread, it ends every unfinished request with reason "cancelled" and all that it has.

    Raises:
        ConfigError: a request or setting that cannot be.
        ContextError: a prompt longer than the context.
        StateError: a slot that does not exist, already holds as much as the request, or ends inside of a span.
        ModelError: while iterating, logits that nothing can be drawn from.
    """
    policy = policy or PromptsFirst(chunk)
    for index, request in enumerate(requests):
        try:
            request.check(executor.decoder, has_text=text_stream is not None, beyond_context=beyond_context)
        except (ConfigError, ContextError) as error:
            raise type(error)(f"request {index}: {error}" if len(requests) > 1 else str(error)) from None
    slots = _slots(requests, state)
    most = draft_limit(speculate)
    held = executor.new_state(len(requests)) if state is None else state
    limit = executor.decoder.longest if beyond_context else executor.decoder.max_context
    sequences: list[Sequence] = []
    for index, (request, slot) in enumerate(zip(requests, slots, strict=True)):
        stream = text_stream() if text_stream else None
        sequences.append(Sequence(request, index=index, limit=limit, stream=stream, most=most))
        sequences[-1].place(held, slot)
    speculation = SpeculationController(most) if most else None
    return _run(executor, held, sequences, policy, speculation, stop, owns_state=state is None)


def _run(
    executor: Executor,
    state: State,
    sequences: abc.Sequence[Sequence],
    policy: Policy,
    speculation: SpeculationController | None,
    stop: StopFlag | None,
    *,
    owns_state: bool,
) -> Generator[Event, None, None]:
    def leave(sequence: Sequence) -> None:
        if owns_state and sequence.state is not None:
            state.free(sequence.leave())

    try:
        for sequence in sequences:
            if sequence.is_full:
                yield sequence.finish("context")
        while live := [sequence for sequence in sequences if not sequence.finished]:
            if stop is not None and stop.is_set():
                raise Stopped("the stop flag was set between two steps")
            with closing(step(executor, state, policy(live), speculation=speculation, stop=stop)) as events:
                for event in events:
                    sequence = sequences[event.request]
                    if sequence.error is not None:
                        raise sequence.error
                    if sequence.finished:
                        leave(sequence)
                    yield event
    except (KeyboardInterrupt, Stopped) as end:
        for sequence in sequences:
            if not sequence.finished:
                yield sequence.finish("interrupted" if isinstance(end, KeyboardInterrupt) else "cancelled")
    finally:
        for sequence in sequences:
            leave(sequence)


def complete(executor: Executor, requests: abc.Sequence[Request], **options) -> list[Result]:
    """`generate` to its end: the result of each request, in their order. Takes the same options."""
    results = {e.request: e.result for e in generate(executor, requests, **options) if e.result is not None}
    return [results[i] for i in range(len(requests))]


def score(
    executor: Executor,
    ids: abc.Sequence[int],
    *,
    top: int = 0,
    chunk: int = 128,
    beyond_context: bool = False,
    spans: abc.Sequence[tuple[int, int]] = (),
    images: abc.Sequence[np.ndarray] = (),
) -> Score:
    """Log-probability of each of `ids` after those before it.

    Logits are held for one chunk at a time: 128 rows of 262,144 are 134 MB.

    Args:
        top: how many of the most likely tokens to list at each position.
        spans, images: as of a `Request`. Tokens of a span have seen one another, so that of them only the first is
            predicted.

    Raises:
        ConfigError, ContextError: as for `generate`.
        ModelError: logits with NaN.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1 token")
    request = Request(ids, logprobs=top, max_tokens=1, spans=spans, images=images)
    request.check(executor.decoder, beyond_context=beyond_context)
    told = {position for start, end in spans for position in range(start + 1, end)}
    predicted = [position for position in range(1, len(ids)) if position not in told]
    entries: list[TokenLogprob | None] = [None] * len(ids)
    state = executor.new_state(1)
    sequence = Sequence(request)
    sequence.place(state, 0)
    last = max(predicted, default=0)  # what is predicted last need not be run
    borders = [start for start, _ in spans]  # chunks end there, so that rows inside of a span are not computed
    while (at := sequence.computed) < last:
        until = min(border for border in (*borders, at + chunk, last) if border > at)
        tokens = sequence.fit(until - at) or sequence.unit
        first = min(position for position in predicted if position > at)
        rows = max(0, at + tokens + 1 - first)
        outputs = executor.run([replace(sequence.chunk(tokens), rows=rows)], state)
        for position, row in enumerate(outputs.rows, first):
            entries[position] = token_logprob(row, int(ids[position]), top)
    return Score(tuple(entries))


def reward(executor: Executor, ids: abc.Sequence[int], *, chunk: int = 512) -> float:
    """The number that a reward model's head gives for the last of `ids`.

    Args:
        chunk: tokens a call, which bounds the memory that a long text takes.
    """
    state = executor.new_state(1)
    for start in range(0, len(ids) - 1, chunk):
        executor.run([Chunk(0, ids[start : min(start + chunk, len(ids) - 1)], rows=0)], state)
    return float(executor.run([Chunk(0, ids[-1:])], state, output="reward").rows[0][0])


def _slots(requests: abc.Sequence[Request], state: State | None) -> list[int]:
    """The slot of each request: the named ones of a state that was passed, or 0, 1, 2, ... of a new one."""
    if state is None:
        for index, request in enumerate(requests):
            if request.slot is not None:
                raise ConfigError(f"request {index}: slot={request.slot} names a slot, but no state is passed")
        return list(range(len(requests)))
    slots: list[int] = []
    for index, request in enumerate(requests):
        there = ", ".join(map(str, state.lengths))
        if request.slot is None:
            raise ConfigError(f"request {index}: a state is passed, so slot must name one of its slots: {there}")
        if request.slot not in state.lengths:
            raise StateError(f"request {index}: slot={request.slot}, but the state has the slots {there}")
        if request.slot in slots:
            raise StateError(f"request {index}: slot={request.slot} is taken by request {slots.index(request.slot)}")
        slots.append(request.slot)
    return slots
