"""What a state promises: whatever way tokens come in, the logits are those of the whole sequence at once."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gemkit import family, nn
from gemkit.errors import ConfigError, StateError
from gemkit.family import Global, Layer, Mixer, Mlp, Recurrent, Rope, Sliding, repeat, replace_layers
from gemkit.nn import Batch

WINDOW = 5
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 8**-0.5, "qk_norm": True}


def layers(*mixers: Mixer, ffw_width: int = 32) -> tuple[Layer, ...]:
    return repeat(*mixers, ffw=Mlp(ffw_width), total=len(mixers))


CONFIG = family.DecoderConfig(
    vocab_size=64,
    width=24,
    layers=layers(
        Sliding(WINDOW, **HEADS),
        Recurrent(32, num_blocks=4),
        Global(rope=Rope(1e6), **HEADS),
        Sliding(1, **HEADS),
        Recurrent(16, num_blocks=2, conv_width=2),
        Sliding(WINDOW, **HEADS),
    ),
    max_context=256,
    post_norms=True,
    final_softcap=30.0,
)


def random_module(config: family.DecoderConfig = CONFIG, seed: int = 0) -> nn.Decoder:
    module = nn.Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, 0, 0.3, generator=generator)
        if "recurrent_param" in name:  # decays of 0.06 to 0.999 a token: some channels remember the whole sequence
            torch.nn.init.uniform_(p, -8, 0, generator=generator)
    return module.requires_grad_(False)


MODULE = random_module()


def whole(ids: list[int]) -> torch.Tensor:
    return MODULE(Batch.of([ids]))


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())  # sums in another order


ATTENDING = layers(Sliding(WINDOW, **HEADS), Global(rope=Rope(1e6), **HEADS), Sliding(1, **HEADS))
ATTENTIVE = random_module(replace(CONFIG, layers=ATTENDING))


def feed(state: nn.State, ids: list[int], slot: int = 0, module: nn.Decoder = MODULE) -> torch.Tensor:
    return module(Batch.of([ids], offsets=[state.lengths[slot]], slots=[slot]), state)


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
    assert state.lengths == {0: len(ids)}


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


@pytest.mark.parametrize("recurrent", [False, True])
@given(ids=sequences, draft=st.lists(st.integers(0, 63), min_size=1, max_size=6), after=sequences, data=st.data())
def test_the_first_tokens_of_a_draft_may_stay(recurrent, ids, draft, after, data):
    module = MODULE if recurrent else ATTENTIVE
    state = module.new_state(room=6)
    feed(state, ids, module=module)
    mark = state.mark(0)
    feed(state, draft, module=module)
    keep = data.draw(st.integers(0, len(draft)))
    state.rollback(mark, keep)
    kept = [*ids, *draft[:keep]][: state.lengths[0]]
    assert len(kept) == len(ids) + (0 if recurrent else keep)  # a recurrent layer cannot stop on the way
    expected = module(Batch.of([kept + after]))[len(kept) :]
    assert_same(feed(state, after, module=module), expected)


@given(ids=sequences, left=sequences, right=sequences)
def test_forks_go_their_own_ways(ids, left, right):
    state = MODULE.new_state(2)
    feed(state, ids)
    state.fork(0, 1)
    got_left, got_right = feed(state, left, 0), feed(state, right, 1)
    assert_same(got_left, whole(ids + left)[len(ids) :])
    assert_same(got_right, whole(ids + right)[len(ids) :])


@given(batch=st.lists(sequences, min_size=1, max_size=3), after=sequences, free=st.integers(0, 2))
def test_a_saved_state_goes_on_as_if_nothing_had_been(tmp_path_factory, batch, after, free):
    """Saved in the middle, with one slot or none empty, and rolled back to a mark of before in the restored one."""
    state = MODULE.new_state(3, room=4)
    for slot, ids in enumerate(batch):
        feed(state, ids, slot)
    state.free(free)
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    assert state.save(path) == path
    again = nn.State.load(path, CONFIG)
    assert again.lengths == state.lengths
    for slot, ids in enumerate(batch):
        before = [] if slot == free else ids
        expected = whole(before + after)[len(before) :]
        mark = again.mark(slot)
        feed(again, after[:4], slot)
        again.rollback(mark)
        for each in (state, again):
            assert_same(feed(each, after, slot), expected)


def test_a_restored_state_holds_the_rows_in_use_only(tmp_path):
    state = MODULE.new_state()
    feed(state, [1] * 500)
    feed(state, [2])
    state.save(tmp_path / "state")
    again = nn.State.load(tmp_path / "state", CONFIG)
    assert again.nbytes < state.nbytes
    assert abs((tmp_path / "state").stat().st_size - again.nbytes) < 5_000  # the header
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


@pytest.fixture
def saved(tmp_path):
    state = MODULE.new_state(2)
    feed(state, list(range(20)), slot=1)
    return state.save(tmp_path / "state")


def rewrite(path, change):
    """The same file with other tensors or another manifest."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        manifest = json.loads(file.metadata()["gemkit.state"])
    change(tensors, manifest)
    save_file(tensors, path, {"gemkit.state": json.dumps(manifest)})


