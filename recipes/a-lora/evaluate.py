"""What an epoch on a few hundred answers changes: `python recipes/a-lora/evaluate.py --adapter runs/answers`.

Perplexity of the held-out answers, the share of them that are given in the form that was taught and the share whose
word is right, before and after; and the perplexity of a text that has nothing to do with them. After is told twice: of
the adapter as it was trained, and turned down to a strength at which the other text has lost less than 2 %.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from common import HERE, curve, log, read_jsonl, save_picture

import gemkit
from gemkit.inspect.curves import Panel, draw
from gemkit.text import chat

FORM = re.compile(r"In a word: (.+)\.\nIn a sentence: .+\.")
STRENGTH = 0.7
TEXT = HERE.parent / "tests" / "data" / "text.txt"


def answer_perplexity(model: gemkit.Gemma, records: list[dict[str, Any]]) -> float:
    """Of the answers alone, with the token that ends each."""
    from gemkit.generate import score

    total = count = 0.0
    for record in records:
        question = chat(model.tokenizer, record["prompt"]).ids
        said = [*model.tokenizer.encode(record["completion"]), model.tokenizer.end_of_turn]
        logprobs = score(model.executor, [*question, *said]).logprobs[len(question) :]
        total -= sum(entry.logprob for entry in logprobs if entry is not None)
        count += len(logprobs)
    return math.exp(total / count)


def measure(model: gemkit.Gemma, records: list[dict[str, Any]]) -> dict[str, float]:
    asked = records[:40]
    answers = [model.chat(record["prompt"], max_tokens=40, temperature=0).text for record in asked]
    said = [FORM.fullmatch(answer) for answer in answers]
    wanted = [FORM.fullmatch(record["completion"]) for record in asked]
    return {
        "held_out": answer_perplexity(model, records),
        "form": sum(match is not None for match in said) / len(asked),
        "right": sum(a is not None and b is not None and a[1] == b[1] for a, b in zip(said, wanted, strict=True))
        / len(asked),
        "text": model.score(TEXT.read_text(encoding="utf-8")).perplexity or math.nan,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default=None)
    parser.add_argument("--adapter", default="runs/answers")
    parser.add_argument("--data", type=Path, default=Path("data/answers"))
    options = parser.parse_args()
    records = list(read_jsonl(options.data / "held-out.jsonl"))
    model = gemkit.load(options.model)
    found = {"before": measure(model, records)}
    model.load_adapter(options.adapter)
    found["after"] = measure(model, records)
    model.scale_adapter(STRENGTH)
    found[f"at a strength of {STRENGTH}"] = measure(model, records)
    for name, row in found.items():
        print(
            f"{name}: perplexity {row['held_out']:.2f} held out, {row['text']:.2f} of other text; "
            f"{row['form']:.0%} in form, {row['right']:.0%} right"
        )
    entries = log(options.adapter)
    drawn = [curve("training", entries, "loss", every=5), curve("held out", entries, "held_out.loss")]
    panel = Panel("loss of the answers", drawn, lambda y: f"{y:.2f}")
    save_picture("lora.svg", draw([panel], title="LoRA of the 270M", x_label="steps", logarithmic=False))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
