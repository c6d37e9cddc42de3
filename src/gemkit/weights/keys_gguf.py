"""The metadata keys of GGUF files of the family, and the effect of each: used, ignored and why, or refused.

Keys of the architecture stand here without its name in front. Sources: gguf-py's constants and llama.cpp's
`llama-arch.cpp` and models; Ollama's `convert_gemma3.go`. A key that is in none of the tables is noted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gemkit.errors import ConfigError
from gemkit.weights.config_keys import Keys

USED = {
    "general.architecture", "general.type", "general.alignment", "split.no", "split.count", "split.tensors.count",
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.layer_norm_rms_epsilon", "attn_logit_softcapping",
    "final_logit_softcapping", "rope.freq_base", "rope.freq_base_swa", "rope.global.freq_base", "rope.local.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "mm.tokens_per_image", "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type", "tokenizer.chat_template", "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.suffix_token_id", "tokenizer.ggml.middle_token_id", "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.fim_sep_token_id",
}  # fmt: skip

# Patterns of keys -> why they cannot change a result.
IGNORED = {
    r"general\..*": "where the file came from",
    r"quantize\.imatrix\..*": "how the file was quantized",
    r"vocab_size": "the rows of the embedding say it",
    r"rope\.scaling\.finetuned": "says how it was trained, not how it is computed",
    r"rope\.scaling\.yarn_attn_factor": "llama.cpp computes it from the factor",
    r"vision\..*": "of the image tower, which is left out",
    r"tokenizer\.ggml\.(bos|eos|unknown|padding|mask|seperator|separator|cls|eot|eom|fim_pad|fim_rep)_token_id": (
        "the pieces have names: <bos>, <eos>, <end_of_turn>"
    ),
    r"tokenizer\.ggml\.(pre|pretokenizer)": "of other tokenizers than the family's",
    r"tokenizer\.ggml\.merges": "scores rank the merges",
    r"tokenizer\.ggml\.(add_(bos|eos|sep)_token|remove_extra_whitespaces|precompiled_charsmap)": (
        "prompt formats put <bos> where it belongs"
    ),
    r"tokenizer\.chat_templates|tokenizer\.chat_template\..*": "further templates, by name",
    r"tokenizer\.(huggingface\.json|rwkv\.world)": "another tool's copy of the vocabulary",
}

# Keys that change what is computed, and are not implemented here -> the value that changes nothing.
REFUSED: dict[str, Any] = {
    "attention.causal": True,
    "attention.scale": None,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.key_length_swa": None,
    "attention.value_length_swa": None,
    "attention.temperature_scale": None,
    "attention.shared_kv_layers": 0,
    "rope.dimension_count_swa": None,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": None,
    "embedding_length_per_layer_input": None,
    "dense_2_feat_out": None,
    "dense_3_feat_in": None,
    "pooling_type": 0,
    "use_parallel_residual": False,
    "tensor_data_layout": None,
    "general.quantization_version": 2,
    "tokenizer.ggml.add_space_prefix": False,
}


def check(metadata: Mapping[str, Any], kind: str, keys: Keys) -> None:
    """Note keys that nobody knows.

    Raises:
        ConfigError: for one that changes what is computed, at a value that is not implemented.
    """
    for full, value in metadata.items():
        name = full.removeprefix(f"{kind}.")
        if name in USED:
            continue
        if name in REFUSED:
            neutral = REFUSED[name]
            if value != neutral:
                known = "" if neutral is None else f"; {neutral!r} is"
                raise ConfigError(f"{keys.where}: {full}={value!r} is not implemented{known}")
        elif not any(re.fullmatch(pattern, name) for pattern in IGNORED):
            shown = repr(value) if len(repr(value)) < 60 else type(value).__name__
            keys.note(full, f"is no key that is known here, and has no say ({shown})")
