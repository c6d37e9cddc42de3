"""Gemma 3: five short windows to one global layer, long contexts, norms on queries and keys instead of soft caps.

Report arXiv:2503.19786; checked against google/gemma_pytorch gemma/config.py and the released Hugging Face
configurations. 4B, 12B and 27B are released with an image tower; here is their text decoder, with the 262,144 rows of
the tokenizer (Hugging Face pads the table of these three to 262,208 for the image placeholder).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gemkit.family.schema import DecoderConfig, Global, Layer, Member, Mlp, Rope, Sliding, repeat


def _layers(total: int, ffw_width: int, window: int, factor: float = 1.0, **heads: Any) -> tuple[Layer, ...]:
    """Five sliding layers to one global, which comes last; the factor stretches positions in the global ones alone."""
    numbers = {**heads, "qk_norm": True}
    sliding, all_tokens = Sliding(window, **numbers), Global(rope=Rope(base=1_000_000.0, factor=factor), **numbers)
    return repeat(*[sliding] * 5, all_tokens, ffw=Mlp(ffw_width), total=total)


_HEADS = {"head_dim": 256, "scale": 256**-0.5}
GEMMA3_270M = DecoderConfig(
    vocab_size=262_144,
    width=640,
    layers=_layers(18, 2048, window=512, heads=4, kv_heads=1, **_HEADS),
    max_context=32_768,
    post_norms=True,
)
GEMMA3_1B = replace(GEMMA3_270M, width=1152, layers=_layers(26, 6912, window=512, heads=4, kv_heads=1, **_HEADS))
GEMMA3_4B = replace(
    GEMMA3_270M,
    width=2560,
    layers=_layers(34, 10_240, window=1024, factor=8.0, heads=8, kv_heads=4, **_HEADS),
    max_context=131_072,
)
GEMMA3_12B = replace(
    GEMMA3_4B,
    width=3840,
    layers=_layers(48, 15_360, window=1024, factor=8.0, heads=16, kv_heads=8, **_HEADS),
)
GEMMA3_27B = replace(
    GEMMA3_4B,
    width=5376,
    layers=_layers(
        62,
        21_504,
        window=1024,
        factor=8.0,
        heads=32,
        kv_heads=16,
        head_dim=128,
        scale=(5376 // 32) ** -0.5,  # by width per head, as in Gemma 2 27B
    ),
)


def _pair(
    size: str, decoder: DecoderConfig, suffix: str = "-pt", released: str = "2025-03-12"
) -> tuple[Member, Member]:
    """The pretrained release (`suffix` ends its name) and the instruction-tuned one."""
    name = f"gemma-3-{size}"
    # Keras has two presets of a multimodal size; both have this text decoder
    keras = ("",) if size in ("270m", "1b") else ("", "_text")
    base = Member(
        name=name + suffix,
        hub_id=f"google/{name}{suffix}",
        family="Gemma 3",
        decoder=decoder,
        tuning="pretrained",
        vocabulary="gemma3",
        prompts=("complete",),
        released=released,
        aliases=(*([name, f"google/{name}"] if suffix else []), *(f"gemma3_{size}{end}" for end in keras)),
        source="arXiv:2503.19786; google/gemma_pytorch gemma/config.py",
    )
    tuned = replace(
        base,
        name=f"{name}-it",
        hub_id=f"google/{name}-it",
        tuning="instruction-tuned",
        prompts=("chat",),
        aliases=tuple(f"gemma3_instruct_{size}{end}" for end in keras),
    )
    return base, tuned


MEMBERS = (
    *_pair("270m", GEMMA3_270M, suffix="", released="2025-08-14"),
    *_pair("1b", GEMMA3_1B),
    *_pair("4b", GEMMA3_4B),
    *_pair("12b", GEMMA3_12B),
    *_pair("27b", GEMMA3_27B),
)
