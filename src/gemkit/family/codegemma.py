"""CodeGemma: Gemma 1 trained further on code, most of it with a middle cut out to be filled in.

Report arXiv:2406.11409. The architecture is Gemma 1's to the last number; four unused pieces of the vocabulary became
the control tokens of infilling (ids 67 to 70), so the vocabulary has a name of its own.
"""

from __future__ import annotations

from gemkit.family.gemma1 import GEMMA1_2B, GEMMA1_7B
from gemkit.family.schema import DecoderConfig, Member, Prompt

_V1, _V1_1 = "2024-04-09", "2024-05-03"


def _member(name: str, decoder: DecoderConfig, prompts: tuple[Prompt, ...], released: str, keras: str) -> Member:
    return Member(
        name=name,
        hub_id=f"google/{name}",
        family="CodeGemma",
        decoder=decoder,
        tuning="instruction-tuned" if prompts == ("chat",) else "pretrained",
        vocabulary="codegemma",
        prompts=prompts,
        released=released,
        aliases=(keras,),
        source="arXiv:2406.11409; decoder as in google/gemma_pytorch gemma/config.py",
    )


MEMBERS = (
    _member("codegemma-2b", GEMMA1_2B, ("infill", "complete"), _V1, "code_gemma_2b_en"),
    _member("codegemma-1.1-2b", GEMMA1_2B, ("infill", "complete"), _V1_1, "code_gemma_1.1_2b_en"),
    _member("codegemma-7b", GEMMA1_7B, ("infill", "complete"), _V1, "code_gemma_7b_en"),
    _member("codegemma-7b-it", GEMMA1_7B, ("chat",), _V1, "code_gemma_instruct_7b_en"),
    _member("codegemma-1.1-7b-it", GEMMA1_7B, ("chat",), _V1_1, "code_gemma_1.1_instruct_7b_en"),
)
