"""What a state promises: whatever way tokens come in, the logits are those of the whole sequence at once."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gemkit import family, nn
from gemkit.errors import StateError
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


drafts = st.lists(st.integers(0, 63), min_size=1, max_size=12)


@given(ids=sequences, draft=drafts, after=sequences)
def test_a_draft_that_was_taken_back_never_was(ids, draft, after):
    state = MODULE.new_state()
    feed(state, ids)
    snapshot = state.snapshot(0)
    for token in draft:  # one by one, so that sliding layers move on the way
        feed(state, [token])
    assert state.restore(snapshot, 0) == 0
    assert_same(feed(state, after), whole(ids + after)[len(ids) :])


@pytest.mark.parametrize("recurrent", [False, True])
@given(ids=sequences, draft=drafts, after=sequences, data=st.data())
def test_the_first_tokens_of_a_draft_may_stay(recurrent, ids, draft, after, data):
    module = MODULE if recurrent else ATTENTIVE
    state = module.new_state()
    feed(state, ids, module=module)
    snapshot = state.snapshot(0)
    feed(state, draft, module=module)
    keep = data.draw(st.integers(0, len(draft)))
    state.restore(snapshot, 0, keep=keep)
    kept = [*ids, *draft[:keep]][: state.lengths[0]]
    assert len(kept) == len(ids) + (0 if recurrent else keep)  # a recurrent layer cannot stop on the way
    expected = module(Batch.of([kept + after]))[len(kept) :]
    assert_same(feed(state, after, module=module), expected)


def test_tokens_that_a_window_has_dropped_do_not_stay():
    state, ids = ATTENTIVE.new_state(), list(range(40))
    feed(state, ids[:10], module=ATTENTIVE)
    snapshot = state.snapshot(0)
    for token in ids[10:]:
        feed(state, [token], module=ATTENTIVE)
    state.restore(snapshot, 0, keep=2)
    assert state.lengths == {0: 10}
    assert_same(feed(state, ids[10:], module=ATTENTIVE), ATTENTIVE(Batch.of([ids]))[10:])


def test_a_short_draft_copies_nothing():
    """Speculation takes a snapshot a step: as long as the buffer has room, that costs no memory."""
    module = random_module(replace(CONFIG, layers=ATTENDING[:2]))
    state = module.new_state()
    feed(state, [1] * 20, module=module)
    feed(state, [1], module=module)
    held = state.nbytes
    snapshot = state.snapshot(0)
    assert state.needed(0, 2) == 0
    feed(state, [1, 2], module=module)
    state.restore(snapshot, 0, keep=1)
    del snapshot
    assert (state.lengths, state.nbytes) == ({0: 22}, held)


@given(ids=sequences, left=sequences, right=sequences)
def test_copies_go_their_own_ways(ids, left, right):
    state = MODULE.new_state(1)
    feed(state, ids)
    held = state.nbytes
    other = state.restore(state.snapshot(0))
    assert (other, state.lengths) == (1, {0: len(ids), 1: len(ids)})
    assert (state.nbytes, state.unique(0), state.unique(1)) == (held, 0, 0)
    got_left, got_right = feed(state, left, 0), feed(state, right, 1)
    assert_same(got_left, whole(ids + left)[len(ids) :])
    assert_same(got_right, whole(ids + right)[len(ids) :])


class Machine:
    """A state beside the plain lists of what its slots and snapshots must remember."""

    def __init__(self, module: nn.Decoder):
        self.module, self.state = module, module.new_state(0)
        self.slots: dict[int, list[int]] = {}
        self.snapshots: list[tuple[Any, list[int]]] = []

    def feed(self, slot: int, ids: list[int]) -> None:
        needed, before = self.state.needed(slot, len(ids)), self.state.nbytes
        logits = feed(self.state, ids, slot, self.module)
        assert self.state.nbytes <= before + needed
        history = self.slots[slot] = self.slots[slot] + ids
        assert_same(logits, self.module(Batch.of([history]))[-len(ids) :])

    def act(self, action: str, random: Any) -> None:
        slots, state = sorted(self.slots), self.state
        if action == "add" or not slots:
            slot = state.add()
            assert slot not in self.slots
            self.slots[slot] = []
            return
        slot = random.choice(slots)
        match action:
            case "free":
                before, unique = state.nbytes, state.unique(slot)
                state.free(slot)
                del self.slots[slot]
                assert state.nbytes == before - unique
            case "feed":
                self.feed(slot, [random.randrange(64) for _ in range(random.randint(1, 9))])
            case "snapshot":
                self.snapshots.append((state.snapshot(slot), self.slots[slot]))
            case "drop" if self.snapshots:
                gone, _ = self.snapshots.pop(random.randrange(len(self.snapshots)))
                before, unique = state.nbytes, state.unique(gone)
                del gone
                assert state.nbytes == before - unique
            case "restore" if self.snapshots:
                snapshot, ids = random.choice(self.snapshots)
                into = random.choice([None, slot])
                self.slots[state.restore(snapshot, into)] = ids
            case "keep":
                snapshot, ids = state.snapshot(slot), self.slots[slot]
                self.feed(slot, [random.randrange(64) for _ in range(random.randint(1, 9))])
                state.restore(snapshot, slot, keep=random.randint(0, len(self.slots[slot]) - len(ids)))
                self.slots[slot] = self.slots[slot][: state.lengths[slot]]
                assert state.lengths[slot] >= len(ids)
        assert state.lengths == {slot: len(ids) for slot, ids in self.slots.items()}


ACTIONS = ["add", "free", "feed", "feed", "feed", "snapshot", "drop", "restore", "keep"]


@pytest.mark.parametrize("module", [MODULE, ATTENTIVE], ids=["recurrent", "attentive"])
@settings(max_examples=40)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=25), random=st.randoms(use_true_random=False))
def test_whatever_comes_and_goes_every_slot_is_its_own_sequence(module, actions, random):
    """Random adds, frees, chunks, snapshots and restores against all of each sequence computed anew."""
    machine = Machine(module)
    for action in actions:
        machine.act(action, random)
    for slot in sorted(machine.slots):
        machine.feed(slot, [1, 2])
    machine.snapshots.clear()
    for slot in sorted(machine.slots):
        machine.state.free(slot)
    assert (machine.state.nbytes, machine.state.lengths) == (0, {})


@given(batch=st.lists(sequences, min_size=1, max_size=3), after=sequences)
def test_a_saved_snapshot_goes_on_as_if_nothing_had_been(tmp_path_factory, batch, after):
    """In another state, beside what that one remembers already, and again from the same snapshot."""
    state, other = MODULE.new_state(3), MODULE.new_state(1)
    feed(other, [5, 6, 7])
    for slot, ids in enumerate(batch):
        feed(state, ids, slot)
        path = tmp_path_factory.mktemp("state") / "state.safetensors"
        assert state.snapshot(slot).save(path) == path
        snapshot = other.load(path)
        assert snapshot.length == len(ids)
        expected = whole(ids + after)[len(ids) :]
        for _ in range(2):
            assert_same(feed(other, after, other.restore(snapshot)), expected)
        assert_same(feed(state, after, slot), expected)
    assert_same(feed(other, after), whole([5, 6, 7, *after])[3:])


def test_a_loaded_snapshot_holds_the_rows_in_use_only(tmp_path):
    state, again = MODULE.new_state(), MODULE.new_state(0)
    feed(state, [1] * 500)
    feed(state, [2])
    state.snapshot(0).save(tmp_path / "state")
    snapshot = again.load(tmp_path / "state")
    assert again.nbytes == again.unique(snapshot) < state.nbytes
    assert abs((tmp_path / "state").stat().st_size - again.nbytes) < 5_000  # the header
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    del snapshot
    assert again.nbytes == 0


@pytest.fixture
def saved(tmp_path):
    state = MODULE.new_state(2)
    feed(state, list(range(20)), slot=1)
    return state.snapshot(1).save(tmp_path / "state")


def rewrite(path, change):
    """The same file with other tensors or another manifest."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        manifest = json.loads(file.metadata()["gemkit.state"])
    change(tensors, manifest)
    save_file(tensors, path, {"gemkit.state": json.dumps(manifest)})


