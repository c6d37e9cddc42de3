"""Published configurations, and those that Transformers writes, against the table of keys."""

import pytest
import transformers

from gemkit.errors import ConfigError
from gemkit.weights.keys_config import CONFIGS, check_config
from gemkit.weights.known_keys import check_keys

SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}
# The keys of the released files, with the values that bear on a rule of the table.
PUBLISHED = {
    "gemma-2b": {
        **COMMON,
        **SIZES,
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu",
        "hidden_activation": None,
        "rope_scaling": None,
    },
    "gemma-1.1-7b-it": {
        **COMMON,
        **SIZES,
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma-2-2b": {
        **COMMON,
        **SIZES,
        **CAPS,
        "model_type": "gemma2",
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
    },
    "gemma-3-1b-it": {
        **COMMON,
        **SIZES,
        **{name: None if "cap" in name else value for name, value in CAPS.items()},
        "model_type": "gemma3_text",
        "cache_implementation": "hybrid",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma-3-4b-pt": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {**SIGLIP, "image_size": 896, "vision_use_head": False},
    },
    "recurrentgemma-2b": {
        **COMMON,
        **SIZES,
        "model_type": "recurrent_gemma",
        "attention_window_size": 2048,
        "block_types": ["recurrent", "recurrent", "attention"],
        "_block_types": ["recurrent", "recurrent", "attention"],
        "conv1d_width": 4,
        "embeddings_scale_by_sqrt_dim": True,
        "final_w_init_variance_scale": 0.07692307692307693,
        "hidden_activation": "gelu_pytorch_tanh",
        "logits_soft_cap": 30.0,
        "lru_width": 2560,
        "partial_rotary_factor": 0.5,
        "w_init_variance_scale": 0.01,
    },
    "paligemma-3b-pt-224": {
        "_vocab_size": 257152,
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": 2048,
        "ignore_index": -100,
        "image_token_index": 257152,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": 2048,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 256,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
            "vocab_size": 257216,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.41.0.dev0",
        "vision_config": {
            **SIGLIP,
            "num_image_tokens": 256,
            "projection_dim": 2048,
            "projector_hidden_act": "gelu_fast",
        },
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_known_whole(name):
    assert check_config(PUBLISHED[name], name) == []


@pytest.mark.parametrize(
    "kind",
    ["GemmaConfig", "Gemma2Config", "Gemma3TextConfig", "Gemma3Config", "RecurrentGemmaConfig", "PaliGemmaConfig"],
)
def test_configurations_that_transformers_writes_are_known_whole(kind):
    assert check_config(getattr(transformers, kind)().to_dict(), kind) == []


def test_a_key_that_is_not_known_is_noted_by_name():
    (note,) = check_config({**PUBLISHED["gemma-2b"], "attention_sinks": 4}, "x")
    assert note == "x: not known here, and not used: attention_sinks"
    (note,) = check_config({**PUBLISHED["gemma-3-4b-pt"], "text_config": {"moe_layers": 2}}, "x")
    assert note == "x: text_config: not known here, and not used: moe_layers"


def test_a_key_that_would_change_a_result_is_refused():
    with pytest.raises(ConfigError, match="attention_bias=True"):
        check_config({**PUBLISHED["gemma-2-2b"], "attention_bias": True}, "x")
    with pytest.raises(ConfigError, match="use_bidirectional_attention=True"):
        check_config({**PUBLISHED["gemma-3-1b-it"], "use_bidirectional_attention": True}, "x")


def test_a_key_that_transformers_does_not_read_is_noted():
    (note,) = check_keys({"sliding_window_pattern": 3}, CONFIGS["gemma2"], "x")
    assert note.startswith("x: sliding_window_pattern=3 is not used")
