"""What a draw costs over a vocabulary of 262,144: each way of choosing a token, the median of many steps.

    python benchmarks/sampling.py                   # logits like those of a trained model
    python benchmarks/sampling.py --logits FILE.npy # (N, V) float32 that a model gave
    python benchmarks/sampling.py --json | tail -1  # one JSON object

`peaked` follows what the starter model gives in running text: a bell of about 4 wide with a heavy upper end.
`flat` is a bell of 0.5 without one, as of a model that knows nothing: every filter but top-k keeps thousands. Every
step takes other logits than the one before, after 4,096 ids of prompt and answer. The floor is NumPy's argmax: each
logit is read once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import machine
import numpy as np

from gemkit.generate import GREEDY, INSTRUCTION_TUNED, Sampling, sample
from gemkit.generate.sampler import token_logprob

V = 262_144
PADDING = dict.fromkeys(range(V - 100, V), -math.inf)
PLAIN = Sampling(temperature=1.0, seed=0)
PUBLISHED = replace(INSTRUCTION_TUNED, seed=0)
HISTORY = array("q", np.random.default_rng(1).integers(0, V - 100, 4096).tolist())

SAMPLINGS = {
    "greedy": GREEDY,
    "greedy, 100 rows banned": replace(GREEDY, logit_bias=PADDING),
    "greedy, penalty": Sampling(repetition_penalty=1.1),
    "top-k 64, top-p 0.95": PUBLISHED,
    "the same, banned, penalty": replace(PUBLISHED, logit_bias=PADDING, repetition_penalty=1.1),
    "top-k 1,000": replace(PLAIN, top_k=1000),
    "min-p 0.05": replace(PLAIN, min_p=0.05),
    "temperature 1": PLAIN,
    "temperature 0.8": replace(PLAIN, temperature=0.8),
    "top-p 0.95": replace(PLAIN, top_p=0.95),
    "top-p 0.95, min-p 0.05": replace(PLAIN, top_p=0.95, min_p=0.05),
}
MODES: dict[str, Callable[[np.ndarray], object]] = {
    "numpy argmax": np.argmax,
    **{name: partial(sample, sampling=sampling, history=HISTORY) for name, sampling in SAMPLINGS.items()},
    "logprob": partial(token_logprob, token=7),
    "logprob and 5 others": partial(token_logprob, token=7, top=5),
}


def peaked(rng: np.random.Generator) -> np.ndarray:
    return (4 * rng.standard_normal(V) + rng.exponential(1.0, V)).astype(np.float32)


def flat(rng: np.random.Generator) -> np.ndarray:
    return 0.5 * rng.standard_normal(V, dtype=np.float32)


def milliseconds(run: Callable[[np.ndarray], object], logits_NV: np.ndarray, rounds: int) -> float:
    times = []
    for step in range(rounds + 5):
        logits_V = logits_NV[step % len(logits_NV)]
        start = time.perf_counter()
        run(logits_V)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times[5:])  # the first ones fill caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", metavar="FILE", help="(N, V) float32 in NumPy's format, beside the made ones")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    inputs = {made.__name__: np.stack([made(rng) for _ in range(8)]) for made in (peaked, flat)}
    if args.logits:
        inputs["given"] = np.load(args.logits)
    print(f"{'median ms a step':<28}" + "".join(f"{name:>10}" for name in inputs))
    table: dict[str, dict[str, float]] = {}
    for mode, run in MODES.items():
        table[mode] = {name: milliseconds(run, logits_NV, args.rounds) for name, logits_NV in inputs.items()}
        print(f"{mode:<28}" + "".join(f"{ms:>10.3f}" for ms in table[mode].values()), flush=True)
    if args.json:
        print(json.dumps({"machine": machine.describe(1), "milliseconds": table}))


if __name__ == "__main__":
    main()
