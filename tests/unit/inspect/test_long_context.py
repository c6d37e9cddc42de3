"""Decode rate and memory against depth, on tiny shapes: states, rounds, workers. No speed is tested."""

import os
import signal
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.inspect import Subject, cost, long_context
from support.tiny import WINDOW, tiny

GRIFFIN, GEMMA = "recurrentgemma-2b", "gemma-2b"
TOKENS = 3


def cut(name: str) -> family.DecoderConfig:
    """Tiny, and with the first four layers only: two recurrent, one sliding, one recurrent; or four global."""
    decoder = tiny(name)
    return replace(decoder, layers=decoder.layers[:4])


def depths_of(name: str) -> long_context.Depths:
    return long_context.Depths(cut(name), TOKENS)


@pytest.mark.parametrize("name", [GRIFFIN, GEMMA, "gemma-2-2b"])
def test_a_filled_state_is_as_large_as_a_generated_one(name):
    filled, generated = depths_of(name), depths_of(name)
    for depth in (WINDOW - 1, 3 * WINDOW, 300):  # 300: past the first growth of a global buffer
        assert filled.deepen(depth, decode_all=False) == generated.deepen(depth, decode_all=True)
        assert filled.state.lengths == generated.state.lengths == {0: depth}
        for one, other in zip(filled.state.layers, generated.state.layers, strict=True):
            ours, theirs = one.hold(0, depth).tensors(), other.hold(0, depth).tensors()
            assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
                k: (v.shape, v.dtype) for k, v in theirs.items()
            }


@pytest.mark.parametrize("name", [GRIFFIN, GEMMA])
@pytest.mark.parametrize("depth", [1, WINDOW - 1, 5 * WINDOW])
def test_the_state_holds_what_the_cost_model_says(name, depth):
    depths = depths_of(name)
    held = depths.deepen(depth, decode_all=False)
    config, needed = depths.state.decoder, cost.state_bytes(depths.state.decoder, depth)
    assert held >= needed.total
    in_use = 0
    for layer, entry in zip(config.layers, depths.state.layers, strict=True):
        tensors = entry.hold(0, depth).tensors().values()
        if layer.mixer.kind == "sliding":  # may keep more than it needs, which is the last `window`
            tensors = [tensor[-layer.mixer.window :] for tensor in tensors]
        in_use += sum(tensor.nbytes for tensor in tensors)
    assert in_use == needed.total


def test_a_filled_state_decodes_and_a_round_leaves_no_trace():
    depths = depths_of(GRIFFIN)
    depths.deepen(5 * WINDOW, decode_all=False)
    before = [{k: v.clone() for k, v in entry.hold(0, 5 * WINDOW).tensors().items()} for entry in depths.state.layers]
    seconds, resident = depths.round()
    assert seconds > 0
    assert resident is None or resident > 10e6
    assert depths.state.lengths == {0: 5 * WINDOW}
    for entry, was in zip(depths.state.layers, before, strict=True):
        now = entry.hold(0, 5 * WINDOW).tensors()
        assert all(torch.equal(now[key][-(WINDOW - 1) :], was[key][-(WINDOW - 1) :]) for key in was)
    depths.decode(2)
    assert depths.state.lengths == {0: 5 * WINDOW + 2}


def test_what_is_filled_in_is_what_the_model_then_reads():
    depths = depths_of(GEMMA)
    depths.fill(20)
    keys, values, first = depths.state.layers[0].read(0)
    assert (keys.shape, first) == ((20, 1, 16), 0)
    assert keys.float().std().item() == pytest.approx(1, abs=0.2)  # 320 normal numbers: five standard errors
    assert not torch.equal(keys, values)


@pytest.mark.parametrize("name", family.names())
def test_small_keeps_the_pattern_and_a_sixteenth_of_the_weights(name):
    real = family.get(name).decoder
    narrow = long_context.small(real)
    assert len(narrow.layers) == len(real.layers)
    for was, now in zip(real.layers, narrow.layers, strict=True):
        field = "width" if was.mixer.kind == "recurrent" else "head_dim"
        assert now.mixer == replace(was.mixer, **{field: getattr(was.mixer, field) // 4})
        assert now.ffw.width == was.ffw.width // 4
    # norms and biases shrink by 4 only, and their share of the small one is larger
    assert cost.count(real).total / cost.count(narrow).total == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize(
    ("scale", "free", "fits"), [("small", 1e9, True), ("small", 6e8, False), ("full", 6e9, True), ("full", 5e9, False)]
)
def test_what_does_not_fit_into_memory_is_refused(monkeypatch, scale, free, fits):
    """Both small ones take 0.65 GB of weights, and 0.04 GB to hold 4,096 tokens; full ones 5.4 GB, one at a time."""
    decoders = [family.get(name).decoder for name in (GRIFFIN, GEMMA)]
    one, other = (
        Subject("model", long_context.small(decoder) if scale == "small" else decoder) for decoder in decoders
    )
    plan = long_context.Plan((one, other), [4096], scale, 8, None, False)
    monkeypatch.setattr("gemkit.memory.available_memory", lambda: int(free))
    with nullcontext() if fits else pytest.raises(ConfigError, match="memory is free"):
        long_context.check_memory(plan)


@pytest.mark.parametrize(("name", "mate"), [(GRIFFIN, "gemma-2b"), ("recurrentgemma-9b-it", "gemma-7b")])
def test_the_other_is_the_gemma_of_its_size(name, mate):
    assert long_context.same_size(family.get(name).decoder) == mate


def test_a_worker_that_dies_is_told_and_leaves_no_process():
    with long_context.worker("the model", cut(GEMMA), TOKENS) as one:
        assert one.ask("deepen", 4, False) > 0
        process = one.process
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ConfigError, match="the model has died"):
            one.ask("round")
    assert not process.is_alive()
