"""Whether memory stays flat while a RecurrentGemma goes on and on: resident memory after every 1,024 tokens.

    python benchmarks/flat.py                       # about 100 million parameters, 16,384 tokens

Random weights: what is remembered does not depend on them. Once the window is full nothing may grow; what does is told
as the largest distance from there on, in percent. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import machine
import numpy as np
import torch

from gemkit import family, nn
from gemkit.executors.torch import TorchExecutor
from gemkit.generate import Chunk
from gemkit.memory import resident_memory

STEP = 1024


def geometry() -> family.DecoderConfig:
    """RecurrentGemma 2B's pattern and windows with narrower layers and a smaller vocabulary."""
    real = family.get("recurrentgemma-2b").decoder
    return family.replace_layers(
        replace(real, vocab_size=32_000, width=512),
        attention={"head_dim": 64, "scale": 64**-0.5},
        recurrent={"width": 512, "num_blocks": 8},
        ffw={"width": 1536},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    tokens = parser.parse_args().tokens
    config = geometry()
    if tokens < 4 * STEP:
        parser.error(f"--tokens {tokens}: the window is full after {2 * STEP}, so measure {4 * STEP} at least")
    module = nn.Decoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, 0, 0.02, generator=generator)
    parameters = sum(weight.numel() for weight in module.parameters())
    window = config.windows[0]
    print(f"{parameters / 1e6:.0f} million parameters, {len(config.layers)} layers, a window of {window:,}, float32")

    executor = TorchExecutor(module)
    state, token = executor.new_state(1), 2
    points: list[tuple[int, int, int]] = []
    start = time.perf_counter()
    for done in range(1, tokens + 1):
        token = int(np.argmax(executor.run([Chunk(0, [token])], state).rows[0]))
        if done % STEP == 0:
            rate = STEP / (time.perf_counter() - start)
            points.append((done, resident_memory(), state.nbytes))
            sizes = f"{resident_memory() / 1e6:8.1f} MB resident  {state.nbytes / 1e6:6.2f} MB of state"
            print(f"{done:>8,} tokens  {sizes}  {rate:5.1f} tok/s", flush=True)
            start = time.perf_counter()
    full = [(memory, held) for done, memory, held in points if done >= window]
    first = full[0][0]
    off = max(abs(memory - first) for memory, _ in full) / first
    print(f"from {window:,} tokens on, resident memory stays within {100 * off:.2f} % of {first / 1e6:.1f} MB")
    report = {
        "machine": machine.describe(torch.get_num_threads()),
        "parameters": parameters,
        "window": window,
        "points": points,
        "off": off,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
