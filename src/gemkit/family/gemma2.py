"""Gemma 2: every other layer slides, scores and logits are capped, and each block norms its outputs too.

Report arXiv:2408.00118; checked against google/gemma_pytorch gemma/config.py and the released Hugging Face
configurations. The first layer is a sliding one.
"""

from __future__ import annotations

from dataclasses import replace

from gemkit.family.schema import DecoderConfig, Global, Member, Sliding, repeat

GEMMA2_2B = DecoderConfig(
    vocab_size=256_000,
    width=2304,
    ffw_width=9216,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    layers=repeat(Sliding(4096), Global(), total=26),
    max_context=8192,
    query_scale=256**-0.5,
    post_norms=True,
    attention_softcap=50.0,
    final_softcap=30.0,
)
GEMMA2_9B = replace(
    GEMMA2_2B,
    width=3584,
    ffw_width=14_336,
    num_heads=16,
    num_kv_heads=8,
    layers=repeat(Sliding(4096), Global(), total=42),
    query_scale=256**-0.5,  # early Hugging Face conversions had (3584 / 16) ** -0.5, later corrected
)
GEMMA2_27B = replace(
    GEMMA2_2B,
    width=4608,
    ffw_width=36_864,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    layers=repeat(Sliding(4096), Global(), total=46),
    query_scale=(4608 // 32) ** -0.5,  # by width per head, not head_dim: unlike 2B and 9B
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
