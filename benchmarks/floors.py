"""The floors: rows of work in which gemkit must be so many times as fast, or as small, as a rival.

Each row is measured in pairs, ours and the rival in turn, each in a process of its own that is loaded once. A row's
floor is met when the median of the pairs' own ratios meets it and at most two pairs fall below. The rules that hold for
all benchmarks are in README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal

import machine
import models
from machine import Foreign
from workers import HERE, Lost, Worker, say

from gemkit import family
from gemkit.inspect import cost
from gemkit.weights.checkpoint import find

PAIRS = 7  # a result has at least as many
BELOW = 2  # so many of them may miss a floor that their median meets
CHECKED = 8  # tokens that real weights must be continued alike by both
TRIAL = 15  # seconds after which no more is measured of a setting, to choose among several
AGREES = 0.05  # llama.cpp as it is called here and as its own benchmark calls it differ by this share at most


# ── what is measured ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Task:
    """A piece of work: a prompt up to its last logits, greedy tokens after it, or the memory that they take."""

    kind: Literal["prompt", "decode", "memory"]
    prompt: int = 16  # tokens
    tokens: int = 32  # decoded after it, of each sequence
    sequences: int = 1
    depth: int = 0  # tokens remembered already, of a state that is made up; there is no prompt then

    @property
    def context(self) -> int:
        """Tokens that a sequence has at most."""
        return (self.depth or self.prompt) + self.tokens + 8

    def quick(self) -> Task:
        """The same on a small scale: pages are touched and buffers made, and settings can be compared with it."""
        return replace(self, prompt=min(self.prompt, 64), tokens=min(self.tokens, 4))


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    engine: str
    model: str  # of MODELS
    task: Task
    settings: tuple[dict[str, Any], ...] = ({},)  # the fastest of them is taken, by a trial of each
    engines: tuple[str, ...] = ()  # likewise, where engines differ by name


@dataclass(frozen=True)
class Row:
    name: str
    work: str
    floor: float
    ours: Side
    rival: Side | None  # None: ours against the size of its file
    notes: str = ""

    def quick(self) -> Row:
        """The same work on a small scale, whose figures say nothing of the floor."""

        def small(side: Side) -> Side:
            return replace(side, task=replace(side.task.quick(), depth=min(side.task.depth, 256)))

        return replace(self, ours=small(self.ours), rival=self.rival and small(self.rival))


MODELS: dict[str, Callable[[], Path]] = {
    "270m-q4": models.starter,
    "270m-q8": models.starter_q8_0,
    "2b-q4": lambda: models.gemma_2_2b("Q4_K_M"),
    "2b-q8": lambda: models.gemma_2_2b("Q8_0"),
    "2b-folder": lambda: models.folder("gemma-2-2b"),
    "2b-ctranslate2": lambda: CTRANSLATE2,
    "gemma1-folder": lambda: models.folder("gemma-2b"),
    "griffin-folder": lambda: models.folder("recurrentgemma-2b"),
}
CTRANSLATE2 = models.CACHE / "gemma-2-2b-random-ctranslate2-int8"  # made by the rivals' Python: `_convert`
REAL = ("270m-q4", "270m-q8")  # whose words are known before they come

# How llama.cpp and CTranslate2 may be set. Threads are given, and one sequence has one memory.
FLASH = ({"flash": 1}, {"flash": 0})
PROMPT = tuple({"flash": flash, "ubatch": ubatch} for flash in (1, 0) for ubatch in (512, 128))
BATCH = tuple({"flash": flash, "unified": unified} for flash in (1, 0) for unified in (False, True))
WAYS = ({"way": "generate"}, {"way": "forward"})
DENSE = ("transformers-bfloat16", "transformers-float32")
INT4 = ({"weights": "int4", "calibrate": False},)  # how the weights are rounded takes half an hour and no time later
OURS = "gemkit-executor"

_DECODE, _DEEP = Task("decode"), Task("decode", depth=4096)
_PROMPT, _BATCH = Task("prompt", prompt=512, tokens=0), Task("decode", sequences=8)
_FAR, _NEAR = Task("decode", depth=16_384), Task("decode", depth=2048)


def _against_llama(
    name: str, work: str, floor: float, model: str, task: Task, settings: tuple[dict[str, Any], ...]
) -> Row:
    return Row(name, work, floor, Side(OURS, model, task), Side("llama.cpp", model, task, settings))


ROWS = (
    _against_llama("decode-270m", "decode, Gemma 3 270M Q4_K_M (real)", 2.0, "270m-q4", _DECODE, FLASH),
    _against_llama("decode-2b", "decode, Gemma 2 2B Q4_K_M", 1.2, "2b-q4", _DECODE, FLASH),
    _against_llama("decode-2b-4096", "decode after 4,096 tokens, Gemma 2 2B Q4_K_M", 2.0, "2b-q4", _DEEP, FLASH),
    _against_llama("prompt-270m-q4", "prompt of 512, Gemma 3 270M Q4_K_M (real)", 2.0, "270m-q4", _PROMPT, PROMPT),
    _against_llama("prompt-270m-q8", "prompt of 512, Gemma 3 270M Q8_0 (real)", 2.0, "270m-q8", _PROMPT, PROMPT),
    _against_llama("prompt-2b-q4", "prompt of 512, Gemma 2 2B Q4_K_M", 2.0, "2b-q4", _PROMPT, PROMPT),
    _against_llama("prompt-2b-q8", "prompt of 512, Gemma 2 2B Q8_0", 2.0, "2b-q8", _PROMPT, PROMPT),
    Row(
        "prompt-2b-ctranslate2",
        "prompt of 512, Gemma 2 2B int8",
        1.0,
        Side(OURS, "2b-q8", _PROMPT),
        Side("ctranslate2", "2b-ctranslate2", _PROMPT, WAYS),
        "ours from Q8_0: a scale for each 32 weights, where CTranslate2 has one for each row",
    ),
    _against_llama("batch-270m", "8 sequences decoded together, Gemma 3 270M Q4_K_M", 2.5, "270m-q4", _BATCH, BATCH),
    _against_llama("batch-2b", "8 sequences decoded together, Gemma 2 2B Q4_K_M", 2.5, "2b-q4", _BATCH, BATCH),
    Row(
        "decode-2b-transformers",
        "decode, Gemma 2 2B, against Transformers",
        4.0,
        Side(OURS, "2b-q4", _DECODE),
        Side("transformers", "2b-folder", _DECODE, engines=DENSE),
    ),
    Row(
        "prompt-2b-transformers",
        "prompt of 512, Gemma 2 2B, against Transformers",
        2.5,
        Side(OURS, "2b-q4", _PROMPT),
        Side("transformers", "2b-folder", _PROMPT, engines=DENSE),
    ),
    Row(
        "recurrent-16k",
        "decode after 16,384 tokens, RecurrentGemma 2B int4 against Gemma 2B int4",
        1.0,
        Side(OURS, "griffin-folder", _FAR, INT4),
        Side(OURS, "gemma1-folder", _FAR, INT4),
    ),
    Row(
        "recurrent-flat",
        "decode of RecurrentGemma 2B int4, after 16,384 tokens against after 2,048",
        0.95,
        Side(OURS, "griffin-folder", _FAR, INT4),
        Side(OURS, "griffin-folder", _NEAR, INT4),
        "as fast: of two equal figures every other pair falls below 1, so 5 % are allowed for noise",
    ),
    Row(
        "memory-270m",
        "resident memory beyond a process with the tokenizer alone, file : ours, Gemma 3 270M Q4_K_M",
        1 / 1.35,
        Side(OURS, "270m-q4", Task("memory", tokens=8)),
        None,
    ),
    Row(
        "memory-2b",
        "resident memory beyond a process with the tokenizer alone, file : ours, Gemma 2 2B Q4_K_M",
        1 / 1.25,
        Side(OURS, "2b-q4", Task("memory", tokens=8)),
        None,
    ),
)


# ── arithmetic ──────────────────────────────────────────────────────────────────────────────────────────────────────


def is_met(ratios: Sequence[float], floor: float) -> bool:
    """The rule: the median of the pairs meets the floor, and at most two of them fall below."""
    return median(ratios) >= floor and sum(ratio < floor for ratio in ratios) <= BELOW


@dataclass
class Pair:
    """What one turn of each gave, in the row's unit, and what else the machine did meanwhile."""

    ours: float
    rival: float
    lower_is_better: bool = False
    foreign: Foreign = field(default_factory=Foreign)

    @property
    def ratio(self) -> float:
        """Above 1: ours is ahead."""
        return self.rival / self.ours if self.lower_is_better else self.ours / self.rival

    def told(self) -> dict[str, float]:
        return {
            "ours": self.ours,
            "rival": self.rival,
            "ratio": self.ratio,
            "foreign_cpus": self.foreign.cpus,
            "stolen_cpus": self.foreign.stolen_cpus,
        }