def test_a_state_of_another_model_is_refused(saved):
    with pytest.raises(StateError, match="state of another model"):
        nn.State.load(saved, replace_layers(CONFIG, ffw={"width": 16}))


def test_a_truncated_state_is_refused(saved):
    """At every length, and never with another error."""
    data = saved.read_bytes()
    for length in (*range(0, len(data), 997), len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(StateError, match="cannot be read as a state"):
            nn.State.load(saved, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("1.0.keys"), r"slot 1, layer 0: holds \['values'\], must hold"),
        (lambda t, m: t.pop("1.4.hidden"), "slot 1, layer 4: holds"),
        (lambda t, m: t.update({"1.1.hidden": torch.zeros(31)}), r"layer 1.hidden is \(31,\)"),
        (lambda t, m: t.update({"1.1.hidden": torch.zeros(32, dtype=torch.bfloat16)}), "layer 1.hidden is .*bfloat16"),
        (lambda t, m: t.update({"1.1.tail": torch.zeros(3, 32, dtype=torch.int64)}), "layer 1.tail is .*int64"),
        (lambda t, m: t.update({"1.2.keys": torch.zeros(20, 2, 4)}), "layer 2.keys is"),
        (lambda t, m: t.update({"1.2.values": torch.zeros(19, 2, 8)}), "layer 2.values is"),
        (lambda t, m: t.update({"1.2.keys": torch.zeros(19, 2, 8)}), "layer 2: holds 19 of 20 positions"),
        (lambda t, m: t.update({"1.0.keys": torch.zeros(3, 2, 8)}), "layer 0: holds 3 of 20 positions"),
        (lambda t, m: t.update({"1.0.keys": torch.tensor(1.0)}), "layer 0: holds 0 of 20 positions"),
        (lambda t, m: t.update({"0.0.keys": torch.zeros(1)}), "0.0.keys belongs nowhere"),
        (lambda t, m: m.update(version=2), "version 2 of the format"),
        (lambda t, m: m.update(lengths=[0, -1]), "manifest is damaged"),
        (lambda t, m: m.update(lengths=[]), "manifest is damaged"),
        (lambda t, m: m.update(room="much"), "manifest is damaged"),
        (lambda t, m: m.pop("lengths"), "manifest is damaged"),
        (lambda t, m: m.update(lengths=[0, 10**18]), "positions, must hold"),
        (lambda t, m: m.update(lengths=3), "manifest is damaged"),
    ],
)
def test_a_damaged_state_is_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(StateError, match=message):
        nn.State.load(saved, CONFIG)


def test_files_that_are_no_state_are_refused(tmp_path):
    with pytest.raises(StateError, match="cannot be read as a state"):
        nn.State.load(tmp_path / "missing", CONFIG)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(StateError, match="but no state"):
        nn.State.load(tmp_path / "weights", CONFIG)
    with pytest.raises(StateError, match="cannot write"):
        MODULE.new_state().save(tmp_path / "no folder" / "state")


def test_sliding_layers_stay_small_and_global_ones_grow():
    module = random_module(replace(CONFIG, layers=layers(Sliding(WINDOW, **HEADS))))
    state = module.new_state()
    sizes = set()
    for position in range(300):
        module(Batch.of([[position % 64]], offsets=[position]), state)
        sizes.add(state.nbytes)
    row = 2 * HEADS["kv_heads"] * HEADS["head_dim"] * 4
    assert max(sizes) <= 2 * WINDOW * row
    state.free(0)
    assert (state.nbytes, state.lengths) == (0, {0: 0})


def test_after_a_long_chunk_a_sliding_layer_shrinks_again():
    module = random_module(replace(CONFIG, layers=layers(Sliding(WINDOW, **HEADS))))
    state = module.new_state()
    module(Batch.of([[1] * 200]), state)
    module(Batch.of([[1]], offsets=[200]), state)
    assert state.nbytes <= 2 * WINDOW * 2 * HEADS["kv_heads"] * HEADS["head_dim"] * 4


