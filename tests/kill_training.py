"""Kill a training run twenty times, at random moments, and compare it with one that was left alone, bit by bit.

`python tests/kill_training.py [kills] [seed]`; a part of `make parity-full`. All weights are trained in one run,
adapters with dropout in another.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from support import killing


def main() -> int:
    kills, seed = (int(value) for value in [*sys.argv[1:3], *("20", "0")[len(sys.argv) - 1 :]])
    for lora in (False, True):
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kill-") as folder:
            told = killing.check(Path(folder), lora=lora, kills=kills, seed=seed)
        kind = "adapters with dropout" if lora else "all weights"
        print(f"{kind}: killed {len(told)} times, {', '.join(told)}; {time.monotonic() - start:.0f} s")
        print(f"{kind}: losses, evaluations and weights are those of a run that was left alone, to the bit", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
