"""Slots and snapshots of the native executor: shared pages, restored anywhere, written to files."""

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from gemkit import nn
from gemkit.errors import StateError
from gemkit.executors.interface import Chunk
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from support.native_models import ids, one_by_one, randomised
from support.outputs import dense


@pytest.fixture(scope="module", params=["gemma-2-2b", "recurrentgemma-2b"])
def ours(request):
    module = randomised(request.param)
    return NativeExecutor(module.config, pack(module))


def test_slots_come_and_go(ours):
    state = ours.new_state()
    assert (dict(state.lengths), state.nbytes) == ({}, 0)
    assert [state.add() for _ in range(3)] == [0, 1, 2]
    ours.run([Chunk(1, [5, 6])], state)
    state.free(1)
    assert dict(state.lengths) == {0: 0, 2: 0}
    with pytest.raises(StateError, match="slot 1 of a state with the slots"):
        ours.run([Chunk(1, [5])], state)
    with pytest.raises(StateError, match="slot 1"):
        state.free(1)
    assert state.add() == 1
    prompt = ids(70)[0]
    assert np.array_equal(dense(ours, [Chunk(1, prompt)], state)[0], one_by_one(ours, prompt)[-1])
    for slot in range(3):
        state.free(slot)
    assert state.nbytes == 0


def test_a_rolled_back_draft_never_was(ours):
    prompt, draft, rest = ids(40, 9, 20)
    plain = ours.new_state(1)
    ours.run([Chunk(0, prompt)], plain)
    expected = dense(ours, [Chunk(0, rest, rows=20)], plain)
    state = ours.new_state(1)
    ours.run([Chunk(0, prompt)], state)
    before = state.snapshot(0)
    ours.run([Chunk(0, draft)], state)
    assert state.restore(before, 0) == 0
    assert state.lengths == {0: 40}
    assert np.array_equal(dense(ours, [Chunk(0, rest, rows=20)], state), expected)


@pytest.mark.parametrize("start", [40, 60, 64])
def test_part_of_a_draft_can_be_kept(ours, start):
    """On each side of the border of a page, and on it."""
    prompt, draft = ids(start, 9)
    state = ours.new_state(1)
    ours.run([Chunk(0, prompt)], state)
    before = state.snapshot(0)
    ours.run([Chunk(0, draft)], state)
    state.restore(before, 0, keep=4)
    kept = state.lengths[0] - start
    assert kept == (0 if ours.decoder.recurrent else 4)  # a recurrence can only go back to the snapshot
    del before
    logits = dense(ours, [Chunk(0, [*draft[kept:4], 5])], state)
    assert np.array_equal(logits[0], one_by_one(ours, [*prompt, *draft[:4], 5])[-1])


def test_a_window_that_has_moved_on_keeps_nothing():
    """What was to be kept is no longer held; the snapshot has all that its next token sees."""
    module = randomised("gemma-3-1b")
    ours = NativeExecutor(module.config, pack(module))
    prompt, *parts = ids(20, 100, 100, 100)
    state = ours.new_state(1)
    ours.run([Chunk(0, prompt)], state)
    before = state.snapshot(0)
    for part in parts:
        ours.run([Chunk(0, part)], state)
    state.restore(before, 0, keep=30)
    assert state.lengths == {0: 20}
    assert np.array_equal(dense(ours, [Chunk(0, [7])], state)[0], one_by_one(ours, [*prompt, 7])[-1])


def test_what_a_slot_did_not_compute_cannot_be_kept(ours):
    state = ours.new_state(2)
    ours.run([Chunk(0, ids(10)[0]), Chunk(1, ids(30)[0])], state)
    early = state.snapshot(0)
    ours.run([Chunk(0, [1, 2, 3])], state)
    late = state.snapshot(0)
    with pytest.raises(StateError, match="computed 3 tokens since"):
        state.restore(early, 0, keep=4)
    with pytest.raises(StateError, match="slot 1 does not go on"):
        state.restore(early, 1, keep=1)
    with pytest.raises(StateError, match="slot None does not go on"):
        state.restore(early, keep=1)
    assert state.lengths == {0: 13, 1: 30}
    state.restore(early, 0)
    ours.run([Chunk(0, [4, 5, 6, 7])], state)
    with pytest.raises(StateError, match="does not go on"):  # it holds other tokens than the later snapshot
        state.restore(late, 0, keep=1)
    state.restore(late, 0)
    assert state.lengths[0] == 13