def test_a_state_of_another_model_is_refused(saved):
    with pytest.raises(StateError, match="of another model"):
        nn.State(replace_layers(CONFIG, ffw={"width": 16})).load(saved)
    with pytest.raises(StateError, match=r"layer 0.keys is .* torch.float32, must be .* torch.bfloat16"):
        nn.State(CONFIG, dtype=torch.bfloat16).load(saved)


def test_a_truncated_state_is_refused(saved):
    """At every length, and never with another error."""
    data = saved.read_bytes()
    for length in (*range(0, len(data), 997), len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(StateError, match="cannot be read as a snapshot"):
            MODULE.new_state().load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("0.keys"), r"layer 0: holds \['values'\], must hold"),
        (lambda t, m: t.pop("4.hidden"), "layer 4: holds"),
        (lambda t, m: t.update({"1.hidden": torch.zeros(31)}), r"layer 1.hidden is \(31,\)"),
        (lambda t, m: t.update({"1.hidden": torch.zeros(32, dtype=torch.bfloat16)}), "layer 1.hidden is .*bfloat16"),
        (lambda t, m: t.update({"1.tail": torch.zeros(3, 32, dtype=torch.int64)}), "layer 1.tail is .*int64"),
        (lambda t, m: t.update({"2.keys": torch.zeros(20, 2, 4)}), "layer 2.keys is"),
        (lambda t, m: t.update({"2.values": torch.zeros(19, 2, 8)}), "layer 2.values is"),
        (lambda t, m: t.update({"2.keys": torch.zeros(19, 2, 8)}), "layer 2: holds 19 of 20 positions"),
        (lambda t, m: t.update({"0.keys": torch.zeros(3, 2, 8)}), "layer 0: holds 3 of 20 positions"),
        (lambda t, m: t.update({"0.keys": torch.tensor(1.0)}), "layer 0: holds 0 of 20 positions"),
        (lambda t, m: t.update({"9.keys": torch.zeros(1)}), "9.keys belongs nowhere"),
        (lambda t, m: m.update(version=1), "version 1 of the format"),
        (lambda t, m: m.update(executor="native"), "snapshot of the executor 'native', and this one is torch"),
        (lambda t, m: m.update(length=-1), "manifest is damaged"),
        (lambda t, m: m.update(length="much"), "manifest is damaged"),
        (lambda t, m: m.update(length=True), "manifest is damaged"),
        (lambda t, m: m.update(decoder=3), "manifest is damaged"),
        (lambda t, m: m.pop("length"), "manifest is damaged"),
        (lambda t, m: m.update(length=10**18), "positions, must hold"),
    ],
)
def test_a_damaged_state_is_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(StateError, match=message):
        MODULE.new_state().load(saved)


