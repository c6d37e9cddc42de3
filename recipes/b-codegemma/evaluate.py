"""What the tiny CodeGemma fills in: `python recipes/b-codegemma/evaluate.py -m runs/code --data data/code`.

Variants of the caret example, and single lines of held-out files: a line is cut out but for its indentation, and the
answer must be that line to the letter.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from common import read_jsonl
from variants import PREFIX, VARIANTS

import gemkit

LINES = 200


def single_lines(records: list[dict[str, str]], seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """Before, middle and after: of each of so many held-out files one line with at least four characters."""
    rng = np.random.default_rng(seed)
    for i in rng.permutation(len(records))[:LINES]:
        text = records[i]["text"]
        lines = text.splitlines(keepends=True)
        long = [k for k, line in enumerate(lines) if len(line.strip()) >= 4]
        if not long:
            continue
        k = int(rng.choice(long))
        start = sum(map(len, lines[:k])) + len(lines[k]) - len(lines[k].lstrip())
        end = sum(map(len, lines[:k])) + len(lines[k].rstrip())
        yield text[:start], text[start:end], text[end:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="runs/code")
    parser.add_argument("--data", type=Path, default=Path("data/code"))
    options = parser.parse_args()
    model = gemkit.load(options.model)
    right = 0
    for module, suffix in VARIANTS.items():
        answer = model.infill(PREFIX, suffix, max_tokens=12).text
        right += answer == module
        if answer != module:
            print(f"import {module}: {answer!r}")
    cut = list(single_lines(list(read_jsonl(options.data / "held-out.jsonl"))))
    exact = sum(model.infill(before, after, max_tokens=48).text == middle for before, middle, after in cut)
    found = {"variants": len(VARIANTS), "right": right, "lines": len(cut), "exact": exact, "rate": exact / len(cut)}
    print(f"{right} of {len(VARIANTS)} variants of the caret example, {exact} of {len(cut)} held-out lines exactly")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
