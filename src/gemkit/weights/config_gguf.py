"""Decoders as the metadata of a GGUF describes them <-> `family` data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemkit.errors import ConfigError, WeightsError
from gemkit.family import DecoderConfig, Global, Mlp, Rope, Sliding, repeat
from gemkit.weights.config_keys import Keys, refuse_differences

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


def from_gguf(metadata: Mapping[str, Any], vocab_size: int, where: str) -> DecoderConfig:
    """The decoder that a GGUF's metadata describes; `vocab_size` counts the rows of its embedding.

    Layer pattern, local rope base and (by the number of layers, as in llama.cpp) the query scale of the 27B models
    are not in the files: the architecture implies them.
    """
    kind = metadata.get("general.architecture")
    if kind not in ("gemma", "gemma2", "gemma3"):
        raise WeightsError(f"{where}: architecture {kind!r} is not one that is read here: gemma, gemma2, gemma3")
    keys = Keys({k.removeprefix(f"{kind}."): v for k, v in metadata.items() if k.startswith(f"{kind}.")}, where)
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    depth, head_dim = keys.whole("block_count"), keys.whole("attention.key_length")
    if keys.whole("attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{where}: key_length={head_dim} and value_length={keys.get('attention.value_length')} differ"
        )
    if keys.get("rope.scaling.type") not in (None, "none", "linear"):
        raise ConfigError(f"{where}: rope.scaling.type={keys.get('rope.scaling.type')!r}; known: none, linear")
    factor = keys.number("rope.scaling.factor", 1.0) if keys.get("rope.scaling.type") == "linear" else 1.0
    base = keys.number("rope.freq_base", 1_000_000.0 if kind == "gemma3" else 10_000.0)
    local = Rope(keys.number("rope.freq_base_swa", 10_000.0)) if kind == "gemma3" else Rope(base, factor)
    if depth > 1_000:  # an absurd count must not become a tuple of that length
        raise ConfigError(f"{where}: block_count={depth} is beyond any member (62 at most)")
    wide = (kind, depth) in (("gemma2", 46), ("gemma3", 62))
    numbers: dict[str, Any] = {
        "heads": heads,
        "kv_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "scale": (width // heads if wide else head_dim) ** -0.5,
        "softcap": keys.optional_number("attn_logit_softcapping", 50.0 if kind == "gemma2" else None),
        "qk_norm": kind == "gemma3",
    }
    pattern = [Global(rope=Rope(base, factor), **numbers)]
    if kind != "gemma":
        sliding = Sliding(keys.whole("attention.sliding_window", 4096), rope=local, **numbers)
        pattern = [*[sliding] * (1 if kind == "gemma2" else 5), *pattern]
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=repeat(*pattern, ffw=Mlp(keys.whole("feed_forward_length")), total=depth),
        max_context=keys.whole("context_length"),
        post_norms=kind != "gemma",
        final_softcap=keys.optional_number("final_logit_softcapping", 30.0 if kind == "gemma2" else None),
        norm_eps=_float32_as_written(keys.number("attention.layer_norm_rms_epsilon", 1e-6)),
    )


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
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": full.factor}
    if kind != "gemma":
        keys["attention.sliding_window"] = next(iter(decoder.windows), decoder.max_context)
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
