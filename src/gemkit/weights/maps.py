"""The names that published checkpoints give to our parameters: one table a format, read in both directions.

Ours are the names of the published Hugging Face checkpoints of Gemma 2 and 3 without their leading `model.`. What a
format stores differently stands beside the name as a `Layout`: GGUF norms are `1 + w`, google/gemma_pytorch keeps q, k
and v as the rows of one matrix, google-deepmind/recurrentgemma turns some matrices and pairs others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from gemkit.family import Attention, DecoderConfig, Modality
from gemkit.weights.formats.base import Format

if TYPE_CHECKING:
    from torch import Tensor

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_TOWER, _PROJECTOR, _DECODER = "vision_tower.", "multi_modal_projector.", "language_model."
_HEAD = "lm_head"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a file stores one of our parameters."""

    shape: Shape  # of the tensor in the file
    rows: tuple[int, int] | None = None  # only these of its first axis are the parameter
    transposed: bool = False  # the last two axes are in the other order
    plus_one: bool = False  # it is 1 + w


@dataclass(frozen=True)
class Part:
    """Where one of our parameters is in a file, and how."""

    file_name: str
    param_name: str
    shape: Shape  # of the parameter
    layout: Layout

    @property
    def plain(self) -> bool:
        """Whether the file stores the parameter as it is."""
        return self.layout == Layout(self.shape)

    def take(self, stored: Tensor) -> Tensor:
        """The parameter, from the file's tensor."""
        if self.layout.rows is not None:
            stored = stored[self.layout.rows[0] : self.layout.rows[1]].clone()
        if self.layout.transposed:
            stored = stored.transpose(-1, -2).contiguous()
        stored = stored.reshape(self.shape)
        return stored.float() - 1.0 if self.layout.plus_one else stored

    def give(self, value: Tensor) -> Tensor:
        """The file's tensor, or the rows `layout.rows` of it, from the parameter: the inverse of `take`.

        The 1 of `1 + w` is added in float32. A parameter that `take` has given comes back to the same bits, since it is
        a whole number of steps of the sum; one from elsewhere loses what is smaller than 2**-24.
        """
        if self.layout.plus_one:
            value = value.float() + 1.0
        rows = self.layout.rows
        shape = self.layout.shape if rows is None else (rows[1] - rows[0], *self.layout.shape[1:])
        if self.layout.transposed:
            value = value.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        return value.reshape(shape).contiguous()


def by_file_name(parts: Iterable[Part]) -> dict[str, list[Part]]:
    """The parts of each tensor of a file, by the order of their rows: one, or those that the file has fused."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.file_name, []).append(part)
    return {name: sorted(sharing, key=lambda part: part.layout.rows or (0, 0)) for name, sharing in found.items()}


# The layout of a parameter, from its name, its shape and the architecture.
Stored = Callable[[str, Shape, DecoderConfig], Layout]


def _as_it_is(ours: str, shape: Shape, decoder: DecoderConfig) -> Layout:
    return Layout(shape)


@dataclass(frozen=True)
class Submodel:
    """A submodel, such as an image tower, and the prefixes of its parameters' names."""

    prefix: str = ""  # of our names
    file_prefixes: tuple[str, ...] = ("",)  # of published names: one of them; the first is what we write
    anchor: str = "embed_tokens.weight"  # the parameter whose published name tells which it is, without `prefix`
    modules: str | None = None  # what Transformers' modules begin with, where its files do not: adapters go by these


