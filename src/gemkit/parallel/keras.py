"""Layout maps of Keras, in its paths and its order of axes, as layouts of ours; and the two that were published.

A path of Keras names a variable (`decoder_block_0/attention/query/kernel`), whose axes are those of an einsum: heads
and their size apart, inputs before outputs. Our weights are (out, in), with heads and their size in one dimension.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemkit.errors import ConfigError, nearest
from gemkit.family import DecoderConfig, Modality, parameters
from gemkit.parallel.layout import Layout, Rule, Shard, Unit
from gemkit.parallel.mesh import AXES

Axes = Sequence[str | None]
_Dims = tuple[tuple[int, Unit] | None, ...]

MAPS: dict[str, dict[str, Axes]] = {
    # Announcement of Gemma in Keras, February 2024: the residual axis of every weight is divided
    "announcement": {
        "token_embedding/embeddings": (None, "model"),
        "decoder_block.*attention.*(query|key|value).*kernel": (None, "model", None),
        "decoder_block.*attention_output.*kernel": (None, None, "model"),
        "decoder_block.*ffw_gating.*kernel": ("model", None),
        "decoder_block.*ffw_linear.*kernel": (None, "model"),
    },
    # keras-hub 0.32, `GemmaBackbone.get_layout_map`: heads and feed-forward along "model", the residual axis along the
    # axis of the data, as ZeRO-3 does; it says that Gemma's own training was like this
    "keras-hub": {
        "token_embedding/embeddings": ("model", "batch"),
        "decoder_block.*attention.*(query|key|value).kernel": ("model", "batch", None),
        "decoder_block.*attention_output.kernel": ("model", None, "batch"),
        "decoder_block.*ffw_gating.kernel": ("batch", "model"),
        "decoder_block.*ffw_gating_2.kernel": ("batch", "model"),
        "decoder_block.*ffw_linear.kernel": ("model", "batch"),
    },
}


@dataclass(frozen=True)
class _Variable:
    """A variable of Keras for a weight of ours; `dims` has, of each of its axes, our dimension and unit, or None where
    a division of the axis is none of consecutive parts here."""

    path: str
    dims: _Dims


_INTO_HEADS: _Dims = ((0, "heads"), (1, "elements"), None)  # (heads, in, size of a head)
_OUT_OF_HEADS: _Dims = ((1, "heads"), None, (0, "elements"))  # (heads, size of a head, out)
_MATRIX: _Dims = ((1, "elements"), (0, "elements"))  # (in, out)
_VECTOR: _Dims = ((0, "elements"),)
_VARIABLES = {  # within a layer
    "input_layernorm.weight": _Variable("pre_attention_norm/scale", _VECTOR),
    "self_attn.q_proj.weight": _Variable("attention/query/kernel", _INTO_HEADS),
    "self_attn.k_proj.weight": _Variable("attention/key/kernel", _INTO_HEADS),
    "self_attn.v_proj.weight": _Variable("attention/value/kernel", _INTO_HEADS),
    "self_attn.q_norm.weight": _Variable("attention/query_norm/scale", _VECTOR),
    "self_attn.k_norm.weight": _Variable("attention/key_norm/scale", _VECTOR),
    "self_attn.o_proj.weight": _Variable("attention/attention_output/kernel", _OUT_OF_HEADS),
    "post_attention_layernorm.weight": _Variable("post_attention_norm/scale", _VECTOR),
    "pre_feedforward_layernorm.weight": _Variable("pre_ffw_norm/scale", _VECTOR),
    "mlp.gate_proj.weight": _Variable("ffw_gating/kernel", _MATRIX),
    "mlp.up_proj.weight": _Variable("ffw_gating_2/kernel", _MATRIX),
    "mlp.down_proj.weight": _Variable("ffw_linear/kernel", _MATRIX),
    "post_feedforward_layernorm.weight": _Variable("post_ffw_norm/scale", _VECTOR),
}
_OUTSIDE = {
    "embed_tokens.weight": _Variable("token_embedding/embeddings", ((0, "elements"), (1, "elements"))),
    "norm.weight": _Variable("final_normalization/scale", _VECTOR),
}


def from_keras(layout_map: Mapping[str, Axes], decoder: DecoderConfig, vision: Modality | None = None) -> Layout:
    """The layout that a `keras.distribution.LayoutMap` says of this member.

    A path takes the key that equals it, else the one key that matches the whole of it as a regular expression; without
    any it is whole on every device. The axis "data" is our "batch". Recurrent layers and image towers have no names in
    these maps, so that their weights have no rule.

    Args:
        layout_map: regular expressions on Keras' paths, and of each axis of the variable a mesh axis or None.

    Raises:
        ConfigError: for a key that matches no path, a path that several keys match (Keras refuses it too), more axes
            than a variable has, and a division of the inside of every head.
    """
    variables = {}
    for name, _ in parameters(decoder, vision):
        if (variable := _variable(name)) is not None:
            variables[name] = variable
    used: set[str] = set()
    rules: dict[str, Rule] = {}
    for name, variable in variables.items():
        keys = [variable.path] if variable.path in layout_map else _matching(layout_map, variable.path)
        if len(keys) > 1:
            raise ConfigError(f"Keras path {variable.path!r} matches several keys of the map: {', '.join(keys)}")
        used.update(keys)
        shards = tuple(_shards(layout_map[keys[0]], keys[0], variable)) if keys else ()
        rules[f"^{re.escape(name)}$"] = shards or None
    if unused := [key for key in layout_map if key not in used]:
        paths = [variable.path for variable in variables.values()]
        raise ConfigError(
            f"key {unused[0]!r} of the Keras map matches no path of this model as a whole; " + nearest(unused[0], paths)
        )
    return Layout(_for_all_layers(rules))


def _variable(name: str) -> _Variable | None:
    inside = name.removeprefix("language_model.")
    if inside in _OUTSIDE:
        return _OUTSIDE[inside]
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", inside)
    if layer is None or (found := _VARIABLES.get(layer[2])) is None:
        return None
    return _Variable(f"decoder_block_{layer[1]}/{found.path}", found.dims)


def _matching(layout_map: Mapping[str, Axes], path: str) -> list[str]:
    try:
        return [key for key in layout_map if re.fullmatch(key, path)]
    except re.error as error:
        raise ConfigError(f"a key of the Keras map is no regular expression: {error}") from error


def _shards(axes: Axes, key: str, variable: _Variable):
    if len(axes) > len(variable.dims):
        raise ConfigError(
            f"key {key!r} of the Keras map has {len(axes)} axes, and {variable.path} has {len(variable.dims)}"
        )
    for axis, dim in zip(axes, variable.dims, strict=False):  # the axes left out are not divided
        if axis is None:
            continue
        ours = "batch" if axis == "data" else axis
        if ours not in AXES:
            raise ConfigError(f"axis {axis!r} of key {key!r} of the Keras map is not one of data, {', '.join(AXES)}")
        if dim is None:
            raise ConfigError(
                f"key {key!r} of the Keras map divides the inside of every head of {variable.path}, which is no "
                "consecutive part of our weight; divide the heads"
            )
        yield Shard(dim[0], ours, dim[1])


def _for_all_layers(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """One rule for what is the same in every layer."""
    kinds: dict[str, list[str]] = {}
    for pattern in rules:
        kinds.setdefault(re.sub(r"layers\\\.\d+\\\.", r"layers\\.\\d+\\.", pattern), []).append(pattern)
    found: dict[str, Rule] = {}
    for kind, patterns in kinds.items():
        same = all(rules[pattern] == rules[patterns[0]] for pattern in patterns)
        found.update({kind: rules[patterns[0]]} if same else {pattern: rules[pattern] for pattern in patterns})
    return found
