"""Speculation: drafts are as defined, answers are those of the plain loop, and it stops where it loses."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ConfigError
from gemkit.executors.interface import Outputs
from gemkit.executors.torch import TorchExecutor
from gemkit.family import Global, Sliding
from gemkit.generate import Chunk, Request, Result, Sampling, complete, generate
from gemkit.generate.speculate import DRAFT, Drafts, Lookup, SpeculationController, draft_limit
from support.fake_executors import BOS, ByteStream, FakeState, HashModel, text_of
from unit.generate.test_loop import outcome, requests
from unit.nn.test_state import CONFIG, HEADS, layers, random_module


class Habit(HashModel):
    """Mostly says what it said after the same two ids, so that drafts are often right; the rest is a hash of all ids,
    so that a token that a state holds by mistake is not overlooked."""

    def logits(self, history):
        return super().logits(history[-2:]) + super().logits(history) / 3


class Clock:
    """Time that passes by the tokens of a step, or not at all."""

    def __init__(self, monkeypatch, step: float = 0.0, token: float = 0.0):
        self.now, self._step, self._token = 0.0, step, token
        monkeypatch.setattr("gemkit.generate.speculate.time.perf_counter", lambda: self.now)

    def watch(self, model: HashModel) -> HashModel:
        run = model.run

        def timed(chunks, state, **options):
            self.now += self._step + self._token * (sum(len(chunk.ids) for chunk in chunks) - len(chunks))
            return run(chunks, state, **options)

        model.run = timed
        return model


def same(result: Result, plain: Result) -> None:
    timings = replace(result.timings, drafted_tokens=0, accepted_tokens=0)
    result = replace(result, timings=timings)
    assert outcome(replace(result, computed_tokens=plain.computed_tokens)) == outcome(plain)


def last_earlier(ids: list[int], size: int) -> int | None:
    """By definition: where the token after the last earlier occurrence of the last `size` ids is."""
    ends = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[len(ids) - size :]]
    return max(ends, default=None)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 12))
def test_a_draft_is_what_followed_the_last_earlier_occurrence(ids, first, most):
    growing = array("q", ids[:first])
    lookup = Lookup(growing)
    for i in [*ids[first:], None]:
        held = growing.tolist()
        start = last_earlier(held, 3) or last_earlier(held, 2)
        draft = lookup.draft(most)
        if start is None:
            assert draft == []
        else:
            assert len(draft) == most
            assert [*held, *draft][start : start + len(draft)] == draft  # also where it goes on with itself
        if i is not None:
            growing.append(i)


def test_the_longer_match_counts_and_a_repetition_goes_on():
    assert Lookup([5, 6, 7, 1, 6, 7, 2, 5, 6, 7]).draft(2) == [1, 6]  # two ids were last followed by 2
    assert Lookup([9, 6, 7, 1, 6, 7, 2, 5, 6, 7]).draft(2) == [2, 5]
    assert Lookup([1, 2, 1, 2, 1]).draft(4) == [2, 1, 2, 1]
    assert Lookup([1, 2, 3]).draft(4) == []


def test_drafts_grow_while_they_are_right():
    ids, state = [1] * 9, FakeState(1)
    drafts, lengths = Drafts(ids, most=10), []
    for right in (4, 8, 10, 3, 0, 1, 2):
        state.histories[0] = ids[:-1]
        draft = drafts.begin(state, 0, 99)
        state.histories[0] = ids + draft
        lengths.append(len(draft))
        while drafts.taken < right:
            ids.append(1)
            assert drafts.confirm()
        ids.append(1 if right == len(draft) else 2)
        assert not drafts.confirm()
        drafts.rollback_rejected()
        assert state.histories[0] == ids[:-1]
        ids[-1:] = [1, 1, 1]
    assert lengths == [4, 8, 10, 10, 3, 1, 2]
    assert (drafts.drafted, drafts.accepted) == (38, 28)


@given(
    st.lists(requests, min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([(0, 0), (1, 0.1), (1, 2)]),
)
def test_answers_are_those_of_the_plain_loop(batch, chunk, most, recurrent, costs):
    batch = [replace(request, max_tokens=3 * request.max_tokens) for request in batch]
    plain = complete(Habit(40), batch, text_stream=ByteStream)
    with pytest.MonkeyPatch.context() as patch:
        model = Clock(patch, *costs).watch(Habit(40, recurrent))
        state = model.new_state(len(batch))
        batch = [replace(request, slot=slot) for slot, request in enumerate(batch)]
        results = complete(model, batch, text_stream=ByteStream, chunk=chunk, state=state, speculate=most)
    for request, result, other in zip(batch, results, plain, strict=True):
        same(result, other)
        assert recurrent or result.computed_tokens == other.computed_tokens
        assert state.histories[request.slot] == [*request.ids, *result.ids][: result.computed_tokens]
        assert result.computed_tokens < len(request.ids) + len(result.ids) or not result.ids
    assert model.longest < 40  # nothing that could not be drawn was computed


@given(requests, st.integers(0, 20), st.booleans(), st.booleans())
def test_an_answer_that_is_dropped_or_interrupted_leaves_no_draft(request_, seen, recurrent, interrupt):
    request_ = replace(request_, max_tokens=20, slot=0)
    with pytest.MonkeyPatch.context() as patch:
        model = Clock(patch).watch(Habit(40, recurrent))
        state = model.new_state(1)
        events = generate(model, [request_], text_stream=ByteStream, state=state, speculate=True)
        taken = list(itertools.islice(events, seen))
        if interrupt and taken and taken[-1].result is None:
            taken.append(events.throw(KeyboardInterrupt))
            assert taken[-1].result.finish_reason == "interrupted"
            assert taken[-1].result.text == "".join(event.text for event in taken)
            assert list(events) == []
        events.close()
    whole = [*request_.ids, *(event.id for event in taken if event.id is not None)]
    assert state.histories[0] == whole[: len(state.histories[0])]
    assert recurrent or not seen or len(state.histories[0]) >= len(whole) - 1


@pytest.mark.parametrize("step", range(3, 12))
def test_ctrl_c_in_a_step_with_drafts_keeps_what_was_drawn(monkeypatch, step):
    model = Clock(monkeypatch).watch(Habit())
    run = model.run

    def interrupted(chunks, state, **options):
        if len(model.calls) == step:
            raise KeyboardInterrupt
        return run(chunks, state, **options)

    model.run = interrupted
    request = Request([BOS, 5], max_tokens=50)
    (result,) = complete(model, [request], text_stream=ByteStream, speculate=True)
    (whole,) = complete(Habit(), [request], text_stream=ByteStream)
    assert result.finish_reason == "interrupted"
    assert result.ids == whole.ids[: len(result.ids)]
    assert (result.computed_tokens, result.text) == (len(result.ids) + 1, text_of(result.ids))


class Parrot(HashModel):
    """Says a sentence of 11 tokens over and over, from a position on; before it, anything."""

    def __init__(self, start: int = 0):
        super().__init__(4096)
        self._start = start

    def logits(self, history):
        logits = super().logits(history)
        if len(history) >= self._start:
            logits[2 + len(history) % 11 % 10] = 99
        return logits


def test_dropped_in_the_middle_of_a_draft_the_state_holds_what_was_told(monkeypatch):
    model = Clock(monkeypatch).watch(Parrot())
    for seen in range(30, 42):  # by then drafts are 8 long
        state = model.new_state(1)
        events = generate(model, [Request([BOS], slot=0)], state=state, speculate=True)
        told = [event.id for event in itertools.islice(events, seen)]
        events.close()
        assert state.histories[0] == [BOS, *told][:-1]


def test_each_accepted_token_saves_a_step(monkeypatch):
    model = Clock(monkeypatch).watch(Parrot())
    (result,) = complete(model, [Request([BOS], max_tokens=400)], speculate=True)
    t = result.timings
    assert t.drafted_tokens >= t.accepted_tokens > 250
    assert len(model.calls) == t.generated_tokens - t.accepted_tokens


def test_where_nothing_repeats_it_costs_little(monkeypatch):
    clock = Clock(monkeypatch, step=1.0, token=0.5)  # a draft of two doubles what a step takes
    model = clock.watch(HashModel(4096))  # 12 tokens: two of them were there before soon, and were followed by others
    sampling = Sampling(temperature=1.0, seed=1)
    (result,) = complete(model, [Request([BOS], sampling, max_tokens=2000)], speculate=True)
    assert result.timings.drafted_tokens > 10
    assert clock.now < 1.01 * 2000


def test_it_starts_again_where_it_pays(monkeypatch):
    clock = Clock(monkeypatch, step=1.0, token=0.1)
    model = clock.watch(Parrot(start=300))
    (result,) = complete(model, [Request([BOS], Sampling(temperature=0.3, seed=1), max_tokens=1300)], speculate=True)
    assert result.timings.accepted_tokens > 500
    assert clock.now < 900


def test_a_token_of_a_batch_is_worth_its_share_of_a_step(monkeypatch):
    pace = SpeculationController(8)

    def step(seconds: float, tokens: int, accepted: int) -> int:
        times = iter([0.0, seconds])
        monkeypatch.setattr("gemkit.generate.speculate.time.perf_counter", lambda: next(times))
        chunks = [Chunk(0, [BOS])] * 3 + [Chunk(3, [BOS] * (tokens - 3))]
        pace.timed(lambda chunks, state: Outputs([], np.zeros(0, np.int64)))(chunks, FakeState())
        pace.learn(accepted)
        return pace.most

    assert [step(1.0, 4, 0) for _ in range(3)] == [0, 0, 8]
    assert step(1.9, 12, 4) == 8  # four tokens of four sequences are a plain step: 1.0 gained for 0.9
    assert step(3.5, 12, 4) == 0  # and now lost 1.5
    assert [step(1.0, 4, 0) for _ in range(16)][-2:] == [0, 8]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=20, repetition_penalty=1.05, seed=2)])
def test_real_members_say_the_same(monkeypatch, recurrent, sampling):
    """Windows of 5 that slide over drafts, and recurrent layers, which must be computed again from a mark."""
    Clock(monkeypatch)
    config = (
        CONFIG
        if recurrent
        else replace(CONFIG, layers=layers(Sliding(5, **HEADS), Global(**HEADS), Sliding(2, **HEADS)))
    )
    executor = TorchExecutor(random_module(config, seed=3))
    rng = np.random.default_rng(4)
    batch = [Request([2, *rng.integers(3, 64, n).tolist() * 3], sampling, max_tokens=60) for n in (3, 6, 1)]
    plain = complete(executor, batch)
    for most in (2, 7):
        for result, other in zip(complete(executor, batch, speculate=most), plain, strict=True):
            same(result, other)
            assert result.timings.accepted_tokens > 0


def test_a_setting_that_cannot_be_is_refused():
    model = HashModel()
    for bad in (-1, 2.5, "3", None):
        with pytest.raises(ConfigError, match=f"speculate={bad!r}"):
            generate(model, [Request([BOS])], speculate=bad)
    assert [draft_limit(number) for number in (False, 0, 3, True)] == [0, 0, 3, DRAFT]
