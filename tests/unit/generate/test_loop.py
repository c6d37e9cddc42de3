"""The plain loop on models that can be worked out by hand, and on one whose logits hash the whole history."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ConfigError, ContextError, ModelError, StateError
from gemkit.generate import Event, Request, Result, Sampling, complete, generate, sample, score
from support.fake_executors import BOS, END, PIECES, ByteStream, HashModel, Script, text_of

tokens = st.integers(2, len(PIECES) - 1)


def spans_within(length: int):
    """None, one or two spans of a sequence of this length, with and without tokens between them."""
    borders = st.lists(st.integers(0, length), max_size=4, unique=True).map(sorted)
    return borders.map(lambda found: list(zip(found[::2], found[1::2], strict=False)))


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([None, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 5),
)
requests = st.builds(
    Request,
    ids=st.lists(tokens, max_size=9).map(lambda ids: [BOS, *ids]),
    sampling=samplings,
    max_tokens=st.integers(1, 12),
    stop_ids=st.sampled_from([(), (END,), (END, 4)]),
    stop_strings=st.sampled_from([[], ["ca"], ["bc", "ab"], ["é", "c c"]]),
    logprobs=st.sampled_from([None, 0, 2]),
).flatmap(lambda r: spans_within(len(r.ids)).map(lambda spans: replace(r, spans=spans)))


def outcome(result: Result) -> Result:
    """All of a result but the clock."""
    return replace(result, timings=replace(result.timings, first_token_seconds=None, decode_seconds=0.0))


def by_definition(model: HashModel, request: Request) -> tuple[list[int], str, str]:
    """Ids, text and reason, with the whole sequence computed anew for each token."""
    ids: list[int] = []
    while True:
        history = [*request.ids, *ids]
        if len(history) >= model.decoder.max_context:
            return ids, text_of(ids), "context"
        ids.append(sample(model.logits(history), request.sampling, history))
        if ids[-1] in request.stop_ids:
            return ids, text_of(ids[:-1]), "stop"
        text = text_of(ids)
        cuts = [text.find(stop) for stop in request.stop_strings if stop in text]
        if cuts:  # no stop string here contains another, so the one that begins first ends first
            return ids, text[: min(cuts)], "stop"
        if len(ids) == request.max_tokens:
            return ids, text, "length"


@given(requests)
def test_a_request_gives_what_the_definition_gives(request_):
    model = HashModel(max_context=16)
    (result,) = complete(model, [request_], text_stream=ByteStream)
    ids, text, reason = by_definition(model, request_)
    assert (list(result.ids), result.text, result.finish_reason) == (ids, text, reason)
    assert model.longest <= 16


@given(st.lists(requests, min_size=1, max_size=4), st.integers(1, 12))
def test_batch_and_chunks_change_nothing(batch, chunk):
    model = HashModel(max_context=16)
    together = complete(model, batch, text_stream=ByteStream, chunk=chunk)
    alone = [complete(HashModel(max_context=16), [r], text_stream=ByteStream)[0] for r in batch]
    assert [outcome(r) for r in together] == [outcome(r) for r in alone]
    prompt_steps = [call for call in model.calls if any(len(c.ids) > 1 for c in call)]
    for call in prompt_steps:  # a longer span is a call of its own
        tokens = [len(c.ids) for c in call]
        assert sum(tokens) <= chunk or tokens == [end - start for start, end in call[0].spans]


@given(requests, st.data())
def test_a_state_that_holds_the_beginning_changes_nothing_but_the_work(request_, data):
    held = data.draw(st.integers(0, len(request_.ids) - 1))
    held = 0 if any(start < held < end for start, end in request_.spans) else held
    model = HashModel(max_context=16)
    state = model.new_state(3)
    state.histories[1] = list(request_.ids[:held])
    (warm,) = complete(model, [replace(request_, slot=1)], text_stream=ByteStream, state=state)
    (cold,) = complete(HashModel(max_context=16), [request_], text_stream=ByteStream)
    assert warm.timings.cached_tokens == held
    assert outcome(replace(warm, timings=cold.timings)) == outcome(cold)
    assert sum(len(chunk.ids) for call in model.calls for chunk in call) == warm.computed_tokens - held
    # the invariant that a chat goes on by
    assert state.histories[1] == [*request_.ids, *warm.ids][: warm.computed_tokens]


@given(st.lists(requests, min_size=1, max_size=3))
def test_events_add_up_to_the_results(batch):
    events = list(generate(HashModel(max_context=16), batch, text_stream=ByteStream))
    for index in range(len(batch)):
        *before, last = [event for event in events if event.request == index]
        result = last.result
        assert result is not None
        assert all(event.result is None for event in before)
        assert "".join(e.text for e in [*before, last]) == result.text
        assert tuple(e.id for e in [*before, last] if e.id is not None) == result.ids
        if batch[index].logprobs is not None:
            assert tuple(e.logprob for e in [*before, last] if e.id is not None) == result.logprobs


def test_a_conversation_goes_on_from_its_state():
    model, whole = HashModel(), [BOS, 5, 6]
    state = model.new_state(1)
    for _ in range(3):
        (result,) = complete(model, [Request(whole, max_tokens=4, slot=0)], state=state)
        assert result.computed_tokens == len(whole) + 3  # the last token drawn has not been run
        assert result.timings.cached_tokens == max(0, len(whole) - 3)
        whole = [*whole, *result.ids, 8, 2]
    assert sum(len(chunk.ids) for call in model.calls for chunk in call) == state.lengths[0]  # nothing ran twice


def test_an_answer_cut_short_and_asked_for_again_is_the_same_answer():
    sampling = Sampling(temperature=1.0, seed=3)
    (whole,) = complete(HashModel(), [Request([BOS, 4], sampling, max_tokens=20)])
    (head,) = complete(HashModel(), [Request([BOS, 4], sampling, max_tokens=7)])
    (tail,) = complete(HashModel(), [Request([BOS, 4, *head.ids], sampling, max_tokens=13)])
    assert head.ids + tail.ids == whole.ids


def test_a_finished_sequence_is_no_longer_run():
    model = HashModel()
    complete(model, [Request([BOS, 3], max_tokens=1), Request([BOS, 4], max_tokens=3)])
    assert [[c.slot for c in call] for call in model.calls] == [[0, 1], [1], [1]]


def test_stop_ids_end_the_answer_and_stay_out_of_its_text():
    (result,) = complete(Script([2, 3, END, 4]), [Request([BOS], stop_ids=[END])], text_stream=ByteStream)
    assert (result.text, result.ids, result.finish_reason, result.stopped_by) == ("ab", (2, 3, END), "stop", END)
    assert result.computed_tokens == 3


def test_a_stop_string_over_several_tokens_is_cut_and_named():
    request = Request([BOS], stop_strings=["zz", "bc c"])
    events = list(generate(Script([2, 3, 4, 8, 4, 2]), [request], text_stream=ByteStream))
    assert [event.text for event in events] == ["a", "", "", "", ""]
    result = events[-1].result
    assert result is not None
    assert (result.text, result.ids, result.stopped_by) == ("a", (2, 3, 4, 8, 4), "bc c")


def test_what_was_held_back_comes_out_when_the_answer_ends_otherwise():
    possible_stop = Request([BOS], max_tokens=2, stop_strings=["bcd"])
    half_character = Request([BOS], max_tokens=2)
    assert complete(Script([2, 6]), [possible_stop], text_stream=ByteStream)[0].text == "abc"
    assert complete(Script([2, 9]), [half_character], text_stream=ByteStream)[0].text == "a\N{REPLACEMENT CHARACTER}"


def test_a_character_of_two_tokens_comes_whole():
    events = list(generate(Script([9, 10]), [Request([BOS], max_tokens=2)], text_stream=ByteStream))
    assert [event.text for event in events] == ["", "é"]


@pytest.mark.parametrize("prompt", [1, 7, 8])
def test_prompt_and_answer_fill_the_context_and_no_more(prompt):
    model = HashModel(max_context=8)
    (result,) = complete(model, [Request([BOS] * prompt, sampling=Sampling(logit_bias={END: -math.inf}))])
    assert (len(result.ids), result.finish_reason) == (8 - prompt, "context")
    assert model.longest == (7 if result.ids else 0)  # the last token is drawn and not run; a full prompt is not either


def test_a_stop_counts_before_max_tokens_and_that_before_the_context():
    says = Script([2, END], max_context=3)
    (both,) = complete(says, [Request([BOS], max_tokens=2)])
    (all_three,) = complete(says, [Request([BOS], max_tokens=2, stop_ids=[END])])
    assert (both.finish_reason, all_three.finish_reason) == ("length", "stop")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers_or_let_through():
    model, prompt = HashModel(max_context=8), [BOS] * 9
    with pytest.raises(ContextError, match=r"request 1: the prompt has 9 tokens .* trained on 8"):
        generate(model, [Request([BOS]), Request(prompt)])
    (result,) = complete(model, [Request(prompt, max_tokens=5)], beyond_context=True)
    assert (len(result.ids), result.finish_reason) == (5, "length")
    with pytest.raises(ConfigError, match="max_tokens must be set"):
        generate(model, [Request(prompt)], beyond_context=True)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request([]), "ids is empty"),
        (Request([BOS, len(PIECES)]), "ids holds 12"),
        (Request([BOS, -1]), "ids holds -1"),
        (Request([BOS], stop_ids=[99]), "stop_ids holds 99"),
        (Request([BOS], Sampling(logit_bias={99: 1.0})), "logit_bias holds 99"),
        (Request([BOS], max_tokens=0), "max_tokens=0"),
        (Request([BOS], logprobs=-1), "logprobs=-1"),
        (Request([BOS], logprobs=13), "logprobs=13"),
        (Request([BOS], stop_strings=["a"]), "text_stream"),
        (Request([BOS], slot=0), "no state is passed"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_runs(request_, says):
    model = HashModel()
    with pytest.raises(ConfigError, match=f"request 1: .*{says}"):
        generate(model, [Request([BOS]), request_])
    assert not model.calls


def test_no_requests_give_no_results():
    assert complete(HashModel(), []) == []


@pytest.mark.parametrize("run", [lambda m: generate(m, [], chunk=0), lambda m: score(m, [BOS], chunk=0)])
def test_a_chunk_of_nothing_is_refused(run):
    with pytest.raises(ConfigError, match="chunk=0"):
        run(HashModel())


def test_slots_are_checked_against_the_state():
    model = HashModel()
    state = model.new_state(2)
    state.histories[0] = [BOS, 3]
    with pytest.raises(ConfigError, match="slot must name one"):
        generate(model, [Request([BOS])], state=state)
    with pytest.raises(StateError, match="slot=2, but the state has the slots 0, 1"):
        generate(model, [Request([BOS], slot=2)], state=state)
    with pytest.raises(StateError, match="request 1: slot=1 is taken by request 0"):
        generate(model, [Request([BOS], slot=1), Request([BOS], slot=1)], state=state)
    with pytest.raises(StateError, match="slot 0 holds 2 tokens and the request has 2"):
        generate(model, [Request([BOS, 3], slot=0)], state=state)


def test_logprobs_are_those_of_the_model_before_any_setting():
    model = HashModel()
    request = Request([BOS, 5], Sampling(temperature=2.0, top_k=4, logit_bias={3: 9.0}, seed=1), 6, logprobs=3)
    (result,) = complete(model, [request])
    assert result.logprobs is not None
    assert [entry.id for entry in result.logprobs] == list(result.ids)
    for n, entry in enumerate(result.logprobs):
        logits = model.logits([*request.ids, *result.ids[:n]]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert entry.logprob == pytest.approx(logprobs[entry.id], abs=1e-6)  # float32 exponentials
        assert [i for i, _ in entry.top] == np.argsort(-logits)[:3].tolist()


def test_a_seed_that_was_not_given_is_told_and_repeats_the_answer():
    request = Request([BOS], Sampling(temperature=2.0), max_tokens=12)
    first, second = complete(HashModel(), [request, request])
    assert first.ids != second.ids  # 12 draws from 12 tokens: alike once in a billion times
    (again,) = complete(HashModel(), [replace(request, sampling=replace(request.sampling, seed=first.seed))])
    assert outcome(again) == outcome(first)
    assert complete(HashModel(), [Request([BOS], max_tokens=1)])[0].seed is None


class Interrupted(HashModel):
    """Ctrl-C comes in the middle of its fourth step."""

    def run(self, chunks, state, **options):
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return super().run(chunks, state, **options)


def test_ctrl_c_in_a_step_keeps_all_that_there_is():
    batch = [Request([BOS, 5], max_tokens=9), Request([BOS, 6], max_tokens=2), Request([BOS, 7], max_tokens=9)]
    model = Interrupted()
    results = complete(model, batch, text_stream=ByteStream)
    undisturbed = complete(HashModel(), batch, text_stream=ByteStream)
    assert [r.finish_reason for r in results] == ["interrupted", "length", "interrupted"]
    assert [r.computed_tokens for r in results] == [4, 3, 4]
    for result, whole in zip(results, undisturbed, strict=True):
        assert result.ids == whole.ids[: len(result.ids)]
        assert result.text == text_of(result.ids)
    assert [r.timings.generated_tokens for r in results] == [3, 2, 3]


def test_ctrl_c_between_two_events_can_be_handed_on():
    events = generate(HashModel(), [Request([BOS, 5], max_tokens=9)], text_stream=ByteStream)
    seen = [*itertools.islice(events, 3), events.throw(KeyboardInterrupt)]
    assert list(events) == []
    result = seen[-1].result
    assert result is not None
    assert (result.finish_reason, result.computed_tokens) == ("interrupted", 4)
    assert result.ids == tuple(event.id for event in seen[:3])


def test_nan_ends_the_generation_with_an_error_of_ours():
    class Broken(HashModel):
        def logits(self, history):
            return super().logits(history) * (math.nan if len(history) > 3 else 1)

    events = generate(Broken(), [Request([BOS])])
    assert all(isinstance(next(events), Event) for _ in range(3))
    with pytest.raises(ModelError, match="NaN"):
        next(events)


def test_timings_count_what_was_run(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("gemkit.generate.sequence.time.perf_counter", lambda: float(next(clock)))
    model = HashModel()
    state = model.new_state(1)
    state.histories[0] = [BOS, 3]
    (result,) = complete(model, [Request([BOS, 3, 4, 5, 6], max_tokens=4, slot=0)], state=state)
    # the clock is read at the start and then once for each token: the first comes after 1 second, the rest take 3
    timings = result.timings
    assert (timings.prompt_tokens, timings.cached_tokens, timings.generated_tokens) == (5, 2, 4)
    assert (timings.first_token_seconds, timings.decode_seconds) == (1.0, 3.0)
    assert (timings.prompt_tokens_per_second, timings.decode_tokens_per_second) == (3.0, 1.0)


def test_rates_of_nothing_are_none():
    (result,) = complete(HashModel(max_context=2), [Request([BOS, 3])])
    timings = result.timings
    assert (timings.first_token_seconds, timings.prompt_tokens_per_second) == (None, None)
    assert timings.decode_tokens_per_second is None


@given(st.lists(tokens, min_size=1, max_size=20), st.integers(1, 25))
def test_score_is_the_chain_rule_whatever_the_chunks(ids, chunk):
    model = HashModel()
    scored = score(model, ids, top=1, chunk=chunk)
    expected = []
    for n in range(1, len(ids)):
        logits = model.logits(ids[:n]).astype(np.float64)
        expected.append(logits[ids[n]] - np.log(np.exp(logits).sum()))
    first, *rest = scored.logprobs
    assert first is None
    assert [entry.id for entry in rest] == ids[1:]
    # float32 exponentials: 1e-6 at each token
    assert [entry.logprob for entry in rest] == pytest.approx(expected, abs=1e-6)
    assert scored.total == pytest.approx(sum(expected), abs=1e-6 * len(ids))
    if expected:
        assert scored.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)
    else:
        assert scored.perplexity is None
    assert all(len(entry.top) == 1 and entry.top[0][1] >= entry.logprob for entry in rest)
    assert all(len(call[0].ids) <= chunk for call in model.calls)


def test_score_and_generate_agree_on_the_same_tokens():
    (result,) = complete(HashModel(), [Request([BOS, 5], max_tokens=10, logprobs=2)])
    assert score(HashModel(), [BOS, 5, *result.ids], top=2).logprobs[2:] == result.logprobs


def test_score_keeps_to_the_context():
    with pytest.raises(ContextError, match="9 tokens"):
        score(HashModel(max_context=8), [BOS] * 9)
    assert score(HashModel(max_context=8), [BOS] * 9, beyond_context=True).perplexity is not None


def test_generating_needs_no_torch():
    code = "import sys, gemkit.generate; assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_span_is_never_cut_and_waits_for_room():
    model, image = HashModel(), np.zeros((3, 2, 2), np.float32)
    batch = [
        Request([BOS, 2, 3], max_tokens=1),
        Request([BOS, *[2] * 9], max_tokens=1, spans=[(0, 8)], images=[image]),  # longer than a chunk
        Request([BOS, 4, 5], max_tokens=1, spans=[(0, 3)]),  # would not fit beside the first
        Request([BOS], max_tokens=1),
    ]
    results = complete(model, batch, chunk=5)
    steps = [[(c.slot, len(c.ids), c.rows, len(c.images), *c.spans) for c in call] for call in model.calls]
    assert steps == [
        [(0, 3, 1, 0), (3, 1, 1, 0)],
        [(1, 8, 0, 1, (0, 8))],
        [(1, 2, 1, 0), (2, 3, 1, 0, (0, 3))],
    ]
    assert [r.finish_reason for r in results] == ["length"] * 4


def test_what_spans_must_be():
    model, image = HashModel(), np.zeros((3, 2, 2), np.float32)
    for request, message in (
        (Request([BOS, 2], spans=[(0, 3)]), r"spans=\[\(0, 3\)\] must be .* within the 2 ids"),
        (Request([BOS, 2], spans=[(-1, 1)]), r"spans=\[\(-1, 1\)\]"),
        (Request([BOS, 2], spans=[(1, 1)]), r"spans=\[\(1, 1\)\]"),
        (Request([BOS, 2, 3], spans=[(0, 2), (1, 3)]), r"ascending, disjoint"),
        (Request([BOS, 2], images=[image]), "1 images and 0 spans"),
        (Request([BOS, 2, 3], spans=[(0, 1), (1, 2)], images=[image] * 3), "3 images and 2 spans"),
    ):
        with pytest.raises(ConfigError, match=message):
            complete(model, [request])
    state = model.new_state(1)
    state.histories[0] = [BOS, 2]
    with pytest.raises(StateError, match="slot 0 holds 2 tokens, which cuts the span of tokens 0 to 3"):
        complete(model, [Request([BOS, 2, 3, 4], spans=[(0, 3)], slot=0)], state=state)


@given(requests, st.integers(1, 12))
def test_a_score_predicts_no_token_that_others_have_seen(request_, chunk):
    model, ids = HashModel(), list(request_.ids)
    scored = score(model, ids, top=1, chunk=chunk, spans=request_.spans)
    whole = score(HashModel(), ids, top=1)
    seen = {0}.union(*(range(start + 1, end) for start, end in request_.spans))  # the first of a span was predicted
    assert [n for n, entry in enumerate(scored.logprobs) if entry is None] == sorted(seen)
    assert all(entry in (None, other) for entry, other in zip(scored.logprobs, whole.logprobs, strict=True))
    last = max({*range(len(ids))} - seen, default=0)
    assert sum(len(c.ids) for call in model.calls for c in call) == last  # what is predicted last need not be run
    rows = sum(c.rows for call in model.calls for c in call)
    assert rows == len(ids) - len(seen)  # no logits within a span
