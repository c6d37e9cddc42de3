"""Letters to put in order, in the four forms that the four ways to learn take.

python recipes/d-rl/make_data.py --out data/letters

sft.jsonl         {"messages": [{"role": "user", "content": "sort dbca"}, {... "abcd"}]}
preferences.jsonl {"prompt": [...], "chosen": "abcd", "rejected": "abdc"}
prompts.jsonl     {"prompt": [...], "answer": "abcd"}      what is right can be checked: that is the reward
held-out.jsonl    the same as prompts.jsonl, of words that are nowhere else
"""

from __future__ import annotations

import argparse
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from common import write_jsonl

SIZES = {"sft": 6000, "preferences": 2000, "prompts": 4000, "held-out": 200}


def words(seed: int) -> Iterator[str]:
    """Words of three to eight different letters, no two of the same letters."""
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    while True:
        letters = rng.choice(list(string.ascii_lowercase), size=rng.integers(3, 9), replace=False)
        word = "".join(letters)
        key = "".join(sorted(word))
        if key not in seen and word != key:
            seen.add(key)
            yield word


def asked(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"sort {word}"}]


def mistaken(answer: str, rng: np.random.Generator) -> str:
    """An answer as models get it wrong: two neighbours the wrong way round, a letter lost, said twice or changed."""
    i = int(rng.integers(len(answer) - 1))
    match int(rng.integers(4)):
        case 0:
            return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]
        case 1:
            return answer[:i] + answer[i + 1 :]
        case 2:
            return answer[: i + 1] + answer[i:]
        case _:
            others = sorted(set(string.ascii_lowercase) - set(answer))
            return answer[:i] + str(rng.choice(others)) + answer[i + 1 :]


def records(kind: str, word: str, rng: np.random.Generator) -> dict[str, Any]:
    answer = "".join(sorted(word))
    match kind:
        case "sft":
            return {"messages": [*asked(word), {"role": "assistant", "content": answer}]}
        case "preferences":
            return {"prompt": asked(word), "chosen": answer, "rejected": mistaken(answer, rng)}
        case _:
            return {"prompt": asked(word), "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/letters"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    endless, rng = words(options.seed), np.random.default_rng(options.seed)
    for kind, size in SIZES.items():
        write_jsonl(options.out / f"{kind}.jsonl", [records(kind, next(endless), rng) for _ in range(size)])
    print(", ".join(f"{size} {kind}" for kind, size in SIZES.items()), f"in {options.out}")


if __name__ == "__main__":
    main()