@pytest.mark.parametrize("length", [0, 1, 20])
def test_an_interrupted_step_never_was(monkeypatch, tmp_path, length):
    """A forward pass that dies between two layers leaves the state as good as it was: to go on, to copy, to save."""
    ids = list(range(30))
    state = MODULE.new_state(2)
    if length:
        feed(state, ids[:length])
    with monkeypatch.context() as patch:
        patch.setattr(MODULE.layers[2].mlp, "forward", lambda x: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            feed(state, ids[20:] if length == 20 else ids[length : length + 5])
    assert state.lengths == {0: length, 1: 0}
    state.fork(0, 1)
    again = nn.State.load(state.save(tmp_path / "state"), CONFIG)
    for each, slot in ((state, 0), (state, 1), (again, 0)):
        assert_same(feed(each, ids[length:], slot), whole(ids)[length:])


def test_recurrent_layers_never_grow():
    module = random_module(replace(CONFIG, layers=layers(Recurrent(32, num_blocks=4))))
    state = module.new_state()
    sizes = set()
    for chunk in (1, 2, 300, 5):
        module(Batch.of([[1] * chunk], offsets=[state.lengths[0]]), state)
        sizes.add(state.nbytes)
    assert sizes == {(32 + 3 * 32) * 4}
    state.free(0)
    assert (state.nbytes, state.lengths) == (0, {0: 0})


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
        random_module(replace_layers(CONFIG, ffw={"width": 16}))(Batch.of([[1]]), state)
    with pytest.raises(StateError, match="slots=0"):
        MODULE.new_state(0)
    feed(state, [1, 2, 3])
    mark = state.mark(0)
    state.free(0)
    with pytest.raises(StateError, match="holds 0 tokens, the mark is at 3"):
        state.rollback(mark)


@pytest.mark.parametrize("layer", CONFIG.layers[:3], ids=str)
def test_training_with_a_state_is_refused(layer):
    module = random_module(replace(CONFIG, layers=(layer,))).requires_grad_(True)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": [0, 2, 1, 3]}, r"starts=\[0, 2, 1, 3\] must rise from 0 to the number of tokens, 3"),
        ({"starts": [0, 1, 1, 3]}, "must rise"),
        ({"starts": [1, 2, 3]}, "must rise from 0"),
        ({"starts": [0, 1, 2]}, "number of tokens, 3"),
        ({"starts": [0]}, "must rise"),
        ({"starts": [0, 3]}, "1 sequences, but 3 positions, 2 offsets and 2 slots"),
        ({"positions": [0, 1]}, "2 positions"),
        ({"spans": [[1, 3]]}, r"spans=\[\[1, 3\]\] are cut by the borders of sequences \[0, 2, 3\]"),
        ({"spans": [[0, 1], [1, 3]]}, "are cut by the borders"),
        ({"spans": [[2, 4]]}, r"spans=\[\[2, 4\]\] must be rows of the 3, ascending and disjoint"),
        ({"spans": [[-1, 1]]}, "ascending and disjoint"),
        ({"spans": [[1, 1]]}, "ascending and disjoint"),
        ({"spans": [[0, 2], [1, 2]]}, "ascending and disjoint"),
        ({"spans": [[2, 3], [0, 1]]}, "ascending and disjoint"),
    ],
)
def test_boundaries_that_cannot_be(change, message):
    fields = {"tokens": [7, 8, 9], "positions": [0, 1, 0], "starts": [0, 2, 3]}
    fields |= {"offsets": [0, 0], "slots": [0, 1], "spans": [], "image_rows": [], **change}
    with pytest.raises(ConfigError, match=message):
        Batch(**{name: torch.tensor(values) for name, values in fields.items()})


def test_a_batch_lays_sequences_end_to_end():
    batch = Batch.of([[7, 8, 9], [5]], offsets=[0, 4], slots=[2, 0])
    assert batch.tokens.tolist() == [7, 8, 9, 5]
    assert batch.positions.tolist() == [0, 1, 2, 4]
    assert list(batch.sequences()) == [(0, 3, 2, 0), (3, 4, 0, 4)]
    assert len(batch) == 4


@settings(max_examples=20)
@given(ids=st.lists(sequences, min_size=1, max_size=3))
def test_a_rectangle_is_its_rows(ids):
    length = min(map(len, ids))
    rectangle = torch.tensor([s[:length] for s in ids])
    for row, logits in zip(rectangle, MODULE(rectangle), strict=True):
        assert_same(logits, whole(row.tolist()))
