"""The seven forms: what of the experiment is set otherwise in each, and how to train them all.

python recipes/e-attention/make_data.py --out data/modules
python recipes/e-attention/variants.py                       trains all, to runs/attention-*
python recipes/e-attention/evaluate.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WINDOW = 64

_LOCAL = f'model.new.layers=[{{kind="sliding", window={WINDOW}}}, {{kind="global"}}]'
# two recurrent layers, then one that sees the last 64 tokens besides its own, with half of each head rotated
_GRIFFIN = (
    'model.new.layers=[{kind="recurrent", width=128, num_blocks=4}, {kind="recurrent", width=128, num_blocks=4}, '
    f'{{kind="sliding", window={WINDOW + 1}, rope={{fraction=0.5}}}}]'
)
VARIANTS = {
    "mha": [],
    "gqa": ["model.new.kv_heads=2"],
    "mqa": ["model.new.kv_heads=1"],
    "mha-window": [_LOCAL],
    "gqa-window": ["model.new.kv_heads=2", _LOCAL],
    "mqa-window": ["model.new.kv_heads=1", _LOCAL],
    "griffin": ["model.new.kv_heads=1", _GRIFFIN, "model.new.post_norms=false", "model.new.biases=true",
                "model.new.final_softcap=30.0", "model.new.embed_scale_dtype=bfloat16"],
}  # fmt: skip


def folder(name: str) -> str:
    return f"runs/attention-{name}"


def main() -> None:
    for name, changes in VARIANTS.items():
        settings = [part for change in changes for part in ("--set", change)]
        config = str(HERE / "experiment.toml")
        subprocess.run(
            [sys.executable, "-m", "gemkit.cli", "tune", "--config", config, *settings, "-o", folder(name)], check=True
        )


if __name__ == "__main__":
    main()
