"""A step of training, against Transformers and PEFT: LoRA of rank 8 beside all projections of the starter model.

    python benchmarks/training.py --save            every row, and a file in results/
    python benchmarks/training.py --only 512-all --json

A row is so many tokens, of which all or the last quarter are in the loss. Both sides read the same GGUF and compute in
float32: ours from the weights as the file has them, as `gemkit tune` keeps them, the rival from weights that were made
float32 when they were loaded, the only way it has. In each row the rival is first tried at each of its settings, and
the fastest is measured; then both must find the same loss and the same norm of the gradient; then they take steps in
turn, A B A B. A pair's ratio is above 1 where ours is ahead. Memory is the most that a process held in its steps, less
what it held before the model was loaded; what loading took for a moment is not counted. The rules for all benchmarks
are in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import machine
import models
from machine import Foreign
from run import PASSAGE, save
from workers import Lost, Worker, say

from gemkit.weights.checkpoint import find

PAIRS, RANK = 5, 8
# Losses differ by so much at most; norms of gradients, relative to themselves, by NORMS: of 512 tokens with the last
# quarter in the loss float64 finds 3.63748, ours finds 3.63711 to 3.63723 in float32, Transformers 3.63663.
AGREES, NORMS = 1e-4, 5e-4


@dataclass(frozen=True)
class Row:
    tokens: int
    all_learned: bool

    @property
    def name(self) -> str:
        return f"{self.tokens}-{'all' if self.all_learned else 'quarter'}"

    @property
    def learned(self) -> int:
        return self.tokens - 1 if self.all_learned else self.tokens // 4

    @property
    def floor(self) -> float:
        """Tokens a second, ours over theirs."""
        return 1.2 if self.all_learned else 2.0

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What the rival is tried at. With every token learned, there is nothing to leave out of the logits."""
        keeps = (False,) if self.all_learned else (False, True)
        return [{"attention": attention, "keep": keep} for keep in keeps for attention in ("sdpa", "eager")]


ROWS = [Row(tokens, all_learned) for tokens in (512, 2048) for all_learned in (True, False)]
MEMORY_FLOOR = 0.5  # of theirs


def text_ids(tokens: int) -> list[int]:
    with find(models.starter()) as checkpoint:
        ids = [2]
        while len(ids) < tokens:
            ids += checkpoint.tokenizer.encode(PASSAGE)
    return [int(i) for i in ids[:tokens]]


class Side:
    """One of the two in a new process, its model loaded."""

    def __init__(self, name: str, threads: int, settings: dict[str, Any]):
        self.worker = Worker(name, Path(sys.executable), threads, "training_worker.py")
        try:
            told = self.worker.ask("load", path=str(models.starter()), rank=RANK, **settings)
        except Lost:
            self.worker.close()
            raise
        self.about, self.before, self.peak = told["about"], told["before"], 0

    def step(self, row: Row, ids: list[int], foreign: Foreign | None = None) -> dict[str, Any]:
        told = self.worker.ask("step", foreign, ids=ids, learned=row.learned)
        self.peak = told["peak"]
        return told


