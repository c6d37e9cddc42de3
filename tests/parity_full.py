"""The 2B members at their full published size against Transformers: `python tests/parity_full.py [member ...]`.

The same random weights, in the published layout and in real files, go through both. Each step has a process of its own,
so that one model is in memory at a time: write, their logits, our logits, and a load in bfloat16 that is measured. A
member takes minutes, 16 GB of memory and 6 GB of disk; naming members runs these alone, as after a run that was cut
short.
"""

from __future__ import annotations

import argparse
import math
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

from gemkit import family, images
from gemkit.weights.checkpoint import find
from support.outputs import dense

MEMBERS = ("gemma-2b", "codegemma-2b", "gemma-2-2b", "recurrentgemma-2b", "paligemma-3b-pt-224")
PROMPT, STEPS = 32, 8  # tokens computed at once, then one by one from what is remembered
TOLERANCE = 2e-5  # of the largest absolute logit: float32 sums over 16384 terms in another order
TOLERANCE_OF_IMAGES = 5e-5  # through the 27 layers of a tower first
ROOM = 1.2  # peak memory of a load in bfloat16 over the size of the files: the weights once, and the libraries


def write(name: str, folder: Path) -> int:
    """Random weights of a member in bfloat16, as its publishers lay them out. Returns the bytes of the files."""
    import torch

    from gemkit.nn import build
    from gemkit.weights.export.hf import save_hf

    member = family.get(name)
    with torch.device("meta"):
        module = build(member.decoder, member.vision)
    for seed, (weight, shape) in enumerate(family.parameters(member.decoder, member.vision)):
        # Norms are offsets from 1. Queries and keys are larger, so that softmaxes choose and soft caps bend; all else
        # is of unit gain: with more, rounding grows from layer to layer in both.
        terms = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
        gain = 0.3 if "norm" in weight else (1.5 if "q_proj" in weight or "k_proj" in weight else 1) / terms**0.5
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(gain)
        if "layer_norm" in weight or "post_layernorm" in weight:  # the tower's are factors, with biases
            drawn += float(weight.endswith("weight"))
        module.set_param(weight, torch.nn.Parameter(drawn.bfloat16(), requires_grad=False))
    save_hf(module, folder, shard_bytes=2_000_000_000)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def tokens(name: str) -> list[int]:
    """Random ones; after the placeholders of an image, for a member that sees one."""
    member = family.get(name)
    most, placeholders = member.decoder.vocab_size, []
    if member.vision is not None:
        most, placeholders = 256_000, [member.vision.placeholder] * member.vision.tokens
    return [*placeholders, *np.random.default_rng(0).integers(0, most, PROMPT + STEPS).tolist()]


def image(name: str) -> np.ndarray | None:
    """What the member is shown: noise of its resolution, prepared as a picture is."""
    vision = family.get(name).vision
    if vision is None:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    return images.preprocess(images.read(noise), vision.tower.image_size)


def their_logits(folder: Path, ids: list[int], shown: np.ndarray | None, out: Path) -> None:
    """Transformers in float32 on the same files, all tokens at once, for its RecurrentGemma hands out no cache to go on
    with; eager attention, for its default may leave out a soft cap. Of the text alone, where there is an image."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    kind = transformers.AutoModelForCausalLM if shown is None else transformers.AutoModelForImageTextToText
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"Transformers finds the files wanting: {info}")
    seen: dict[str, Any] = {}
    if shown is not None:
        in_suffix = [int(i >= len(ids) - STEPS) for i in range(len(ids))]
        seen = {"pixel_values": torch.from_numpy(shown)[None], "token_type_ids": torch.tensor([in_suffix])}
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), logits_to_keep=PROMPT + STEPS, **seen).logits[0]
    np.save(out, logits.numpy())


def our_logits(folder: Path, ids: list[int], shown: np.ndarray | None, out: Path) -> None:
    from gemkit.executors.torch import TorchExecutor
    from gemkit.generate import Chunk
    from gemkit.weights.load import load_module

    with find(folder) as checkpoint:
        executor = TorchExecutor(load_module(checkpoint, dtype="float32")[0])
    state = executor.new_state(1)
    prompt, answer = ids[:-STEPS], ids[-STEPS:]
    seen = {} if shown is None else {"spans": [(0, len(prompt))], "images": [shown]}
    rows = [dense(executor, [Chunk(0, prompt, rows=PROMPT, **seen)], state)]
    rows += [dense(executor, [Chunk(0, [token])], state) for token in answer]
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
    ids, shown = tokens(name), image(name)
    tolerance = TOLERANCE if shown is None else TOLERANCE_OF_IMAGES
    model, theirs, ours = folder / name, folder / "theirs.npy", folder / "ours.npy"
    size, seconds, peak = alone(write, name, model)
    say(f"{name}: {size / 1e9:.2f} GB written in {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB")
    for whose, run, out in (("Transformers", their_logits, theirs), ("gemkit", our_logits, ours)):
        _, seconds, peak = alone(run, model, ids, shown, out)
        say(f"{name}: {whose} in float32: {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB")
    _, seconds, peak = alone(load_only, model)
    a, b = np.load(ours), np.load(theirs)
    largest = np.abs(b).max()
    error, room = np.abs(a - b).max() / largest, peak / size
    same = (a.argmax(-1) == b.argmax(-1)).mean()
    passed = bool(error <= tolerance and room <= ROOM)  # a NaN is not within
    say(
        f"{name}: {'ok' if passed else 'FAILED'}: logits of {PROMPT} + {STEPS} tokens differ by at most {error:.1e} of "
        f"the largest, {largest:.1f} ({tolerance:.0e} allowed), best token the same in {same:.0%}; loading in bfloat16 "
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
