"""The native executor against the modules themselves, and against itself however it is asked."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemkit import nn
from gemkit.errors import ConfigError, ModelError, StateError, Stopped, TextError
from gemkit.executors.interface import Chunk, LogitsFilter, StopFlag
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.executors.native.state import NativeState
from gemkit.executors.torch import TorchExecutor
from gemkit.ops import Quantized
from support.native_models import assert_close, ids, one_by_one, randomised
from support.outputs import dense
from support.tiny import WINDOW


def test_logits_are_those_of_the_modules(pair, halves):
    """4e-3: a key that is rounded to the other side moves by 2**-11, and 46 layers of random weights amplify it."""
    ours, theirs = pair
    chunks = [Chunk(i, sequence, rows=len(sequence)) for i, sequence in enumerate(ids(9 * WINDOW + 30, 7, 1))]
    got, expected = dense(ours, chunks, ours.new_state(3)), dense(theirs, chunks, theirs.new_state(3))
    assert_close(got, expected, 4e-3)


def rounded_to_int8(module: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What the kernels do to the input of a quantized weight: int8 with a scale for each 32 columns."""
    groups = given[0].unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / step.clamp_min(1e-30)).round().mul(step).flatten(-2),)


def test_quantized_weights_are_multiplied_with_int8_activations(halves):
    """5e-3: a code that is rounded to the other side moves by 1/127 of its group's largest. One layer, since layers of
    random weights amplify that."""
    module = randomised("gemma-2-2b", quantized=True, depth=1)
    ours, theirs = NativeExecutor(module.config, pack(module)), TorchExecutor(module)
    for linear in module.modules():
        if isinstance(getattr(linear, "weight", None), Quantized) and not isinstance(linear, nn.layers.Embedding):
            linear.register_forward_pre_hook(rounded_to_int8)
    (prompt,) = ids(40)
    got = dense(ours, [Chunk(0, prompt, rows=40)], ours.new_state(1))
    expected = dense(theirs, [Chunk(0, prompt, rows=40)], theirs.new_state(1))
    assert_close(got, expected, 5e-3)


