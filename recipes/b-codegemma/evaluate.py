"""What the tiny CodeGemma fills in: `python recipes/b-codegemma/evaluate.py -m runs/code --data data/code`.

Variants of the caret example, and single lines of held-out files: a line is cut out but for its indentation, and the
answer must be that line to the letter. The losses of the run become `docs/recipes/infilling.svg`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from common import curve, log, read_jsonl, save_picture
from variants import PREFIX, VARIANTS

import gemkit
from gemkit.inspect.curves import Panel, draw


def caret_answers(model: gemkit.Gemma) -> dict[str, str]:
    """What the model imports in each variant, by what it should."""
    return {module: model.infill(PREFIX, suffix, max_tokens=12).text for module, suffix in VARIANTS.items()}


def exact_lines(model: gemkit.Gemma, lines: Iterable[Mapping[str, str]]) -> list[bool]:
    """Whether each line is filled in to the letter."""
    return [model.infill(cut["before"], cut["after"], max_tokens=48).text == cut["middle"] for cut in lines]


def draw_losses(folder: str) -> None:
    entries = [entry for entry in log(folder) if entry["step"]]  # before the first it is 9.8, far above the others
    drawn = [curve("training", entries, "loss", every=50), curve("held out", entries, "held_out.loss")]
    panel = Panel("loss (nats a token)", drawn, lambda y: f"{y:.2f}", from_zero=False)
    title = "A tiny CodeGemma from nothing"
    save_picture("infilling.svg", draw([panel], title=title, x_label="steps", logarithmic=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="runs/code")
    parser.add_argument("--data", type=Path, default=Path("data/code"))
    options = parser.parse_args()
    model = gemkit.load(options.model)
    answers = caret_answers(model)
    for module, answer in answers.items():
        if answer != module:
            print(f"import {module}: {answer!r}")
    right = sum(answer == module for module, answer in answers.items())
    exact = exact_lines(model, read_jsonl(options.data / "lines.jsonl"))
    found = {"variants": len(answers), "right": right, "lines": len(exact), "exact": sum(exact)}
    print(
        f"{right} of {len(answers)} variants of the caret example, {sum(exact)} of {len(exact)} held-out lines exactly"
    )
    print(json.dumps(found))
    if (Path(options.model) / "log.jsonl").exists():
        draw_losses(options.model)


if __name__ == "__main__":
    main()
