"""Decoders as Hugging Face's `config.json` describes them <-> `family` data.

Files leave out what their own library had as a default at the time, so each model type's defaults stand here beside the
keys. A setting that would change the numbers and that we do not implement is refused; keys that mean nothing to the
numbers are ignored. No key of a file ever names something to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemkit.errors import ConfigError, WeightsError
from gemkit.family import (
    Attention,
    DecoderConfig,
    Global,
    Layer,
    Mixer,
    Mlp,
    Modality,
    Recurrent,
    Rope,
    Sliding,
    repeat,
)
from gemkit.weights.config_keys import Keys, refuse_differences, section
from gemkit.weights.config_rope import flat_rope, rope_keys, rope_to_hf, ropes_from_hf
from gemkit.weights.config_vision import paligemma_to_hf
from gemkit.weights.keys_config import check_config

# Published defaults of the configuration classes, for keys that files omit (the text configuration of gemma-3-4b-pt
# names five keys only). Transformers 5.23, models/*gemma*/configuration_*.py
_COMMON = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256}
_GEMMA2 = {
    **_COMMON,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        **_COMMON,
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
    "gemma2": {
        **_GEMMA2,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA2, "vocab_size": 262_208, "max_position_embeddings": 131_072},
    "recurrent_gemma": {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "vocab_size": 256_000,
        "hidden_size": 2560,
        "intermediate_size": 7680,
        "num_hidden_layers": 26,
        "num_attention_heads": 10,
        "max_position_embeddings": 8192,
        "attention_window_size": 2048,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
    },
}
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three spellings of one formula


def from_hf(config: Mapping[str, Any], where: str, notes: list[str] | None = None) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Args:
        config: the parsed file.
        where: its name, for messages.
        notes: takes what a user should know of how it was read.

    Raises:
        WeightsError: for a model type that is not of the family, or a key that is missing or of the wrong type.
        ConfigError: for a setting that we do not implement, or that contradicts another.
    """
    said = check_config(config, where)
    if notes is not None:
        notes += said
    return _decoder(config, where, notes)


