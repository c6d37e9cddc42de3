"""Decoders as the metadata of a GGUF describes them <-> `family` data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemkit.errors import ConfigError, WeightsError
from gemkit.family import DecoderConfig, Global, Layer, Mlp, Rope, Sliding, Yarn
from gemkit.weights.config_keys import Keys, refuse_differences
from gemkit.weights.config_rope import yarn_attention_factor
from gemkit.weights.keys_gguf import GGUF
from gemkit.weights.known_keys import check_keys

# What a GGUF may hold beside models, by its `general.type`.
_OTHER_KINDS = {
    "adapter": "a LoRA adapter, not a model; adapters are read in PEFT's layout (adapter_config.json)",
    "mmproj": "an image tower (mmproj), not a model: name the GGUF of the text model beside it",
    "vocab": "a vocabulary without weights",
    "imatrix": "an importance matrix, which quantizers read, not a model",
}


def refuse_other_kinds(metadata: Mapping[str, Any], where: str) -> None:
    """Raises: WeightsError, for a GGUF that holds something else than a model; says what."""
    kind = metadata.get("general.type", "model")
    if metadata.get("general.architecture") == "clip":  # towers from before there was a general.type
        kind = "mmproj"
    if kind != "model":
        raise WeightsError(f"{where} is " + _OTHER_KINDS.get(kind, f"a GGUF of general.type={kind!r}, not a model"))


def from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, where: str, notes: list[str] | None = None
) -> DecoderConfig:
    """The decoder that a GGUF's metadata describes; keys mean what llama.cpp makes of them.

    The query scale of the 27B models (by the number of layers, as in llama.cpp) and, where no key says them, layer
    pattern and bases of ropes are not in the files: the architecture implies them.

    Args:
        vocab_size: rows of the embedding.
        notes: is given what a user should know of keys without a say, or that are missing.

    Raises:
        WeightsError: for another architecture, or values that are missing or of the wrong type.
        ConfigError: for a setting that is not implemented.
    """
    kind = metadata.get("general.architecture")
    if kind not in ("gemma", "gemma2", "gemma3"):
        raise WeightsError(f"{where}: architecture {kind!r} is not one that is read here: gemma, gemma2, gemma3")
    values = {k.removeprefix(f"{kind}."): v for k, v in metadata.items() if k.startswith(f"{kind}.")}
    keys = Keys(values, where, notes)
    keys.notes += check_keys(metadata, GGUF, where, prefix=f"{kind}.")
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    depth, head_dim = keys.whole("block_count"), keys.whole("attention.key_length", width // heads)
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{where}: key_length={head_dim} and value_length={keys.get('attention.value_length')} differ"
        )
    if keys.whole("rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(
            f"{where}: rope.dimension_count={keys.get('rope.dimension_count')} of heads of {head_dim}: heads of these "
            "architectures are rotated whole"
        )
    if depth > 1_000:  # an absurd count must not become a tuple of that length
        raise ConfigError(f"{where}: block_count={depth} is beyond any member (62 at most)")
    slides = _slides(keys, kind, depth)
    full, local = _ropes(keys, kind, depth, any(slides))
    wide = (kind, depth) in (("gemma2", 46), ("gemma3", 62))
    numbers: dict[str, Any] = {
        "heads": heads,
        "kv_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "scale": (width // heads if wide else head_dim) ** -0.5,
        "softcap": _cap(keys, "attn_logit_softcapping", kind, {"gemma2": 50.0}),
        "qk_norm": kind == "gemma3",
    }
    ffw = Mlp(keys.whole("feed_forward_length"))
    window = keys.whole("attention.sliding_window", 4096) if any(slides) else 0
    mixers = {True: Sliding(max(window, 1), rope=local, **numbers), False: Global(rope=full, **numbers)}
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=tuple(Layer(mixers[slide], ffw) for slide in slides),
        max_context=keys.whole("context_length"),
        post_norms=kind != "gemma",
        final_softcap=_cap(keys, "final_logit_softcapping", kind, {"gemma2": 30.0, "gemma3": 0.0}),
        norm_eps=_float32_as_written(keys.number("attention.layer_norm_rms_epsilon", 1e-6)),
    )


def _cap(keys: Keys, name: str, kind: str, defaults: Mapping[str, float]) -> float | None:
    """A soft cap of an architecture that has one; 0 is none."""
    cap = keys.number(name, defaults.get(kind, 0.0))
    if cap and kind not in defaults:
        raise ConfigError(f"{keys.where}: {name}={cap:g}, and llama.cpp's {kind} has no such cap: it would be ignored")
    return cap or None


_PERIODS = {"gemma2": 2, "gemma3": 6}  # layers to one without a window, which is the last of them


def _slides(keys: Keys, kind: str, depth: int) -> tuple[bool, ...]:
    """Which layers have a window. A Gemma 3 whose metadata give none has none: the converter then leaves it out."""
    given = keys.get("attention.sliding_window")
    if kind == "gemma" or given == 0 or (given is None and kind == "gemma3"):
        return (False,) * depth
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != np.bool_ or len(pattern) < depth:
            raise WeightsError(
                f"{keys.where}: attention.sliding_window_pattern has {len(pattern)} {pattern.dtype}; one truth value a "
                f"layer is needed, of {depth}"
            )
        return tuple(map(bool, pattern[:depth]))
    period = 0 if pattern == 0 else keys.whole("attention.sliding_window_pattern", _PERIODS[kind])
    return tuple(not period or i % period < period - 1 for i in range(depth))


def _ropes(keys: Keys, kind: str, depth: int, sliding: bool) -> tuple[Rope, Rope]:
    """Ropes of layers without a window and with one. Stretching is of the former alone in Gemma 3."""
    name = next((n for n in ("rope.freq_base", "rope.global.freq_base") if keys.get(n) is not None), "rope.freq_base")
    base = keys.number(name, 1_000_000.0 if kind == "gemma3" else 10_000.0)
    full = _stretched(keys, base)
    if kind != "gemma3":
        return full, full
    if keys.get(name) is None:
        keys.note(name, "is not in the file; the published 1,000,000 is used")
    # Ollama's own conversions of 4B, 12B and 27B leave out what the published configurations say
    if full == Rope(base) and keys.get("mm.tokens_per_image") and sliding and depth in (34, 48, 62):
        keys.note("rope.scaling.factor", "is not in this file of Ollama's; the published factor of 8 is used")
        full = Rope(base, 8.0)
    return full, Rope(keys.number("rope.freq_base_swa", keys.number("rope.local.freq_base", 10_000.0)))


def _stretched(keys: Keys, base: float) -> Rope:
    form = keys.get("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    match form:
        case "none":
            return Rope(base)
        case None | "linear":  # a factor without a type stretches linearly
            return Rope(base, factor)
        case "yarn":
            context = keys.whole("rope.scaling.original_context_length", keys.whole("context_length"))
            fast, slow = (keys.number(f"rope.scaling.yarn_beta_{end}", n) for end, n in (("fast", 32.0), ("slow", 1.0)))
            return Rope(base, factor, yarn=Yarn(context, yarn_attention_factor(factor), fast, slow))
    raise ConfigError(f"{keys.where}: rope.scaling.type={form!r} is not implemented; known: none, linear, yarn")


def _float32_as_written(value: float) -> float:
    """The shortest decimal that the float32 of a GGUF stands for: 1e-06, not 9.999999974752427e-07."""
    return float(f"{value:.7g}")


def to_gguf(decoder: DecoderConfig) -> dict[str, Any]:
    """The metadata of a GGUF that describe this decoder, as llama.cpp and `from_gguf` read them.

    Raises:
        ConfigError: if no GGUF architecture that is read here can express it.
    """
    if decoder.recurrent:
        raise ConfigError("no GGUF architecture has the recurrence of RecurrentGemma: save it as safetensors")
    first = decoder.attention[0]
    kind = "gemma3" if first.qk_norm else "gemma2" if decoder.post_norms else "gemma"
    full = next((mixer.rope for mixer in decoder.attention if mixer.window is None), first.rope)
    keys: dict[str, Any] = {
        "context_length": decoder.max_context,
        "embedding_length": decoder.width,
        "block_count": len(decoder.layers),
        "feed_forward_length": decoder.layers[0].ffw.width,
        "attention.head_count": first.heads,
        "attention.head_count_kv": first.kv_heads,
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        "attention.layer_norm_rms_epsilon": decoder.norm_eps,
        "rope.freq_base": full.base,
    }
    if full.factor != 1:
        keys |= {"rope.scaling.type": "yarn" if full.yarn else "linear", "rope.scaling.factor": full.factor}
    if full.yarn:
        keys["rope.scaling.original_context_length"] = full.yarn.context
        keys |= {"rope.scaling.yarn_beta_fast": full.yarn.beta_fast, "rope.scaling.yarn_beta_slow": full.yarn.beta_slow}
    if kind != "gemma" and decoder.windows:
        keys["attention.sliding_window"] = decoder.windows[0]
        slides = [mixer.window is not None for mixer in decoder.attention]
        if slides != [i % _PERIODS[kind] < _PERIODS[kind] - 1 for i in range(len(slides))]:
            keys["attention.sliding_window_pattern"] = np.array(slides)
    if kind == "gemma3":
        keys["rope.freq_base_swa"] = next((m.rope.base for m in decoder.attention if m.window is not None), full.base)
    if first.softcap is not None:
        keys["attn_logit_softcapping"] = first.softcap
    if decoder.final_softcap is not None:
        keys["final_logit_softcapping"] = decoder.final_softcap
    metadata = {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in keys.items()}}
    read = from_gguf(metadata, decoder.vocab_size, "the GGUF")
    refuse_differences(decoder, read, f"no GGUF of architecture {kind!r}")
    return metadata
