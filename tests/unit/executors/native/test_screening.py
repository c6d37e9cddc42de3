"""The screened head: its sketch, and the logits that a filter leaves, exact however they are computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gemkit import nn
from gemkit.executors.interface import Chunk, LogitsFilter, SparseLogits
from gemkit.executors.native import screening
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.generate import Sampling
from gemkit.generate.sampler import logits_filter
from gemkit.ops import Quantized
from support.native_models import ids, of_whole_blocks, q8_0, randomised
from support.outputs import dense
from support.tiny import tiny


def test_signs_are_ones_the_same_every_time():
    signs = screening.signs(2048)
    assert signs.dtype == np.float32
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.1
    assert np.array_equal(signs, screening.signs(2048))
    assert np.array_equal(signs[:640], screening.signs(640))


def test_bytes_of_a_sketch():
    """For 16 rows: a scale each, and 2 bits a weight in whole vectors."""
    assert screening.tile_bytes(640) == 64 + 640 * 16 * 2 // 8
    assert screening.nbytes(33, 640) == 3 * screening.tile_bytes(640)


@pytest.fixture(scope="module")
def wide_model():
    """A decoder whose table is large enough to be screened, with some rows that stand out, as words do in a context."""
    module = nn.Decoder(of_whole_blocks(replace(tiny("gemma-2-2b"), vocab_size=40_000)))
    generator = torch.Generator().manual_seed(3)
    for path, weight in list(module.named_parameters()):
        small = "norm" in path
        value = torch.randn(weight.shape, generator=generator) * (0.3 if small else weight.shape[-1] ** -0.5)
        if path.startswith("embed_tokens"):
            value *= 4
            value[::100] *= 8
        held = q8_0(value) if "_proj" in path or path.startswith("embed_tokens") else value
        module.set_param(path, held if isinstance(held, Quantized) else torch.nn.Parameter(held, requires_grad=False))
    return module.config, pack(module)


@pytest.fixture(scope="module")
def wide(wide_model):
    return NativeExecutor(*wide_model)


def left(logits_V: np.ndarray, some: LogitsFilter) -> SparseLogits:
    """The definition: the top n and all their ties, what is within the gap of the largest, and what is always kept."""
    counted = np.ones(len(logits_V), bool)
    counted[some.always] = False
    ranked = np.sort(logits_V[counted])[::-1]
    floor = ranked[some.top_n - 1]
    if some.max_gap is not None:
        floor = min(floor, ranked[0] - np.float32(some.max_gap))
    found = np.flatnonzero(~counted | (logits_V >= floor))
    return SparseLogits(found, logits_V[found])


def assert_same(got: SparseLogits, expected: SparseLogits) -> None:
    assert got.ids.dtype == np.int64
    assert got.values.dtype == np.float32
    assert np.array_equal(got.ids, expected.ids)
    assert np.array_equal(got.values, expected.values)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.0, top_k=20),
        Sampling(temperature=0.7, top_k=64, top_p=0.9),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(logit_bias={7: -np.inf, 39_999: 3.0}),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.2, top_k=5, repetition_penalty=0.8, logit_bias={5: 2.0}),
    ],
)
def test_a_screened_row_is_what_the_filter_leaves_of_all_logits(wide, sampling):
    (prompt,) = ids(40, seed=2)
    state, full = wide.new_state(1), wide.new_state(1)
    screened = 0
    for i, token in enumerate(prompt):
        some = logits_filter(sampling, prompt[: i + 1])
        outputs = wide.run([Chunk(0, [token], filter=some)], state)
        screened += outputs.computed[0] < wide.decoder.vocab_size
        assert_same(outputs.rows[0], left(dense(wide, [Chunk(0, [token])], full)[0], some))
    assert screened > 30


FILTERS = [
    LogitsFilter(1),
    LogitsFilter(64, always=np.array([39_999, 5, 5, 7])),
    None,
    LogitsFilter(1, 3.0),
    LogitsFilter(5000),
    LogitsFilter(2, 1e9),
]


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_with_and_without_a_filter_in_one_call(wide, wide_model, monkeypatch, threads):
    """No row can tell what else is in its call, or how many threads compute it."""
    monkeypatch.setenv("GEMKIT_THREADS", str(threads))
    executor = NativeExecutor(*wide_model)
    prompts = ids(*[9] * len(FILTERS), seed=4)
    chunks = [Chunk(i, prompt, 2, filter=FILTERS[i]) for i, prompt in enumerate(prompts)]
    outputs = executor.run(chunks, executor.new_state(len(chunks)))
    whole = dense(wide, [replace(chunk, filter=None) for chunk in chunks], wide.new_state(len(chunks)))
    assert outputs.computed.tolist() == [wide.decoder.vocab_size] * len(outputs.rows)
    for row, (got, expected) in enumerate(zip(outputs.rows, whole, strict=True)):
        if (some := FILTERS[row // 2]) is None:
            assert np.array_equal(got, expected)
        else:
            assert_same(got, left(expected, some))


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b"])
def test_a_small_table_is_filtered_without_screening(name):
    module = randomised(name)
    executor = NativeExecutor(module.config, pack(module))
    (prompt,) = ids(30)
    whole = dense(executor, [Chunk(0, prompt, 30)], executor.new_state(1))
    for some in (LogitsFilter(1), LogitsFilter(17, 0.5), LogitsFilter(1000, always=np.array([3]))):
        rows = executor.run([Chunk(0, prompt, 30, filter=some)], executor.new_state(1)).rows
        for got, expected in zip(rows, whole, strict=True):
            assert_same(got, left(expected, replace(some, top_n=min(some.top_n, 319))))


def test_equal_logits_are_all_left(wide_model):
    """A table of equal rows: every one ties with the best."""
    module = randomised("gemma-2b")
    table = module.embed_tokens.weight.detach().clone()
    table[:] = table[0]
    module.set_param("embed_tokens.weight", torch.nn.Parameter(table, requires_grad=False))
    executor = NativeExecutor(module.config, pack(module))
    (row,) = executor.run([Chunk(0, [1, 2], filter=LogitsFilter(1))], executor.new_state(1)).rows
    assert np.array_equal(row.ids, np.arange(module.config.vocab_size))


def test_what_is_not_a_number_is_not_left_out():
    """The sampler is to see it and say so."""
    module = randomised("gemma-2b")
    weight = torch.full((module.config.width,), torch.nan)
    module.norm.set_param("weight", torch.nn.Parameter(weight, requires_grad=False))
    executor = NativeExecutor(module.config, pack(module))
    (row,) = executor.run([Chunk(0, [1, 2], filter=LogitsFilter(1))], executor.new_state(1)).rows
    assert np.isnan(row.values).any()
