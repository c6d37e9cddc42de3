"""The keys of `config.json`, and the effect of each here: a table for each model type (form: `weights.known_keys`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemkit.weights.known_keys import Key, Table, check_keys, ignored, noted, refused, used

# sampling defaults that Transformers 4 kept in config.json; version 5 drops them there too
# fmt: off
_GENERATION = (
    "assistant_confidence_threshold", "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "assistant_lookbehind", "temperature",
    "top_k", "top_p", "typical_p",
)
# fmt: on
_EVERY: Table = {
    **used("the kind of model", "model_type"),
    **ignored("the model type and the tensors say the same", "architectures"),
    **ignored("names code or its version; no code of a file is run", "auto_map", "transformers_version"),
    **ignored("where the file came from", "_name_or_path", "name_or_path", "_commit_hash", "model_name"),
    **ignored("written by training tools about themselves", "unsloth_version", "unsloth_fixed", "task_specific_params"),
    **ignored("weights are computed with as they are stored", "dtype", "torch_dtype"),
    **ignored("names of a classifier's outputs", "id2label", "label2id", "problem_type", "num_labels"),
    **ignored(
        "the shape of Python results", "return_dict", "output_attentions", "output_hidden_states", "use_return_dict"
    ),
    **ignored("a cache changes no result", "use_cache", "cache_implementation"),
    **ignored(
        "which kernel computes attention", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"
    ),
    **ignored("computed whole here; Gemma reads it nowhere", "chunk_size_feed_forward"),
    **ignored("how new weights are drawn", "initializer_range", "initializer_factor"),
    **ignored("sampling settings stand in generation_config.json", *_GENERATION),
    **ignored("older Python back ends", "tf_legacy_loss", "use_bfloat16", "torchscript", "tie_encoder_decoder"),
    **ignored(
        "of encoder-decoders",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "prefix",
        "sep_token_id",
        "tokenizer_class",
        "finetuning_task",
    ),
    **refused("the family has decoders alone", ["is_encoder_decoder"], False),
    **refused("no member is", ["is_decoder"], False),
    **refused("removed heads are not implemented", ["pruned_heads"], {}),
    **refused("layers that differ by it are not implemented", ["per_layer_config"], {}),
    **used("how weights are kept: gemkit's own form; others are refused by name", "quantization_config"),
    **ignored("MLX's settings; weights that it packed have scales beside them, which are refused", "quantization"),
    **used("the ids that tokenizer and answers go by", "bos_token_id", "eos_token_id", "pad_token_id"),
    **used("false with no head in the file is refused; else the head of the file is used", "tie_word_embeddings"),
}
_DECODER: Table = {
    **_EVERY,
    **used("rows of the embedding", "vocab_size"),
    **used("widths and counts", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    **used("widths and counts", "num_key_value_heads", "head_dim"),
    **used("tokens in training; the unit of yarn and dynamic ropes", "max_position_embeddings"),
    **used("added to the mean square of norms", "rms_norm_eps"),
    **used("the rope; see its own keys", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    **used("of yarn, where the rope does not say it", "original_max_position_embeddings"),
    **noted("no dropout is applied while training here; it changes no answer", ["attention_dropout"], 0),
    **refused("no member has biases there", ["attention_bias"], False),
    **refused("text that sees what follows it is not implemented", ["use_bidirectional_attention"], False),
    **ignored("counted from the tower", "num_image_tokens"),
}
_WINDOWED: Table = {
    **_DECODER,
    **used("the activation", "hidden_activation"),
    **ignored("this class reads hidden_activation", "hidden_act"),
    **used("queries are divided by its root", "query_pre_attn_scalar"),
    **used("visible tokens of sliding layers", "sliding_window"),
    **used("the kind of each layer", "layer_types"),
    **used("soft caps; null is none", "attn_logit_softcapping", "final_logit_softcapping"),
    **ignored("the hybrid cache of Transformers", "sliding_window_size"),
}
CONFIGS: Mapping[str, Table] = {
    "gemma": {
        **_DECODER,
        **used("the activation", "hidden_act"),
        **noted("this class reads hidden_act", ["hidden_activation"], "gelu_pytorch_tanh"),
    },
    "gemma2": {**_WINDOWED, **noted("every other layer slides, whatever it says", ["sliding_window_pattern"], 2)},
    "gemma3_text": {
        **_WINDOWED,
        "attn_logit_softcapping": Key("noted", "Transformers has the key in Gemma 3 and never applies it"),
        **used("every n-th layer is global, where layer_types is absent", "sliding_window_pattern"),
        **noted("layer_types says it", ["_sliding_window_pattern"], 6),
        **used("base of the sliding layers, where rope_parameters has none", "rope_local_base_freq"),
        **ignored("the vision tower's part", "mm_tokens_per_image"),
    },
    "recurrent_gemma": {
        **_DECODER,
        **used("the activation", "hidden_activation"),
        **used("width and taps of the recurrence", "lru_width", "conv1d_width"),
        **used("visible tokens besides the current one", "attention_window_size"),
        **used("the soft cap of the logits", "logits_soft_cap"),
        **used("the pattern of layers", "block_types", "_block_types", "layers_block_type", "layer_types"),
        **ignored("how new weights are drawn", "w_init_variance_scale", "final_w_init_variance_scale"),
        **refused("every member scales its embeddings", ["embeddings_scale_by_sqrt_dim"], True),
    },
    "paligemma": {
        **_EVERY,
        **used("decoder and tower, each with a table of its own", "text_config", "vision_config"),
        **used("the id that holds a patch's place", "image_token_index", "image_token_id"),
        **used("width of the decoder", "projection_dim"),
        **ignored("the decoder's own keys count", "hidden_size", "vocab_size", "_vocab_size"),
        **ignored("no loss is computed at it here", "ignore_index"),
    },
    "gemma3": {
        **_EVERY,
        **used(
            "the decoder, with a table of its own; the tower is left out, with a note", "text_config", "vision_config"
        ),
        **ignored(
            "of the tower, which is left out with a note", "mm_tokens_per_image", "image_token_index", "image_token_id"
        ),
        **ignored(
            "of the tower, which is left out with a note",
            "boi_token_index",
            "eoi_token_index",
            "boi_token_id",
            "eoi_token_id",
        ),
        **ignored("the decoder's own keys count", "hidden_size", "vocab_size"),
    },
    "siglip_vision_model": {
        **_EVERY,
        **used("widths and counts", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        **used("pixels", "image_size", "patch_size"),
        **used("1e-6 in every release", "layer_norm_eps"),
        **used("gelu_pytorch_tanh and 3; others are refused", "hidden_act", "num_channels"),
        **ignored(
            "counted from the sizes", "num_image_tokens", "projection_dim", "num_positions", "projector_hidden_act"
        ),
        **ignored("of a head that pools the image, which nothing reads", "vision_use_head"),
        **ignored("of a text tower, which there is none of", "vocab_size"),
        **noted("no dropout is applied while training here; it changes no answer", ["attention_dropout"], 0),
    },
}


def check_config(config: Mapping[str, Any], where: str) -> list[str]:
    """Notes on a `config.json`, its parts included. Raises as `check_keys`."""
    kind = config.get("model_type")
    notes = check_keys(config, CONFIGS.get(str(kind), {}), where)
    parts = {"paligemma": {"text_config": "gemma", "vision_config": "siglip_vision_model"}}.get(str(kind), {})
    for name, default in ({"text_config": "gemma3_text"} if kind == "gemma3" else parts).items():
        part = config.get(name)
        if isinstance(part, Mapping):
            of = default if kind == "gemma3" else str(part.get("model_type", default))
            # a prefix that sees itself is a matter of the batch here
            given = {k: v for k, v in part.items() if k != "use_bidirectional_attention" or kind != "paligemma"}
            notes += check_keys(given, CONFIGS.get(of, {}), f"{where}: {name}")
    return notes
