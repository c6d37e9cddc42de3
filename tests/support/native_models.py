"""Members at test size with random weights, dense or quantized, for tests of the native executor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from gemkit import family, nn
from gemkit.block_types import KINDS
from gemkit.executors.interface import Chunk
from gemkit.executors.native.executor import NativeExecutor
from gemkit.ops import Quantized
from support.outputs import dense
from support.tiny import tiny, tokens

MEMBERS = ["gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-27b", "gemma-3-1b", "gemma-3-4b", "recurrentgemma-2b"]


def of_whole_blocks(config: family.DecoderConfig) -> family.DecoderConfig:
    """Widths that are multiples of a block of quantized weights."""
    heads = {"head_dim": 32, "scale": 32**-0.5}
    return family.replace_layers(replace(config, width=128), attention=heads, ffw={"width": 256})


def randomised(name: str, quantized: bool = False, depth: int | None = None) -> nn.Decoder:
    """A member at test size with the weights that `tiny.reference` gives it; quantized ones have random codes."""
    generator = torch.Generator().manual_seed(0)
    config = tiny(name)
    if quantized:  # rows of whole blocks
        config = of_whole_blocks(config)
    module = nn.Decoder(replace(config, layers=config.layers[:depth]))
    for path, weight in list(module.named_parameters()):
        gain = 1.5 if "q_proj" in path or "k_proj" in path else 1
        small = "norm" in path or "bias" in path
        value = torch.randn(weight.shape, generator=generator) * (0.3 if small else gain / weight.shape[-1] ** 0.5)
        if "recurrent_param" in path:
            value.uniform_(-8, 2, generator=generator)
        if quantized and ("_proj" in path or path.startswith("embed_tokens")):
            module.set_param(path, q8_0(value))
        else:
            module.set_param(path, torch.nn.Parameter(value, requires_grad=False))
    return module.eval()


def q8_0(value: torch.Tensor) -> Quantized:
    groups = value.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.float().clamp_min(1e-9)[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Quantized(KINDS["Q8_0"], {"codes": codes.flatten(1), "scales": scales}, tuple(value.shape))


def ids(*lengths: int, seed: int = 1) -> list[list[int]]:
    return [sequence.tolist() for sequence in tokens(*lengths, seed=seed)]


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"off by {error:.1e} of the largest logit, {tolerance:.0e} allowed"


def one_by_one(executor: NativeExecutor, sequence: list[int]) -> np.ndarray:
    state = executor.new_state(1)
    return np.concatenate([dense(executor, [Chunk(0, [token])], state) for token in sequence])
