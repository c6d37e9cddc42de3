"""PaliGemma and PaliGemma 2: a SigLIP tower in front of Gemma 1 2B or of Gemma 2.

Reports arXiv:2407.07726 and arXiv:2412.03555; checked against google-research/big_vision and the released Hugging Face
configurations, which this data follows where the two differ: 257,216 rows of vocabulary instead of 257,152 (the
`<image>` placeholder, padded to a multiple of 64), and in PaliGemma 2 windows of 4096 on even layers and a final cap of
30, where big_vision attends everywhere and leaves the cap out of training and prefill.
"""

from __future__ import annotations

from dataclasses import replace

from gemkit.family.gemma1 import GEMMA1_2B
from gemkit.family.gemma2 import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B
from gemkit.family.schema import DecoderConfig, Member, Modality, Vision

IMAGE_TOKEN = 257_152  # `<image>`, the first row after those that are used
ROWS = 257_216  # released Hugging Face tables
ROWS_USED = 257_152  # 256,000 pieces, 1024 <loc> and 128 <seg>: the tables of big_vision and Keras

PALIGEMMA_3B = replace(GEMMA1_2B, vocab_size=ROWS)
PALIGEMMA2_3B = replace(GEMMA2_2B, vocab_size=ROWS)
PALIGEMMA2_10B = replace(GEMMA2_9B, vocab_size=ROWS)
PALIGEMMA2_28B = replace(GEMMA2_27B, vocab_size=ROWS)


def _member(generation: int, size: str, tuning: str, pixels: int, decoder: DecoderConfig, released: str) -> Member:
    version = "2" if generation == 2 else ""
    name = f"paligemma{version}-{size}-{tuning}-{pixels}"
    keras = f"pali_gemma2_{tuning}_{size}_{pixels}" if version else f"pali_gemma_{size}_{tuning}_{pixels}"
    return Member(
        name=name,
        hub_id=f"google/{name}",
        family=f"PaliGemma {version}".strip(),
        decoder=decoder,
        tuning="mix" if tuning == "mix" else "pretrained",
        vocabulary="paligemma",
        prompts=("image",),
        released=released,
        vision=Modality(Vision(image_size=pixels), placeholder=IMAGE_TOKEN),
        aliases=(keras.replace("3b_pt_", "3b_"),),  # Keras leaves "pt" out of the first generation's names
        source=f"arXiv:{'2412.03555' if version else '2407.07726'}; google-research/big_vision",
    )


def _releases(generation: int, size: str, decoder: DecoderConfig, pretrained: str, mix: str) -> tuple[Member, ...]:
    """Pretrained at three resolutions and the mix at two; `pretrained` and `mix` are dates."""
    return (
        *(_member(generation, size, "pt", pixels, decoder, pretrained) for pixels in (224, 448, 896)),
        *(_member(generation, size, "mix", pixels, decoder, mix) for pixels in (224, 448)),
    )


MEMBERS = (
    *_releases(1, "3b", PALIGEMMA_3B, pretrained="2024-05-14", mix="2024-05-14"),
    *_releases(2, "3b", PALIGEMMA2_3B, pretrained="2024-12-05", mix="2025-02-19"),
    *_releases(2, "10b", PALIGEMMA2_10B, pretrained="2024-12-05", mix="2025-02-19"),
    *_releases(2, "28b", PALIGEMMA2_28B, pretrained="2024-12-05", mix="2025-02-19"),
)
