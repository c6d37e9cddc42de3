"""Teacher, student alone and student taught: `python recipes/c-distill/evaluate.py`.

The mean negative log-probability of a token of 300 held-out files, in nats, under each.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from common import curve, log, read_jsonl, save_picture

import gemkit
from gemkit.inspect.curves import Panel, draw

TEXTS = 300
RUNS = {"teacher": "runs/teacher", "student alone": "runs/student", "student taught": "runs/taught"}


def measure(folder: str, texts: list[str]) -> float:
    model = gemkit.load(folder)
    scores = [model.score(text) for text in texts]
    return -sum(score.total for score in scores) / sum(len(score.logprobs) - 1 for score in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/code"))
    options = parser.parse_args()
    held_out = [record["text"] for record in read_jsonl(options.data / "held-out.jsonl")]
    texts = held_out[:: len(held_out) // TEXTS][:TEXTS]  # of all modules, which come one after the other
    found = {name: measure(folder, texts) for name, folder in RUNS.items()}
    drawn = [curve(name, log(RUNS[name]), "loss", every=20) for name in ("student alone", "student taught")]
    panel = Panel("loss that is learned from (its own: next token; divergence)", drawn, lambda y: f"{y:.2f}")
    save_picture("distillation.svg", draw([panel], title="A student, alone and taught", x_label="steps",
                                          logarithmic=False))  # fmt: skip
    for name, nats in found.items():
        print(f"{name}: {nats:.3f} nats a token")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
