"""The sampler against arithmetic done by hand, published random numbers and the definition of each filter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gemkit.errors import ConfigError, ModelError
from gemkit.executors.interface import SparseLogits
from gemkit.generate import GREEDY, INSTRUCTION_TUNED, Sampling, sample
from gemkit.generate.sampler import candidates, check_ids, logits_filter, logsumexp, philox4x32, token_logprob, uniform
from support.fake_executors import filtered, ranks

few_values = st.sampled_from([-2.0, -0.5, 0.0, 1.0, 1.5])  # few distinct ones: ties everywhere
tied_logits = arrays(np.float32, st.integers(1, 40), elements=few_values)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox4x32(tuple(counter), tuple(key)) == tuple(words)


def test_every_bit_of_seed_sequence_and_position_reaches_the_draw():
    base = (5, 6, 7)
    bits = [uniform(*(v ^ (1 << bit) * (i == n) for i, v in enumerate(base))) for n in range(3) for bit in range(64)]
    draws = {uniform(*base), *bits}
    assert len(draws) == 1 + 3 * 64
    assert all(0 <= draw < 1 for draw in draws)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_draws_follow_the_distribution(seed):
    probabilities = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    logits = np.log(probabilities).astype(np.float32)
    sampling, n = Sampling(temperature=1.0, seed=seed), 4000
    counts = np.bincount([sample(logits, sampling, range(position)) for position in range(n)], minlength=8)
    chi_square = float(((counts - n * probabilities) ** 2 / (n * probabilities)).sum())
    assert chi_square < 24.32  # the 99.9 % quantile for 7 degrees of freedom; the draws are fixed by the seed


@pytest.mark.parametrize("size", [3, 2000])
def test_the_smallest_and_the_largest_draw_fall_on_tokens_with_weight(monkeypatch, size):
    logits = np.full(size, -np.inf, np.float32)
    logits[[1, size - 2]] = 0
    for share, token in ((0.0, 1), (1 - 2**-53, size - 2)):
        monkeypatch.setattr("gemkit.generate.sampler.uniform", lambda *_, share=share: share)
        assert sample(logits, Sampling(temperature=1.0, seed=0)) == token


def test_rounding_of_the_sums_never_draws_past_the_end(monkeypatch):
    monkeypatch.setattr("gemkit.generate.sampler.uniform", lambda *_: 1 - 2**-53)
    rng = np.random.default_rng(0)
    for size in rng.integers(500, 3000, 300):
        logits = -30 * rng.random(size, dtype=np.float32)  # weights of such a range do not add up exactly in float64
        logits[-1] = 0  # and the last one is far more than the error
        assert sample(logits, Sampling(temperature=1.0, seed=0)) == size - 1


def test_a_draw_from_a_whole_vocabulary_inverts_the_cumulative_distribution():
    logits = np.random.default_rng(0).standard_normal(262_144, dtype=np.float32)
    cumulative = np.cumsum(np.exp(logits.astype(np.float64)))
    for position in range(200):
        share = uniform(3, 0, position)
        below, at = np.searchsorted(cumulative, (share + np.array([-1e-7, 1e-7])) * cumulative[-1])
        # weights are float32, so a cumulative share is good to about 1e-7, less than the share of one token
        assert below <= sample(logits, Sampling(temperature=1.0, seed=3), range(position)) <= at


@given(tied_logits, st.integers(0, 2**64 - 1), st.integers(0, 100))
def test_filters_that_remove_nothing_change_no_draw(logits, seed, position):
    plain = Sampling(temperature=0.8, seed=seed)
    idle = replace(plain, top_k=len(logits), top_p=1.0, min_p=1e-9, logit_bias={0: 0.0})
    assert sample(logits, plain, [0] * position) == sample(logits, idle, [0] * position)


@given(tied_logits)
def test_greedy_is_rank_zero_and_so_is_top_k_one(logits):
    assert sample(logits, GREEDY) == ranks(logits)[0]
    assert candidates(logits, Sampling(temperature=2.0, top_k=1)).ids.tolist() == [ranks(logits)[0]]
    assert candidates(logits, Sampling(temperature=2.0, top_p=0.0)).ids.tolist() == [ranks(logits)[0]]


@given(tied_logits, st.integers(1, 40))
def test_top_k_keeps_exactly_k_ranks(logits, k):
    kept = candidates(logits, Sampling(temperature=1.0, top_k=k)).ids
    assert kept.tolist() == sorted(ranks(logits)[:k])


@pytest.mark.parametrize("k", [1, 64, 4096, 4097, 262_144])
def test_top_k_over_a_whole_vocabulary_of_rounded_logits(k):
    # two decimals of a normal distribution: every value occurs hundreds of times, as in a bf16 model's tail
    logits = np.random.default_rng(k).standard_normal(262_144).round(2).astype(np.float32)
    expected = np.lexsort((np.arange(logits.size), -logits))[:k]
    kept = candidates(logits, Sampling(temperature=1.0, top_k=k)).ids
    assert np.array_equal(kept, np.sort(expected))


@given(
    arrays(np.float32, st.integers(1, 60), elements=st.integers(-12, 12).map(float)),
    st.floats(0.01, 0.99),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_top_p_keeps_the_shortest_run_of_ranks_that_holds_the_mass(logits, top_p, temperature):
    kept = candidates(logits, Sampling(temperature=temperature, top_p=top_p))
    exact = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    exact /= exact.sum()
    best = ranks(logits)
    count = len(kept.ids)
    assert kept.ids.tolist() == sorted(best[:count])
    mass = exact[best].cumsum()
    # float32 weights are off by at most about 1e-6 after exp, so the boundary is too
    assert mass[count - 1] >= top_p - 1e-6
    assert count == 1 or mass[count - 2] < top_p + 1e-6
    assert kept.probabilities.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 12.0])  # from nearly flat to nearly certain
@pytest.mark.parametrize("decimals", [1, 7])  # with one, thousands are equal at every cut
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 0.999])
def test_top_p_over_a_whole_vocabulary(spread, decimals, top_p):
    logits = (spread * np.random.default_rng(7).standard_normal(262_144)).round(decimals).astype(np.float32)
    kept = candidates(logits, Sampling(temperature=1.0, top_p=top_p))
    best = np.lexsort((np.arange(logits.size), -logits))
    assert np.array_equal(kept.ids, np.sort(best[: kept.ids.size]))
    # the weights are the float32 ones that were summed; sums in blocks of float32 are off by less than 1e-7 of them
    mass = np.exp(logits[best] - logits[best[0]]).cumsum(dtype=np.float64)
    assert mass[kept.ids.size - 1] >= (top_p - 1e-7) * mass[-1]
    assert kept.ids.size == 1 or mass[kept.ids.size - 2] < (top_p + 1e-7) * mass[-1]


@pytest.mark.parametrize("temperature", [1e-6, 0.7, 3.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])  # where neighbouring float32 are 0.001 apart
def test_min_p_over_a_whole_vocabulary(temperature, offset):
    logits = (4 * np.random.default_rng(8).standard_normal(262_144) + offset).astype(np.float32)
    for min_p in (1e-9, 0.05, 0.9999, 1.0):
        kept = candidates(logits, Sampling(temperature=temperature, min_p=min_p))
        weights = np.exp((logits - logits.max()) / np.float32(temperature))
        assert np.array_equal(kept.ids, np.flatnonzero(weights >= min_p))
        assert np.array_equal(kept.weights, weights[kept.ids])


def test_min_p_is_a_share_of_the_best():
    logits = np.log(np.array([0.5, 0.26, 0.2, 0.04], np.float32))
    assert candidates(logits, Sampling(temperature=1.0, min_p=0.5)).ids.tolist() == [0, 1]
    assert candidates(logits, Sampling(temperature=1.0, min_p=1.0)).ids.tolist() == [0]


def test_each_filter_works_on_what_the_one_before_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # top-k 2 leaves 0.4 and 0.3, which are 0.571 and 0.429 of what is left: 0.5 is then held by the best alone,
    # while of the whole distribution it would take two.
    assert candidates(logits, Sampling(temperature=1.0, top_p=0.5)).ids.tolist() == [0, 1]
    assert candidates(logits, Sampling(temperature=1.0, top_k=2, top_p=0.5)).ids.tolist() == [0]


def test_temperature_sharpens_and_flattens():
    logits = np.log(np.array([0.8, 0.2], np.float32))
    for temperature, odds in ((0.5, 16.0), (1.0, 4.0), (2.0, 2.0)):
        high, low = candidates(logits, Sampling(temperature=temperature)).probabilities
        assert high / low == pytest.approx(odds, rel=1e-6)  # float32 logits
    assert candidates(logits, Sampling(temperature=1e-6)).probabilities.tolist() == [1.0, 0.0]
    assert candidates(logits, Sampling(temperature=1e6)).probabilities == pytest.approx([0.5, 0.5], abs=1e-6)


def test_a_token_that_occurs_twice_is_penalized_once_and_by_its_sign():
    logits = np.array([2.0, -1.0, 1.5, -1.2], np.float32)
    assert sample(logits, Sampling(repetition_penalty=1.5), [0, 0, 1]) == 2  # 2 / 1.5 < 1.5, and 2 / 1.5**2 too
    assert sample(logits[[1, 3]], Sampling(repetition_penalty=1.5), [0]) == 1  # -1 * 1.5 < -1.2
    assert sample(logits, Sampling(repetition_penalty=1.2), [0, 0, 1]) == 0  # 2 / 1.2 > 1.5 > 2 / 1.2**2
    assert logits[0] == 2  # the caller's logits stay as they were


def test_bias_moves_and_bans():
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    assert sample(logits, Sampling(logit_bias={2: 3.0})) == 2
    assert sample(logits, Sampling(logit_bias={0: -math.inf})) == 1
    ban = Sampling(temperature=5.0, seed=1, logit_bias={1: -math.inf})
    assert {sample(logits, ban, range(n)) for n in range(100)} == {0, 2}


def test_masked_logits_of_either_kind_are_never_drawn():
    logits = np.array([np.finfo(np.float32).min, 1.0, -np.inf, 1.0], np.float32)
    drawn = {sample(logits, Sampling(temperature=0.1, seed=2), range(n)) for n in range(100)}
    assert drawn == {1, 3}


def test_a_sequence_number_gives_another_answer_and_a_seed_repeats_it():
    logits = np.zeros(1000, np.float32)
    first = Sampling(temperature=1.0, seed=4)
    second = replace(first, sequence=1)
    assert sample(logits, first, [1, 2]) == sample(logits, first, [3, 4])  # the position counts, not what is there
    assert sample(logits, first, [1, 2]) != sample(logits, second, [1, 2])
    assert first.seeded() == first
    assert {Sampling().seeded().seed for _ in range(5)} != {Sampling().seeded().seed}


@pytest.mark.parametrize("sampling", [GREEDY, replace(INSTRUCTION_TUNED, seed=0), Sampling(temperature=1.0, seed=0)])
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.0, math.nan, 1.0, math.nan], "NaN for 2 of 4 logits .*token 1"),
        ([math.inf, 0.0], "infinite logit for token 0"),
        ([-math.inf] * 3, "all 3 tokens"),
    ],
)
def test_logits_that_nothing_can_be_drawn_from_are_named(sampling, values, says):
    logits = np.array(values, np.float32)
    with pytest.raises(ModelError, match=says):
        sample(logits, sampling)
    with pytest.raises(ModelError, match=says):
        token_logprob(logits, 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1e-30}, r"0 \(greedy\)"),
        ({"top_k": 0}, "None to keep every token"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.5}, "min_p=-0.5"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
        ({"logit_bias": {3: math.nan}}, r"logit_bias\[3\]=nan"),
        ({"logit_bias": {3: math.inf}}, r"logit_bias\[3\]=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"sequence": None}, "sequence=None"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, says):
    with pytest.raises(ConfigError, match=says):
        Sampling(**settings)


def test_ids_outside_the_vocabulary_are_refused():
    check_ids("stop_ids", [0, np.int64(9)], 10)
    for bad in (-1, 10, 1.0, True, "3"):
        with pytest.raises(ConfigError, match="stop_ids holds"):
            check_ids("stop_ids", [1, bad], 10)


def test_drawing_without_a_seed_is_refused():
    with pytest.raises(ConfigError, match="seeded"):
        sample(np.zeros(3, np.float32), Sampling(temperature=1.0))


@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e4, 1e4, width=32)), st.data())
def test_logprobs_match_torch_in_float64(logits, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    top = data.draw(st.integers(0, len(logits) + 3))
    exact = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    entry = token_logprob(logits, token, top)
    # the terms of the sum are float32, summed in float64: relative 1e-7 of a sum, so absolute 1e-6 of its logarithm
    assert entry.logprob == pytest.approx(exact[token].item(), abs=1e-6, rel=1e-12)
    assert [i for i, _ in entry.top] == ranks(logits)[:top]
    assert dict(entry.top).get(token, entry.logprob) == entry.logprob  # identical, not just close


def test_logsumexp_does_not_overflow():
    assert logsumexp(np.array([1e4, 1e4], np.float32)) == 1e4 + math.log(2)
    assert logsumexp(np.array([-1e4, -math.inf], np.float32)) == -1e4


# ---------------------------------------------------------------- sparse rows


filterable = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 3, 8, 64]),
    top_p=st.sampled_from([1.0, 1.0, 0.6, 0.95]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, 11), st.sampled_from([-math.inf, -2.0, 0.5, 4.0]), max_size=5),
    seed=st.integers(0, 2**64 - 1),
)
any_logits = arrays(np.float32, st.integers(12, 90), elements=few_values | st.floats(-9, 9, width=32))


@given(any_logits, filterable, st.lists(st.integers(0, 11), max_size=9))
def test_a_filtered_row_gives_the_token_of_the_full_row(logits, sampling, history):
    if (some := logits_filter(sampling, history)) is None:
        return
    row = filtered(logits, some)
    try:
        token = sample(logits, sampling, history)
    except ModelError:  # all are banned
        with pytest.raises(ModelError):
            sample(row, sampling, history)
        return
    assert sample(row, sampling, history) == token
    kept, whole = candidates(row, sampling, history), candidates(logits, sampling, history)
    assert np.array_equal(kept.ids, whole.ids)
    assert np.array_equal(kept.weights, whole.weights)


@pytest.mark.parametrize("min_p", [1e-7, 0.05, 0.999])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_no_token_at_the_edge_of_min_p_is_filtered_out(min_p, temperature):
    # neighbouring float32 on both sides of the edge: the weight of some is rounded up to min_p
    edge = np.float32(5 + temperature * math.log(min_p))
    near = (edge.view(np.int32) + np.arange(-40, 40)).astype(np.int32).view(np.float32)
    logits = np.concatenate([[np.float32(5)], near])
    sampling = Sampling(temperature=temperature, min_p=min_p, seed=0)
    kept = candidates(filtered(logits, logits_filter(sampling, [])), sampling)
    assert np.array_equal(kept.ids, candidates(logits, sampling).ids)
    assert 1 < kept.ids.size < logits.size


def test_a_sparse_row_has_no_log_probability():
    with pytest.raises(ConfigError, match="needs all logits"):
        token_logprob(SparseLogits(np.array([3]), np.zeros(1, np.float32)), 3)
