"""Gemma 2: every other layer slides, scores and logits are capped, and each block norms its outputs too.

Report arXiv:2408.00118; checked against google/gemma_pytorch gemma/config.py and the released Hugging Face
configurations. The first layer is a sliding one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gemkit.family.schema import DecoderConfig, Global, Layer, Member, Mlp, Sliding, repeat


def _layers(total: int, ffw_width: int, **heads: Any) -> tuple[Layer, ...]:
    """Sliding and global layers in turn."""
    numbers = {**heads, "softcap": 50.0}
    return repeat(Sliding(4096, **numbers), Global(**numbers), ffw=Mlp(ffw_width), total=total)


GEMMA2_2B = DecoderConfig(
    vocab_size=256_000,
    width=2304,
    layers=_layers(26, 9216, heads=8, kv_heads=4, head_dim=256, scale=256**-0.5),
    max_context=8192,
    post_norms=True,
    final_softcap=30.0,
)
GEMMA2_9B = replace(
    GEMMA2_2B,
    width=3584,
    # early Hugging Face conversions had a scale of (3584 / 16) ** -0.5, later corrected
    layers=_layers(42, 14_336, heads=16, kv_heads=8, head_dim=256, scale=256**-0.5),
)
GEMMA2_27B = replace(
    GEMMA2_2B,
    width=4608,
    # the scale is by width per head, not head_dim: unlike 2B and 9B
    layers=_layers(46, 36_864, heads=32, kv_heads=16, head_dim=128, scale=(4608 // 32) ** -0.5),
)


def _pair(size: str, decoder: DecoderConfig, released: str) -> tuple[Member, Member]:
    name = f"gemma-2-{size}"
    base = Member(
        name=name,
        hub_id=f"google/{name}",
        family="Gemma 2",
        decoder=decoder,
        tuning="pretrained",
        vocabulary="gemma",
        prompts=("complete",),
        released=released,
        aliases=(f"gemma2_{size}_en",),
        source="arXiv:2408.00118; google/gemma_pytorch gemma/config.py",
    )
    tuned = replace(
        base,
        name=f"{name}-it",
        hub_id=f"google/{name}-it",
        tuning="instruction-tuned",
        prompts=("chat",),
        aliases=(f"gemma2_instruct_{size}_en",),
    )
    return base, tuned


MEMBERS = (
    *_pair("2b", GEMMA2_2B, released="2024-07-31"),
    *_pair("9b", GEMMA2_9B, released="2024-06-27"),
    *_pair("27b", GEMMA2_27B, released="2024-06-27"),
)
