"""Starting: a file that was never opened, the same again, and llama.cpp, in turn.

    python benchmarks/start.py [MODEL] [--pairs 5] [--rivals .venv-bench] [--json]

Ours is the whole command, `gemkit generate -m MODEL -n 1`, from its start to its end: first with an empty cache, so
that it packs, and then again. Of llama.cpp what is timed is loading and one token, in a process that has imported it.
The file is in the page cache. MODEL is by default Gemma 2 2B with random weights, Q4_K_M, 1.7 GB.

Memory is the most that the command had resident (ru_maxrss), pages of mapped files among it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import models
from workers import Worker, environment, say


def command(model: Path, cache: str, threads: int) -> tuple[float, int]:
    """Seconds of the command, and the most bytes that it had resident."""
    gemkit = Path(sys.executable).with_name("gemkit")
    given = [gemkit, "generate", "-m", model, "-n", "1", "The capital of France is"]
    env = {**environment(threads), "GEMKIT_CACHE": cache}
    start = time.perf_counter()
    process = subprocess.Popen(given, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the command ended with {os.waitstatus_to_exitcode(status)}: {given}")
    return seconds, 1024 * used.ru_maxrss


def ours(model: Path, threads: int) -> dict[str, float]:
    """Of a file that was never opened, and of the same again."""
    with tempfile.TemporaryDirectory(dir=models.CACHE) as cache:
        first, memory = command(model, cache, threads)
        second, _ = command(model, cache, threads)
    return {"first": first, "second": second, "memory": memory}


def theirs(model: Path, python: Path, threads: int) -> dict[str, float]:
    """llama.cpp's load and a first token."""
    worker = Worker("llama.cpp", python, threads)
    seconds = worker.ask("load", path=str(model), context=4_096)["seconds"]
    worker.close()
    return {"llama.cpp": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals", type=Path, default=Path(".venv-bench"), help="their environment")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = args.model or models.gemma_2_2b("Q4_K_M")
    with open(model, "rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    python, rows = args.rivals / "bin" / "python", []
    for i in range(args.pairs):
        if i % 2:
            row = ours(model, args.threads) | theirs(model, python, args.threads)
        else:
            row = theirs(model, python, args.threads) | ours(model, args.threads)
        rows.append(row)
        say(f"{i + 1}/{args.pairs}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    ratios = sorted(row["first"] / row["llama.cpp"] for row in rows)
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(
        "| first | second | llama.cpp | first / llama.cpp | first - second | memory / file |\n|--:|--:|--:|--:|--:|--:|"
    )
    print(
        f"| {middle['first']:.2f} s | {middle['second']:.2f} s | {middle['llama.cpp']:.2f} s | "
        f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] | "
        f"{statistics.median(row['first'] - row['second'] for row in rows):.2f} s | "
        f"{middle['memory'] / model.stat().st_size:.2f} |"
    )
    if args.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
