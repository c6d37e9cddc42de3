"""How far the error of the output table's sketch reaches, in its own deviations, on real text; how many rows are left.

    python benchmarks/screening.py [--positions 420] [--json]

Every pair of a hidden state and a row is one sample: 420 positions of texts in several languages and of code, times
262,144 rows of the starter model, are 1.1e8. If the errors are normal, the share beyond z deviations on one side is
Phi(-z); what is counted is shown beside it. The rows that matter, the best 64 at each position, are counted apart.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

import gemkit
from gemkit.executors.native import screening
from gemkit.generate import Chunk, Sampling
from gemkit.generate.sampler import logits_filter
from gemkit.nn import Batch

HERE = Path(__file__).parent
TILES = 1024  # of the table at a time
MARKS = (0, 1, 2, 3, 4, 4.5, 5, 5.5, 6)


def texts() -> list[str]:
    """Prompts in many languages and code, a page of prose, and source code of the standard library."""
    data = HERE.parent / "tests" / "data"
    prompts = json.loads((data / "prompts.json").read_text(encoding="utf-8"))
    return [*prompts, (data / "text.txt").read_text(encoding="utf-8"), Path(json.__file__).read_text(encoding="utf-8")]


def hidden_states(model: gemkit.Gemma, positions: int) -> tuple[np.ndarray, list[list[int]]]:
    """What the head is given at so many positions, spread over the texts, (P, D) float32; and the texts' ids."""
    seen: list[torch.Tensor] = []
    module = model.module
    module.decoder.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    module.decoder.lm_head.forward = lambda x: x[:, :1]  # the logits are computed below
    ids = [model.tokenizer.with_bos(model.tokenizer.encode(text))[:256] for text in texts()]
    with torch.inference_mode():
        for one in ids:
            module(Batch.of([one]))
    x_PD = torch.cat(seen).float().numpy()
    chosen = np.linspace(0, len(x_PD) - 1, min(positions, len(x_PD))).astype(int)
    return x_PD[chosen], ids


def turned(x_PD: np.ndarray, signs_D: np.ndarray) -> np.ndarray:
    """The rotation of a screening."""
    columns = x_PD.shape[1]
    block = columns & -columns
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = (x_PD * signs_D).reshape(len(x_PD), -1, block)
    return (blocks @ hadamard / math.sqrt(block)).reshape(x_PD.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=420)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch_model = gemkit.load(executor="torch", quantized=False)
    x_PD, ids = hidden_states(torch_model, args.positions)
    table = torch_model.module.decoder.embed_tokens.weight.detach().numpy()
    native = gemkit.load(executor="native").executor
    entries = {entry.name: entry for entry in native.pack.table}
    raw = native.pack.bytes_of(entries["sketch of embed_tokens.weight"])
    columns, rows = table.shape[1], table.shape[0]
    tiles = raw.reshape(-1, screening.tile_bytes(columns))
    turned_PD = turned(x_PD, native.pack.bytes_of(entries["signs"]).view(np.float32))
    step_P1 = np.abs(turned_PD).max(1, keepdims=True) / 127
    rounded_PD = np.rint(turned_PD / step_P1) * step_P1
    length_P1 = np.linalg.norm(x_PD, axis=1, keepdims=True)
    exact_PV, z_PV = np.empty((2, len(x_PD), rows), np.float32)
    for start in range(0, len(tiles), TILES):
        part = tiles[start : start + TILES]
        scale, error = (part[:, at : at + 32].copy().view(np.float16).reshape(-1).astype(np.float32) for at in (0, 32))
        packed = part[:, 64:].reshape(len(part), -1, 16, 4)
        codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 2)  # tile, chunk, quarter, row, column
        codes = codes.transpose(0, 3, 1, 2, 4).reshape(len(part) * 16, -1)[:, :columns]
        span = slice(start * 16, min(rows, start * 16 + len(codes)))
        exact_PV[:, span] = x_PD @ table[span].T
        coarse = rounded_PD @ (scale[:, None] * (codes - np.float32(1.5)))[: span.stop - span.start].T
        z_PV[:, span] = (exact_PV[:, span] - coarse) / (length_P1 * error[: span.stop - span.start])
    best = np.argpartition(exact_PV, -64, axis=1)[:, -64:]
    z_best = np.take_along_axis(z_PV, best, 1).ravel()
    record = {"pairs": int(z_PV.size), "deviation": float(z_PV.std()), "mean": float(z_PV.mean()), "tail": []}
    for mark in MARKS:
        phi = 0.5 * math.erfc(mark / math.sqrt(2))
        shares = (z_PV > mark).mean(), (z_PV < -mark).mean(), (z_best > mark).mean()
        record["tail"].append(
            {"z": mark, "normal": phi, **dict(zip(("above", "below", "best"), map(float, shares), strict=True))}
        )
    record["largest"] = float(z_PV.max())
    record["largest_of_best"] = float(z_best.max())
    del exact_PV, z_PV
    for name, sampling in (("greedy", Sampling()), ("top-k 64", Sampling(temperature=1, top_k=64))):
        record[name] = survivors(native, ids, sampling)
    if args.json:
        print(json.dumps(record))
        return
    print(f"{record['pairs']:,} pairs: mean {record['mean']:+.3f}, deviation {record['deviation']:.3f}")
    print(f"largest {record['largest']:.2f}; of the best 64 rows of a position {record['largest_of_best']:.2f}\n")
    print("z      normal      above      below      above, best 64")
    for row in record["tail"]:
        print(f"{row['z']:<4} {row['normal']:>10.2e} {row['above']:>10.2e} {row['below']:>10.2e} {row['best']:>10.2e}")
    for name in ("greedy", "top-k 64"):
        found = record[name]
        print(f"\n{name}: rows computed of {rows:,}: median {found['median']:,}, 90 % below {found['p90']:,}, ", end="")
        print(f"most {found['most']:,}; the whole table at {found['full']} of {found['steps']} steps")


def survivors(native, ids: list[list[int]], sampling: Sampling) -> dict[str, int]:
    """Rows that were computed, over every position of the texts but the first few."""
    counts = []
    for one in ids:
        state = native.new_state(1)
        native.run([Chunk(0, one[:4])], state)
        for i in range(4, min(len(one), 64)):
            outputs = native.run([Chunk(0, [one[i]], filter=logits_filter(sampling, one[: i + 1]))], state)
            counts.append(int(outputs.computed[0]))
    full = sum(count == native.decoder.vocab_size for count in counts)
    ordered = sorted(counts)
    return {
        "steps": len(counts),
        "full": full,
        "median": ordered[len(counts) // 2],
        "p90": ordered[int(0.9 * len(counts))],
        "most": ordered[-1],
    }


if __name__ == "__main__":
    main()
