"""The torch executor: each output against the modules, filters, stops, and calls of several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemkit import nn
from gemkit.errors import ConfigError, ModelError, StateError, Stopped
from gemkit.executors.interface import Chunk, LogitsFilter, SparseLogits, StopFlag
from gemkit.executors.torch import TorchExecutor
from gemkit.nn import Batch
from gemkit.nn.layers import Score
from support.outputs import dense
from support.tiny import tiny


def random_module(name: str = "gemma-2-2b") -> nn.Decoder:
    config = tiny(name)
    module = nn.Decoder(replace(config, layers=config.layers[:3]))
    module.score = Score(config.width)
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, 0, 0.3, generator=generator)
    return module.requires_grad_(False)


MODULE = random_module()
EXECUTOR = TorchExecutor(MODULE)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
CHUNKS = [Chunk(2, IDS, rows=3), Chunk(0, IDS[:4], rows=0), Chunk(1, IDS[:2], rows=1)]
ROWS = torch.tensor([5, 6, 7, 13])


def expected(output: str) -> np.ndarray:
    batch = Batch.of([IDS, IDS[:4], IDS[:2]])
    return MODULE(batch, None, ROWS, output=output).numpy()


def test_logits_are_those_of_the_modules():
    outputs = EXECUTOR.run(CHUNKS, EXECUTOR.new_state(3))
    assert outputs.computed.tolist() == [MODULE.config.vocab_size] * 4
    np.testing.assert_allclose(np.stack(outputs.rows), expected("logits"), atol=1e-5)


def test_hidden_states_rewards_and_pooled_embeddings():
    hidden = expected("hidden")
    outputs = EXECUTOR.run(CHUNKS, EXECUTOR.new_state(3), output="hidden")
    np.testing.assert_allclose(np.stack(outputs.rows), hidden, atol=1e-5)
    assert outputs.computed.tolist() == [0] * 4
    rewards = EXECUTOR.run(CHUNKS, EXECUTOR.new_state(3), output="reward").rows
    np.testing.assert_allclose(np.stack(rewards), expected("reward")[:, None], atol=1e-4)
    pooled = EXECUTOR.run(CHUNKS, EXECUTOR.new_state(3), output="pooled").rows  # of the chunks with rows
    np.testing.assert_allclose(np.stack(pooled), [hidden[:3].mean(0), hidden[3]], atol=1e-5)


def test_a_call_without_rows_gives_none_and_is_remembered():
    state = EXECUTOR.new_state(1)
    for output in ("logits", "hidden", "reward", "pooled"):
        assert len(EXECUTOR.run([Chunk(0, [1, 2], rows=0)], state, output=output).rows) == 0
    assert state.lengths == {0: 8}


filters = st.builds(
    LogitsFilter,
    st.integers(1, 400),  # more than the vocabulary too
    st.none() | st.floats(0, 5),
    st.lists(st.integers(0, MODULE.config.vocab_size - 1), max_size=5).map(lambda ids: np.array(ids, np.int64)),
)


@given(some=filters)
def test_a_filtered_row_holds_all_that_its_filter_leaves(some):
    (row,) = EXECUTOR.run([Chunk(0, IDS, filter=some)], EXECUTOR.new_state(1)).rows
    whole = dense(EXECUTOR, [Chunk(0, IDS)], EXECUTOR.new_state(1))[0]
    assert isinstance(row, SparseLogits)
    assert np.array_equal(row.values, whole[row.ids])  # exact
    assert (np.diff(row.ids) > 0).all()
    counted = whole.copy()
    counted[some.always] = -np.inf
    reach = np.sort(counted)[-min(some.top_n, len(counted))] - (some.max_gap or 0)
    must = set(np.flatnonzero(counted >= reach)) | set(some.always)
    assert must <= set(row.ids.tolist())
    if some.max_gap is None:
        assert must == set(row.ids.tolist())


def test_a_row_with_nan_is_left_whole_for_the_sampler_to_refuse():
    module = random_module()
    module.norm.weight.fill_(float("nan"))
    (row,) = TorchExecutor(module).run([Chunk(0, [1], filter=LogitsFilter(1))], module.new_state()).rows
    assert isinstance(row, np.ndarray)
    assert np.isnan(row).any()


def test_a_stop_flag_ends_its_call_and_that_alone():
    """Set from another thread while a block computes: the state is as before, and the next call is as ever."""
    state, flag = EXECUTOR.new_state(1), StopFlag()
    before = dense(EXECUTOR, [Chunk(0, IDS)], EXECUTOR.new_state(1))

    def stop(*_):
        thread = threading.Thread(target=flag.set)
        thread.start()
        thread.join()

    handle = MODULE.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(Stopped, match="stop flag"):
        EXECUTOR.run([Chunk(0, IDS)], state, stop=flag)
    handle.remove()
    assert state.lengths == {0: 0}
    with pytest.raises(Stopped):
        EXECUTOR.run([Chunk(0, IDS)], state, stop=flag)  # it stays set
    assert np.array_equal(dense(EXECUTOR, [Chunk(0, IDS)], state, stop=StopFlag()), before)
    assert not MODULE.layers[0]._forward_pre_hooks


def test_calls_of_threads_take_turns():
    """Many at once in slots of one state; each gives what it gives alone, and no two are computed together."""
    running, most = 0, 0

    def enter(*_):
        nonlocal running, most
        running += 1
        most = max(most, running)

    def leave(*_):
        nonlocal running
        running -= 1

    state, alone = EXECUTOR.new_state(8), dense(EXECUTOR, [Chunk(0, IDS)], EXECUTOR.new_state(1))
    handles = [MODULE.register_forward_pre_hook(enter), MODULE.register_forward_hook(leave)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda slot: dense(EXECUTOR, [Chunk(slot, IDS)], state), range(8)))
    for handle in handles:
        handle.remove()
    assert most == 1
    assert all(np.array_equal(result, alone) for result in results)


def test_misuse_is_refused():
    plain = nn.Decoder(MODULE.config)
    with pytest.raises(ModelError, match="no reward head"):
        TorchExecutor(plain).run([Chunk(0, [1])], plain.new_state(), output="reward")
    with pytest.raises(StateError, match="list is no state of this executor"):
        EXECUTOR.run([Chunk(0, [1])], [])
    with pytest.raises(StateError, match=r"slot 3 of a state with slots \[0\]"):
        EXECUTOR.run([Chunk(3, [1])], EXECUTOR.new_state(1))
    with pytest.raises(ConfigError, match="is cut by a chunk"):
        EXECUTOR.run([Chunk(0, [1, 2], spans=[(0, 3)])], EXECUTOR.new_state(1))


@pytest.mark.parametrize(("reach", "window", "seen"), [("past", None, 0), ("both", 3, 2), ("all", None, 7)])
def test_a_layer_reaches_as_far_as_its_data_says(reach, window, seen):
    """One layer: another token changes the rows that see it, and what sees its followers is computed whole."""
    config = MODULE.config
    (layer, *_) = config.layers
    layer = replace(layer, mixer=replace(layer.mixer, reach=reach, window=window))
    module = nn.Decoder(replace(config, layers=(layer,)))
    for name, weight in MODULE.named_parameters():
        if name in dict(module.named_parameters()):
            module.get_parameter(name).data.copy_(weight)
    executor = TorchExecutor(module)
    state = executor.new_state(1)
    before = dense(executor, [Chunk(0, IDS, rows=8)], state, output="hidden")
    after = dense(executor, [Chunk(0, [*IDS[:-1], 0], rows=8)], executor.new_state(1), output="hidden")
    changed = [int(row) for row in np.flatnonzero(np.abs(before - after).max(1) > 0)]
    assert changed == list(range(7 - seen, 8))
    if seen:
        with pytest.raises(StateError, match="goes on at position 8, but its tokens see those after them"):
            executor.run([Chunk(0, [1])], state)
        assert state.lengths == {0: 8}
