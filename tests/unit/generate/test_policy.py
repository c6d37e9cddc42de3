"""Policies: the order of steps that each makes, and that none changes an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ConfigError
from gemkit.generate import Mixed, PromptsFirst, Request, Sampling, complete
from support.fake_executors import BOS, ByteStream, HashModel
from unit.generate.test_loop import outcome, requests


@given(st.lists(requests, min_size=1, max_size=4), st.integers(1, 12))
def test_prompts_and_decoding_that_share_steps_change_nothing(batch, chunk):
    model = HashModel(max_context=16)
    together = complete(model, batch, text_stream=ByteStream, policy=Mixed(chunk))
    alone = [complete(HashModel(max_context=16), [r], text_stream=ByteStream)[0] for r in batch]
    assert [outcome(r) for r in together] == [outcome(r) for r in alone]


def test_a_long_prompt_does_not_stop_the_others():
    model = HashModel()
    batch = [Request([BOS, 3], max_tokens=9), Request([BOS] * 11, max_tokens=1)]
    complete(model, batch, policy=Mixed(4))
    assert [[(c.slot, len(c.ids), c.rows) for c in call] for call in model.calls[:5]] == [
        [(0, 2, 1), (1, 2, 0)],
        [(0, 1, 1), (1, 3, 0)],
        [(0, 1, 1), (1, 3, 0)],
        [(0, 1, 1), (1, 3, 1)],
        [(0, 1, 1)],
    ]


def test_prompts_go_on_however_many_decode():
    model = HashModel()
    complete(
        model, [*[Request([i], max_tokens=9) for i in range(2, 6)], Request([BOS] * 3, max_tokens=1)], policy=Mixed(2)
    )
    waiting = [sum(len(c.ids) for c in call) for call in model.calls[:5]]
    assert waiting == [2, 3, 4, 5, 5]  # in the end one token of the last prompt beside four of others


def test_prompts_share_chunks_and_want_logits_only_at_their_ends():
    model = HashModel()
    complete(model, [Request([BOS] * n, max_tokens=1) for n in (5, 1, 6)], chunk=4)
    assert [[(c.slot, len(c.ids), c.rows) for c in call] for call in model.calls] == [
        [(0, 4, 0)],
        [(0, 1, 1), (1, 1, 1), (2, 2, 0)],
        [(2, 4, 1)],
    ]


def test_a_policy_of_the_caller_decides_who_goes_next():
    def shortest(live):
        sequence = min(live, key=lambda s: s.pending)
        return [(sequence, sequence.pending)]

    model = HashModel()
    batch = [Request([BOS] * 4, max_tokens=2), Request([BOS], max_tokens=2, sampling=Sampling(1.0, seed=2))]
    results = complete(model, batch, policy=shortest)
    assert [[c.slot for c in call] for call in model.calls] == [[1], [1], [0], [0]]
    assert [r.ids for r in results] == [r.ids for r in complete(HashModel(), batch)]


@pytest.mark.parametrize("policy", [PromptsFirst, Mixed])
def test_a_step_of_nothing_is_refused(policy):
    with pytest.raises(ConfigError, match="chunk=0"):
        policy(0)
