"""The seven forms side by side: `python recipes/e-attention/evaluate.py`.

Loss on what is held out, tokens a second in generating (256 tokens after 256, natively), and what a sequence of 8,192
tokens leaves in memory, by arithmetic: keys and values in bfloat16, a hidden state in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from common import curve, log, save_picture
from variants import VARIANTS, folder

import gemkit
from gemkit.inspect.cost import count, state_bytes
from gemkit.inspect.curves import Panel, draw

CONTEXT = 8192


def measure(name: str) -> dict[str, float]:
    entries, model = log(folder(name)), gemkit.load(folder(name))
    held_out = [e["held_out"]["loss"] for e in entries if "held_out" in e]
    text = "import os\n" * 64
    timings = model.generate(text, max_tokens=256, logit_bias={model.tokenizer.eos: -100.0}).timings
    return {
        "parameters": count(model.config).total,
        "loss": held_out[-1],
        "decoding": timings.decode_tokens_per_second or 0.0,
        "cache": state_bytes(model.config, CONTEXT).total,
    }


def main() -> None:
    found = {name: measure(name) for name in VARIANTS}
    print("| | parameters | loss | decoding tokens/s | cache at 8,192 |")
    print("|---|---:|---:|---:|---:|")
    for name, row in found.items():
        print(
            f"| {name} | {row['parameters']:,} | {row['loss']:.3f} | {row['decoding']:,.0f} "
            f"| {row['cache'] / 1e6:.2f} MB |"
        )
    shown = ("mha", "mqa", "mqa-window", "griffin")
    panels = [Panel("loss", [curve(n, log(folder(n)), "loss", every=10) for n in shown], lambda y: f"{y:.2f}",
                    from_zero=False)]  # fmt: skip
    save_picture(
        "attention.svg",
        draw(panels, title="The same model, mixed in four ways", x_label="steps", logarithmic=False),
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
