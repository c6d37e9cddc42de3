"""Gemma 3: five short windows to one global layer, long contexts, norms on queries and keys instead of soft caps.

Report arXiv:2503.19786; checked against google/gemma_pytorch gemma/config.py and the released Hugging Face
configurations. 4B, 12B and 27B are released with an image tower; here is their text decoder, with the 262,144 rows of
the tokenizer (Hugging Face pads the table of these three to 262,208 for the image placeholder).
"""

from __future__ import annotations

from dataclasses import replace

from gemkit.family.schema import DecoderConfig, Global, Layer, Member, Rope, Sliding, repeat


def _layers(total: int, window: int, factor: float = 1.0) -> tuple[Layer, ...]:
    """Five sliding layers to one global, which comes last; the factor stretches positions in the global ones alone."""
    sliding, all_tokens = Sliding(window), Global(Rope(base=1_000_000.0, factor=factor))
    return repeat(*[sliding] * 5, all_tokens, total=total)


GEMMA3_270M = DecoderConfig(
    vocab_size=262_144,
    width=640,
    ffw_width=2048,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    layers=_layers(18, window=512),
    max_context=32_768,
    query_scale=256**-0.5,
    post_norms=True,
    qk_norm=True,
)
GEMMA3_1B = replace(GEMMA3_270M, width=1152, ffw_width=6912, layers=_layers(26, window=512))
GEMMA3_4B = replace(
    GEMMA3_270M,
    width=2560,
    ffw_width=10_240,
    num_heads=8,
    num_kv_heads=4,
    layers=_layers(34, window=1024, factor=8.0),
    max_context=131_072,
)
GEMMA3_12B = replace(
    GEMMA3_4B,
    width=3840,
    ffw_width=15_360,
    num_heads=16,
    num_kv_heads=8,
    layers=_layers(48, window=1024, factor=8.0),
)
GEMMA3_27B = replace(
    GEMMA3_4B,
    width=5376,
    ffw_width=21_504,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    layers=_layers(62, window=1024, factor=8.0),
    query_scale=(5376 // 32) ** -0.5,  # by width per head, as in Gemma 2 27B
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