@dataclass(frozen=True)
class NameMap:
    """A table of (published name within its submodel, our name) with `{i}` for the layer number."""

    format: Format
    table: tuple[tuple[str, str], ...]
    stored: Mapping[str, Stored] = field(default_factory=dict)  # our names, or their ends, that are not stored as is
    submodels: tuple[Submodel, ...] = (Submodel(),)
    ignored: tuple[str, ...] = ()  # regular expressions of published tensors that carry nothing for us

    def file_name(self, ours: str) -> str:
        """The published name of one of our parameters, in the layout that we write.

        Raises:
            KeyError: if the format has no such parameter.
        """
        return self._submodel(ours).file_prefixes[0] + self.within(ours)

    def module(self, ours: str) -> str:
        """Transformers' name of one of our modules with a weight, which adapters are stored under.

        Raises:
            KeyError: if the format has no such module.
        """
        return self.modules(ours)[0]

    def modules(self, ours: str) -> tuple[str, ...]:
        """Names that Transformers has given to one of our modules with a weight, today's first."""
        return tuple(name.removesuffix(".weight") for name in self.params(ours + ".weight"))

    def params(self, ours: str) -> tuple[str, ...]:
        """Names that the parameters of Transformers' modules have had for one of ours, today's first; the head, which
        has none of its own, included.

        Raises:
            KeyError: if the format has no such parameter.
        """
        if ours.removeprefix(_DECODER) == f"{_HEAD}.weight":
            return (f"{_HEAD}.weight", f"{_DECODER}{_HEAD}.weight")
        submodel, within = self._submodel(ours), self.within(ours)
        beginnings = submodel.file_prefixes if submodel.modules is None else (submodel.modules, *submodel.file_prefixes)
        return tuple(dict.fromkeys(beginning + within for beginning in beginnings))

    def within(self, ours: str) -> str:
        """The published name of one of our parameters within its submodel.

        Raises:
            KeyError: if the format has no such parameter.
        """
        pattern, number = _split(ours)
        return self._by_ours[pattern].replace("{i}", number)

    def parts(self, decoder: DecoderConfig, shapes: Mapping[str, Shape], published: Iterable[str] = ()) -> list[Part]:
        """Where to find each of our parameters in a file that holds `published`; without them, where we write it.

        Args:
            shapes: the parameters, by name.

        Raises:
            KeyError: if the format has no such parameter.
        """
        published = set(published)
        prefixes = {}
        for submodel in self.submodels:
            anchor = self.within(submodel.prefix + submodel.anchor)
            prefixes[submodel] = next(
                (p for p in submodel.file_prefixes if p + anchor in published), submodel.file_prefixes[0]
            )
        parts = []
        for ours, shape in shapes.items():
            theirs = prefixes[self._submodel(ours)] + self.within(ours)
            stored = next((how for end, how in self.stored.items() if ours.endswith(end)), _as_it_is)
            parts.append(Part(theirs, ours, shape, stored(ours, shape, decoder)))
        return parts

    def ignores(self, theirs: str) -> bool:
        """Whether a published tensor may be left unread: a copy of the tied head, an image tower, a buffer."""
        return any(re.fullmatch(pattern, theirs) for pattern in self.ignored)

    def _submodel(self, ours: str) -> Submodel:
        found = next((submodel for submodel in self.submodels if ours.startswith(submodel.prefix)), None)
        if found is None:
            raise KeyError(ours)
        return found

    @cached_property
    def _by_ours(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.table}


def _split(ours: str) -> tuple[str, str]:
    found = _NUMBER.search(ours)
    return (_NUMBER.sub("{i}", ours, count=1), found.group()) if found else (ours, "")


_LAYER = "layers.{i}."
_WEIGHT, _BIAS = ("weight",), ("weight", "bias")
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
_HF_TEXT = (Submodel(file_prefixes=("model.", "language_model.model.", "model.language_model.", "", "model.model.")),)
_HF_IGNORED = (
    r"(model\.)?vision_tower\..*",
    r"(model\.)?multi_modal_projector\..*",
    r".*\.rotary_emb\.inv_freq",
)

HF_GEMMA1 = NameMap("safetensors", _ENDS + _GEMMA1_NORMS + _MATRICES, submodels=_HF_TEXT, ignored=_HF_IGNORED)
HF_GEMMA2 = NameMap("safetensors", _ENDS + _FOUR_NORMS + _MATRICES, submodels=_HF_TEXT, ignored=_HF_IGNORED)
HF_GEMMA3 = NameMap("safetensors", _ENDS + _FOUR_NORMS + _QK_NORMS + _MATRICES, submodels=_HF_TEXT, ignored=_HF_IGNORED)


def _hf_paligemma(text: NameMap) -> NameMap:
    """The tower, the projection and a decoder of that table, under the names of the released files, of files that
    newer versions of Transformers write, and of those that keep their modules' own names."""
    modules = {
        "": ("embeddings.patch_embedding.{p}", "post_layernorm.{p}"),
        "encoder.layers.{i}.": ("layer_norm1.{p}", "layer_norm2.{p}", "mlp.fc1.{p}", "mlp.fc2.{p}"),
        "encoder.layers.{i}.self_attn.": ("q_proj.{p}", "k_proj.{p}", "v_proj.{p}", "out_proj.{p}"),
    }
    tower = [path + name.replace("{p}", p) for path, names in modules.items() for name in names for p in _BIAS]
    tower.append("embeddings.position_embedding.weight")
    return NameMap(
        "safetensors",
        (
            *((name, _TOWER + name) for name in tower),
            *((f"linear.{p}", f"{_PROJECTOR}linear.{p}") for p in _BIAS),
            *((theirs, _DECODER + ours) for theirs, ours in text.table),
        ),
        submodels=(
            Submodel(
                _TOWER,
                (_TOWER + "vision_model.", _TOWER, f"model.{_TOWER}", f"model.{_TOWER}vision_model."),
                "embeddings.patch_embedding.weight",
                modules=f"model.{_TOWER}",
            ),
            Submodel(_PROJECTOR, (_PROJECTOR, f"model.{_PROJECTOR}"), "linear.weight", modules=f"model.{_PROJECTOR}"),
            Submodel(_DECODER, (_DECODER + "model.", f"model.{_DECODER}"), modules=f"model.{_DECODER}"),
        ),
        ignored=(
            r"(model\.)?vision_tower\.(vision_model\.)?head\..*",  # pools an image to one vector, which nothing reads
            r".*\.position_ids",
            r".*\.rotary_emb\.inv_freq",
        ),
    )


