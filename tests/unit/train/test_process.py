"""Two processes of a run, played by two threads: their steps add up to that of one, and one of them writes."""

import copy
import threading
from dataclasses import dataclass, field

import pytest
import torch

from gemkit.train import step
from gemkit.train.data.loader import share
from gemkit.train.experiment import Save, Step
from gemkit.train.loop import Trainer
from gemkit.train.process import Process
from support.training import NextToken, Sequences, experiment, module


@dataclass(frozen=True)
class Thread(Process):
    """A process whose sums go over threads."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    board: dict[int, float] = field(default_factory=dict)

    def sum(self, value: float) -> float:
        self.board[self.rank] = value
        self.barrier.wait(60)
        total = sum(self.board[rank] for rank in range(self.world))
        self.barrier.wait(60)
        return total


def together(world: int, run) -> list:
    """What `run` returns in each of the processes."""
    barrier, board = threading.Barrier(world), {}
    results: dict[int, object] = {}

    def of(rank: int) -> None:
        try:
            results[rank] = run(Thread(rank, world, barrier=barrier, board=board))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=of, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world)]


def test_one_process_sums_nothing():
    assert Process().main
    assert Process().sum(2.5) == 2.5
    assert Process().any(True)
    assert not Process().any(False)


def test_two_processes_have_the_gradient_of_one():
    """Units dealt unequally in float64: the loss and its metrics are equal everywhere, the gradients add up."""
    model, units = module("gemma-2-2b", dtype=torch.float64), Sequences().at(0)

    def compute(process: Process):
        own = copy.deepcopy(model)
        mine = share(units, process.rank, process.world)
        found = step.compute(own, NextToken(), mine, seed=0, step=0, microbatch_tokens=18, process=process)
        return found, {name: value.grad for name, value in own.named_parameters()}

    whole, wanted = compute(Process())
    (one, ours), (two, theirs) = together(2, compute)
    assert len(one.units) + len(two.units) == len(units)
    for found in (one, two):
        assert found.size == whole.size
        assert found.loss == pytest.approx(whole.loss, rel=1e-12)
        assert found.metrics["right"] == pytest.approx(whole.metrics["right"])
    largest = max(grad.abs().max().item() for grad in wanted.values())
    for name, grad in wanted.items():
        assert (ours[name] + theirs[name] - grad).abs().max().item() < 1e-13 * largest, name


def test_only_the_main_process_writes_and_speaks(tmp_path):
    """Both compute the same steps here, for nothing reduces their gradients."""
    said: dict[int, list[str]] = {0: [], 1: []}

    def run(process: Process):
        folder = tmp_path / str(process.rank)
        folder.mkdir()
        of = Trainer(
            copy.deepcopy(start), NextToken(), Sequences(), experiment(step=Step(), save=Save(every=1)), 2,
            folder=folder, held_out=Sequences(seed=7).at(0), say=said[process.rank].append, process=process,
        )  # fmt: skip
        return of.run()

    start = module()
    one, two = together(2, run)
    assert one.step == two.step == 2
    assert (tmp_path / "0" / "log.jsonl").exists()
    assert sorted(path.name for path in (tmp_path / "0" / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    assert [*(tmp_path / "1").iterdir()] == []
    assert said[0]
    assert not said[1]


def test_a_stop_of_one_process_stops_all():
    def run(process: Process):
        of = Trainer(copy.deepcopy(start), NextToken(), Sequences(), experiment(), 5, process=process)
        of.on_step = lambda _: None
        if process.rank == 1:
            of._signals.count = 1
        return of.run()

    start = module()
    assert [outcome.step for outcome in together(2, run)] == [0, 0]
