"""Variants of GGUF files against llama.cpp: both executors mean what it means, and are no further from float32 than it.

Its answers are in tests/data/gguf.json (`tests/golden_gguf.py` made them); no llama.cpp is needed here.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from gemkit.executors.interface import Chunk
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.packer import pack
from gemkit.nn import Batch
from gemkit.weights.checkpoint import find
from gemkit.weights.load import load_module
from support.gguf_variants import VARIANTS, ids
from support.outputs import dense

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "gguf.json").read_text())
IDS = GOLDEN["ids"]


def of_next(logits_TV):
    """The logarithm of the probability of each next token."""
    log_TV = torch.from_numpy(np.asarray(logits_TV, np.float64)).log_softmax(-1)
    return log_TV[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()


@cache
def measured(name):
    """How far llama.cpp and the native executor are from float32, torch's on the same file."""
    with tempfile.TemporaryDirectory() as folder:
        VARIANTS[name](Path(folder) / "x.gguf")
        with find(min(Path(folder).iterdir())) as checkpoint:
            module, _ = load_module(checkpoint, dtype="float32")
            assert checkpoint.tokenizer.is_control(checkpoint.tokenizer.end_of_turn)
    with torch.inference_mode():
        exact = of_next(module(Batch.of([IDS])).numpy())
    native = NativeExecutor(module.config, pack(module))
    ours = of_next(dense(native, [Chunk(0, IDS, rows=len(IDS))], native.new_state(1)))
    return off(GOLDEN["next"][name], exact), off(ours, exact)


def off(found, wanted):
    return float(np.abs(np.asarray(found) - wanted).mean())


# Of the logarithm of a probability, on average. llama.cpp keeps keys and values in float16, rounds activations to
# bfloat16 in front of such weights, and to int8 in front of quantized ones: this far it is from float32 itself.
FLOAT, BF16, INT8 = 6e-3, 3.5e-2, 4.5e-2


def allowed(name):
    if name.endswith("BF16"):
        return BF16
    rounded = any(word in name for word in ("Q8_0", "Q4_", "Q5_", "blocks", "bf16 table", "q8 table"))
    return INT8 if rounded or name == "f16 table" else FLOAT


def test_the_golden_file_is_of_these_variants():
    assert GOLDEN["next"].keys() == VARIANTS.keys()
    assert ids() == IDS


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_read_as_llama_cpp_reads_it(name):
    theirs, ours = measured(name)
    assert theirs < allowed(name)
    # both round activations to int8, by other groups: of 47 tokens the averages differ by about a fifth
    assert ours < 1.35 * theirs


def test_the_native_executor_is_closer_to_float32_than_llama_cpp():
    distances = np.array([measured(name) for name in VARIANTS])
    assert (distances[:, 1] <= distances[:, 0]).mean() > 0.9  # measured: 50 of 53
    theirs, ours = distances.mean(0)
    assert ours < 0.9 * theirs  # measured: 0.75


BASES = {
    "gemma-2b F32": ("factor in the old key",),
    "gemma-2-2b F32": ("linear", "factor without a type", "yarn of gemma2", "global by layer"),
    "gemma-3-1b F32": (
        "linear of gemma3",
        "yarn with windows",
        "no window",
        "every third global",
        "another local base",
    ),
    "no window": ("yarn",),
}


@pytest.mark.parametrize("base", BASES)
def test_the_tolerance_would_notice_a_key_that_is_not_read(base):
    for name in BASES[base]:
        assert off(GOLDEN["next"][name], np.array(GOLDEN["next"][base])) > 10 * FLOAT