HF_PALIGEMMA1, HF_PALIGEMMA2 = _hf_paligemma(HF_GEMMA1), _hf_paligemma(HF_GEMMA2)

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
_GGUF_IGNORED = (r"(v|mm)\..*",)  # the image tower in the same file, as Ollama keeps it


def _plus_one(ours: str, shape: Shape, decoder: DecoderConfig) -> Layout:
    return Layout(shape, plus_one=True)


_GGUF_STORED = {"norm.weight": _plus_one}
GGUF_GEMMA1 = NameMap("gguf", _GGUF_ENDS + _GGUF_MATRICES, stored=_GGUF_STORED, ignored=_GGUF_IGNORED)
GGUF_GEMMA2 = NameMap(
    "gguf", _GGUF_ENDS + _GGUF_MATRICES + _GGUF_POST_NORMS, stored=_GGUF_STORED, ignored=_GGUF_IGNORED
)
GGUF_GEMMA3 = NameMap(
    "gguf",
    _GGUF_ENDS + _GGUF_MATRICES + _GGUF_POST_NORMS + _GGUF_QK_NORMS,
    stored=_GGUF_STORED,
    ignored=_GGUF_IGNORED,
)

_GP_ENDS = (("embedder.weight", "embed_tokens.weight"), ("model.norm.weight", "norm.weight"))
_GP_IGNORED = (r"(local_|global_)?freqs_cis", r"siglip_vision_model\..*", r"mm_.*")


def _fused_rows(ours: str, shape: Shape, decoder: DecoderConfig) -> Layout:
    mixer = decoder.layers[int(ours.split(".")[1])].mixer
    assert isinstance(mixer, Attention)
    q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    rows = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    return Layout((q + 2 * kv, decoder.width), rows[ours.split(".")[-2]])


def _gemma_pytorch(norms: tuple[tuple[str, str], ...]) -> NameMap:
    table = [(f"model.{theirs}", ours) for theirs, ours in norms + _MATRICES]
    renamed = [
        (re.sub("[qkv]_proj", "qkv_proj", theirs).replace("q_norm", "query_norm").replace("k_norm", "key_norm"), ours)
        for theirs, ours in table
    ]
    stored = {f"{name}_proj.weight": _fused_rows for name in "qkv"}
    return NameMap("ckpt", _GP_ENDS + tuple(renamed), stored=stored, ignored=_GP_IGNORED)


GEMMA_PYTORCH_GEMMA1 = _gemma_pytorch(_GEMMA1_NORMS)
GEMMA_PYTORCH_GEMMA2 = _gemma_pytorch(_FOUR_NORMS)
GEMMA_PYTORCH_GEMMA3 = _gemma_pytorch(_FOUR_NORMS + _QK_NORMS)

# RecurrentGemma has names of its own in Hugging Face's layout, and others in google-deepmind/recurrentgemma's .pt file.
_GRIFFIN_NORMS = (
    ("temporal_pre_norm", "input_layernorm"),
    ("channel_pre_norm", "pre_feedforward_layernorm"),
)


def _hf_taps(ours: str, shape: Shape, decoder: DecoderConfig) -> Layout:
    width, taps = shape
    return Layout((width, 1, taps))  # as torch.nn.Conv1d has it


def _griffin(path: str, modules: tuple[tuple[str, str, tuple[str, ...]], ...]) -> tuple[tuple[str, str], ...]:
    """Rows of a table from (their module, our module, parameters of both)."""
    return tuple(
        (f"{path}{theirs}.{leaf}", f"{_LAYER}{ours}.{leaf}") for theirs, ours, leaves in modules for leaf in leaves
    )