def test_files_that_are_no_state_are_refused(tmp_path):
    with pytest.raises(StateError, match="cannot be read as a snapshot"):
        MODULE.new_state().load(tmp_path / "missing")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(StateError, match="but no snapshot"):
        MODULE.new_state().load(tmp_path / "weights")
    with pytest.raises(StateError, match="cannot write"):
        MODULE.new_state().snapshot(0).save(tmp_path / "no folder" / "state")


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
    assert (state.nbytes, state.lengths) == (0, {})


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
    snapshot, again = state.snapshot(0), MODULE.new_state()
    again.restore(again.load(snapshot.save(tmp_path / "state")), 0)
    state.restore(snapshot, 1)
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
    assert (state.nbytes, state.lengths) == (0, {})


def test_misuse_is_refused():
    state = MODULE.new_state()
    with pytest.raises(StateError, match="remembers 0 tokens but the batch continues at position 3"):
        MODULE(Batch.of([[1]], offsets=[3]), state)
    with pytest.raises(StateError, match=r"slot 1 of a state with slots \[0\]"):
        MODULE(Batch.of([[1]], slots=[1]), state)
    with pytest.raises(StateError, match="another model"):
        random_module(replace_layers(CONFIG, ffw={"width": 16}))(Batch.of([[1]]), state)
    with pytest.raises(StateError, match="slots=-1"):
        MODULE.new_state(-1)
    feed(state, [1, 2, 3])
    snapshot = state.snapshot(0)
    for wrong in (MODULE.new_state().snapshot(0), (0, 3), None):
        with pytest.raises(StateError, match="no snapshot of this state"):
            state.restore(wrong, 0)
        with pytest.raises(StateError, match="neither a slot nor a snapshot"):
            state.unique(wrong)
    for keep in (1, -1):
        with pytest.raises(StateError, match=f"holds 3 tokens and cannot keep {keep} after the snapshot's 3$"):
            state.restore(snapshot, 0, keep=keep)
    with pytest.raises(StateError, match="keep=1 in a new slot"):
        state.restore(snapshot, keep=1)
    other = state.add()
    feed(state, [1, 2, 3, 4, 5], other)
    with pytest.raises(StateError, match="which was not taken of them"):
        state.restore(snapshot, other, keep=1)
    assert state.lengths == {0: 3, 1: 5}
    state.free(0)
    for call in (state.free, state.snapshot, state.unique):
        with pytest.raises(StateError, match=r"slot 0 of a state with slots \[1\]"):
            call(0)
    assert state.add() == 0


@pytest.mark.parametrize("layer", CONFIG.layers[:3], ids=str)
def test_training_with_a_state_is_refused(layer):
    module = random_module(replace(CONFIG, layers=(layer,))).requires_grad_(True)
    with pytest.raises(StateError, match="records gradients"):
        module(Batch.of([[1, 2]]), module.new_state())
    with torch.inference_mode():
        module(Batch.of([[1, 2]]), module.new_state())


@settings(max_examples=20)
@given(ids=st.lists(sequences, min_size=1, max_size=3))
def test_a_rectangle_is_its_rows(ids):
    length = min(map(len, ids))
    rectangle = torch.tensor([s[:length] for s in ids])
    for row, logits in zip(rectangle, MODULE(rectangle), strict=True):
        assert_same(logits, whole(row.tolist()))
