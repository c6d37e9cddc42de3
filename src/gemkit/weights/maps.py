"""The names that published checkpoints give to our parameters: one table a format, read in both directions.

Ours are the names of the published Hugging Face checkpoints of Gemma 2 and 3 without their leading `model.`. What a
format stores differently stands beside the name: GGUF norms are `1 + w`, and google/gemma_pytorch keeps q, k and v as
the rows of one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gemkit.family import Decoder
from gemkit.weights.entries import Format

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Part:
    """Where one of our parameters is in a file."""

    theirs: str
    ours: str
    plus_one: bool = False  # the file stores 1 + w
    rows: tuple[int, int] | None = None  # only these rows of the file's matrix


@dataclass(frozen=True)
class NameMap:
    """A table of (published name, our name) with `{i}` for the layer number."""

    format: Format
    table: tuple[tuple[str, str], ...]
    plus_one: bool = False  # norms are stored as 1 + w
    prefixes: tuple[str, ...] = ("",)  # where the table may hang in a larger model; the first is what we write
    ignored: tuple[str, ...] = ()  # regular expressions of published tensors that carry nothing for us

    def theirs(self, ours: str) -> str:
        """The published name of one of our parameters, in the layout that we write.

        Raises:
            KeyError: if the format has no such parameter.
        """
        pattern, number = _split(ours)
        return self.prefixes[0] + self._by_ours()[pattern].replace("{i}", number)

    def parts(self, decoder: Decoder, names: Iterable[str], published: Iterable[str]) -> list[Part]:
        """Where to find each of our parameters `names` in a file that holds `published`."""
        published = set(published)
        anchor = next(theirs for theirs, ours in self.table if ours == "embed_tokens.weight")
        prefix = next((p for p in self.prefixes if p + anchor in published), self.prefixes[0])
        by_ours = self._by_ours()
        parts = []
        for ours in names:
            pattern, number = _split(ours)
            theirs = prefix + by_ours[pattern].replace("{i}", number)
            rows = _fused_rows(decoder, ours) if "qkv_proj" in theirs else None
            parts.append(Part(theirs, ours, self.plus_one and "norm" in ours, rows))
        return parts

    def ignores(self, theirs: str) -> bool:
        """Whether a published tensor may be left unread: a copy of the tied head, an image tower, a buffer."""
        return any(re.fullmatch(pattern, theirs) for pattern in self.ignored)

    def _by_ours(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.table}


def _split(ours: str) -> tuple[str, str]:
    found = _NUMBER.search(ours)
    return (_NUMBER.sub("{i}", ours, count=1), found.group()) if found else (ours, "")


def _fused_rows(decoder: Decoder, ours: str) -> tuple[int, int]:
    q, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    starts = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    return starts[ours.split(".")[-2]]


_LAYER = "layers.{i}."
_MATRICES = tuple(
    (_LAYER + leaf, _LAYER + leaf)
    for leaf in (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    )
)
_ENDS = (("embed_tokens.weight", "embed_tokens.weight"), ("norm.weight", "norm.weight"))
_FOUR_NORMS = tuple(
    (_LAYER + leaf, _LAYER + leaf)
    for leaf in (
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "pre_feedforward_layernorm.weight",
        "post_feedforward_layernorm.weight",
    )
)
_QK_NORMS = tuple((_LAYER + leaf, _LAYER + leaf) for leaf in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"))
_GEMMA1_NORMS = (
    (_LAYER + "input_layernorm.weight", _LAYER + "input_layernorm.weight"),
    (_LAYER + "post_attention_layernorm.weight", _LAYER + "pre_feedforward_layernorm.weight"),  # sic: before the MLP
)
# causal LM; the text part of published image-and-text checkpoints, old and new; a bare model
_HF_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_HF_IGNORED = (
    r"(model\.)?vision_tower\..*",
    r"(model\.)?multi_modal_projector\..*",
    r".*\.rotary_emb\.inv_freq",
)

HF_GEMMA1 = NameMap("safetensors", _ENDS + _GEMMA1_NORMS + _MATRICES, prefixes=_HF_PREFIXES, ignored=_HF_IGNORED)
HF_GEMMA2 = NameMap("safetensors", _ENDS + _FOUR_NORMS + _MATRICES, prefixes=_HF_PREFIXES, ignored=_HF_IGNORED)
HF_GEMMA3 = NameMap(
    "safetensors", _ENDS + _FOUR_NORMS + _QK_NORMS + _MATRICES, prefixes=_HF_PREFIXES, ignored=_HF_IGNORED
)

_GGUF_ENDS = (("token_embd.weight", "embed_tokens.weight"), ("output_norm.weight", "norm.weight"))
_GGUF_MATRICES = tuple(
    (f"blk.{{i}}.{theirs}.weight", f"{_LAYER}{ours}.weight")
    for theirs, ours in (
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
    )
)
_GGUF_POST_NORMS = tuple(
    (f"blk.{{i}}.{theirs}.weight", f"{_LAYER}{ours}.weight")
    for theirs, ours in (
        ("post_attention_norm", "post_attention_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )
)
_GGUF_QK_NORMS = tuple(
    (f"blk.{{i}}.{theirs}.weight", f"{_LAYER}{ours}.weight")
    for theirs, ours in (("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"))
)
_GGUF_IGNORED = (r"rope_freqs\.weight",)

GGUF_GEMMA1 = NameMap("gguf", _GGUF_ENDS + _GGUF_MATRICES, plus_one=True, ignored=_GGUF_IGNORED)
GGUF_GEMMA2 = NameMap("gguf", _GGUF_ENDS + _GGUF_MATRICES + _GGUF_POST_NORMS, plus_one=True, ignored=_GGUF_IGNORED)
GGUF_GEMMA3 = NameMap(
    "gguf",
    _GGUF_ENDS + _GGUF_MATRICES + _GGUF_POST_NORMS + _GGUF_QK_NORMS,
    plus_one=True,
    ignored=_GGUF_IGNORED,
)

_GP_ENDS = (("embedder.weight", "embed_tokens.weight"), ("model.norm.weight", "norm.weight"))
_GP_IGNORED = (r"(local_|global_)?freqs_cis", r"siglip_vision_model\..*", r"mm_.*")


def _gemma_pytorch(norms: tuple[tuple[str, str], ...]) -> NameMap:
    table = [(f"model.{theirs}", ours) for theirs, ours in norms + _MATRICES]
    renamed = [
        (re.sub("[qkv]_proj", "qkv_proj", theirs).replace("q_norm", "query_norm").replace("k_norm", "key_norm"), ours)
        for theirs, ours in table
    ]
    return NameMap("ckpt", _GP_ENDS + tuple(renamed), ignored=_GP_IGNORED)


GEMMA_PYTORCH_GEMMA1 = _gemma_pytorch(_GEMMA1_NORMS)
GEMMA_PYTORCH_GEMMA2 = _gemma_pytorch(_FOUR_NORMS)
GEMMA_PYTORCH_GEMMA3 = _gemma_pytorch(_FOUR_NORMS + _QK_NORMS)

_MAPS = {
    "safetensors": (HF_GEMMA1, HF_GEMMA2, HF_GEMMA3),
    "gguf": (GGUF_GEMMA1, GGUF_GEMMA2, GGUF_GEMMA3),
    "ckpt": (GEMMA_PYTORCH_GEMMA1, GEMMA_PYTORCH_GEMMA2, GEMMA_PYTORCH_GEMMA3),
}


def name_map(format: Format, decoder: Decoder) -> NameMap:
    """The table for a decoder in a format, chosen by what the decoder has."""
    return _MAPS[format][2 if decoder.qk_norm else 1 if decoder.post_norms else 0]
