"""gemkit and its rivals side by side, in one run, on one GGUF. The rules are in README.md.

python benchmarks/run.py                       the starter model, every engine
python benchmarks/run.py model.gguf --save     another file, and a file in results/
python benchmarks/run.py --only gemkit,llama.cpp --quick
python benchmarks/run.py --suite floors --json what gemkit must reach, row by row, against the best of each rival
python benchmarks/run.py --suite floors --only decode-270m --pairs 3 --quick
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal

import floors
import machine
from machine import Foreign
from workers import HERE, Lost, Worker, say

from gemkit.errors import GemkitError
from gemkit.memory import available_memory
from gemkit.text import Tokenizer
from gemkit.weights import hub
from gemkit.weights.checkpoint import find

ROUNDS = 5  # a result has at least as many
ENGINES = ("gemkit", "gemkit-dense", "llama.cpp", "transformers-float32", "transformers-bfloat16")  # all read a GGUF

# Said twice, and then again and again: what comes next is never in doubt, so all sound engines continue alike.
PASSAGE = (
    "The harbour opens to the west, and in the evening the boats come home against the light. Each skipper counts the "
    "crates, writes the number on a slate beside the scales, and waits for the buyer to nod. Nobody speaks of the "
    "weather before the last rope is tied. "
)
CHECKED = 8  # tokens that the engines must continue alike
ROWS = [row.name for row in floors.ROWS]


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Work:
    """One piece of work that every engine is asked for."""

    name: str
    unit: Literal["tok/s", "s", "MB"]
    prompt: int = 0  # tokens
    decoded: int = 0  # tokens after the prompt's first

    @property
    def better(self) -> str:
        return "higher" if self.unit == "tok/s" else "lower"


LOAD = Work("load", "s")
READY = Work("process start to first token", "s")
PEAK = Work("peak memory", "MB")


def rates(quick: bool) -> list[Work]:
    prompts, steps, depth, deep_steps = ((32, 128), 8, 128, 8) if quick else ((32, 128, 512), 32, 1024, 16)
    return [
        *(Work(f"prompt of {n} tokens", "tok/s", prompt=n) for n in prompts),
        Work(f"decode of {steps} tokens after 16", "tok/s", prompt=16, decoded=steps),
        Work(f"decode of {deep_steps} tokens after {depth}", "tok/s", prompt=depth, decoded=deep_steps),
    ]


# ── the engines, in turn ──────────────────────────────────────────────────────────────────────────────────────────────


class Bench:
    """The measurement: engines asked in turn, round by round. An engine that fails is dropped, with the reason."""

    def __init__(self, args: argparse.Namespace, path: Path, ids: list[int]):
        self.args, self.path, self.ids = args, path, ids
        self.work = rates(args.quick)
        self.engines: dict[str, dict[str, Any]] = {name: {} for name in args.only}
        self.missing: dict[str, str] = {}
        self.values: dict[Work, dict[str, list[float]]] = {work: {} for work in (*self.work, LOAD, READY, PEAK)}
        self.drawn: dict[str, list[int]] = {}
        self.foreign = Foreign()
        self.memory_reads: list[float] = []  # bytes a second: before all else, then one a round
        self.load_average = os.getloadavg()[0]
        self.context = max(work.prompt + work.decoded for work in self.work) + 1

    def run(self) -> None:
        with open(self.path, "rb") as file:  # into the page cache, for everyone alike
            while file.read(1 << 24):
                pass
        memory = Worker("limits", Path(sys.executable), self.args.threads)
        workers: dict[str, Worker] = {}
        try:
            self._read_memory(memory)
            say(f"memory is read at {self.memory_limit() / 1e9:.1f} GB/s: {self.ceiling()}")
            for number in range(self.args.repeat):
                for name in self._turns(number):
                    say(f"loading, round {number + 1} of {self.args.repeat}: {name}")
                    self._guarded(name, self._start_and_stop)
            self._check_room()
            for name in list(self.engines):
                say(f"loading once more, warming up: {name}")
                self._guarded(name, lambda name: self._warm_up(name, workers))
            self._check_agreement()
            for number in range(self.args.repeat):
                self._read_memory(memory)
                for work in self.work:
                    say(f"round {number + 1} of {self.args.repeat}: {work.name}")
                    for name in self._turns(number):
                        self._guarded(name, lambda name, work=work: self._time(workers[name], work))
        finally:
            for worker in (memory, *workers.values()):
                worker.close()

    def _turns(self, number: int) -> list[str]:
        """Everyone in turn; each round begins with another, so that nobody always follows the same neighbour."""
        names = list(self.engines)
        shift = number % len(names) if names else 0
        return names[shift:] + names[:shift]

    def _guarded(self, name: str, work: Any) -> None:
        try:
            work(name)
        except Lost as error:
            say(f"{name} is left out: {error}")
            self.missing[name] = str(error)
            self.engines.pop(name)
            self.drawn.pop(name, None)
            for by_engine in self.values.values():
                by_engine.pop(name, None)

    def _worker(self, name: str) -> Worker:
        python = self.args.rivals / "bin" / "python" if name == "llama.cpp" else Path(sys.executable)
        return Worker(name, python, self.args.threads)

    def _load(self, worker: Worker, foreign: Foreign | None = None) -> dict[str, Any]:
        return worker.ask("load", foreign, path=str(self.path), context=self.context)

    def _start_and_stop(self, name: str) -> None:
        """Load, and the memory that a load, the longest prompt without depth and a short answer take."""
        worker = self._worker(name)
        try:
            answer = self._load(worker, self.foreign)
            ready = time.perf_counter() - worker.started
            longest = max(work.prompt for work in self.work if not work.decoded)
            worker.ask("decode", self.foreign, prompts=[self.ids[:longest]], tokens=4)
            self._note(LOAD, name, answer["seconds"])
            self._note(READY, name, ready)
            self._note(PEAK, name, worker.ask("peak")["bytes"] / 1e6)
            self.engines[name] = {
                "about": answer["about"],
                "weight_bytes": answer["weight_bytes"],
                "imported_bytes": worker.imported_bytes,
            }
        finally:
            worker.close()

    def _warm_up(self, name: str, workers: dict[str, Worker]) -> None:
        """Everything once, untimed: buffers are made, and what the engine says can be compared."""
        workers[name] = worker = self._worker(name)
        self._load(worker)
        for work in self.work:
            answer = self._ask(worker, work)
        self.drawn[name] = [
            token for (token,) in answer["drawn"][:CHECKED]
        ]  # of the last work, whose prompt repeats itself most often

    def _check_room(self) -> None:
        needed = sum(max(values) * 1e6 for values in self.values[PEAK].values())
        if (free := available_memory()) is not None and needed > free:
            raise SystemExit(
                f"all engines at once need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: measure "
                "fewer in one run with --only"
            )

    def _read_memory(self, memory: Worker) -> None:
        answer = memory.ask("read", passes=8)
        self.memory_reads.append(answer["bytes"] / answer["seconds"])

    def _check_agreement(self) -> None:
        """Refuse to measure models that do not say the same: one of them is broken, and a broken one may be fast."""
        if len(set(map(tuple, self.drawn.values()))) <= 1:
            return
        said = "; ".join(f"{name}: {ids}" for name, ids in self.drawn.items())
        if not self.args.unchecked:
            raise SystemExit(
                f"the engines continue the same text differently: {said}. One is broken, so nothing is measured. For a "
                "model of random weights, which is never sure of a word, pass --unchecked"
            )
        say(f"note: the engines continue the same text differently: {said}")

    def _ask(self, worker: Worker, work: Work, foreign: Foreign | None = None) -> dict[str, Any]:
        prompts = [self.ids[: work.prompt]]
        if work.decoded:
            return worker.ask("decode", foreign, prompts=prompts, tokens=work.decoded)
        return worker.ask("prompt", foreign, prompts=prompts)

    def _time(self, worker: Worker, work: Work) -> None:
        answer = self._ask(worker, work, self.foreign)
        self._note(work, worker.name, (work.decoded or work.prompt) / answer["seconds"])

    def _note(self, work: Work, name: str, value: float) -> None:
        self.values.setdefault(work, {}).setdefault(name, []).append(value)

    # ── what came of it ─────────────────────────────────────────────────────────────────────────────────────────────

    def rows(self) -> list[dict[str, Any]]:
        """Each of ours beside each rival, for each piece of work."""
        rows = []
        for work, by_engine in self.values.items():
            for ours, ours_values in by_engine.items():
                for rival, rival_values in by_engine.items():
                    if not is_ours(ours) or is_ours(rival):
                        continue
                    ratios = [a / b for a, b in zip(ours_values, rival_values, strict=True)]
                    rows.append(
                        {
                            "work": work.name,
                            "ours": median(ours_values),
                            "rival": median(rival_values),
                            "rival_name": rival,
                            "unit": work.unit,
                            "ratio": median(ratios),
                            "ratio_range": [min(ratios), max(ratios)],
                            "better": work.better,
                            "ours_name": ours,
                            "ours_range": [min(ours_values), max(ours_values)],
                            "rival_range": [min(rival_values), max(rival_values)],
                            "rounds": len(ratios),
                        }
                    )
        return rows

    def ceiling(self) -> str:
        """What the memory allows at most, told before anything is measured."""
        with find(self.path) as checkpoint:
            weights = sum(entry.nbytes for entry in checkpoint.reader.entries.values())
        rate = self.memory_limit() / weights
        return f"the {weights / 1e6:,.0f} MB of weights in the file can be read {rate:.1f} times a second, a token each"

    def memory_limit(self) -> float:
        """Bytes a second that the machine was seen to read from memory: the best of all rounds."""
        return max(self.memory_reads)

    def doubts(self) -> list[str]:
        """Why the figures may be off."""
        doubts = []
        if self.args.quick or self.args.repeat < ROUNDS:
            doubts.append(f"--quick, or fewer than {ROUNDS} rounds: figures for development, not a result")
        if self.foreign.cpus > 0.1:
            doubts.append(f"other processes kept {self.foreign.cpus:.2f} CPUs busy")
        if self.foreign.stolen_cpus > 0.05:
            doubts.append(f"the hypervisor took {self.foreign.stolen_cpus:.2f} CPUs away")
        if max(self.memory_reads) > 1.25 * min(self.memory_reads):
            doubts.append(
                f"memory was read at {min(self.memory_reads) / 1e9:.1f} to {self.memory_limit() / 1e9:.1f} GB/s"
            )
        spreads = [
            (max(values) / min(values), f"{name}, {work.name}")
            for work, by_engine in self.values.items()
            for name, values in by_engine.items()
        ]
        if wide := [spread for spread in spreads if spread[0] > 1.25]:
            factor, where = max(wide)
            doubts.append(
                f"the rounds of {len(wide)} of {len(spreads)} measurements differ by more than a quarter, most of all "
                f"those of {where}: by a factor of {factor:.2f}"
            )
        return doubts

    def result(self) -> dict[str, Any]:
        with find(self.path) as checkpoint:
            types = Counter(entry.dtype for entry in checkpoint.reader.entries.values())
            label = checkpoint.reader.metadata.get("general.name")
        return {
            "rows": self.rows(),
            "machine": {
                **machine.describe(self.args.threads),
                "memory_read_gb_per_s": [value / 1e9 for value in self.memory_reads],
                "load_average_at_start": self.load_average,
                "foreign_cpus": self.foreign.cpus,
                "stolen_cpus": self.foreign.stolen_cpus,
            },
            "model": {
                "file": self.path.name,
                "name": label,
                "bytes": self.path.stat().st_size,
                "tensors": dict(types.most_common()),
            },
            "engines": self.engines,
            "missing": self.missing,
            "doubts": self.doubts(),
            "agreed": len(set(map(tuple, self.drawn.values()))) <= 1,
            "values": {work.name: by_engine for work, by_engine in self.values.items()},
            "commit": machine.commit(),
            "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
            "date": date.today().isoformat(),
        }


def is_ours(engine: str) -> bool:
    return engine.startswith("gemkit")


# ── telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(bench: Bench, result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    here, model = result["machine"], result["model"]
    tensors = ", ".join(f"{kind} x{count}" for kind, count in model["tensors"].items())
    limit, lowest = bench.memory_limit() / 1e9, min(bench.memory_reads) / 1e9
    lines = [
        f"# {model['name'] or model['file']}, {here['cpu']}, {here['threads']} threads",
        "",
        f"- file: {model['file']}, {model['bytes'] / 1e6:,.1f} MB ({tensors})",
        f"- machine: {here['cpus']} CPUs ({' '.join(here['instructions'])}), {here['memory_bytes'] / 2**30:.1f} GiB, "
        f"{here['system']}, Python {here['python']}; environment: "
        + (" ".join(f"{k}={v}" for k, v in here["environment"].items()) or "nothing set"),
        f"- memory read limit, measured in this run: {limit:.1f} GB/s (lowest round {lowest:.1f})",
        f"- meanwhile others kept {here['foreign_cpus']:.2f} CPUs busy and {here['stolen_cpus']:.2f} were stolen; load "
        f"average at the start {here['load_average_at_start']:.2f}",
        f"- {bench.args.repeat} rounds, engines in turn; {result['date']}, commit {result['commit']}",
        f"- command: `{result['command']}`",
        *(
            f"- {name}: {engine['about']}; {engine['weight_bytes'] / 1e6:,.0f} MB of weights, and "
            f"{engine['imported_bytes'] / 1e6:,.0f} MB before anything is loaded"
            for name, engine in result["engines"].items()
        ),
        *(f"- not measured: {name}: {why}" for name, why in result["missing"].items()),
        *(f"- **doubt**: {doubt}" for doubt in result["doubts"]),
        "- the engines "
        + ("agree" if result["agreed"] else "DISAGREE")
        + f" on {CHECKED} tokens after the longest prompt",
        "",
        "median [lowest, highest]; a ratio is the median of the rounds' own ratios, gemkit's value over the rival's",
        "",
    ]
    for work, by_engine in bench.values.items():
        lines += [f"## {work.name} ({work.unit}, {work.better} is better)", "", *_table(bench, work, by_engine), ""]
    return "\n".join(lines)


def _table(bench: Bench, work: Work, by_engine: dict[str, list[float]]) -> list[str]:
    ours = [name for name in by_engine if is_ours(name)]
    head = ["engine", work.unit, *(f"ratio of {name}" for name in ours)]
    if work.decoded:
        head += ["weights a token", "share of the memory limit"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, values in by_engine.items():
        cells = [name, spread(values)]
        for mine in ours:
            ratios = [a / b for a, b in zip(by_engine[mine], values, strict=True)]
            cells.append("" if is_ours(name) else spread(ratios))
        if work.decoded:
            weights = bench.engines[name]["weight_bytes"]
            cells += [f"{weights / 1e6:,.0f} MB", f"{weights * median(values) / bench.memory_limit():.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float]) -> str:
    digits = 0 if median(values) >= 1000 else 1 if median(values) >= 10 else 2
    return f"{median(values):,.{digits}f} [{min(values):,.{digits}f}, {max(values):,.{digits}f}]"


def save(text: str, result: dict[str, Any], name: str) -> Path:
    """A file in results/, named as its README says: `name` is what was measured. Nothing is overwritten."""

    def slug(words: str) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")

    here = result["machine"]
    hardware = slug(f"{here['cpu']} {here['threads']} threads".replace("Processor", ""))
    stem = f"{slug(name)}_{hardware}_{result['date'].replace('-', '')}"
    path, number = HERE / "results" / f"{stem}.md", 1
    while path.exists():
        number += 1
        path = path.with_name(f"{stem}_{number}.md")
    path.write_text(f"{text}\n## Raw\n\n```json\n{json.dumps(result)}\n```\n", encoding="utf-8")
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf (default: the starter model)")
    parser.add_argument("--suite", choices=("engines", "floors"), default="engines", help="default: engines")
    parser.add_argument(
        "--only", metavar="NAMES", help=f"engines, of: {', '.join(ENGINES)}; or rows of the floors: {', '.join(ROWS)}"
    )
    parser.add_argument("--repeat", type=int, default=ROUNDS, metavar="N", help=f"rounds (default: {ROUNDS})")
    parser.add_argument("--pairs", type=int, default=floors.PAIRS, metavar="N", help="of a floor's row (default: 7)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="of each engine")
    parser.add_argument("--quick", action="store_true", help="small sizes, for work on the engines; never a result")
    parser.add_argument("--unchecked", action="store_true", help="measure engines that disagree (random weights)")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    parser.add_argument("--save", action="store_true", help="write a file in benchmarks/results")
    parser.add_argument(
        "--rivals",
        type=Path,
        default=Path(os.environ.get("GEMKIT_BENCH_RIVALS", HERE.parent / ".venv-bench")),
        metavar="FOLDER",
        help="virtual environment with llama-cpp-python (default: $GEMKIT_BENCH_RIVALS, or .venv-bench)",
    )
    parser.add_argument(
        "--llama-bench", type=Path, metavar="PROGRAM", help="llama.cpp's own benchmark, to compare its figures with"
    )
    args = parser.parse_args()
    known = ENGINES if args.suite == "engines" else ROWS
    args.only = args.only.split(",") if args.only else list(known)
    if unknown := sorted(set(args.only) - set(known)):
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(known)}")
    if min(args.repeat, args.pairs, args.threads) < 1:
        parser.error("--repeat, --pairs and --threads must be at least 1")
    if args.suite == "floors" and (args.model or args.unchecked):
        parser.error("the rows of --suite floors have models of their own: no model, no --unchecked")
    if args.save and (args.quick or args.repeat < ROUNDS or args.pairs < floors.PAIRS):
        parser.error(f"--save is for results: without --quick, with {ROUNDS} rounds or {floors.PAIRS} pairs at least")
    return args


def measure_engines(args: argparse.Namespace) -> int:
    path = (args.model or hub.starter()).resolve()
    with find(path) as checkpoint:
        if checkpoint.reader.format != "gguf":
            raise SystemExit(f"{path} is not a GGUF, which is what all engines read")
        tokenizer = checkpoint.tokenizer
    longest = max(work.prompt for work in rates(args.quick))
    bench = Bench(args, path, prompt(tokenizer, longest))
    bench.run()
    result = bench.result()
    tell(args, report(bench, result), result, path.stem)
    return 0 if not any(map(is_ours, bench.missing)) else 1


def measure_floors(args: argparse.Namespace) -> int:
    with find(hub.starter()) as checkpoint:  # its ids serve every vocabulary: those of the others are cut from it
        tokenizer = checkpoint.tokenizer
    suite = floors.Floors(args, lambda count: prompt(tokenizer, count))
    suite.run()
    result = suite.result()
    tell(args, floors.report(result, args.pairs), result, "floors")
    return 0 if result["met"] == len(args.only) else 1


def prompt(tokenizer: Tokenizer, count: int) -> list[int]:
    """So many ids of the passage, over and over, after a <bos>."""
    said = tokenizer.encode(PASSAGE)
    return [tokenizer.bos, *(said * (count // len(said) + 1))][:count]


def tell(args: argparse.Namespace, text: str, result: dict[str, Any], name: str) -> None:
    print(text)
    if args.save:
        say(f"saved to {save(text, result, name)}")
    if args.json:
        print(json.dumps(result))


def main() -> int:
    args = parse()
    try:
        return measure_floors(args) if args.suite == "floors" else measure_engines(args)
    except GemkitError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