def test_the_same_bits_however_it_is_cut(pair):
    ours, _ = pair
    prompt, other = ids(150, 40)
    whole = dense(ours, [Chunk(0, prompt, rows=150)], ours.new_state(1))
    assert np.array_equal(one_by_one(ours, prompt), whole)
    state = ours.new_state(2)
    parts = [dense(ours, [Chunk(1, prompt[:70], rows=70), Chunk(0, other, rows=40)], state)]
    parts += [dense(ours, [Chunk(0, [1]), Chunk(1, prompt[70:75], rows=5)], state)[1:]]
    parts += [dense(ours, [Chunk(1, prompt[75:], rows=75)], state)]
    assert np.array_equal(np.concatenate([parts[0][:70], *parts[1:]]), whole)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_same_bits_with_any_number_of_threads(quantized, monkeypatch):
    module = randomised("gemma-2-2b", quantized)
    packed, (prompt,) = pack(module), ids(200)
    found = []
    for count in (1, 2, 3, 5):
        monkeypatch.setenv("GEMKIT_THREADS", str(count))
        executor = NativeExecutor(module.config, packed)
        found.append(dense(executor, [Chunk(0, prompt, rows=200)], executor.new_state(1)))
    assert all(np.array_equal(logits, found[0]) for logits in found[1:])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_runs_a_model(isa, tmp_path):
    """In a process of its own: kernels are chosen once. Where the machine lacks a set it says so."""
    module = randomised("gemma-2-2b", quantized=True)
    target = tmp_path / "model"
    packed, (prompt,) = pack(module, target), ids(70)
    here = NativeExecutor(module.config, packed)
    np.save(tmp_path / "expected.npy", dense(here, [Chunk(0, prompt, rows=70)], here.new_state(1)))
    program = """
import sys
import numpy as np
from pathlib import Path
from gemkit.errors import ConfigError
from gemkit.generate import Chunk
from gemkit.executors.native import library as native
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packfile import Pack
from support.native_models import ids, randomised
folder = Path(sys.argv[1])
try:
    able, which = native.available()
except ConfigError as error:
    assert f"GEMKIT_ISA='{sys.argv[2]}': the kernels here are " in str(error), error
    sys.exit(0)
assert (able, which) == (True, sys.argv[2]), which
executor = NativeExecutor(randomised("gemma-2-2b", quantized=True).config, Pack(folder / "model"))
logits = np.stack(executor.run([Chunk(0, ids(70)[0], rows=70)], executor.new_state(1)).rows)
expected = np.load(folder / "expected.npy")
assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max(), np.abs(logits - expected).max()
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), isa],
        env={**os.environ, "GEMKIT_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_settings_that_cannot_be(pair):
    ours, _ = pair
    with pytest.raises(TextError):
        ours.run([Chunk(0, [10**6])], ours.new_state(1))
    with pytest.raises(ConfigError, match="without an image tower"):
        ours.run([Chunk(0, [1, 2], images=[np.zeros((3, 8, 8), np.float32)])], ours.new_state(1))
    with pytest.raises(ConfigError, match="one chunk"):
        ours.run([Chunk(0, [1]), Chunk(0, [2])], ours.new_state(1))
    with pytest.raises(StateError, match="slot 1"):
        ours.run([Chunk(1, [1])], ours.new_state(1))
    with pytest.raises(ConfigError, match="keeps at least 1"):
        ours.run([Chunk(0, [1], filter=LogitsFilter(0))], ours.new_state(1))
    with pytest.raises(ConfigError, match="ids from 0"):
        ours.run([Chunk(0, [1], filter=LogitsFilter(1, always=np.array([10**6])))], ours.new_state(1))


def test_keys_beyond_float16_are_refused():
    module = randomised("gemma-2b")
    with torch.no_grad():
        module.layers[3].self_attn.v_proj.weight.mul_(1e7)
    ours = NativeExecutor(module.config, pack(module))
    state = ours.new_state(1)
    with pytest.raises(ModelError, match="float16"):
        ours.run([Chunk(0, [1, 2, 3])], state)
    assert state.lengths == {0: 0}


# ---------------------------------------------------------------- spans and reach


def both(module: nn.Decoder, chunks: list[Chunk], slots: int, tolerance: float = 4e-3) -> None:
    """The same logits from the modules and from the native executor."""
    ours, theirs = NativeExecutor(module.config, pack(module)), TorchExecutor(module)
    got, expected = dense(ours, chunks, ours.new_state(slots)), dense(theirs, chunks, theirs.new_state(slots))
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-1b"])
def test_spans_are_attended_as_the_modules_do(name, halves):
    """A prefix, a block in the middle, two blocks, in windows of 8; one chunk has none."""
    spans = [[(0, 100)], [(70, 140)], [(3, 9), (20, 150)], []]
    chunks = [Chunk(i, s, rows=len(s), spans=spans[i]) for i, s in enumerate(ids(150, 150, 160, 30))]
    both(randomised(name), chunks, 4)


def test_spans_of_a_sequence_in_chunks():
    """A span in the second chunk; those before and after do not matter to it. The same bits as in one call."""
    module = randomised("gemma-3-1b")
    ours = NativeExecutor(module.config, pack(module))
    (prompt,), spans = ids(150), [(10, 40), (75, 120)]
    whole = dense(ours, [Chunk(0, prompt, rows=150, spans=spans)], ours.new_state(1))
    state = ours.new_state(1)
    parts = [(0, 60), (60, 130), (130, 150)]
    cut = [dense(ours, [Chunk(0, prompt[a:b], rows=b - a, spans=spans)], state) for a, b in parts]
    assert np.array_equal(np.concatenate(cut), whole)
    with pytest.raises(ConfigError, match="cut"):
        ours.run([Chunk(0, prompt[:20], spans=spans)], ours.new_state(1))


def test_a_recurrence_has_no_spans():
    module = randomised("recurrentgemma-2b")
    ours = NativeExecutor(module.config, pack(module))
    with pytest.raises(ConfigError, match="recurrent"):
        ours.run([Chunk(0, [1, 2], spans=[(0, 2)])], ours.new_state(1))


@pytest.mark.parametrize("reach", ["all", "both"])
def test_reaches_that_look_ahead(reach, halves):
    """As an encoder attends: windows on both sides, and all to all."""
    module = randomised("gemma-3-1b")
    layers = []
    for layer, block in zip(module.config.layers, module.layers, strict=True):
        window = layer.mixer.window if reach == "both" else None
        look = "all" if window is None else "both"
        layers.append(replace(layer, mixer=replace(layer.mixer, window=window, reach=look)))
        block.self_attn.window = (None, None) if window is None else (window - 1, window - 1)
    module.config = replace(module.config, layers=tuple(layers))
    both(module, [Chunk(i, s, rows=len(s)) for i, s in enumerate(ids(150, 30, 1))], 3)
    ours = NativeExecutor(module.config, pack(module))
    state = ours.new_state(1)
    ours.run([Chunk(0, [1, 2])], state)
    with pytest.raises(StateError, match="see those after them"):
        ours.run([Chunk(0, [3])], state)
    assert state.lengths == {0: 2}


# ---------------------------------------------------------------- outputs


def test_hidden_states_are_what_the_head_reads(pair, halves):
    ours, theirs = pair
    chunks = [Chunk(0, ids(40)[0], rows=3), Chunk(1, ids(9)[0], rows=0), Chunk(2, ids(7)[0])]
    got = ours.run(chunks, ours.new_state(3), output="hidden")
    assert [row.shape for row in got.rows] == [(ours.decoder.width,)] * 4
    assert got.computed.tolist() == [0] * 4
    table = theirs.module.embed_tokens.weight.detach().numpy()
    logits = np.stack(got.rows) @ table.T
    if cap := ours.decoder.final_softcap:
        logits = cap * np.tanh(logits / cap)
    assert_close(logits, dense(ours, chunks, ours.new_state(3)), 1e-4)


def test_pooled_rows_are_the_means_of_hidden_states(pair):
    ours, _ = pair
    chunks = [Chunk(0, ids(20)[0], rows=20), Chunk(1, ids(9)[0], rows=0), Chunk(2, ids(7)[0], rows=2)]
    hidden = np.stack(ours.run(chunks, ours.new_state(3), output="hidden").rows)
    pooled = ours.run(chunks, ours.new_state(3), output="pooled").rows
    means = [hidden[:20].mean(0, dtype=np.float64), hidden[20:].mean(0, dtype=np.float64)]
    assert np.array_equal(np.stack(pooled), np.stack(means).astype(np.float32))


def test_a_reward_is_the_score_of_a_hidden_state():
    module = randomised("gemma-3-1b")
    plain = NativeExecutor(module.config, pack(module))
    with pytest.raises(ModelError, match="no score head"):
        plain.run([Chunk(0, [1, 2])], plain.new_state(1), output="reward")
    module.score = nn.layers.Score(module.config.width)
    module.score.set_param("weight", torch.nn.Parameter(torch.randn(1, module.config.width), requires_grad=False))
    ours = NativeExecutor(module.config, pack(module))
    chunks = [Chunk(0, ids(20)[0], rows=3), Chunk(1, [5])]
    hidden = np.stack(ours.run(chunks, ours.new_state(2), output="hidden").rows)
    rewards = ours.run(chunks, ours.new_state(2), output="reward").rows
    assert [reward.shape for reward in rewards] == [(1,)] * 4
    expected = hidden.astype(np.float64) @ module.score.weight.detach().numpy()[0]
    np.testing.assert_allclose(np.concatenate(rewards), expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(dense(ours, chunks, ours.new_state(2)), dense(plain, chunks, plain.new_state(2)))


# ---------------------------------------------------------------- the process around it


def test_a_child_of_a_fork_computes(pair):
    ours, _ = pair
    (prompt,) = ids(30)
    expected = dense(ours, [Chunk(0, prompt)], ours.new_state(1))
    child = os.fork()
    if child == 0:
        same = np.array_equal(dense(ours, [Chunk(0, prompt)], ours.new_state(1)), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_of_python_take_turns(pair):
    ours, _ = pair
    prompts = ids(60, 61, 62, 63)
    expected = [dense(ours, [Chunk(0, p)], ours.new_state(1)) for p in prompts]
    found = [None] * len(prompts)

    def work(i: int) -> None:
        found[i] = dense(ours, [Chunk(0, prompts[i])], ours.new_state(1))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_ctrl_c_ends_a_long_prompt_and_leaves_the_state():
    module = randomised("gemma-7b")
    ours = NativeExecutor(module.config, pack(module))
    state = ours.new_state(1)
    (prompt,) = ids(8000)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ours.run([Chunk(0, prompt)], state)  # tens of seconds
    finally:
        signal.signal(signal.SIGINT, previous)
    assert state.lengths == {0: 0}  # a prompt that had come to its end would be here
    assert np.isfinite(dense(ours, [Chunk(0, prompt[:10])], state)).all()


def test_a_flag_ends_the_call_that_it_was_given_to():
    """One that computes, and one that waits for its turn; both leave the state, and calls without a flag go on."""
    module = randomised("gemma-7b")
    ours = NativeExecutor(module.config, pack(module))
    state, other = ours.new_state(1), ours.new_state(2)
    (prompt,) = ids(8000)
    long, waits, untouched = StopFlag(), StopFlag(), StopFlag()
    ended: list[str] = []

    def run(name: str, chunk: Chunk, where: NativeState, flag: StopFlag | None) -> None:
        try:
            ours.run([chunk], where, stop=flag)
            ended.append(name)
        except Stopped:
            ended.append(f"{name} stopped")

    calls = [("long", Chunk(0, prompt), state, long), ("waits", Chunk(0, [1]), other, waits)]
    calls += [("goes on", Chunk(1, [1]), other, untouched)]
    threads = [threading.Thread(target=run, args=call) for call in calls]
    threads[0].start()
    time.sleep(0.1)
    for thread in threads[1:]:
        thread.start()
    waits.set()
    threads[1].join(20)
    assert ended == ["waits stopped"]  # while the long prompt, tens of seconds of it, is computed
    long.set()
    for thread in threads:
        thread.join(20)
    assert ended == ["waits stopped", "long stopped", "goes on"]
    assert (state.lengths, other.lengths) == ({0: 0}, {0: 0, 1: 1})
    with pytest.raises(Stopped):
        ours.run([Chunk(0, [1])], state, stop=long)  # it stays set


def test_a_child_of_a_fork_has_its_turn_though_a_thread_of_the_parent_holds_it():
    module = randomised("gemma-2b")
    ours = NativeExecutor(module.config, pack(module))
    ours.turn.acquire()
    child = os.fork()
    if child == 0:
        os._exit(0 if ours.run([Chunk(0, [1])], ours.new_state(1)).computed[0] else 1)
    ours.turn.release()
    assert os.waitpid(child, 0)[1] == 0
