"""Runs of `gemkit tune` that are killed: what the test suite does twice, `kill_training.py` does twenty times."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from support.tiny_models import tokenizer, write

STEPS = 30
_ARGUMENTS = ["--steps", STEPS, "--batch-size", 4, "--max-length", 64, "--lr", 1e-3]
_FIELDS = ["save.every=3", "step.threads=1", "step.microbatch_tokens=100", "monitor.evaluate_every=7"]


def prepare(folder: Path) -> None:
    """A tiny model and texts."""
    write(folder / "model", "gemma-3-270m")
    rng = np.random.default_rng(0)
    letters = list("abcdefgh ")
    for name, count in (("train.jsonl", 50), ("held-out.jsonl", 5)):
        lines = [json.dumps({"text": "".join(rng.choice(letters, rng.integers(5, 60)))}) for _ in range(count)]
        (folder / name).write_text("\n".join(lines) + "\n")
    assert len(tokenizer()) > 256


def command(folder: Path, run: str, *, lora: bool) -> list[str]:
    adapters = ["--lora", 4, "--set", "lora.dropout=0.2"] if lora else []
    data = ["--data", folder / "train.jsonl", "--held-out", folder / "held-out.jsonl"]
    parts = ["pretrain", "-m", folder / "model", *data, "-o", folder / run, *_ARGUMENTS, *adapters]
    parts += [word for field in _FIELDS for word in ("--set", field)]
    return [sys.executable, "-m", "gemkit.cli", "tune", *map(str, parts)]


def resume(folder: Path, run: str) -> list[str]:
    return [sys.executable, "-m", "gemkit.cli", "tune", "--resume", str(folder / run)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def finish(line: list[str]) -> str:
    """Run to the end; what it said."""
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def killed(line: list[str], run: Path, rng: random.Random) -> str | None:
    """Kill it at a random moment of its training, or on the way there; how far it had come. None: it had ended."""
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    reached = entries(run)
    wanted = len(reached) + rng.randrange(1, 12)
    while process.poll() is None and len(entries(run)) < wanted:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.05)  # within a step, a checkpoint, the writing of a line
    process.send_signal(signal.SIGKILL)
    process.wait()
    return None if process.returncode != -signal.SIGKILL else f"after {len(entries(run))} lines of log"


def entries(run: Path) -> list[dict[str, Any]]:
    """Of the log, which a run may remove as it begins anew; a line that is being written is left out."""
    try:
        written = (run / "log.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith(b"\n")]


def numbers(run: Path) -> list[Any]:
    """Of the log all that must be the same: losses, norms, rates, evaluations. JSON keeps every bit of a float."""
    timed = ("seconds", "peak_memory")
    return [{name: value for name, value in entry.items() if name not in timed} for entry in entries(run)]


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.glob("*.safetensors"))}


def check(folder: Path, *, lora: bool, kills: int, seed: int) -> list[str]:
    """A run that is killed so many times against one that is not; what was done."""
    prepare(folder)
    finish(command(folder, "whole", lora=lora))
    rng, told = random.Random(seed), []
    run = folder / "killed"
    line = command(folder, "killed", lora=lora)
    attempts = 0
    while len(told) < kills:
        attempts += 1
        assert attempts < 20 * kills, "the run ends before it is killed often enough"
        how = killed(line, run, rng)
        if how is None:  # it reached its end: another one is begun
            compare(folder)
            run.rename(folder / f"ended-{attempts}")
            line = command(folder, "killed", lora=lora)
            continue
        told.append(how)
        if (run / "experiment.toml").exists():
            line = resume(folder, "killed")
    finish(line)
    compare(folder)
    return told


def compare(folder: Path) -> None:
    whole, killed = folder / "whole", folder / "killed"
    assert len(numbers(whole)) > STEPS
    assert numbers(killed) == numbers(whole)
    assert weights(whole)
    assert weights(killed) == weights(whole)
