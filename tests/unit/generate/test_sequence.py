"""Sequences that are stepped, moved, set aside and cancelled give the answers of the plain loop."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ConfigError, ModelError, StateError, Stopped
from gemkit.executors.interface import StopFlag
from gemkit.generate import Request, Sequence, complete, generate, step
from support.fake_executors import BOS, ByteStream, HashModel, text_of
from support.interleaving import Interleaving, assert_same_answers
from unit.generate.test_loop import requests
from unit.generate.test_speculate import Habit


@given(
    st.lists(requests, min_size=1, max_size=5),
    st.integers(0, 2**32).map(Random),
    st.sets(st.integers(0, 4)),
    st.integers(0, 6),
    st.booleans(),
    st.booleans(),
)
def test_whatever_else_happens_an_answer_is_that_of_its_request_alone(batch, rng, cancelled, most, recurrent, sparse):
    batch = [replace(request, max_tokens=2 * request.max_tokens) for request in batch]
    alone = [complete(Habit(40), [request], text_stream=ByteStream)[0] for request in batch]
    model = Habit(40, recurrent, sparse)
    run = Interleaving(model, batch, rng, cancelled=cancelled, most=most, text_stream=ByteStream)
    assert_same_answers(batch, run.run(), alone)
    assert (run.state.lengths, run.state.nbytes) == ({}, 0)


def placed(model: HashModel, request: Request, **options) -> tuple[Sequence, object]:
    state = model.new_state()
    sequence = Sequence(request, **options)
    sequence.place(state, state.add())
    return sequence, state


def test_a_sequence_that_was_set_aside_goes_on_in_another_slot():
    model, request = HashModel(), Request([BOS, 3, 4], max_tokens=6)
    sequence, state = placed(model, request, stream=ByteStream())
    told = [event for _ in range(3) for event in step(model, state, [(sequence, sequence.pending)])]
    state.free(sequence.leave())
    assert (state.lengths, sequence.computed, sequence.pending) == ({}, 0, 6)
    with pytest.raises(ConfigError, match="request 0 has no slot"):
        sequence.chunk(1)
    other = model.new_state(2)
    sequence.place(other, 1)
    while not sequence.finished:
        told += step(model, other, [(sequence, min(2, sequence.pending))])
    (expected,) = complete(HashModel(), [request], text_stream=ByteStream)
    assert sequence.result.ids == expected.ids == tuple(event.id for event in told)
    assert sequence.result.text == expected.text
    assert sequence.result.timings.cached_tokens == 0  # what it computed itself was in no cache


def test_a_cancelled_sequence_ends_once_and_keeps_what_it_has():
    model = HashModel()
    sequence, state = placed(model, Request([BOS, 3], max_tokens=9), stream=ByteStream())
    for _ in range(3):
        list(step(model, state, [(sequence, sequence.pending)]))
    event = sequence.cancel()
    assert (event.id, event.result.finish_reason, len(event.result.ids)) == (None, "cancelled", 3)
    assert event.result.text == text_of(event.result.ids)
    assert sequence.cancel() is None
    with pytest.raises(ConfigError, match="request 0 is over"):
        list(step(model, state, [(sequence, 1)]))


def test_a_sequence_cancelled_while_others_of_its_step_are_told_draws_no_more():
    model = HashModel()
    first, state = placed(model, Request([BOS, 3], max_tokens=9))
    second = Sequence(Request([BOS, 4], max_tokens=9), index=1)
    second.place(state, state.add())
    told = []
    for event in step(model, state, [(first, 2), (second, 2)]):
        told.append(event.request)
        second.cancel()
    assert told == [0]
    assert second.result.ids == ()


def test_logits_without_a_token_end_their_sequence_and_no_other():
    class Broken(HashModel):
        def logits(self, history):
            return super().logits(history) * (math.nan if history[1] == 4 and len(history) > 3 else 1)

    model = Broken()
    good, state = placed(model, Request([BOS, 3], max_tokens=5))
    bad = Sequence(Request([BOS, 4], max_tokens=5), index=1)
    bad.place(state, state.add())
    while live := [sequence for sequence in (good, bad) if not sequence.finished]:
        list(step(model, state, [(sequence, sequence.pending) for sequence in live]))
    assert (good.result.finish_reason, bad.result.finish_reason) == ("length", "error")
    assert isinstance(bad.error, ModelError)
    assert len(bad.result.ids) == 2
    assert good.result.ids == complete(HashModel(), [good.request])[0].ids


@pytest.mark.parametrize("tokens", [0, 4])
def test_a_plan_of_tokens_that_are_not_there_is_refused(tokens):
    model = HashModel()
    sequence, state = placed(model, Request([BOS, 3, 4]))
    with pytest.raises(ConfigError, match=f"computes {tokens} tokens of request 0, which waits for 3"):
        list(step(model, state, [(sequence, tokens)]))


def test_a_plan_that_cuts_a_span_is_refused():
    model = HashModel()
    sequence, state = placed(model, Request([BOS, 3, 4, 5, 6, 7], spans=[(1, 4)]))
    assert [sequence.fit(n) for n in range(1, 8)] == [1, 1, 1, 4, 5, 6, 6]
    with pytest.raises(ConfigError, match="no part of a span"):
        list(step(model, state, [(sequence, 2)]))
    list(step(model, state, [(sequence, 1)]))
    assert ([sequence.fit(n) for n in range(1, 5)], sequence.unit) == ([0, 0, 3, 4], 3)


def test_each_image_comes_with_its_span():
    model, images = HashModel(), [np.full((3, 1, 1), i, np.float32) for i in range(2)]
    request = Request([BOS, 3, 3, 4, 3, 3, 4], spans=[(1, 3), (4, 6)], images=images, max_tokens=1)
    complete(model, [request], chunk=3)
    seen = [[(len(c.ids), *c.spans, *(image[0, 0, 0] for image in c.images)) for c in call] for call in model.calls]
    assert seen == [[(3, (1, 3), 0)], [(3, (4, 6), 1)], [(1,)]]


def test_a_slot_that_holds_part_of_a_span_or_all_of_a_sequence_is_no_place():
    state = HashModel().new_state(2)
    state.histories[0], state.histories[1] = [BOS, 3], [BOS, 3, 4, 5]
    sequence = Sequence(Request([BOS, 3, 4, 5], spans=[(1, 3)]), index=7)
    with pytest.raises(StateError, match="request 7: slot 0 holds 2 tokens, which cuts the span of tokens 1 to 3"):
        sequence.place(state, 0)
    with pytest.raises(StateError, match="request 7: slot 1 holds 4 tokens and the request has 4"):
        sequence.place(state, 1)


def test_a_step_that_raises_changes_nothing():
    class Failing(Habit):
        failing = False

        def run(self, chunks, state, **options):
            if self.failing:
                raise ModelError("memory ran out")
            return super().run(chunks, state, **options)

    model, request = Failing(), Request([BOS, 3, 4], max_tokens=20)
    sequence, state = placed(model, request)
    while not sequence.finished:
        before = sequence.computed, len(sequence.ids)
        model.failing = True
        with pytest.raises(ModelError, match="memory"):
            list(step(model, state, [(sequence, sequence.pending)]))
        assert (sequence.computed, len(sequence.ids)) == before
        model.failing = False
        list(step(model, state, [(sequence, sequence.pending)]))
    assert sequence.result.ids == complete(Habit(), [request])[0].ids


def test_a_stop_flag_ends_the_step_that_it_was_given_to():
    model, stop = HashModel(), StopFlag()
    sequence, state = placed(model, Request([BOS, 3]))
    stop.set()
    with pytest.raises(Stopped):
        list(step(model, state, [(sequence, 2)], stop=stop))
    assert len(list(step(model, state, [(sequence, 2)], stop=StopFlag()))) == 1


def test_a_stop_flag_ends_all_requests_of_a_batch():
    stop, batch = StopFlag(), [Request([BOS, 3], max_tokens=30), Request([BOS, 4], max_tokens=2)]
    results = {}
    for n, event in enumerate(generate(HashModel(), batch, stop=stop)):
        if n == 6:
            stop.set()
        if event.result:
            results[event.request] = event.result
    assert [results[i].finish_reason for i in (0, 1)] == ["cancelled", "length"]
    assert results[0].ids == complete(HashModel(), batch)[0].ids[: len(results[0].ids)]


@given(st.lists(requests, min_size=1, max_size=3), st.booleans(), st.integers(0, 9))
def test_a_state_of_the_loop_s_own_holds_nothing_afterwards(batch, dropped, seen):
    model = HashModel(max_context=16)
    events = generate(model, batch, text_stream=ByteStream)
    left = {event.request for _, event in zip(range(seen), events, strict=False) if event.result is not None}
    (state,) = model.states
    if seen:
        assert len(state.lengths) == len(batch) - len(left)
    if dropped:
        events.close()
    else:
        list(events)
    assert state.lengths == {} or (dropped and not seen)  # a generator that was never asked has nothing to clean up


def test_only_drafts_take_snapshots():
    model = HashModel()
    complete(model, [Request([BOS, 5, 5], max_tokens=30)])
    assert model.states[0].snapshots == 0