def test_slots_that_share_a_snapshot_go_their_own_ways(ours):
    prompt, a, b = ids(70, 5, 5)
    state = ours.new_state(1)
    ours.run([Chunk(0, prompt)], state)
    assert state.restore(state.snapshot(0)) == 1
    first = dense(ours, [Chunk(0, a, rows=5), Chunk(1, b, rows=5)], state)
    for tail, rows in ((a, first[:5]), (b, first[5:])):
        assert np.array_equal(rows, one_by_one(ours, prompt + tail)[70:])
    state.free(0)
    assert state.lengths == {1: 75}
    assert np.array_equal(dense(ours, [Chunk(1, [3])], state)[0], one_by_one(ours, [*prompt, *b, 3])[-1])


def test_a_snapshot_of_another_state(ours):
    """Of the same executor, and of another with the same model; the first state may end before."""
    prompt = ids(70)[0]
    state, other = ours.new_state(1), NativeExecutor(ours.decoder, ours.pack).new_state(2)
    ours.run([Chunk(0, prompt)], state)
    snapshot = state.snapshot(0)
    other.restore(snapshot, 1)
    del state, snapshot
    logits = other.executor.run([Chunk(1, [9])], other).rows[0]
    assert np.array_equal(logits, one_by_one(ours, [*prompt, 9])[-1])
    smaller = randomised("gemma-2b")
    with pytest.raises(StateError, match="another model"):
        NativeExecutor(smaller.config, pack(smaller)).new_state(1).restore(other.snapshot(1))


def test_bytes_of_shared_pages_are_counted_once(ours):
    state = ours.new_state(1)
    prompt = ids(100)[0]
    needed = state.needed(0, len(prompt))
    empty = state.nbytes
    ours.run([Chunk(0, prompt)], state)
    held = state.nbytes
    assert 0 < held - empty <= needed  # a window may have given some back
    assert state.unique(0) == held
    snapshot = state.snapshot(0)
    shared = held - state.unique(0) if ours.decoder.recurrent else held
    assert state.nbytes == held
    assert state.unique(snapshot) == 0
    assert state.unique(0) == held - shared
    twin = state.restore(snapshot)
    assert state.nbytes == held
    growth = state.needed(twin, 1)
    assert growth > 0  # the last pages are copied
    ours.run([Chunk(twin, [1])], state)
    assert state.nbytes == held + growth
    assert state.unique(twin) == growth
    state.free(twin)
    assert state.nbytes == held
    state.free(0)
    assert state.nbytes == state.unique(snapshot) == shared
    del snapshot
    assert state.nbytes == 0


def test_memory_of_sliding_layers_does_not_grow():
    module = randomised("gemma-3-1b")
    sliding = replace(module.config, layers=module.config.layers[:5])
    small = nn.Decoder(sliding)
    small.load_state_dict({name: value for name, value in module.state_dict().items() if name in small.state_dict()})
    ours = NativeExecutor(sliding, pack(small.requires_grad_(False)))
    state = ours.new_state(1)
    sizes = []
    for part in ids(*[100] * 12):
        ours.run([Chunk(0, part)], state)
        sizes.append(state.nbytes)
    assert max(sizes[3:]) <= 2 * min(sizes)  # a window of 8 is in one page of 64, or in two


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_of_chunks_snapshots_and_restores(ours, data):
    """A model of the state in Python: the tokens of each slot and snapshot. Every row is that of its tokens alone."""
    state, held, kept = ours.new_state(), {}, []
    for _ in range(data.draw(st.integers(1, 12))):
        does = data.draw(st.sampled_from(["add", "run", "run", "snapshot", "restore", "keep", "free", "drop"]))
        slot = data.draw(st.sampled_from(sorted(held))) if held else None
        if does == "add" or slot is None:
            held[state.add()] = []
        elif does == "run":
            part = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=70))
            logits = dense(ours, [Chunk(slot, part)], state)[0]
            held[slot] = held[slot] + part
            assert np.array_equal(logits, dense(ours, [Chunk(0, held[slot])], ours.new_state(1))[0])
        elif does == "snapshot":
            kept.append((state.snapshot(slot), held[slot]))
        elif does == "free":
            state.free(slot)
            del held[slot]
        elif kept:
            i = data.draw(st.integers(0, len(kept) - 1))
            snapshot, tokens = kept[i]
            if does == "drop":
                del kept[i], snapshot
            elif does == "restore":
                to = data.draw(st.sampled_from([None, *held]))
                held[state.restore(snapshot, to)] = tokens
            else:
                keep, before = data.draw(st.integers(1, 9)), held[slot]
                try:
                    state.restore(snapshot, slot, keep=keep)
                except StateError:
                    continue
                assert before[: len(tokens)] == tokens
                held[slot] = before[: state.lengths[slot]]
                assert len(tokens) <= len(held[slot]) <= len(tokens) + keep
        assert dict(state.lengths) == {slot: len(tokens) for slot, tokens in held.items()}
    for slot in [*held]:
        state.free(slot)
    kept.clear()
    snapshot = None
    assert state.nbytes == 0


