"""What the tiny PaliGemma sees: `python recipes/f-paligemma/evaluate.py -m runs/shapes --data data/shapes`.

Of 200 held-out pictures 150 have the shape that is asked for: the mean overlap (intersection over union) of the box
that is answered with the one that is right, 0 where none is answered. In 50 it is absent: the share of empty answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from common import HERE, read_jsonl

import gemkit
from gemkit.text import Box, places


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    across = min(a.x_max, b.x_max) - max(a.x_min, b.x_min)
    down = min(a.y_max, b.y_max) - max(a.y_min, b.y_min)
    both = max(across, 0) * max(down, 0)
    areas = [(box.x_max - box.x_min) * (box.y_max - box.y_min) for box in (a, b)]
    return both / (sum(areas) - both)


def measure(model: gemkit.Gemma, folder: Path) -> dict[str, float]:
    """Overlap and share of empty answers on the held-out pictures of a folder."""
    overlaps, empty = [], []
    for record in read_jsonl(folder / "held-out.jsonl"):
        seen = model.detect_prompt(folder / record["image"], record["prompt"], max_tokens=24)
        right = places.parse(record["suffix"]).places
        if not right:
            empty.append(not seen.result.text)
            continue
        said = places.parse(seen.result.text).places
        overlaps.append(overlap(said[0].box, right[0].box) if said else 0.0)
    return {"overlap": float(np.mean(overlaps)), "found": float(np.mean(np.array(overlaps) > 0.5)),
            "empty": float(np.mean(empty)), "present": len(overlaps), "absent": len(empty)}  # fmt: skip


def picture(model: gemkit.Gemma, folder: Path) -> None:
    """Eight held-out pictures with what was found drawn over them, as `gemkit detect --overlay` does."""
    from PIL import Image

    records = list(read_jsonl(folder / "held-out.jsonl"))
    chosen = [*records[:6], *records[-2:]]
    drawn = [model.detect_prompt(folder / r["image"], r["prompt"], max_tokens=24).overlay() for r in chosen]
    sheet = Image.new("RGB", (4 * 160, 2 * 160), "white")
    for i, overlay in enumerate(drawn):
        sheet.paste(overlay.resize((152, 152)), (i % 4 * 160 + 4, i // 4 * 160 + 4))
    (HERE.parent / "docs" / "recipes").mkdir(exist_ok=True)
    sheet.save(HERE.parent / "docs" / "recipes" / "shapes.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="runs/shapes")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    options = parser.parse_args()
    model = gemkit.load(options.model)
    found = measure(model, options.data)
    picture(model, options.data)
    print(f"mean overlap {found['overlap']:.3f} where present, {found['empty']:.0%} empty answers where absent")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
