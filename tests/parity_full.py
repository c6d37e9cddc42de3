"""The 2B members at their full published size against Transformers: `python tests/parity_full.py [member ...]`.

The same random weights, in the published layout and in real files, go through both. Each step has a process of its own,
so that one model is in memory at a time: write, their logits, our logits, and a load in bfloat16 that is measured. A
member takes minutes, 16 GB of memory and 6 GB of disk; naming members runs these alone, as after a run that was cut
short.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gemkit import family
from gemkit.weights.checkpoint import find

MEMBERS = ("gemma-2b", "codegemma-2b", "gemma-2-2b", "recurrentgemma-2b")
PROMPT, STEPS = 32, 8  # tokens computed at once, then one by one from what is remembered
TOLERANCE = 2e-5  # of the largest absolute logit: float32 sums over 16384 terms in another order
ROOM = 1.2  # peak memory of a load in bfloat16 over the size of the files: the weights once, and the libraries


def write(name: str, folder: Path) -> int:
    """Random weights of a member in bfloat16, as its publishers lay them out. Returns the bytes of the files."""
    import torch

    from gemkit.nn import Decoder
    from gemkit.weights.save import save_hf

    decoder = family.get(name).decoder
    with torch.device("meta"):
        module = Decoder(decoder)
    for seed, (weight, shape) in enumerate(family.parameters(decoder)):
        # Norms are offsets from 1. Queries and keys are larger, so that softmaxes choose and soft caps bend; all else
        # is of unit gain: with more, rounding grows from layer to layer in both.
        gain = 0.3 if "norm" in weight else (1.5 if "q_proj" in weight or "k_proj" in weight else 1) / shape[-1] ** 0.5
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(gain).bfloat16()
        module.hold(weight, torch.nn.Parameter(drawn, requires_grad=False))
    save_hf(module, folder, shard_bytes=2_000_000_000)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def tokens(name: str) -> list[int]:
    return np.random.default_rng(0).integers(0, family.get(name).decoder.vocab_size, PROMPT + STEPS).tolist()


def their_logits(folder: Path, ids: list[int], out: Path) -> None:
    """Transformers in float32 on the same files, all tokens at once, for its RecurrentGemma hands out no cache to go on
    with; eager attention, for its default may leave out a soft cap."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"Transformers finds the files wanting: {info}")
    with torch.inference_mode():
        np.save(out, model(torch.tensor([ids])).logits[0].numpy())


def our_logits(folder: Path, ids: list[int], out: Path) -> None:
    from gemkit.generate import Chunk
    from gemkit.program.eager import Eager
    from gemkit.weights.load import load_module

    with find(folder) as checkpoint:
        executor = Eager(load_module(checkpoint, dtype="float32")[0])
    state = executor.new_state(1)
    rows = [executor.run([Chunk(0, ids[:PROMPT], rows=PROMPT)], state)]
    rows += [executor.run([Chunk(0, [token])], state) for token in ids[PROMPT:]]
    np.save(out, np.concatenate(rows))


def load_only(folder: Path) -> None:
    from gemkit.weights.load import load_module

    with find(folder) as checkpoint:
        load_module(checkpoint, dtype="bfloat16")


def alone(work: Callable[..., Any], *args: Any) -> tuple[Any, float, int]:
    """The result of a function in a process of its own, the seconds it took there, and the process's peak memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, work, *args).result()


def _measured(work: Callable[..., Any], *args: Any) -> tuple[Any, float, int]:
    start = time.perf_counter()
    result = work(*args)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return result, seconds, peak * 1024


def check(name: str, folder: Path) -> bool:
    """Whether a member passes; says how closely."""
    ids = tokens(name)
    model, theirs, ours = folder / name, folder / "theirs.npy", folder / "ours.npy"
    size, seconds, peak = alone(write, name, model)
    say(f"{name}: {size / 1e9:.2f} GB written in {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB")
    for whose, run, out in (("Transformers", their_logits, theirs), ("gemkit", our_logits, ours)):
        _, seconds, peak = alone(run, model, ids, out)
        say(f"{name}: {whose} in float32: {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB")
    _, seconds, peak = alone(load_only, model)
    a, b = np.load(ours), np.load(theirs)
    largest = np.abs(b).max()
    error, room = np.abs(a - b).max() / largest, peak / size
    same = (a.argmax(-1) == b.argmax(-1)).mean()
    passed = bool(error <= TOLERANCE and room <= ROOM)  # a NaN is not within
    say(
        f"{name}: {'ok' if passed else 'FAILED'}: logits of {PROMPT} + {STEPS} tokens differ by at most {error:.1e} of "
        f"the largest, {largest:.1f} ({TOLERANCE:.0e} allowed), best token the same in {same:.0%}; loading in bfloat16 "
        f"took {seconds:.1f} s and at its peak {room:.2f} times the size of the files ({ROOM} allowed)"
    )
    return passed


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", default=MEMBERS, metavar="member", help=f"default: {' '.join(MEMBERS)}")
    parser.add_argument("--folder", type=Path, help="where the files are while they are needed (default: a temporary)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.members:
        folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="parity-"))
        try:
            if not check(name, folder):
                failed.append(name)
        finally:
            shutil.rmtree(folder)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
