"""Whole modules of the standard library, in pieces of some hundred lines: long enough that a window leaves much out.

python recipes/e-attention/make_data.py --out data/modules
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from common import library_files, write_jsonl

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
LINES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/modules"))
    options = parser.parse_args()
    kept: dict[str, list[dict[str, str]]] = {"train": [], "held-out": []}
    for path in library_files():
        name = str(path.relative_to(LIBRARY))
        if name.startswith("test"):
            continue
        which = "held-out" if hashlib.sha256(name.encode()).digest()[0] < 256 // 20 else "train"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        pieces = ["".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
        kept[which] += [{"text": piece, "path": name} for piece in pieces if piece.strip()]
    for which, records in kept.items():
        write_jsonl(options.out / f"{which}.jsonl", records)
    print(f"{len(kept['train'])} pieces to train on, {len(kept['held-out'])} to measure with, in {options.out}")


if __name__ == "__main__":
    main()
