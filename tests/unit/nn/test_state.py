"""What a state promises: whatever way tokens come in, the logits are those of the whole sequence at once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemkit import family, nn
from gemkit.errors import ConfigError, StateError
from gemkit.family import Global, Rope, Sliding
from gemkit.nn import Batch

WINDOW = 5
CONFIG = family.Decoder(
    vocab_size=64,
    width=24,
    ffw_width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(Sliding(WINDOW), Global(Rope(1e6)), Sliding(1), Sliding(WINDOW)),
    max_context=256,
    query_scale=8**-0.5,
    post_norms=True,
    qk_norm=True,
    final_softcap=30.0,
)


def random_module(config: family.Decoder = CONFIG, seed: int = 0) -> nn.Decoder:
    module = nn.Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.3, generator=generator)
    return module.requires_grad_(False)


MODULE = random_module()


def whole(ids: list[int]) -> torch.Tensor:
    return MODULE(Batch.of([ids]))


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())  # sums in another order


def feed(state: nn.State, ids: list[int], slot: int = 0) -> torch.Tensor:
    return MODULE(Batch.of([ids], offsets=[state.lengths[slot]], slots=[slot]), state)


sequences = st.lists(st.integers(0, 63), min_size=1, max_size=40)


@given(ids=sequences, cuts=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_chunks_of_any_sizes_equal_the_whole(ids, cuts):
    state = MODULE.new_state()
    got, at = [], 0
    while at < len(ids):
        size = cuts[at % len(cuts)]
        got.append(feed(state, ids[at : at + size]))
        at += size
    assert_same(torch.cat(got), whole(ids))
    assert state.lengths == [len(ids)]


@given(batch=st.lists(sequences, min_size=1, max_size=4), order=st.randoms(use_true_random=False))
def test_interleaved_sequences_do_not_touch_each_other(batch, order):
    """Each step continues a random choice of the sequences by random lengths, in random slots."""
    slots = order.sample(range(6), len(batch))
    state = MODULE.new_state(6)
    got: list[list[torch.Tensor]] = [[] for _ in batch]
    while live := [i for i, s in enumerate(slots) if state.lengths[s] < len(batch[i])]:
        chosen = order.sample(live, order.randint(1, len(live)))
        starts = [state.lengths[slots[i]] for i in chosen]
        parts = [batch[i][a : a + order.randint(1, 9)] for i, a in zip(chosen, starts, strict=True)]
        logits = MODULE(Batch.of(parts, offsets=starts, slots=[slots[i] for i in chosen]), state)
        for i, rows in zip(chosen, logits.split([len(p) for p in parts]), strict=True):
            got[i].append(rows)
    for rows, ids in zip(got, batch, strict=True):
        assert_same(torch.cat(rows), whole(ids))


@given(ids=sequences, draft=st.lists(st.integers(0, 63), min_size=1, max_size=6), after=sequences)
def test_a_rolled_back_draft_never_was(ids, draft, after):
    state = MODULE.new_state(room=6)
    feed(state, ids)
    mark = state.mark(0)
    for token in draft:  # one by one, so that sliding layers compact on the way
        feed(state, [token])
    state.rollback(mark)
    assert_same(feed(state, after), whole(ids + after)[len(ids) :])


@given(ids=sequences, left=sequences, right=sequences)
def test_forks_go_their_own_ways(ids, left, right):
    state = MODULE.new_state(2)
    feed(state, ids)
    state.fork(0, 1)
    got_left, got_right = feed(state, left, 0), feed(state, right, 1)
    assert_same(got_left, whole(ids + left)[len(ids) :])
    assert_same(got_right, whole(ids + right)[len(ids) :])


def test_sliding_layers_stay_small_and_global_ones_grow():
    module = random_module(replace(CONFIG, layers=(Sliding(WINDOW),)))
    state = module.new_state()
    sizes = set()
    for position in range(300):
        module(Batch.of([[position % 64]], offsets=[position]), state)
        sizes.add(state.nbytes)
    row = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert max(sizes) <= 2 * WINDOW * row
    state.free(0)
    assert (state.nbytes, state.lengths) == (0, [0])


def test_after_a_long_chunk_a_sliding_layer_shrinks_again():
    module = random_module(replace(CONFIG, layers=(Sliding(WINDOW),)))
    state = module.new_state()
    module(Batch.of([[1] * 200]), state)
    module(Batch.of([[1]], offsets=[200]), state)
    assert state.nbytes <= 2 * WINDOW * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4


def test_an_interrupted_step_can_be_repeated(monkeypatch):
    """A forward pass that dies between two layers leaves the state as good as it was."""
    ids = list(range(30))
    state = MODULE.new_state()
    feed(state, ids[:20])
    with monkeypatch.context() as patch:
        patch.setattr(MODULE.layers[2].mlp, "forward", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            feed(state, ids[20:25])
    assert state.lengths == [20]
    assert_same(feed(state, ids[20:]), whole(ids)[20:])


def test_rolling_back_too_far_is_refused_and_changes_nothing():
    ids = list(range(40))
    state = MODULE.new_state(room=2)
    feed(state, ids[:20])
    mark = state.mark(0)
    for token in ids[20:39]:
        feed(state, [token])
    with pytest.raises(StateError, match=r"window of .* make the state with room="):
        state.rollback(mark)
    assert_same(feed(state, ids[39:]), whole(ids)[39:])


def test_misuse_is_refused():
    state = MODULE.new_state()
    with pytest.raises(StateError, match="remembers 0 tokens but the batch continues at position 3"):
        MODULE(Batch.of([[1]], offsets=[3]), state)
    with pytest.raises(StateError, match="slot 1 of a state with slots 0 to 0"):
        MODULE(Batch.of([[1]], slots=[1]), state)
    with pytest.raises(StateError, match="another model"):
        random_module(replace(CONFIG, ffw_width=16))(Batch.of([[1]]), state)
    with pytest.raises(StateError, match="slots=0"):
        MODULE.new_state(0)
    feed(state, [1, 2, 3])
    mark = state.mark(0)
    state.free(0)
    with pytest.raises(StateError, match="holds 0 tokens, the mark is at 3"):
        state.rollback(mark)


def test_training_with_a_state_is_refused():
    module = random_module().requires_grad_(True)
    with pytest.raises(StateError, match="records gradients"):
        module(Batch.of([[1, 2]]), module.new_state())
    with torch.inference_mode():
        module(Batch.of([[1, 2]]), module.new_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one sequence"),
        (([[1], []],), "at least one token"),
        (([[1]], {"offsets": [0, 1]}), "must agree"),
        (([[1], [2]], {"slots": [3, 3]}), "must differ"),
        (([[1]], {"offsets": [-1]}), "0 or more"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    sequences, options = (*arguments, {})[:2]
    with pytest.raises(ConfigError, match=message):
        Batch.of(sequences, **options)


def test_a_batch_lays_sequences_end_to_end():
    batch = Batch.of([[7, 8, 9], [5]], offsets=[0, 4], slots=[2, 0])
    assert batch.tokens.tolist() == [7, 8, 9, 5]
    assert batch.positions.tolist() == [0, 1, 2, 4]
    assert list(batch.spans()) == [(0, 3, 2, 0), (3, 4, 0, 4)]
    assert len(batch) == 4


@settings(max_examples=20)
@given(ids=st.lists(sequences, min_size=1, max_size=3))
def test_a_rectangle_is_its_rows(ids):
    length = min(map(len, ids))
    rectangle = torch.tensor([s[:length] for s in ids])
    for row, logits in zip(rectangle, MODULE(rectangle), strict=True):
        assert_same(logits, whole(row.tolist()))
