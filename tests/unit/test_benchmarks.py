"""The benchmark's arithmetic, what becomes of rounds and pairs, and the models it writes. Nothing here is timed."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

import gemkit
from gemkit import family
from gemkit.generate import Chunk
from support.outputs import dense
from support.tiny import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # its modules import each other by name
    spec = importlib.util.spec_from_file_location("benchmarks_run", BENCHMARKS / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_run", module)  # dataclasses look themselves up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(run):
    args = SimpleNamespace(quick=False, repeat=5, only=["gemkit", "gemkit-dense", "llama.cpp"])
    return run.Bench(args, Path("model.gguf"), [1, 2, 3])


def test_rows_pair_ours_with_rivals_round_by_round(bench):
    work = bench.work[0]
    bench.values[work] = {
        "gemkit": [10.0, 30.0, 20.0],
        "gemkit-dense": [1.0, 1.0, 1.0],
        "llama.cpp": [20.0, 20.0, 80.0],
    }
    rows = {row["ours_name"]: row for row in bench.rows()}
    assert set(rows) == {"gemkit", "gemkit-dense"}  # never one of ours beside another
    row = rows["gemkit"]
    assert (row["ours"], row["rival"], row["rival_name"]) == (20.0, 20.0, "llama.cpp")
    assert row["ratio"] == 0.5  # the median of 0.5, 1.5 and 0.25, not 20 / 20
    assert row["ratio_range"] == [0.25, 1.5]
    assert (row["rounds"], row["better"], row["unit"]) == (3, "higher", "tok/s")


def test_what_is_missing_has_no_rows(bench):
    bench.values[bench.work[0]] = {"gemkit": [10.0]}
    assert bench.rows() == []


def test_doubts_are_said(bench):
    bench.memory_reads = [10e9, 11e9]
    bench.foreign = SimpleNamespace(cpus=0.0, stolen_cpus=0.0)
    bench.values = {bench.work[0]: {"gemkit": [10.0, 11.0]}}
    assert bench.doubts() == []
    bench.values = {bench.work[0]: {"gemkit": [10.0, 20.0]}}
    bench.foreign.cpus = 0.5
    bench.memory_reads.append(20e9)
    bench.args.repeat = 1
    assert len(bench.doubts()) == 4


# ── floors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def floors(run):
    return run.floors


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ([2.0] * 7, True),
        ([1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0], True),  # two may fall below
        ([1.9, 1.9, 1.9, 9.0, 9.0, 9.0, 9.0], False),  # three may not, however far the others are ahead
        ([1.9, 1.9, 1.9, 1.9, 9.0, 9.0, 9.0], False),
    ],
)
def test_a_floor_is_met_by_the_median_with_two_pairs_below_at_most(floors, ratios, met):
    assert floors.is_met(ratios, 2.0) is met


def _row(floors, **changes):
    sides = [floors.Side(engine, "2b-q4", floors.Task("decode")) for engine in ("gemkit-executor", "llama.cpp")]
    return floors.Row(**{"name": "x", "work": "work", "floor": 2.0, "ours": sides[0], "rival": sides[1], **changes})


def test_a_ratio_is_that_of_the_pair_and_above_one_where_ours_is_ahead(floors):
    assert floors.Pair(30.0, 10.0).ratio == 3
    assert floors.Pair(200.0, 100.0, lower_is_better=True).ratio == 0.5  # more memory than the file is behind
    pairs = [floors.Pair(ours, rival) for ours, rival in [(10.0, 5.0), (30.0, 10.0), (20.0, 20.0)] + [(8.0, 2.0)] * 4]
    told = floors.told(_row(floors), pairs, "tok/s", {})
    assert (told["ratio"], told["ratio_range"], told["below"]) == (4, [1, 4], 1)
    assert (told["ours"], told["rival"]) == (8, 2)  # medians of their own, whose ratio need not be that of the pairs
    assert told["met"]


def test_no_floor_is_met_by_few_pairs_or_by_other_words(floors):
    pairs = [floors.Pair(4.0, 1.0)] * floors.PAIRS
    assert floors.told(_row(floors), pairs, "tok/s", {"agreed": None})["met"]  # random weights are never sure
    assert not floors.told(_row(floors), pairs[1:], "tok/s", {"agreed": True})["met"]
    assert not floors.told(_row(floors), pairs, "tok/s", {"agreed": False})["met"]
    assert not floors.told(_row(floors), pairs, "tok/s", {}, is_result=False)["met"]


def test_shares_of_the_limits(floors):
    decoder = family.get("gemma-2-2b").decoder
    need = floors.needs(decoder, floors.Task("decode", depth=4096, tokens=32), weight_bytes=1.7e9)
    keys = 26 * 2 * 4 * 256 * 2  # layers, keys and values, heads, numbers, bytes; the window holds 4,096
    assert need["bytes"] == 1.7e9 + keys * 4096 + keys // 2 * 16
    alone = floors.needs(decoder, floors.Task("decode"), weight_bytes=1.7e9)
    eight = floors.needs(decoder, floors.Task("decode", sequences=8), weight_bytes=1.7e9)
    assert alone["bytes"] - eight["bytes"] == 1.7e9 * 7 / 8  # the weights are shared, the states are not
    assert alone["operations"] == eight["operations"]
    prompt = floors.needs(decoder, floors.Task("prompt", prompt=512, tokens=0), weight_bytes=1.7e9)
    matrices = 2 * (2_614_341_888 - 256_000 * 2304)  # parameters without the table, but for the norms
    assert prompt["operations"] == pytest.approx(matrices, rel=0.02)  # attention and one head in 512 are the rest
    limits = {"memory": 17e9, "int8": 1e12, "float32": None}
    assert floors.shares(10.0, {"bytes": 1.7e9, "operations": 1e10}, limits) == {
        "memory": 1.0,
        "int8": 0.1,
        "float32": None,
    }


def test_the_result_is_one_object_and_says_what_is_missing_and_doubtful(floors):
    args = SimpleNamespace(
        pairs=7, quick=False, threads=2, only=["decode-270m", "decode-2b"], rivals=Path("nowhere"), llama_bench=None
    )
    suite = floors.Floors(args, lambda count: [2] * count)
    suite.limits, suite.reads = {"memory": 20e9, "int8": None, "float32": 1e11}, [20e9, 10e9]
    pairs = [floors.Pair(4.0, 1.0, foreign=floors.Foreign(1.0, busy=0.5))] * 7
    need = {"bytes": 1e9, "operations": 1e9}
    more = {"agreed": True, "own_bench": {"off": 0.08, "agrees": False}}
    names = {f"{w}_{what}": what for w in ("ours", "rival") for what in ("name", "about")}
    suite.rows.append(
        floors.told(_row(floors), pairs, "tok/s", {**more, **names, "ours_need": need, "rival_need": need})
    )
    suite.missing["decode-2b"] = "its process ended"
    result = json.loads(json.dumps(suite.result()))
    assert (result["suite"], result["met"], result["of"]) == ("floors", 1, len(floors.ROWS))
    (row,) = result["rows"]
    assert {"row", "work", "ratio", "floor", "met", "ours", "rival", "unit", "pairs"} <= row.keys()
    assert row["pairs"][0] == {"ours": 4, "rival": 1, "ratio": 4, "foreign_cpus": 0.5, "stolen_cpus": 0}
    assert row["ours_share"] == {"memory": 0.2, "int8": None, "float32": 0.04}
    assert result["missing"] == {"decode-2b": "its process ended"}
    assert len(result["doubts"]) == 3  # foreign load, off its own benchmark, memory read at half its rate
    text = floors.report(result, 7)
    assert "| work | 4.00 [4.00, 4.00] | 2.00 | yes |" in text
    assert "not measured: decode-2b: its process ended" in text


def test_rows_have_names_of_their_own_and_models_that_are_known(floors):
    assert len({row.name for row in floors.ROWS}) == len(floors.ROWS)
    sides = [side for row in floors.ROWS for side in (row.ours, row.rival) if side is not None]
    assert {side.model for side in sides} <= floors.MODELS.keys()


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def small(name):
    """The member's layers with the least width that blocks of 256 can be cut from."""
    real = family.get(name).decoder
    heads = {"head_dim": 64, "scale": 64**-0.5}
    return family.replace_layers(replace(real, vocab_size=512, width=256), attention=heads, ffw={"width": 512})