# ---------------------------------------------------------------- files


def test_another_process_goes_on_bit_for_bit(tmp_path, ours):
    module = ours.decoder
    ours_file = tmp_path / "model"
    pack(randomised("recurrentgemma-2b" if module.recurrent else "gemma-2-2b"), ours_file)
    state = ours.new_state(1)
    prompt, rest = ids(150, 20)
    ours.run([Chunk(0, prompt)], state)
    saved = state.snapshot(0).save(tmp_path / "snapshot.safetensors")
    expected = dense(ours, [Chunk(0, rest, rows=20)], state)
    program = f"""
import sys
import weakref
import numpy as np
from pathlib import Path
from gemkit import family
from gemkit.executors.interface import Chunk
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packfile import Pack
decoder = eval({repr(module)!r}, vars(family))
executor = NativeExecutor(decoder, Pack(Path(sys.argv[1])))
state = executor.new_state()
slot = state.restore(state.load(sys.argv[2]))
assert state.lengths == {{slot: 150}}
np.save(sys.argv[3], np.stack(executor.run([Chunk(slot, {rest}, rows=20)], state).rows))
assert "torch" not in sys.modules
"""
    out = tmp_path / "logits.npy"
    done = subprocess.run([sys.executable, "-c", program, ours_file, saved, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(out), expected)


def test_files_of_other_models_and_damaged_ones_are_refused(tmp_path, ours):
    state = ours.new_state(1)
    ours.run([Chunk(0, ids(70)[0])], state)
    path = state.snapshot(0).save(tmp_path / "snapshot.safetensors")
    whole = path.read_bytes()
    other = randomised("gemma-3-1b")
    with pytest.raises(StateError, match="another architecture"):
        NativeExecutor(other.config, pack(other)).new_state().load(path)
    before = state.nbytes
    bad = tmp_path / "bad.safetensors"
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(StateError, match="bad"):
            state.load(bad)
    for at in (len(whole) - 1, len(whole) - 3000):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StateError, match="checksum"):
            state.load(bad)
    with pytest.raises(StateError, match="nowhere"):
        state.load(tmp_path / "nowhere")
    with pytest.raises(StateError, match="cannot be written"):
        state.snapshot(0).save(tmp_path / "nowhere" / "snapshot")
    assert state.nbytes == before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_refused_or_harmless(tmp_path_factory, ours, at, data):
    folder = tmp_path_factory.mktemp("damaged")
    state = ours.new_state(1)
    ours.run([Chunk(0, ids(70)[0])], state)
    path = state.snapshot(0).save(folder / "snapshot.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        slot = state.restore(state.load(path))
    except StateError:
        return
    ours.run([Chunk(slot, [1])], state)


@pytest.mark.parametrize("change", [{"length": 71}, {"length": 5000}, {"length": -1}, {"first": 3}, {"length": "70"}])
def test_a_manifest_that_does_not_fit_its_pages_is_refused(tmp_path, ours, change):
    state = ours.new_state(1)
    ours.run([Chunk(0, ids(60)[0])], state)
    path = state.snapshot(0).save(tmp_path / "snapshot.safetensors")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["manifest"])
    manifest |= {"length": change["length"]} if "length" in change else {"first": [change["first"]] * 99}
    header["__metadata__"]["manifest"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    if change == {"length": 71} and not ours.decoder.attention:
        pytest.skip("a recurrence has no length")
    with pytest.raises(StateError, match="damaged"):
        state.load(path)


def test_a_state_and_its_snapshots_may_go_in_any_order(ours):
    """The collector ends the objects of a cycle in an order of its own."""
    state = ours.new_state(1)
    ours.run([Chunk(0, ids(70)[0])], state)
    cycle: list[object] = [state, state.snapshot(0), state.restore(state.snapshot(0)), state.snapshot(0)]
    cycle.append(cycle)
    gone = [weakref.ref(cycle[0]), weakref.ref(cycle[1])]
    del state, cycle
    gc.collect()
    assert [one() for one in gone] == [None, None]
    last = ours.new_state(1).snapshot(0)  # outlives the caller's state
    assert last.length == 0
