"""The first numbers of a model that is trained from nothing, as the family's published code draws them.

Decoder: google-deepmind/recurrentgemma, torch/layers.py and modules.py, the one training code of the family that draws
its own. All is normal with the variance of one over the inputs; what ends a branch has 2 / layers of that, so that the
residual stream does not grow with depth; embeddings have 1 / width, and are multiplied by sqrt(width) when they are
read; a convolution begins small; norms, which are offsets from 1, and biases are zero. The decays of an RG-LRU begin
between 0.9 and 0.999, uniform by area of the ring.

Tower: google-research/big_vision, models/vit.py: uniform by Glorot in the encoder, normal by LeCun for the patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from gemkit import family
from gemkit.nn import LanguageModel, build

MIN_DECAY, MAX_DECAY = 0.9, 0.999
_CONV_SCALE = 0.01


def new_module(
    decoder: family.DecoderConfig,
    vision: family.Modality | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """A model of random weights, ready to be trained. The same seed gives the same model."""
    with torch.device("meta"):
        module = build(decoder, vision)
    for i, (name, shape) in enumerate(family.parameters(decoder, vision)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        value = draw(name, shape, decoder, generator)
        module.set_param(name, Parameter(value.to(device, dtype)))
    module.decoder.embed_tokens.run_dtype = dtype
    return module


def draw(name: str, shape: tuple[int, ...], decoder: family.DecoderConfig, generator: torch.Generator) -> Tensor:
    """The first value of a parameter, in float32."""
    tower = name.startswith("vision_tower.")
    if "norm" in name:
        return torch.full(shape, float(tower and name.endswith("weight")))  # the tower's are factors, not offsets
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("recurrent_param"):
        # softplus(param) = -log(decay): where both gates are open to the full, a = decay ** 8
        area = torch.rand(shape, generator=generator) * (MAX_DECAY**2 - MIN_DECAY**2) + MIN_DECAY**2
        return torch.log(torch.expm1(-0.5 * torch.log(area)))
    if tower and len(shape) == 2 and "position" not in name:
        bound = math.sqrt(6 / sum(shape))
        return (2 * torch.rand(shape, generator=generator) - 1) * bound
    return torch.randn(shape, generator=generator) * math.sqrt(_variance(name, shape, decoder))


def _variance(name: str, shape: tuple[int, ...], decoder: family.DecoderConfig) -> float:
    if "position_embedding" in name or "embed_tokens" in name:
        return 1 / shape[1]
    if "rg_lru" in name:  # blocks are (in, out)
        return 1 / shape[1]
    if "conv_1d" in name:
        return _CONV_SCALE / shape[1]
    ends = name.endswith(("o_proj.weight", "down_proj.weight", "linear_out.weight"))
    return (2 / len(decoder.layers) if ends else 1.0) / math.prod(shape[1:])
