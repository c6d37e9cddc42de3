"""Rotary embeddings as Hugging Face's `config.json` describes them <-> `family` data.

The keys have changed over the years, and a file may hold several generations of them. They mean what Transformers 5.23
makes of them: in Gemma 3 `rope_scaling` changes the global layers on top of a nested `rope_parameters`; elsewhere it
takes the place of `rope_parameters`. Source: `convert_rope_params_to_dict` of modeling_rope_utils.py and of
models/gemma3/configuration_gemma3.py.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from gemkit.errors import ConfigError
from gemkit.family import DecoderConfig, Rope, Yarn
from gemkit.weights.config_keys import Keys

_FULL, _SLIDING = "full_attention", "sliding_attention"
# keys of the settings of a rope that are read, beside its form and base
_FORMS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}


def ropes_from_hf(kind: str, keys: Keys) -> dict[str, Rope]:
    """The rope of each layer type; keys that have no say are noted in `keys`.

    Raises:
        ConfigError: for a form that is not implemented, or settings that Transformers cannot read.
        WeightsError: for a value of the wrong type.
    """
    if kind == "gemma3_text":
        return _nested(keys)
    rope = flat_rope(keys)
    return {_FULL: rope, _SLIDING: rope}


def flat_rope(keys: Keys, forms: Container[str] = _FORMS, fraction: float = 1.0) -> Rope:
    """The one rope of all layers: `rope_scaling`, or else `rope_parameters`, and the keys beside them.

    Args:
        forms: values of rope_type that the model type has.
        fraction: share of a head that is rotated, where no key says it.

    Raises as `ropes_from_hf`.
    """
    name = "rope_scaling" if keys.section("rope_scaling") else "rope_parameters"
    given = dict(keys.section(name) or {})
    if name == "rope_scaling" and (dropped := keys.section("rope_parameters")):
        keys.note("rope_parameters", f"{dict(dropped)} gives way to rope_scaling")
    if nested := sorted({_FULL, _SLIDING} & given.keys()):
        raise ConfigError(f"{keys.where}: {name} has a {nested[0]}; all layers of this model type share one rope")
    given.setdefault("rope_theta", keys.number("rope_theta", 10_000.0))
    given.setdefault("rope_type", given.pop("type", "default"))
    given.setdefault("partial_rotary_factor", keys.number("partial_rotary_factor", fraction))
    if given["rope_type"] == "yarn" and keys.get("original_max_position_embeddings") is not None:
        given["original_max_position_embeddings"] = keys.get("original_max_position_embeddings")
    return _rope(Keys(given, f"{keys.where}: {name}", keys.notes), keys, given, forms, whole=fraction == 1)


def _nested(keys: Keys) -> dict[str, Rope]:
    """A rope for each layer type of Gemma 3. Keys of a flat `rope_parameters` have no say."""
    given = keys.section("rope_parameters")
    beside = {name: value for name, value in (given or {}).items() if name not in (_FULL, _SLIDING)}
    full, sliding = (dict(Keys(given or {}, keys.where).section(name) or {}) for name in (_FULL, _SLIDING))
    if scaling := keys.section("rope_scaling"):
        if given is not None and _FULL not in given:
            raise ConfigError(f"{keys.where}: rope_scaling beside a rope_parameters without {_FULL}: keep one of them")
        full |= {"rope_type": full.get("rope_type", "default"), **scaling}
    full.setdefault("rope_theta", keys.number("rope_theta", 1_000_000.0))
    sliding.setdefault("rope_theta", keys.number("rope_local_base_freq", 10_000.0))
    for settings in (full, sliding):
        older = settings.pop("type", "default")
        if settings.setdefault("rope_type", older) == "default" and older != "default":
            keys.note("rope_scaling", f"its type {older!r} has no say: Transformers 5 reads rope_type in Gemma 3")
            settings.pop("factor", None)
    unread = {name: value for name, value in beside.items() if name != "truncate" and value is not None}
    plain = {"rope_type": "default", "type": "default", "rope_theta": full["rope_theta"]}
    if any(value != plain.get(name) for name, value in unread.items()):
        keys.note(
            "rope_parameters",
            f"{beside} has no say in Gemma 3, whose layer types have a rope each: the global layers have base "
            f"{full['rope_theta']:,.0f}, {full['rope_type']}",
        )
    return {
        layer_type: _rope(Keys(settings, f"{keys.where}: rope of {layer_type}", keys.notes), keys, beside)
        for layer_type, settings in ((_FULL, full), (_SLIDING, sliding))
    }


def _rope(
    given: Keys, config: Keys, beside: Mapping[str, Any], forms: Container[str] = _FORMS, whole: bool = True
) -> Rope:
    """A rope from its own settings; `beside` are those of `rope_parameters` as a whole."""
    form = given.get("rope_type")
    if form not in _FORMS or form not in forms:
        known = ", ".join(name for name in _FORMS if name in forms)
        raise ConfigError(f"{given.where}: rope_type={form!r} is not implemented; known: {known}")
    fraction = given.number("partial_rotary_factor", 1.0)
    if whole and fraction != 1:
        raise ConfigError(
            f"{given.where}: partial_rotary_factor={fraction:g}: heads of this model type are rotated whole"
        )
    known = _FORMS[form] | {"rope_type", "rope_theta", "partial_rotary_factor"}
    for name in sorted(given.keys() - known):
        given.note(name, f"{given.get(name)!r} means nothing to rope_type {form!r}")
    rope = Rope(base=given.number("rope_theta"), fraction=fraction)
    max_context = config.whole("max_position_embeddings")
    match form:
        case "linear":
            return replace(rope, factor=given.number("factor"))
        case "dynamic":
            return replace(rope, dynamic=given.number("factor"))
        case "yarn":
            context = given.whole("original_max_position_embeddings", max_context)
            factor = given.number("factor", max_context / context)
            yarn = Yarn(
                context,
                _attention_factor(given, factor),
                beta_fast=given.number("beta_fast", 0.0) or 32.0,
                beta_slow=given.number("beta_slow", 0.0) or 1.0,
                truncate=beside.get("truncate", True) is True,  # of the whole even where ropes are nested
            )
            return replace(rope, factor=factor, yarn=yarn)
    return rope


def _attention_factor(given: Keys, factor: float) -> float:
    """YaRN's factor of rotated queries and keys: as given, or 0.1 ln(factor) + 1 (arXiv:2309.00071, equation 22)."""
    stated = given.optional_number("attention_factor")
    if stated is not None:
        return stated
    mscale, over_all = given.number("mscale", 0.0), given.number("mscale_all_dim", 0.0)
    if mscale and over_all:
        return yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, over_all)
    return yarn_attention_factor(factor)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """`0.1 * mscale * ln(factor) + 1`; 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """The settings of a rope, as Transformers 5 writes them."""
    base = {"rope_theta": rope.base}
    if rope.fraction != 1:
        base["partial_rotary_factor"] = rope.fraction
    if rope.dynamic is not None:
        return {**base, "rope_type": "dynamic", "factor": rope.dynamic}
    if (yarn := rope.yarn) is not None:
        return {
            **base,
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": yarn.context,
            "attention_factor": yarn.attention_factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
    if rope.factor != 1:
        return {**base, "rope_type": "linear", "factor": rope.factor}
    return {**base, "rope_type": "default"}


def rope_keys(kind: str, decoder: DecoderConfig) -> dict[str, Any]:
    """The keys of a decoder's ropes, in the present form and, where that can say it, in the older one beside it."""
    first = decoder.attention[0].rope
    full = next((mixer.rope for mixer in decoder.attention if mixer.window is None), first)
    local = next((mixer.rope for mixer in decoder.attention if mixer.window is not None), full)
    keys: dict[str, Any] = {"rope_theta": full.base}
    if kind != "gemma3_text":
        settings = rope_to_hf(full)
        return keys | {"rope_parameters": settings | _truncation(full, local)}
    stretched = {name: value for name, value in rope_to_hf(full).items() if name != "rope_theta"}
    keys["rope_local_base_freq"] = local.base
    keys["rope_scaling"] = None if stretched == {"rope_type": "default"} else stretched
    keys["rope_parameters"] = {_FULL: rope_to_hf(full), _SLIDING: rope_to_hf(local), **_truncation(full, local)}
    return keys


def _truncation(*ropes: Rope) -> dict[str, bool]:
    return {} if all(rope.yarn is None or rope.yarn.truncate for rope in ropes) else {"truncate": False}