@pytest.mark.parametrize(("name", "mix"), [("gemma-2-2b", "Q4_K_M"), ("gemma-2-2b", "Q8_0"), ("gemma-2b", "Q4_K_M")])
def test_random_ggufs_load_and_their_logits_are_finite(run, tmp_path, name, mix):
    path = tmp_path / "random.gguf"
    run.floors.models.write_gguf(path, small(name), mix)
    model = gemkit.load(path)
    assert model.config == small(name)
    state = model.executor.new_state(1)
    for ids in ([2, 300, 301, 302], [303], [304]):
        logits = dense(model.executor, [Chunk(0, ids)], state)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01  # of weights that are not all alike
    for weight in (model.module.embed_tokens.weight, model.module.layers[3].mlp.down_proj.weight):
        values = weight.dequantize()
        assert float(values.std()) == pytest.approx(run.floors.models.DEVIATION, rel=0.1)
        assert abs(float(values.mean())) < 0.1 * run.floors.models.DEVIATION


def test_blocks_mean_the_same_to_the_gguf_package(run, tmp_path):
    """The scales are packed by hand, and another reader must find them where ours does."""
    path = tmp_path / "random.gguf"
    run.floors.models.write_gguf(path, small("gemma-2-2b"), "Q4_K_M")
    model = gemkit.load(path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, weight in (
        ("token_embd", model.module.embed_tokens.weight),
        ("blk.3.ffn_up", model.module.layers[3].mlp.up_proj.weight),
    ):
        tensor = tensors[f"{name}.weight"]
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        np.testing.assert_allclose(weight.dequantize().numpy(), theirs, atol=1e-7)  # float32, in another order
    types = [tensors[f"blk.{i}.attn_v.weight"].tensor_type.name for i in range(26)]
    # by llama.cpp's rule: the first and last eighth of 26 layers, and every third between
    assert [i for i, name in enumerate(types) if name == "Q6_K"] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25]
    assert set(types) == {"Q4_K", "Q6_K"}


@pytest.mark.parametrize("name", ["gemma-2-2b", "recurrentgemma-2b"])
def test_random_folders_load_and_a_state_that_is_made_up_goes_on(run, tmp_path, name):
    decoder = replace(tiny(name), vocab_size=512)  # the pieces of a real vocabulary begin with 256 bytes and more
    run.floors.models.write_folder(tmp_path / "random", decoder)
    executor = gemkit.load(tmp_path / "random").executor
    state = executor.new_state(2)
    importlib.import_module("worker").fill(executor, state, 100)  # windows of 8 are long full
    assert state.lengths == {0: 100, 1: 0}
    state.restore(state.snapshot(0), 1)
    logits = [dense(executor, [Chunk(1, [token])], state) for token in (2, 30, 31)]
    assert np.isfinite(logits).all()
    assert state.lengths == {0: 100, 1: 103}
