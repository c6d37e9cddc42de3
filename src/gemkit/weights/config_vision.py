"""Image towers in the configurations of PaliGemma <-> `family` data, and its preprocessor's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemkit.errors import ConfigError, WeightsError
from gemkit.family import DecoderConfig, Modality, Pixels, Vision
from gemkit.family.schema import PILLOW_FILTERS, Channels
from gemkit.weights.config_keys import Keys, section
from gemkit.weights.keys_beside import PREPROCESSOR
from gemkit.weights.known_keys import check_keys

# Published defaults of the tower's configuration class, models/siglip/configuration_siglip.py of Transformers 5.23.
# Released files leave 224 pixels out.
_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def vision_from_hf(config: Mapping[str, Any], where: str) -> Modality | None:
    """The image tower that a `config.json` describes, if it is one that runs here. Raises as `from_hf` does."""
    if config.get("model_type") != "paligemma":
        return None
    text = section(config, "text_config", where)
    tower = section(config, "vision_config", where)
    if tower.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise ConfigError(f"{where}: a tower of model_type {tower['model_type']!r}; known: siglip_vision_model")
    given = {k: v for k, v in tower.items() if v is not None}
    keys = Keys({**_SIGLIP_DEFAULTS, **given}, f"{where}: vision_config")
    for name, only in (("hidden_act", "gelu_pytorch_tanh"), ("num_channels", 3)):
        if keys.get(name) != only:
            raise ConfigError(f"{keys.where}: {name}={keys.get(name)!r}; {only!r} is implemented")
    if (projected := config.get("projection_dim")) not in (None, text.get("hidden_size")):
        raise ConfigError(f"{where}: projection_dim={projected!r} is not the decoder's {text.get('hidden_size')!r}")
    image_token = _image_token(config, where)
    if image_token >= (rows := Keys(text, f"{where}: text_config").whole("vocab_size", 256_000)):
        raise ConfigError(
            f"{where}: image_token_index={image_token} has no row in a vocabulary of {rows}: the released tables have "
            "257,216"
        )
    tower = Vision(
        image_size=keys.whole("image_size"),
        patch_size=keys.whole("patch_size"),
        width=keys.whole("hidden_size"),
        depth=keys.whole("num_hidden_layers"),
        num_heads=keys.whole("num_attention_heads"),
        mlp_width=keys.whole("intermediate_size"),
        norm_eps=keys.number("layer_norm_eps"),
    )
    return Modality(tower, placeholder=image_token)


def _image_token(config: Mapping[str, Any], where: str) -> int:
    keys = Keys(config, where)
    return keys.whole("image_token_index" if keys.get("image_token_index") is not None else "image_token_id")


def paligemma_to_hf(text: dict[str, Any], decoder: DecoderConfig, vision: Modality) -> dict[str, Any]:
    """The `config.json` of a PaliGemma; `text` is that of its decoder.

    Raises:
        ConfigError: if no PaliGemma has such a decoder.
    """
    if text["model_type"] not in ("gemma", "gemma2"):
        raise ConfigError(
            f"no published configuration of model_type 'paligemma' has a text decoder of {text['model_type']!r}"
        )
    tower = {
        "model_type": "siglip_vision_model",
        "image_size": vision.tower.image_size,
        "patch_size": vision.tower.patch_size,
        "hidden_size": vision.tower.width,
        "num_hidden_layers": vision.tower.depth,
        "num_attention_heads": vision.tower.num_heads,
        "intermediate_size": vision.tower.mlp_width,
        "layer_norm_eps": vision.tower.norm_eps,
        "num_image_tokens": vision.tokens,
        "projection_dim": decoder.width,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }
    config = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": vision.placeholder,
        "projection_dim": decoder.width,
        "hidden_size": decoder.width,
        "vocab_size": decoder.vocab_size,
        "tie_word_embeddings": True,
        **{name: text[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        "text_config": {**text, "num_image_tokens": vision.tokens},
        "vision_config": tower,
    }
    assert vision_from_hf(config, "config.json") == replace(vision, pixels=Pixels())
    return config


# The class that prepares pictures for SigLIP, under its names on other back ends and in older versions.
_PROCESSORS = (
    "SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil", "SiglipFeatureExtractor",
)  # fmt: skip


def pixels_from_hf(settings: Mapping[str, Any], vision: Modality, where: str) -> tuple[Pixels, list[str]]:
    """How pictures are prepared, as a `preprocessor_config.json` says, and notes on keys that are not used.

    Raises:
        WeightsError: for a value of the wrong type.
        ConfigError: for a setting under which Transformers' pictures have other numbers than can be made here, or do
            not fit the tower.
    """
    notes = check_keys(settings, PREPROCESSOR, where)
    keys, side = Keys({**_PREPROCESSOR_DEFAULTS, **settings}, where), vision.tower.image_size
    kind = keys.get("image_processor_type") or keys.get("feature_extractor_type") or _PROCESSORS[0]
    if kind not in _PROCESSORS:
        raise ConfigError(f"{where}: image_processor_type={kind!r} is not implemented: the tower's is {_PROCESSORS[0]}")
    if not keys.get("do_resize") or keys.get("size") != {"height": side, "width": side}:
        raise ConfigError(
            f"{where}: do_resize={keys.get('do_resize')!r}, size={keys.get('size')!r} does not fit the tower, which "
            f"takes {{'height': {side}, 'width': {side}}} alone"
        )
    if keys.get("image_seq_length") is not None and (length := keys.whole("image_seq_length")) != vision.tokens:
        raise ConfigError(f"{where}: image_seq_length={length}, and the tower makes {vision.tokens} tokens of an image")
    number = keys.get("resample")
    if isinstance(number, bool) or number not in range(len(PILLOW_FILTERS)):
        raise ConfigError(f"{where}: resample={number!r} is no filter of Pillow: 0 to {len(PILLOW_FILTERS) - 1}")
    scale = keys.number("rescale_factor") if _switch(keys, "do_rescale") else None
    if not _switch(keys, "do_normalize"):
        return Pixels(PILLOW_FILTERS[number], scale, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), notes
    mean, std = _channels(keys, "image_mean"), _channels(keys, "image_std")
    if 0 in std:
        raise ConfigError(f"{where}: image_std={list(std)} divides by zero")
    return Pixels(PILLOW_FILTERS[number], scale, mean, std), notes


# of the class, for keys that are absent; null switches off what it stands for
_PREPROCESSOR_DEFAULTS = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _switch(keys: Keys, name: str) -> bool:
    value = keys.get(name)
    if value is not None and not isinstance(value, bool):
        raise WeightsError(f"{keys.where}: {name}={value!r} must be true or false")
    return bool(value)


def _channels(keys: Keys, name: str) -> Channels:
    """One number a channel, or one for all."""
    value = keys.get(name)
    each = value if isinstance(value, list) else [value] * 3
    if len(each) != 3 or not all(type(number) in (int, float) for number in each):
        raise WeightsError(f"{keys.where}: {name}={value!r} must be a number, or one for each of three channels")
    return float(each[0]), float(each[1]), float(each[2])


def preprocessor_to_hf(vision: Modality) -> dict[str, Any]:
    """The `preprocessor_config.json` that goes with an image tower.

    Raises:
        ConfigError: if Transformers has no such filter.
    """
    pixels = vision.pixels
    if pixels.resample not in PILLOW_FILTERS:
        raise ConfigError(f"no preprocessor_config.json can express the filter {pixels.resample!r}")
    return {
        "image_processor_type": _PROCESSORS[0],
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": vision.tokens,
        "do_resize": True,
        "size": {"height": vision.tower.image_size, "width": vision.tower.image_size},
        "resample": PILLOW_FILTERS.index(pixels.resample),
        "do_rescale": pixels.scale is not None,
        "rescale_factor": 1 / 255 if pixels.scale is None else pixels.scale,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
