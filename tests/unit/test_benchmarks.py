"""The benchmark's arithmetic: what becomes of the rounds. What it measures is not tested, and nothing here is timed."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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
