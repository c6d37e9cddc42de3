"""Two versions of gemkit in turn: `python benchmarks/versions.py OTHER` measures this checkout against another one.

Each checkout answers through its own `worker.py`, in its own `.venv`, in a process of its own; one computes at a time,
and who goes first changes from pair to pair. Ratios are made within a pair, this checkout's speed over the other's (of
memory: its bytes over the other's); their median and range are printed, and two equal builds differ by some percent.

The 2B rows need the file that `models.gemma_2_2b("Q4_K_M")` writes once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from worker import random_ids
from workers import Worker, say

HERE = Path(__file__).parents[1]
VOCABULARY = 200_000  # ids below this are in every file that is measured


class Side:
    """The workers of one checkout, a model each."""

    def __init__(self, checkout: Path, threads: int):
        self.checkout, self.threads = checkout, threads
        self._workers: dict[str, Worker] = {}

    def start(self) -> Worker:
        python = self.checkout / ".venv" / "bin" / "python"
        return Worker("gemkit-executor", python, self.threads, self.checkout / "benchmarks" / "worker.py")

    def with_model(self, path: Path) -> Worker:
        if str(path) not in self._workers:
            worker = self._workers[str(path)] = self.start()
            worker.ask("load", path=str(path), context=4_096)
        return self._workers[str(path)]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def decode(path: Path, sequences: int, tokens: int) -> Callable[[Side], float]:
    """Tokens a second of sequences that go on from a prompt of 64."""
    prompts = [random_ids(64, VOCABULARY)] * sequences

    def measure(side: Side) -> float:
        answer = side.with_model(path).ask("decode", prompts=prompts, tokens=tokens)
        return sequences * tokens / answer["seconds"]

    return measure


def prompt(path: Path, tokens: int) -> Callable[[Side], float]:
    """Tokens a second of a prompt."""
    ids = random_ids(tokens, VOCABULARY)
    return lambda side: tokens / side.with_model(path).ask("prompt", prompts=[ids])["seconds"]


def load(path: Path) -> Callable[[Side], float]:
    """Loads a second, in a new process, its packed form kept."""

    def measure(side: Side) -> float:
        worker = side.start()
        seconds = worker.ask("load", path=str(path), context=4_096)["seconds"]
        worker.close()
        return 1 / seconds

    return measure


def memory(path: Path) -> Callable[[Side], float]:
    """Resident bytes of a process that has answered."""
    return lambda side: side.with_model(path).ask("resident")["resident"]


def rows() -> dict[str, Callable[[Side], float]]:
    small, large = models.starter(), models.gemma_2_2b("Q4_K_M")
    return {
        "decode-270m": decode(small, 1, 96),
        "decode-2b": decode(large, 1, 24),
        "prompt-270m": prompt(small, 512),
        "prompt-2b": prompt(large, 256),
        "eight-270m": decode(small, 8, 24),
        "load-270m": load(small),
        "memory-270m": memory(small),
    }


def main() -> int:
    known = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout, with its .venv")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=known, action="append", help="rows to measure (default: all)")
    args = parser.parse_args()
    sides = Side(HERE, args.threads), Side(args.other.resolve(), args.threads)
    found: dict[str, Any] = {}
    print("| row | this | other | ratio, median [range] |\n|---|--:|--:|--:|", flush=True)
    try:
        for name in args.only or known:
            measure = known[name]
            for side in sides:
                measure(side)  # warm: loaded, packed, its threads started
            pairs = []
            for i in range(args.pairs):
                order = sides if i % 2 else sides[::-1]
                values = {side.checkout: measure(side) for side in order}
                pairs.append(tuple(values[side.checkout] for side in sides))
                say(f"{name} {i + 1}/{args.pairs}: {pairs[-1][0]:.4g} {pairs[-1][1]:.4g}")
            ratios = sorted(ours / theirs for ours, theirs in pairs)
            middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
            found[name] = {"ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]], "pairs": pairs}
            print(
                f"| {name} | {middle[0]:.4g} | {middle[1]:.4g} | "
                f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}] |",
                flush=True,
            )
    finally:
        for side in sides:
            side.close()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
