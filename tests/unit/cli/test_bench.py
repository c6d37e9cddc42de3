"""`gemkit bench long` on tiny shapes: what it reports, draws and refuses. How fast anything is, is not tested."""

import argparse
import json
import os
import signal
import xml.etree.ElementTree as ET
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gemkit import family
from gemkit.cli import bench, main
from gemkit.errors import ConfigError
from gemkit.inspect import cost
from support.tiny import WINDOW, reference, save_reference, tiny

GRIFFIN, GEMMA = "recurrentgemma-2b", "gemma-2b"
TOKENS = 3


def cut(name: str) -> family.DecoderConfig:
    """Tiny, and with the first four layers only: two recurrent, one sliding, one recurrent; or four global."""
    decoder = tiny(name)
    return replace(decoder, layers=decoder.layers[:4])


def depths_of(name: str) -> bench.Depths:
    return bench.Depths(cut(name), TOKENS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of both, of which the command needs the shape alone."""
    root = tmp_path_factory.mktemp("shapes")
    return [str(save_reference(reference(cut(name)), root / name)) for name in (GRIFFIN, GEMMA)]


# ---------------------------------------------------------------- one model


@pytest.mark.parametrize("name", [GRIFFIN, GEMMA, "gemma-2-2b"])
def test_a_filled_state_is_as_large_as_a_generated_one(name):
    filled, generated = depths_of(name), depths_of(name)
    for depth in (WINDOW - 1, 3 * WINDOW, 300):  # 300: past the first growth of a global buffer
        assert filled.deepen(depth, decode_all=False) == generated.deepen(depth, decode_all=True)
        assert filled.state.lengths == generated.state.lengths == [depth]
        for one, other in zip(filled.state.layers, generated.state.layers, strict=True):
            ours, theirs = one.dump(0, depth), other.dump(0, depth)
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
        tensors = entry.dump(0, depth).values()
        if layer.mixer.kind == "sliding":  # may keep more than it needs, which is the last `window`
            tensors = [tensor[-layer.mixer.window :] for tensor in tensors]
        in_use += sum(tensor.nbytes for tensor in tensors)
    assert in_use == needed.total


def test_a_filled_state_decodes_and_a_round_leaves_no_trace():
    depths = depths_of(GRIFFIN)
    depths.deepen(5 * WINDOW, decode_all=False)
    before = [{k: v.clone() for k, v in entry.dump(0, 5 * WINDOW).items()} for entry in depths.state.layers]
    seconds, resident = depths.round()
    assert seconds > 0
    assert resident is None or resident > 10e6
    assert depths.state.lengths == [5 * WINDOW]
    for entry, was in zip(depths.state.layers, before, strict=True):
        now = entry.dump(0, 5 * WINDOW)
        assert all(torch.equal(now[key][-(WINDOW - 1) :], was[key][-(WINDOW - 1) :]) for key in was)
    depths.decode(2)
    assert depths.state.lengths == [5 * WINDOW + 2]


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
    narrow = bench.small(real)
    assert len(narrow.layers) == len(real.layers)
    for was, now in zip(real.layers, narrow.layers, strict=True):
        field = "width" if was.mixer.kind == "recurrent" else "head_dim"
        assert now.mixer == replace(was.mixer, **{field: getattr(was.mixer, field) // 4})
        assert now.ffw.width == was.ffw.width // 4
    # norms and biases shrink by 4 only, and their share of the small one is larger
    assert cost.count(real).total / cost.count(narrow).total == pytest.approx(16, rel=0.02)


# ---------------------------------------------------------------- the command


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main(["bench", "long", *argv])
    return code, *capsys.readouterr()


def test_json_and_drawing(capsys, folders, tmp_path):
    svg = tmp_path / "curves.svg"
    griffin, gemma = folders
    options = ("--scale", "full", "--depths", "40,4", "--tokens", "2", "--threads", "1", "--svg", str(svg))
    code, out, err = run(capsys, "-m", griffin, "--against", gemma, *options, "--json")
    assert code == 0, err
    (line,) = out.splitlines()
    report = json.loads(line)
    assert (report["depths"], report["threads"], report["scale"], report["weights"]) == ([4, 40], 1, "full", "random")
    for record, name in zip(report["models"], (GRIFFIN, GEMMA), strict=True):
        assert record["parameters"] == cost.count(cut(name)).total
        assert [row["depth"] for row in record["measured"]] == [4, 40]
        for row in record["measured"]:
            assert row["state_bytes_needed"] == cost.state_bytes(cut(name), row["depth"]).total
            assert row["read_bytes"] == record["weight_bytes"] + row["state_bytes_needed"]
            assert len(row["rounds_ms_per_token"]) == bench.ROUNDS
            assert row["tokens_per_second"] * row["ms_per_token"] == pytest.approx(1000)
    root = ET.parse(svg).getroot()
    curves = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [len(curve.attrib["points"].split()) for curve in curves] == [2, 2, 2, 2]  # two of rate, two of memory
    written = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {record["model"] for record in report["models"]} <= set(written)


def test_table_says_what_was_run_and_the_ceiling_first(capsys, folders, tmp_path):
    griffin, gemma = folders
    depths = ("--depths", "2,9000", "--tokens", "1", "--layers", "1", "--svg", str(tmp_path / "x.svg"))
    code, out, err = run(capsys, "-m", griffin, "--against", gemma, *depths)
    assert code == 0, err
    places = [out.index(part) for part in ("divided by 4", "random bfloat16", "The ceiling", "Measured", "From 2 to")]
    assert places == sorted(places)
    assert out.count("9,000 tokens") == 3  # ceiling, measurement, and the last sentence
    assert "1 layer of width" in out
    assert "was trained on 8,192 tokens" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depths", "512,many"), "whole numbers"),
        (("--depths", ""), "whole numbers"),
        (("--depths", "0,512"), "at least 1"),
        (("--tokens", "0"), "--tokens 0"),
        (("--threads", "-1"), "--threads -1"),
        (("--layers", "27"), "has 26"),
        (("-m", "gemma-3-nine"), "UnknownModelError"),
        (("-m", "gemma-2b"), "against itself"),
        (("--svg", "/nowhere/at/all.svg"), "no file can be written"),
        (("--svg", "/tmp"), "no file can be written"),
    ],
)
def test_bad_input_is_told_before_anything_runs(capsys, options, message):
    code, out, err = run(capsys, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert "random weights" not in err


@pytest.mark.parametrize(
    ("scale", "free", "fits"), [("small", 1e9, True), ("small", 6e8, False), ("full", 6e9, True), ("full", 5e9, False)]
)
def test_what_does_not_fit_into_memory_is_refused(monkeypatch, scale, free, fits):
    """Both small ones take 0.65 GB of weights, and 0.04 GB to hold 4,096 tokens; full ones 5.4 GB, one at a time."""
    args = argparse.ArgumentParser()
    bench.add(args.add_subparsers())
    plan = bench._plan(args.parse_args(["bench", "long", "--scale", scale, "--depths", "4096"]))
    monkeypatch.setattr("gemkit.weights.load.available_memory", lambda: int(free))
    with nullcontext() if fits else pytest.raises(ConfigError, match="memory is free"):
        bench._check_memory(plan)


@pytest.mark.parametrize(("name", "mate"), [(GRIFFIN, "gemma-2b"), ("recurrentgemma-9b-it", "gemma-7b")])
def test_the_other_is_the_gemma_of_its_size(name, mate):
    assert bench._same_size(family.get(name).decoder) == mate


def test_a_worker_that_dies_is_told_and_leaves_no_process():
    with bench.worker("the model", cut(GEMMA), TOKENS) as one:
        assert one.ask("deepen", 4, False) > 0
        process = one.process
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ConfigError, match="the model has died"):
            one.ask("round")
    assert not process.is_alive()
