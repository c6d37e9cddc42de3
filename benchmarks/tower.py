"""The image tower in C++ against the tower in torch, in turn: its features alone, and a question about a picture.

    python benchmarks/tower.py [--sizes 224 448] [--dtype bfloat16] [--depth 18] [--rounds 5] [--json]

PaliGemma 3B's published geometry with random weights: the tower dense, as files have it, the decoder in int8. A round
runs one after the other with the order swapped each time; the ratio is the median over rounds of torch's time over
ours, above 1 where ours is faster, with the smallest and the largest beside it. A question is the picture's
placeholders and 8 tokens of prompt, then 8 tokens of answer, with all else native in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import Parameter

from gemkit import family
from gemkit.block_types import KINDS
from gemkit.executors.interface import Chunk
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.library import threads
from gemkit.executors.native.packer import pack
from gemkit.executors.native.tower import NativeTower
from gemkit.nn import Multimodal
from gemkit.ops import Quantized

PROMPT, ANSWER = 8, 8


class TorchTower:
    """The tower as torch modules, where the executor asks for its features."""

    def __init__(self, module: Multimodal):
        self.vision, self._module = module.vision, module
        self._dtype = module.multi_modal_projector.linear.bias.dtype

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(I * P, D) float32, from images of (3, S, S) in -1 to 1."""
        with torch.inference_mode():
            return self._module.image_features(torch.from_numpy(np.stack(images)).to(self._dtype)).float().numpy()


def random_model(size: int, dtype: torch.dtype, depth: int) -> Multimodal:
    """PaliGemma 3B for pictures of this size, with as many layers of its decoder, and random weights."""
    member = family.get("paligemma-3b-pt-224")
    assert member.vision is not None
    decoder = replace(member.decoder, layers=member.decoder.layers[:depth])
    with torch.device("meta"):
        module = Multimodal(decoder, replace(member.vision, tower=replace(member.vision.tower, image_size=size)))
    for name, shape in family.parameters(decoder, module.vision):
        if len(shape) == 2 and name.startswith("language_model."):
            weight = Quantized.empty(KINDS["Q8_0"], (shape[0], shape[1]))
            weight.planes["codes"].random_(-100, 100)
            weight.planes["scales"].fill_(1e-4)
            module.set_param(name, weight)
        else:
            value = torch.randn(shape) * 0.02
            module.set_param(name, Parameter(value.to(dtype), requires_grad=False))
    return module.eval()


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median seconds of both, and torch's over ours: median, smallest and largest of the rounds."""
    ours(), theirs()  # the first has memory to claim
    pairs = []
    for i in range(rounds):
        taken = {}
        for call in (ours, theirs) if i % 2 else (theirs, ours):
            start = time.perf_counter()
            call()
            taken[call] = time.perf_counter() - start
        pairs.append((taken[ours], taken[theirs]))
    ratios = sorted(b / a for a, b in pairs)
    seconds = [statistics.median(side) for side in zip(*pairs, strict=True)]
    ratio = statistics.median(ratios)
    return {"native": seconds[0], "torch": seconds[1], "ratio": ratio, "least": ratios[0], "most": ratios[-1]}


def measure(size: int, dtype: torch.dtype, depth: int, rounds: int) -> dict[str, dict[str, float]]:
    """Features and a question, of pictures of this size."""
    module = random_model(size, dtype, depth)
    packed = pack(module)
    towers = [NativeTower(module.vision, module.config.width, packed), TorchTower(module)]
    executor = NativeExecutor(module.config, packed, towers[0])
    image = np.random.default_rng(0).uniform(-1, 1, (3, size, size)).astype(np.float32)
    ids = [module.vision.placeholder] * module.vision.tokens + [7] * PROMPT

    def ask(tower: NativeTower | TorchTower) -> None:
        executor.tower = tower
        state = executor.new_state(1)
        executor.run([Chunk(0, ids, images=[image])], state)
        for _ in range(ANSWER):
            executor.run([Chunk(0, [7])], state)

    ours, theirs = towers
    return {
        "features": in_turn(lambda: ours.features([image]), lambda: theirs.features([image]), rounds),
        "question": in_turn(lambda: ask(ours), lambda: ask(theirs), rounds),
    }


def main() -> None:
    """Print a row for each size, and JSON on the last line."""
    parser = argparse.ArgumentParser(description="the image tower, native against torch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the tower's weights")
    parser.add_argument("--depth", type=int, default=18, help="layers of the decoder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object alone")
    args = parser.parse_args()
    torch.set_num_threads(threads())
    found = {}
    for size in args.sizes:
        found[str(size)] = measure(size, getattr(torch, args.dtype), args.depth, args.rounds)
        for what, row in found[str(size)].items() if not args.json else ():
            seconds = f"native {row['native']:.2f} s, torch {row['torch']:.2f} s"
            print(f"{size} {what}: {seconds}, {row['ratio']:.2f} times ({row['least']:.2f} to {row['most']:.2f})")
    print(json.dumps({"dtype": args.dtype, "depth": args.depth, "threads": threads(), "sizes": found}))


if __name__ == "__main__":
    main()
