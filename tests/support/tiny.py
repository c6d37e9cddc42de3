"""Members at a size that a test can run, with their real layer pattern, and the same weights in Transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import transformers

from gemkit import family
from gemkit.family import Attention, DecoderConfig, Layer, Modality, Vision, replace_layers
from gemkit.nn import LanguageModel
from gemkit.weights import config_hf
from gemkit.weights.checkpoint import find
from gemkit.weights.load import load_module

WINDOW = 8
VOCAB = 320


def tiny(name: str) -> DecoderConfig:
    """The member with small widths and windows of 8. Heads, pattern, caps, norms and ropes stay as they are, and
    heads times head size still differs from the width, unless the published code of the member ties them."""
    real = family.get(name).decoder
    like = real.attention[0]
    by_width = abs(like.scale - like.head_dim**-0.5) > 1e-6  # the 27B models scale by width / heads
    width, head_dim = (12 if by_width else 4) * like.heads, 16
    if real.recurrent:
        width = head_dim * like.heads
    small = replace_layers(
        replace(real, vocab_size=VOCAB, width=width),
        attention={"head_dim": head_dim, "scale": (width // like.heads if by_width else head_dim) ** -0.5},
        recurrent={"width": width},
        ffw={"width": 96},
    )
    return with_windows(small, WINDOW)


def with_windows(decoder: DecoderConfig, window: int) -> DecoderConfig:
    """The decoder with this window in every layer that has one."""

    def changed(layer: Layer) -> Layer:
        slides = isinstance(layer.mixer, Attention) and layer.mixer.window is not None
        return replace(layer, mixer=replace(layer.mixer, window=window)) if slides else layer

    return replace(decoder, layers=tuple(map(changed, decoder.layers)))


# 16 patches an image, twice a window; heads of 18, which like the real 72 is no power of two
TOWER = Modality(Vision(56, patch_size=14, width=36, depth=3, num_heads=2, mlp_width=44), placeholder=VOCAB - 2)


def reference(decoder: DecoderConfig, vision: Modality | None = None, seed: int = 0) -> transformers.PreTrainedModel:
    """Transformers' model with random weights, float32, eager attention (its default may drop Gemma 2's soft cap)."""
    settings = config_hf.to_hf(decoder, vision)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind = transformers.AutoModelForCausalLM if vision is None else transformers.AutoModelForImageTextToText
    model = kind.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norms are offsets from 1. Queries and keys are larger, so that softmaxes choose and soft caps bend; all
            # else is of unit gain. With more, the models are chaotic: Transformers' own float32 is then 1e-4 off its
            # float64.
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1
            small = "norm" in name or "bias" in name
            weight.normal_(0, 0.3 if small else gain / weight.shape[-1] ** 0.5, generator=generator)
            if "layer_norm" in name or "post_layernorm.weight" in name:  # the tower's: factors, not offsets
                weight.add_(float(name.endswith("weight")))
            if "recurrent_param" in name:  # decays from near 0 to near 1: trained ones start between 0.5 and 0.999
                weight.uniform_(-8, 2, generator=generator)
    return model.eval()


def as_trained(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model with the window that RecurrentGemma was trained with: Transformers shows one token fewer."""
    if model.config.model_type == "recurrent_gemma":
        model.config.attention_window_size += 1
    return model


def save_reference(model: transformers.PreTrainedModel, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def load(path: Path, **options) -> LanguageModel:
    """Our model from files, as the front door loads it."""
    with find(path) as checkpoint:
        return load_module(checkpoint, **options)[0]


def tokens(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Within `tolerance` of the largest absolute logit: float32 sums in another order differ by about 1e-6 of it."""
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert error <= tolerance, f"off by {error:.2e} of the largest logit, {tolerance:.0e} allowed"