def fastest(row: Row, ids: list[int], threads: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The rival's best settings, by the second step of each, and all trials."""
    trials = []
    for settings in row.settings:
        side = Side("peft", threads, settings)
        try:
            seconds = [side.step(row, ids)["seconds"] for _ in range(2)]
        finally:
            side.worker.close()
        trials.append({**settings, "seconds": min(seconds)})
        say(f"    trial: {trials[-1]}")
    best = min(trials, key=lambda trial: trial["seconds"])
    return {"attention": best["attention"], "keep": best["keep"]}, trials


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    ids, trials = text_ids(row.tokens), []
    settings = {"attention": args.attention, "keep": not row.all_learned}
    if args.attention is None:
        settings, trials = fastest(row, ids, args.threads)
    sides: list[Side] = []
    try:
        sides.append(Side("gemkit", args.threads, {}))  # one by one: what fails is closed below
        sides.append(Side("peft", args.threads, settings))
        first = [side.step(row, ids) for side in sides]
        agreed = abs(first[0]["loss"] - first[1]["loss"]) <= AGREES
        agreed &= abs(first[0]["norm"] / first[1]["norm"] - 1) <= NORMS
        say(f"    loss {[f['loss'] for f in first]}, norm {[f['norm'] for f in first]}")
        pairs = []
        for _ in range(args.pairs):
            foreign = Foreign()
            seconds = [side.step(row, ids, foreign)["seconds"] for side in sides]
            pairs.append({
                "ours": row.tokens / seconds[0],
                "rival": row.tokens / seconds[1],
                "ratio": seconds[1] / seconds[0],
                "foreign_cpus": foreign.cpus,
                "stolen_cpus": foreign.stolen_cpus,
            })  # fmt: skip
            say(f"    {pairs[-1]}")
        peaks = [side.peak for side in sides]
        beyond = [side.peak - side.before for side in sides]
    finally:
        for side in sides:
            side.worker.close()
    ratios = [pair["ratio"] for pair in pairs]
    memory_ratio = beyond[0] / beyond[1]
    enough = agreed and len(pairs) >= PAIRS
    return {
        "row": row.name,
        "work": f"step of {row.tokens} tokens, {'all' if row.all_learned else 'the last quarter'} in the loss",
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "floor": row.floor,
        "met": enough and median(ratios) >= row.floor,
        "ours": median(pair["ours"] for pair in pairs),
        "rival": median(pair["rival"] for pair in pairs),
        "unit": "tok/s",
        "agreed": agreed,
        "ours_name": sides[0].about,
        "rival_name": sides[1].about,
        "rival_settings": settings,
        "rival_trials": trials,
        "first_steps": first,
        "ours_memory": beyond[0],
        "rival_memory": beyond[1],
        "memory_ratio": memory_ratio,
        "memory_floor": MEMORY_FLOOR,
        "memory_met": agreed and memory_ratio <= MEMORY_FLOOR,
        "ours_peak": peaks[0],
        "rival_peak": peaks[1],
        "pairs": pairs,
    }


def doubts(rows: list[dict[str, Any]], pairs: int) -> list[str]:
    found = [] if pairs >= PAIRS else [f"fewer than {PAIRS} pairs: no floor is met"]
    for row in rows:
        if not row["agreed"]:
            found.append(f"{row['row']}: the two find different losses or gradients, so nothing is met")
        if not row["rival_trials"]:
            found.append(f"{row['row']}: the rival's settings were given, not tried: {row['rival_settings']}")
        if busy := [p for p in row["pairs"] if p["foreign_cpus"] > 0.1 or p["stolen_cpus"] > 0.05]:
            found.append(f"{row['row']}: others had some of the machine in {len(busy)} of {len(row['pairs'])} pairs")
    return found


def report(result: dict[str, Any]) -> str:
    here = result["machine"]
    lines = [
        f"# A step of training, {here['cpu']}, {here['threads']} threads",
        "",
        f"- LoRA of rank {RANK} beside all projections of {models.starter().name}, float32",
        f"- {result['date']}, commit {result['commit']}; command: `{result['command']}`",
        *(f"- not measured: {name}: {why}" for name, why in result["missing"].items()),
        *(f"- **doubt**: {doubt}" for doubt in result["doubts"]),
        "",
        "| work | ratio | floor | met | ours, tok/s | theirs | memory, ours | theirs | ratio | met | in all |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        memory = [f"{row[f'{who}_memory'] / 2**20:,.0f} MiB" for who in ("ours", "rival")]
        cells = [
            row["work"],
            f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['floor']:.1f}",
            "yes" if row["met"] else "**no**",
            f"{row['ours']:.1f}",
            f"{row['rival']:.1f} ({row['rival_settings']})",
            *memory,
            f"{row['memory_ratio']:.2f}",
            "yes" if row["memory_met"] else "**no**",
            f"{row['ours_peak'] / 2**20:,.0f} and {row['rival_peak'] / 2**20:,.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--only", metavar="ROWS", help=f"of: {', '.join(names)}")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"default: {PAIRS}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--attention", choices=("sdpa", "eager"), help="of the rival, instead of trying its settings")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--save", action="store_true", help="write a file in benchmarks/results")
    args = parser.parse_args()
    only = args.only.split(",") if args.only else names
    if unknown := set(only) - set(names):
        parser.error(f"there is no row {sorted(unknown)[0]}; there are: {', '.join(names)}")
    if args.save and args.pairs < PAIRS:
        parser.error(f"--save is for results: with {PAIRS} pairs at least")
    rows, missing = [], {}
    for row in ROWS:
        if row.name in only:
            say(row.name)
            try:
                rows.append(measure(row, args))
            except Lost as error:
                missing[row.name] = str(error)
    result = {
        "suite": "training",
        "rows": rows,
        "missing": missing,
        "machine": machine.describe(args.threads),
        "doubts": doubts(rows, args.pairs),
        "commit": machine.commit(),
        "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
    }
    text = report(result)
    print(text)
    if args.save:
        say(f"saved to {save(text, result, 'training')}")
    if args.json:
        print(json.dumps(result))
    met = [row["met"] and row["memory_met"] for row in rows]
    return 0 if len(met) == len(only) and all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