def _decoder(config: Mapping[str, Any], where: str, notes: list[str] | None) -> DecoderConfig:
    kind = config.get("model_type")
    if kind == "paligemma":
        text = section(config, "text_config", where)
        if text.get("model_type", "gemma") not in ("gemma", "gemma2"):
            raise ConfigError(f"{where}: a text_config of model_type {text['model_type']!r}; known: gemma, gemma2")
        # prefixes are a matter of the batch here
        text = {"model_type": "gemma", **text, "use_bidirectional_attention": None}
        return _decoder(text, f"{where}: text_config", notes)
    if kind == "gemma3":  # text and image: the text decoder is nested
        text = section(config, "text_config", where)
        # the table of the released image checkpoints has 64 rows for image placeholders that text never uses
        return from_hf(
            {"tie_word_embeddings": True, **text, "model_type": "gemma3_text"}, f"{where}: text_config", notes
        )
    if not isinstance(kind, str) or kind not in _HF_DEFAULTS:
        raise WeightsError(
            f"{where}: model_type {kind!r} is not one that is read here: {', '.join(_HF_DEFAULTS)}, gemma3, paligemma"
        )
    keys = Keys({**_HF_DEFAULTS[kind], **{k: v for k, v in config.items() if v is not None}}, where, notes)
    _refuse_other_activations(kind, keys)
    if kind == "recurrent_gemma":
        return _hf_griffin(keys)

    def softcap(name: str) -> float | None:  # a null in the file means no cap, an absent key the default
        return None if kind == "gemma" or (name in config and config[name] is None) else keys.optional_number(name)

    heads: dict[str, Any] = {
        "heads": keys.whole("num_attention_heads"),
        "kv_heads": keys.whole("num_key_value_heads"),
        "head_dim": keys.whole("head_dim"),
        "scale": (keys.number("query_pre_attn_scalar") if kind != "gemma" else keys.whole("head_dim")) ** -0.5,
        # Gemma 3 has the key too, and its class never applies it
        "softcap": softcap("attn_logit_softcapping") if kind == "gemma2" else None,
        "qk_norm": kind == "gemma3_text",
    }
    return DecoderConfig(
        vocab_size=keys.whole("vocab_size"),
        width=keys.whole("hidden_size"),
        layers=_hf_layers(kind, keys, heads),
        max_context=keys.whole("max_position_embeddings"),
        post_norms=kind != "gemma",
        final_softcap=softcap("final_logit_softcapping"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
    )


QUANT_METHOD = "gemkit"


def kinds(config: Mapping[str, Any], where: str) -> Mapping[str, str]:
    """Block type by weight, of the weights that a `config.json` says are kept quantized; {} if there are none.

    Raises:
        WeightsError: if something else than gemkit quantized them.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return {}
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method != QUANT_METHOD:
        raise WeightsError(
            f"{where}: its weights were quantized by {method!r}, which is not read; take the published model, "
            "or a .gguf of it, and quantize it here (`gemkit quantize`)"
        )
    found = settings.get("kinds")
    if not isinstance(found, Mapping):
        raise WeightsError(f"{where}: quantization_config has no kinds, which name the block type of each weight")
    return found


def quantization_to_hf(kinds: Mapping[str, str]) -> dict[str, Any]:
    """What `kinds` reads, as keys of a `config.json`; nothing if no weight is quantized."""
    return {"quantization_config": {"quant_method": QUANT_METHOD, "kinds": dict(kinds)}} if kinds else {}


def _refuse_other_activations(kind: str, keys: Keys) -> None:
    name = "hidden_act" if kind == "gemma" else "hidden_activation"  # the key that its class reads
    # gemma-2b's file says "gelu" and means the tanh form, as its class knows; elsewhere that is another function
    known = (*_TANH_GELU, "gelu") if kind == "gemma" else _TANH_GELU
    if (found := keys.get(name)) not in (None, *known):
        raise ConfigError(
            f"{keys.where}: {name}={found!r} is not implemented: every member was trained with gelu_pytorch_tanh"
        )


def _hf_layers(kind: str, keys: Keys, heads: Mapping[str, Any]) -> tuple[Layer, ...]:
    ropes, ffw = ropes_from_hf(kind, keys), Mlp(keys.whole("intermediate_size"))
    depth = keys.whole("num_hidden_layers")
    full = Global(rope=ropes["full_attention"], **heads)
    if kind == "gemma":
        return repeat(full, ffw=ffw, total=depth)
    sliding = Sliding(keys.whole("sliding_window"), rope=ropes["sliding_attention"], **heads)
    types = keys.get("layer_types")
    if types is None:
        # Transformers reads the pattern in Gemma 3 alone
        every = keys.whole("sliding_window_pattern", 6) if kind == "gemma3_text" else 2
        return repeat(*[sliding] * (every - 1), full, ffw=ffw, total=depth)
    if not isinstance(types, list) or len(types) != depth:
        raise WeightsError(f"{keys.where}: layer_types must list num_hidden_layers={depth} kinds")
    kinds = {"sliding_attention": sliding, "full_attention": full}
    if unknown := sorted({str(t) for t in types} - kinds.keys()):
        raise ConfigError(f"{keys.where}: layer_types has {unknown[0]!r}; known: {', '.join(kinds)}")
    return tuple(Layer(kinds[t], ffw) for t in types)


# The 2B's file says `block_types`, the 9B's `_block_types`, and later versions of Transformers list every layer.
_BLOCK_TYPES = ("block_types", "_block_types", "layers_block_type", "layer_types")
_GRIFFIN_PATTERN = ["recurrent", "recurrent", "attention"]


def _hf_griffin(keys: Keys) -> DecoderConfig:
    heads, width = keys.whole("num_attention_heads"), keys.whole("hidden_size")
    both_branches = keys.whole("intermediate_size")
    if width % heads or both_branches % 2:
        raise ConfigError(
            f"{keys.where}: num_attention_heads={heads} must divide hidden_size={width}, "
            f"and 2 intermediate_size={both_branches}"
        )
    head_dim = keys.whole("head_dim", width // heads)
    recurrent = Recurrent(keys.whole("lru_width", width), heads, keys.whole("conv1d_width"))
    # the models were trained with a mask that lets a token see so many others besides itself
    window = keys.whole("attention_window_size") + 1
    sliding = Sliding(
        window,
        heads=heads,
        kv_heads=keys.whole("num_key_value_heads", heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=flat_rope(keys, forms=("default",), fraction=0.5),
    )
    kinds: dict[str, Mixer] = {
        "recurrent": recurrent,
        "linear_attention": recurrent,
        "attention": sliding,
        "sliding_attention": sliding,
    }
    name = next((name for name in _BLOCK_TYPES if keys.get(name) is not None), "block_types")
    types = _GRIFFIN_PATTERN if keys.get(name) is None else keys.get(name)
    if not isinstance(types, list) or not types:
        raise WeightsError(f"{keys.where}: {name} must list kinds of layers")
    if unknown := sorted({str(t) for t in types} - kinds.keys()):
        raise ConfigError(f"{keys.where}: {name} has {unknown[0]!r}; known: {', '.join(kinds)}")
    return DecoderConfig(
        vocab_size=keys.whole("vocab_size"),
        width=width,
        layers=repeat(*(kinds[t] for t in types), ffw=Mlp(both_branches // 2), total=keys.whole("num_hidden_layers")),
        max_context=keys.whole("max_position_embeddings"),
        final_softcap=keys.number("logits_soft_cap"),
        biases=True,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        embed_scale_dtype="bfloat16",
    )


def to_hf(decoder: DecoderConfig, vision: Modality | None = None) -> dict[str, Any]:
    """The `config.json` that Transformers loads this model from (both its current and its older keys).

    Raises:
        ConfigError: if no published configuration class can express it.
    """
    if vision is not None:
        return paligemma_to_hf(to_hf(decoder), decoder, vision)
    if decoder.recurrent:
        return _expressed(_to_hf_griffin(decoder), decoder)
    first = decoder.attention[0]
    kind = "gemma3_text" if first.qk_norm else "gemma2" if decoder.post_norms else "gemma"
    types = ["full_attention" if mixer.window is None else "sliding_attention" for mixer in decoder.attention]
    config: dict[str, Any] = {
        "architectures": [{"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[kind] + "ForCausalLM"],
        "model_type": kind,
        **_to_hf_common(decoder, first),
        "intermediate_size": decoder.layers[0].ffw.width,
        "hidden_act": "gelu_pytorch_tanh",
    }
    config |= rope_keys(kind, decoder)
    if kind != "gemma":
        config |= {
            "layer_types": types,
            "sliding_window": next(iter(decoder.windows), decoder.max_context),
            "query_pre_attn_scalar": _whole_if_close(first.scale**-2),
            "attn_logit_softcapping": first.softcap,
            "final_logit_softcapping": decoder.final_softcap,
        }
    return _expressed(config, decoder)


def as_reward_model(config: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model with a head of one number: Transformers' class for it, where it has one."""
    names = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}
    name = names.get(config["model_type"])
    architectures = config["architectures"] if name is None else [f"{name}ForSequenceClassification"]
    label = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return {**config, "architectures": architectures, "problem_type": "regression", **label}


