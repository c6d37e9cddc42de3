"""Gemma 1 and 1.1: the plain decoder that every later member varies.

Report arXiv:2403.08295; numbers checked against google/gemma_pytorch gemma/config.py and the released Hugging Face
configurations. The report's table of parameters counts the 256,128 rows of the original Flax embedding, padded to a
multiple of 128; released PyTorch, Hugging Face and Keras tables have the tokenizer's 256,000.
"""

from __future__ import annotations

from dataclasses import replace

from gemkit.family.schema import DecoderConfig, Global, Member, Mlp, repeat

_HEADS = {"head_dim": 256, "scale": 256**-0.5}
GEMMA1_2B = DecoderConfig(
    vocab_size=256_000,
    width=2048,
    layers=repeat(Global(heads=8, kv_heads=1, **_HEADS), ffw=Mlp(16_384), total=18),
    max_context=8192,
)
GEMMA1_7B = replace(
    GEMMA1_2B,
    width=3072,  # 16 heads of 256 are wider
    layers=repeat(Global(heads=16, kv_heads=16, **_HEADS), ffw=Mlp(24_576), total=28),
)

_SOURCE = "arXiv:2403.08295; google/gemma_pytorch gemma/config.py"


def _base(size: str, decoder: DecoderConfig) -> Member:
    name = f"gemma-{size}"
    return Member(
        name=name,
        hub_id=f"google/{name}",
        family="Gemma 1",
        decoder=decoder,
        tuning="pretrained",
        vocabulary="gemma",
        prompts=("complete",),
        released="2024-02-21",
        aliases=(f"gemma_{size}_en",),
        source=_SOURCE,
    )


def _tuned(size: str, decoder: DecoderConfig, version: str = "", released: str = "2024-02-21") -> Member:
    name = f"gemma-{version}{size}-it"
    return replace(
        _base(size, decoder),
        name=name,
        hub_id=f"google/{name}",
        tuning="instruction-tuned",
        prompts=("chat",),
        released=released,
        aliases=(f"gemma_{version.replace('-', '_')}instruct_{size}_en",),
    )


MEMBERS = (
    _base("2b", GEMMA1_2B),
    _tuned("2b", GEMMA1_2B),
    # 1.1 tunes the same pretrained models again
    _tuned("2b", GEMMA1_2B, version="1.1-", released="2024-04-05"),
    _base("7b", GEMMA1_7B),
    _tuned("7b", GEMMA1_7B),
    _tuned("7b", GEMMA1_7B, version="1.1-", released="2024-04-05"),
)
