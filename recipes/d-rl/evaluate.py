"""How often letters come out in order: `python recipes/d-rl/evaluate.py runs/letters-sft runs/letters-rl ...`.

The share of 200 held-out words that are answered to the letter, greedily; and the rewards of the runs that had some,
drawn. Of a reward model among the runs, the share of these words whose right answer it puts above a mistaken one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from common import curve, log, read_jsonl, save_picture
from make_data import mistaken

import gemkit
from gemkit.inspect.curves import Panel, draw


def measure(folder: str, data: Path) -> float:
    model = gemkit.load(folder)
    asked = list(read_jsonl(data / "held-out.jsonl"))
    if model.is_reward_model:
        rng = np.random.default_rng(0)
        pairs = [[model.reward(said, r["prompt"][0]["content"]) for said in (r["answer"], mistaken(r["answer"], rng))]
                 for r in asked]  # fmt: skip
        return sum(right > wrong for right, wrong in pairs) / len(pairs)
    right = [model.chat(r["prompt"], max_tokens=12, temperature=0).text == r["answer"] for r in asked]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", type=Path, default=Path("data/letters"))
    options = parser.parse_args()
    found = {Path(run).name: measure(run, options.data) for run in options.runs}
    logs = {Path(run).name: log(run) for run in options.runs}
    rewarded = {name: entries for name, entries in logs.items() if any("reward" in entry for entry in entries)}
    if rewarded:
        panels = [  # each by itself: a function and a reward model do not count alike
            Panel(f"mean reward of the answers, {name}", [curve(name, entries, "reward", every=5)],
                  lambda y: f"{y:.2f}", from_zero=False)
            for name, entries in rewarded.items()
        ]  # fmt: skip
        save_picture("rl.svg", draw(panels, title="Sorting letters by GRPO", x_label="steps", logarithmic=False))
    for name, share in found.items():
        print(f"{name}: {share:.0%} of the held-out words")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