def needs(decoder: family.DecoderConfig, task: Task, weight_bytes: float) -> dict[str, float]:
    """Bytes read from memory and operations done, for each token that counts in the task's rate.

    Weights are read once a step, which several sequences, or all tokens of a prompt, share; keys and values are taken
    to have two bytes. Operations are those of matrices and attention; only the last token of a prompt needs the head.
    """
    if task.kind == "prompt":
        head = 2 * decoder.vocab_size * decoder.width
        middle = cost.decode_flops(decoder, task.prompt // 2)  # on average
        return {"bytes": weight_bytes / task.prompt, "operations": middle - head + head / task.prompt}
    context = (task.depth or task.prompt) + task.tokens // 2
    state = cost.state_bytes(decoder, context).total
    return {"bytes": weight_bytes / task.sequences + state, "operations": cost.decode_flops(decoder, context)}


def shares(rate: float, need: dict[str, float], limits: dict[str, float | None]) -> dict[str, float | None]:
    """How much of each of the machine's limits a rate uses. None where the limit is not known."""
    operations = rate * need["operations"]
    used = {"memory": rate * need["bytes"], "int8": operations, "float32": operations}
    return {name: None if not (limit := limits.get(name)) else value / limit for name, value in used.items()}


def told(row: Row, pairs: Sequence[Pair], unit: str, more: dict[str, Any], is_result: bool = True) -> dict[str, Any]:
    """A row of the result. Few pairs, other words than the rival's, or what is no result at all, meet no floor."""
    ratios = [pair.ratio for pair in pairs]
    return {
        "row": row.name,
        "work": row.work,
        "ratio": median(ratios),
        "floor": row.floor,
        "met": is_met(ratios, row.floor) and is_result and len(pairs) >= PAIRS and more.get("agreed") is not False,
        "ratio_range": [min(ratios), max(ratios)],
        "below": sum(ratio < row.floor for ratio in ratios),
        "ours": median(pair.ours for pair in pairs),
        "rival": median(pair.rival for pair in pairs),
        "unit": unit,
        "pairs": [pair.told() for pair in pairs],
        **more,
        "notes": row.notes,
    }


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Floors:
    """The suite: row after row. A row whose engines are not there, or fail, is missing, with the reason."""

    def __init__(self, args: argparse.Namespace, prompt: Callable[[int], list[int]]):
        self.args, self._prompt = args, prompt
        self.rows: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.limits: dict[str, float | None] = {"memory": None, "int8": None, "float32": None}
        self.reads: list[float] = []

    def run(self) -> None:
        with ExitStack() as stack:
            limits = Worker("limits", Path(sys.executable), self.args.threads)
            stack.callback(limits.close)
            for number, row in enumerate(row for row in ROWS if row.name in self.args.only):
                row = row.quick() if self.args.quick else row
                self._read_limits(limits)
                say(f"row {number + 1} of {len(self.args.only)}: {row.name}")
                try:
                    self.rows.append(self._memory(row) if row.rival is None else self._measure(row))
                except Lost as error:
                    say(f"{row.name} is left out: {error}")
                    self.missing[row.name] = str(error)
                    continue
                print(line(self._with_shares(self.rows[-1])), flush=True)

    # ── limits

    def _read_limits(self, limits: Worker) -> None:
        """The best of all rows: a limit is what can be reached."""
        answer = limits.ask("read", passes=8)
        self.reads.append(answer["bytes"] / answer["seconds"])
        self.limits["memory"] = max(self.reads)
        try:
            found = limits.ask("compute", library=str(machine.limits_library(models.CACHE)), passes=8)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"the limits of computing are not known: limits.c cannot be compiled: {error}")
            return
        for kind in ("int8", "float32"):
            self.limits[kind] = max(self.limits[kind] or 0.0, found[kind] or 0.0) or None

    def _with_shares(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its figures as shares of the limits that are known by now."""
        found = {
            f"{w}_share": shares(row[w], row[f"{w}_need"], self.limits) for w in ("ours", "rival") if f"{w}_need" in row
        }
        return {**row, **found}

    # ── speed

    def _measure(self, row: Row) -> dict[str, Any]:
        assert row.rival is not None
        with ExitStack() as stack:
            rival, rival_about = self._best(row.rival, stack)
            ours, ours_about = self._best(row.ours, stack)
            own = self._own_bench(rival, row.rival, rival_about["settings"]) if rival.name == "llama.cpp" else {}
            more = {"agreed": self._agree(row, ours, rival), **own}
            for worker, side in ((ours, row.ours), (rival, row.rival)):
                say(f"    warming up: {worker.name}")
                self._rate(worker, side.task)
            pairs = []
            for number in range(self.args.pairs):
                say(f"    pair {number + 1} of {self.args.pairs}")
                foreign = Foreign()
                first = self._rate(ours, row.ours.task, foreign)
                pairs.append(Pair(first, self._rate(rival, row.rival.task, foreign), foreign=foreign))
        sides = (("ours", row.ours, ours, ours_about), ("rival", row.rival, rival, rival_about))
        for whose, side, worker, about in sides:
            more |= {
                f"{whose}_name": worker.name,
                f"{whose}_about": about["about"],
                f"{whose}_settings": about["settings"],
                f"{whose}_trials": about["trials"],
                f"{whose}_weight_bytes": about["weight_bytes"],
                f"{whose}_need": needs(_decoder(side.model), side.task, about["weight_bytes"]),
            }
        return told(row, pairs, "tok/s", more, not self.args.quick)

    def _best(self, side: Side, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
        """The engine at its best setting, loaded. Several are tried one after the other, none beside another."""
        tries = [(engine, settings) for engine in side.engines or (side.engine,) for settings in side.settings]
        trials: list[dict[str, Any]] = []
        if len(tries) > 1:
            for engine, settings in tries:
                worker, _ = self._load(engine, side, settings)
                try:
                    rate = self._trial(worker, side.task)
                except Lost as error:
                    trials.append({"engine": engine, **settings, "failed": str(error)})
                    continue
                finally:
                    worker.close()
                say(f"    {engine} {settings or ''}: {rate:.1f} tok/s")
                trials.append({"engine": engine, **settings, "rate": rate})
            rates = [trial.get("rate", 0.0) for trial in trials]
            if not max(rates):
                raise Lost(f"{tries[0][0]}: {trials[0]['failed']}")
            tries = [tries[rates.index(max(rates))]]
        worker, answer = self._load(tries[0][0], side, tries[0][1])
        stack.callback(worker.close)
        return worker, {**answer, "settings": tries[0][1], "trials": trials}

    def _trial(self, worker: Worker, task: Task) -> float:
        """The median of three, or of as many as fit into a while, after a small one that does not count."""
        self._rate(worker, task.quick())
        start, rates = time.perf_counter(), []
        while len(rates) < 3 and (not rates or time.perf_counter() - start < TRIAL):
            rates.append(self._rate(worker, task))
        return median(rates)

    def _load(self, engine: str, side: Side, settings: dict[str, Any]) -> tuple[Worker, dict[str, Any]]:
        python = self.args.rivals / "bin" / "python" if engine in RIVALS else Path(sys.executable)
        if side.model == "2b-ctranslate2":
            _convert(python)
        path = str(MODELS[side.model]())
        worker = Worker(engine, python, self.args.threads)
        task = side.task
        context = max(task.context, 512 + CHECKED)
        try:
            return worker, worker.ask("load", path=path, context=context, sequences=task.sequences, **settings)
        except Lost:
            worker.close()
            raise

    def _rate(self, worker: Worker, task: Task, foreign: Foreign | None = None) -> float:
        """Tokens a second."""
        if task.depth:
            answer = worker.ask("decode_at", foreign, depth=task.depth, tokens=task.tokens)
            return task.tokens / answer["seconds"]
        prompts = [self._prompt(task.prompt + i)[i:] for i in range(task.sequences)]
        if task.kind == "prompt":
            return task.prompt / worker.ask("prompt", foreign, prompts=prompts)["seconds"]
        answer = worker.ask("decode", foreign, prompts=prompts, tokens=task.tokens)
        return task.sequences * task.tokens / answer["seconds"]

    def _agree(self, row: Row, ours: Worker, rival: Worker) -> bool | None:
        """Whether both say the same where that is in no doubt. None: the weights are random, and are never sure."""
        if row.ours.model not in REAL:
            return None
        prompt = self._prompt(192 if self.args.quick else 512)  # the passage more than twice
        said = [
            [tokens[0] for tokens in worker.ask("decode", prompts=[prompt], tokens=CHECKED)["drawn"]]
            for worker in (ours, rival)
        ]
        if said[0] != said[1]:
            say(f"    DISAGREE: {said[0]} and {said[1]}")
        return said[0] == said[1]

    def _own_bench(self, rival: Worker, side: Side, settings: dict[str, Any]) -> dict[str, Any]:
        """llama.cpp as it is called here, beside the protocol of llama-bench, and that program where it is given."""
        task = side.task
        if task.sequences > 1 or task.depth:
            return {}  # the same calls, of which the plain rows have shown what they are worth
        prompt, tokens = (task.prompt, 0) if task.kind == "prompt" else (0, task.tokens)
        here, protocol = [], []
        for _ in range(3):
            here.append(self._rate(rival, task))
            seconds = rival.ask("own_bench", prompt=prompt, tokens=tokens)["seconds"]
            protocol.append((prompt or tokens) / seconds)
        found = {"here": median(here), "protocol": median(protocol)}
        if self.args.llama_bench is not None:
            found["program"] = self._llama_bench(MODELS[side.model](), prompt, tokens, settings)
        off = max(abs(value / found["here"] - 1) for value in found.values())
        return {"own_bench": {**found, "off": off, "agrees": off <= AGREES}}

    def _llama_bench(self, path: Path, prompt: int, tokens: int, settings: dict[str, Any]) -> float:
        flags = {"-p": prompt, "-n": tokens, "-t": self.args.threads, "-fa": settings["flash"], "-r": 3, "-o": "json"}
        if "ubatch" in settings:
            flags["-ub"] = settings["ubatch"]
        given = [str(part) for flag in flags.items() for part in flag]
        command = [self.args.llama_bench, "-m", path, *given]
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return json.loads(done.stdout)[0]["avg_ts"]
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise Lost(f"{self.args.llama_bench}: {error}") from None

    # ── memory

    def _memory(self, row: Row) -> dict[str, Any]:
        """A new process each time: the tokenizer, then the model, a prompt and a few tokens."""
        path, task = MODELS[row.ours.model](), row.ours.task
        file = path.stat().st_size / 1e6
        pairs, proportional, about = [], [], ""
        for number in range(self.args.pairs):
            say(f"    process {number + 1} of {self.args.pairs}")
            worker, foreign = Worker(row.ours.engine, Path(sys.executable), self.args.threads), Foreign()
            try:
                before = worker.ask("vocabulary", path=str(path))
                about = worker.ask("load", foreign, path=str(path), context=task.context)["about"]
                worker.ask("decode", foreign, prompts=[self._prompt(task.prompt)], tokens=task.tokens)
                after = worker.ask("resident")
            finally:
                worker.close()
            pairs.append(Pair((after["resident"] - before["resident"]) / 1e6, file, True, foreign))
            proportional.append((after["proportional"] - before["proportional"]) / 1e6)
        names = {"ours_name": row.ours.engine, "ours_about": about, "rival_name": f"the file, {path.name}"}
        return told(row, pairs, "MB", {**names, "ours_proportional": proportional}, not self.args.quick)

    # ── what came of it

    def doubts(self) -> list[str]:
        """Why the figures may be off."""
        doubts = []
        if self.args.pairs < PAIRS or self.args.quick:
            doubts.append(f"--quick, or fewer than {PAIRS} pairs: figures for development, and no floor is met")
        for row in self.rows:
            name = row["row"]
            if busy := [pair for pair in row["pairs"] if pair["foreign_cpus"] > 0.1 or pair["stolen_cpus"] > 0.05]:
                worst = max(pair["foreign_cpus"] + pair["stolen_cpus"] for pair in busy)
                doubts.append(f"{name}: others had up to {worst:.2f} CPUs in {len(busy)} of {len(row['pairs'])} pairs")
            if row.get("agreed") is False:
                doubts.append(f"{name}: ours and the rival continue the same text differently, so nothing is met")
            if not row.get("own_bench", {}).get("agrees", True):
                doubts.append(f"{name}: llama.cpp is {row['own_bench']['off']:.0%} off its own benchmark")
        if self.reads and max(self.reads) > 1.25 * min(self.reads):
            doubts.append(f"memory was read at {min(self.reads) / 1e9:.1f} to {max(self.reads) / 1e9:.1f} GB/s")
        return doubts

    def result(self) -> dict[str, Any]:
        return {
            "suite": "floors",
            "rows": [self._with_shares(row) for row in self.rows],
            "missing": self.missing,
            "met": sum(row["met"] for row in self.rows),
            "of": len(ROWS),
            "machine": {
                **machine.describe(self.args.threads),
                "limits": self.limits,
                "memory_read_gb_per_s": [value / 1e9 for value in self.reads],
            },
            "doubts": self.doubts(),
            "commit": machine.commit(),
            "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
            "date": date.today().isoformat(),
        }


RIVALS = ("llama.cpp", "ctranslate2")  # which live in an environment of their own


@cache
def _decoder(model: str) -> family.DecoderConfig:
    if model == "2b-ctranslate2":
        return family.get("gemma-2-2b").decoder
    with find(MODELS[model]()) as checkpoint:
        return checkpoint.decoder


def _convert(python: Path) -> None:
    """The Hugging Face folder as CTranslate2 reads it, by its own converter, once."""
    if CTRANSLATE2.exists():
        return
    say("    converting for CTranslate2")
    script = HERE / "convert_ctranslate2.py"
    work = CTRANSLATE2.with_name(f".{CTRANSLATE2.name}")
    # torch and transformers are here, and not in the rivals' environment
    places = [place for place in sys.path if place.endswith("site-packages")]
    command = [python, script, MODELS["2b-folder"](), work, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Lost(f"CTranslate2 cannot convert: {done.stderr.strip().splitlines()[-1:]}")
    work.rename(CTRANSLATE2)


# ── telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    verdict = "met" if row["met"] else "NOT MET"
    figures = f"{row['ours']:,.1f} against {row['rival']:,.1f} {row['unit']} ({row['rival_name']})"
    return (
        f"{row['row']:<24} ratio {row['ratio']:.2f} [{row['ratio_range'][0]:.2f}, {row['ratio_range'][1]:.2f}]  "
        f"floor {row['floor']:.2f}  {verdict:<7}  {figures}" + _told_shares(row)
    )


def _told_shares(row: dict[str, Any]) -> str:
    if "ours_share" not in row:
        return ""
    return f"; of the limits, ours {share_text(row['ours_share'])}, the rival {share_text(row['rival_share'])}"


def share_text(share: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.0%}" for name, value in share.items() if value is not None)


def report(result: dict[str, Any], pairs: int) -> str:
    """The result for people, in Markdown."""
    here = result["machine"]
    limits = ", ".join(
        f"{name} {value / 1e9:,.1f} {'GB/s' if name == 'memory' else 'Gop/s'}"
        for name, value in here["limits"].items()
        if value is not None
    )
    lines = [
        f"# Floors, {here['cpu']}, {here['threads']} threads",
        "",
        f"- {result['met']} of {result['of']} floors are met",
        f"- machine: {here['cpus']} CPUs ({' '.join(here['instructions'])}), {here['memory_bytes'] / 2**30:.1f} GiB, "
        f"{here['system']}, Python {here['python']}; environment: "
        + (" ".join(f"{k}={v}" for k, v in here["environment"].items()) or "nothing set"),
        f"- limits, measured in this run: {limits}",
        f"- {pairs} pairs a row, ours and the rival in turn; {result['date']}, commit {result['commit']}",
        f"- command: `{result['command']}`",
        *(f"- not measured: {name}: {why}" for name, why in result["missing"].items()),
        *(f"- **doubt**: {doubt}" for doubt in result["doubts"]),
        "",
        "A ratio is the median [lowest, highest] of the pairs' own, above 1 where ours is ahead. Shares are of the "
        "machine's limits, as README.md defines them.",
        "",
        "| work | ratio | floor | met | ours | rival | unit | shares, ours | shares, rival |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_range"]
        cells = [
            row["work"],
            f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['floor']:.2f}",
            "yes" if row["met"] else "**no**",
            f"{row['ours']:,.1f}",
            f"{row['rival']:,.1f} ({row['rival_name']})",
            row["unit"],
            share_text(row.get("ours_share", {})),
            share_text(row.get("rival_share", {})),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for row in result["rows"]:
        lines.append(
            f"- {row['row']}: {row['ours_about']}" + (f"; {row['rival_about']}" if "rival_about" in row else "")
        )
        if own := row.get("own_bench"):
            figures = ", ".join(f"{name} {own[name]:,.1f}" for name in ("here", "protocol", "program") if name in own)
            lines.append(f"    - llama.cpp beside its own benchmark: {figures} tok/s, {own['off']:.1%} off")
        if row["notes"]:
            lines.append(f"    - {row['notes']}")
    return "\n".join([*lines, ""])