def _to_hf_common(decoder: DecoderConfig, attention: Attention) -> dict[str, Any]:
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": decoder.max_context,
        "rms_norm_eps": decoder.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def _to_hf_griffin(decoder: DecoderConfig) -> dict[str, Any]:
    recurrent = decoder.recurrent[0]
    heads = recurrent.num_blocks  # one number says both
    head_dim = max(decoder.width // heads, 2)  # of no layer, where none attends
    none = Sliding(2049, heads=heads, kv_heads=1, head_dim=head_dim, scale=1.0, rope=Rope(fraction=0.5))
    sliding = next(iter(decoder.attention), none)
    types = ["recurrent" if isinstance(layer.mixer, Recurrent) else "attention" for layer in decoder.layers]
    period = next(n for n in range(1, len(types) + 1) if all(t == types[i % n] for i, t in enumerate(types)))
    partial = {"rope_theta": sliding.rope.base, "partial_rotary_factor": sliding.rope.fraction}
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        **_to_hf_common(decoder, sliding),
        "intermediate_size": 2 * decoder.layers[0].ffw.width,
        "lru_width": recurrent.width,
        "conv1d_width": recurrent.conv_width,
        "attention_window_size": (sliding.window or 2) - 1,  # without a window it is refused by `_expressed`
        "logits_soft_cap": decoder.final_softcap,
        "embeddings_scale_by_sqrt_dim": True,
        "block_types": types[:period],
        "_block_types": types[:period],
        **partial,
        "rope_parameters": rope_to_hf(sliding.rope),
    }


def _expressed(config: dict[str, Any], decoder: DecoderConfig) -> dict[str, Any]:
    """The configuration, if the decoder is what it says; a ConfigError if not."""
    read = from_hf(config, "config.json")
    refuse_differences(decoder, read, f"no published configuration of model_type {config['model_type']!r}")
    return config


def _whole_if_close(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 else value
