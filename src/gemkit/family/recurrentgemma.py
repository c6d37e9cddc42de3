"""RecurrentGemma: recurrence in two layers of three, a window in the third, and a state that stops growing.

Report arXiv:2404.07839, Griffin arXiv:2402.19427; checked against google-deepmind/recurrentgemma. Its mask lets a
token see 2048 earlier ones besides itself, so the window is 2049 here (Hugging Face shows one fewer). Its embedding
scale is rounded to bfloat16 whatever the run dtype.
"""

from __future__ import annotations

from dataclasses import replace

from gemkit.family.schema import DecoderConfig, Layer, Member, Mlp, Recurrent, Rope, Sliding, repeat


def _layers(total: int, width: int, heads: int, ffw_width: int) -> tuple[Layer, ...]:
    """Two recurrent layers, as wide as the residual and with a block for each head, to one of attention."""
    recurrent = Recurrent(width, num_blocks=heads)
    sliding = Sliding(2049, rope=Rope(fraction=0.5), heads=heads, kv_heads=1, head_dim=256, scale=256**-0.5)
    return repeat(recurrent, recurrent, sliding, ffw=Mlp(ffw_width), total=total)


RECURRENTGEMMA_2B = DecoderConfig(
    vocab_size=256_000,
    width=2560,
    layers=_layers(26, width=2560, heads=10, ffw_width=7680),  # Hugging Face writes 15360 and halves it
    max_context=8192,
    final_softcap=30.0,
    biases=True,
    embed_scale_dtype="bfloat16",
)
RECURRENTGEMMA_9B = replace(RECURRENTGEMMA_2B, width=4096, layers=_layers(38, width=4096, heads=16, ffw_width=12_288))


def _pair(size: str, decoder: DecoderConfig, released: str) -> tuple[Member, Member]:
    name = f"recurrentgemma-{size}"
    base = Member(
        name=name,
        hub_id=f"google/{name}",
        family="RecurrentGemma",
        decoder=decoder,
        tuning="pretrained",
        vocabulary="gemma",
        prompts=("complete",),
        released=released,
        source="arXiv:2404.07839; google-deepmind/recurrentgemma recurrentgemma/common.py",
    )
    tuned = replace(base, name=f"{name}-it", hub_id=f"google/{name}-it", tuning="instruction-tuned", prompts=("chat",))
    return base, tuned


MEMBERS = (
    *_pair("2b", RECURRENTGEMMA_2B, released="2024-04-09"),
    *_pair("9b", RECURRENTGEMMA_9B, released="2024-06-11"),
)