_HF_GATES = tuple(
    (f"{_LAYER}temporal_block.rg_lru.{gate}_{leaf}", f"{_LAYER}recurrent.rg_lru.{gate}.{leaf}")
    for gate in ("input_gate", "recurrent_gate")
    for leaf in _BIAS
)
HF_GRIFFIN = NameMap(
    "safetensors",
    (
        ("embed_tokens.weight", "embed_tokens.weight"),
        ("final_norm.weight", "norm.weight"),
        *_griffin(_LAYER, tuple((theirs, ours, _WEIGHT) for theirs, ours in _GRIFFIN_NORMS)),
        *_griffin(_LAYER, tuple((f"mlp_block.{m}", f"mlp.{m}", _BIAS) for m in ("gate_proj", "up_proj", "down_proj"))),
        *_griffin(
            _LAYER + "temporal_block.",
            (
                *((f"{m}_proj", f"self_attn.{m}_proj", _WEIGHT) for m in "qkv"),
                ("o_proj", "self_attn.o_proj", _BIAS),
                *((m, f"recurrent.{m}", _BIAS) for m in ("linear_x", "linear_y", "conv_1d", "linear_out")),
                ("rg_lru", "recurrent.rg_lru", ("recurrent_param",)),
            ),
        ),
        *_HF_GATES,
    ),
    stored={"conv_1d.weight": _hf_taps},
    submodels=(Submodel(file_prefixes=("model.", "")),),
)


def _transposed(ours: str, shape: Shape, decoder: DecoderConfig) -> Layout:
    return Layout(shape[::-1], transposed=True)


def _of_pair(ours: str, shape: Shape, decoder: DecoderConfig) -> Layout:
    """The gated branch is first of two; a matrix is (in, out), a bias has axes for a batch and a sequence."""
    first = int("up_proj" in ours)
    whole = (2, *shape[::-1]) if len(shape) == 2 else (2, 1, 1, *shape)
    return Layout(whole, (first, first + 1), transposed=len(shape) == 2)


_BLOCK = "blocks.{i}."
_DM_RECURRENT = _BLOCK + "recurrent_block."
DEEPMIND_GRIFFIN = NameMap(
    "ckpt",
    (
        ("embedder.input_embedding", "embed_tokens.weight"),
        ("final_norm.scale", "norm.weight"),
        *((f"{_BLOCK}{theirs}.scale", f"{_LAYER}{ours}.weight") for theirs, ours in _GRIFFIN_NORMS),
        *(
            (f"{_BLOCK}mlp_block.ffw_up.{leaf[0]}", f"{_LAYER}mlp.{branch}.{leaf}")
            for leaf in _BIAS
            for branch in ("gate_proj", "up_proj")
        ),
        *_griffin(_BLOCK + "mlp_block.", (("ffw_down", "mlp.down_proj", _BIAS),)),
        *_griffin(
            _BLOCK + "attention_block.",
            (
                *((f"proj_{m}", f"self_attn.{m}_proj", _WEIGHT) for m in "qkv"),
                ("proj_final", "self_attn.o_proj", _BIAS),
            ),
        ),
        *_griffin(_DM_RECURRENT, tuple((m, f"recurrent.{m}", _BIAS) for m in ("linear_x", "linear_y", "linear_out"))),
        (_DM_RECURRENT + "rg_lru.a_param", _LAYER + "recurrent.rg_lru.recurrent_param"),
        *(
            (f"{_DM_RECURRENT}{theirs}.{leaf[0]}", f"{_LAYER}recurrent.{ours}.{leaf}")
            for theirs, ours in (
                ("conv_1d", "conv_1d"),
                ("rg_lru.input_gate", "rg_lru.input_gate"),
                ("rg_lru.a_gate", "rg_lru.recurrent_gate"),
            )
            for leaf in _BIAS
        ),
    ),
    stored={
        "conv_1d.weight": _transposed,
        **{f"{branch}_proj.{leaf}": _of_pair for branch in ("gate", "up") for leaf in _BIAS},
    },
)

_MAPS: dict[Format, tuple[NameMap, ...]] = {
    "safetensors": (HF_GEMMA1, HF_GEMMA2, HF_GEMMA3, HF_GRIFFIN),
    "gguf": (GGUF_GEMMA1, GGUF_GEMMA2, GGUF_GEMMA3, GGUF_GEMMA1),  # no GGUF names a recurrence: those have no name
    "ckpt": (GEMMA_PYTORCH_GEMMA1, GEMMA_PYTORCH_GEMMA2, GEMMA_PYTORCH_GEMMA3, DEEPMIND_GRIFFIN),
}


def name_map(format: Format, decoder: DecoderConfig, vision: Modality | None = None) -> NameMap:
    """The table for a model in a format, chosen by what it has. Only one format has names for an image tower."""
    if vision is not None and format == "safetensors":
        return HF_PALIGEMMA2 if decoder.post_norms else HF_PALIGEMMA1
    if decoder.recurrent:
        return _MAPS[format][3]
    qk_norm = any(mixer.qk_norm for mixer in decoder.attention)
    return _MAPS[format][2 if qk_norm else 1 if decoder.post_norms else 0]
