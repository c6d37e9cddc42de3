"""Image towers in the configurations of PaliGemma <-> `family` data, and its preprocessor's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemkit.errors import ConfigError
from gemkit.family import DecoderConfig, Modality, Vision
from gemkit.weights.config_keys import Keys, section

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
    assert vision_from_hf(config, "config.json") == vision
    return config


def preprocessor_to_hf(vision: Modality) -> dict[str, Any]:
    """The `preprocessor_config.json` that goes with an image tower: as released, bicubic, to -1 to 1."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": vision.tokens,
        "do_resize": True,
        "size": {"height": vision.tower.image_size, "width": vision.tower.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
