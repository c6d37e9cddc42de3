"""The keys of published configurations, and the effect of each here: the table behind `docs/configuration-keys.md`.

A key is used; or ignored, with the reason why it cannot change a result; or refused, but at values that change nothing;
or noted, since Transformers gives it no say either. A key that no table knows is noted by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemkit.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """The effect of one key.

    Args:
        effect: "used", "ignored", "refused" or "noted".
        why: its use, or the reason.
        neutral: of a refused or noted key, values besides null at which nothing is said.
    """

    effect: Literal["used", "ignored", "refused", "noted"]
    why: str
    neutral: tuple[Any, ...] = ()


Table = Mapping[str, Key]


def _used(why: str, *names: str) -> dict[str, Key]:
    return {name: Key("used", why) for name in names}


def _ignored(why: str, *names: str) -> dict[str, Key]:
    return {name: Key("ignored", why) for name in names}


def _refused(why: str, **neutral: Any) -> dict[str, Key]:
    return {name: Key("refused", why, (value,)) for name, value in neutral.items()}


def _noted(why: str, **neutral: Any) -> dict[str, Key]:
    return {name: Key("noted", why, (value,)) for name, value in neutral.items()}


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
    **_used("the kind of model", "model_type"),
    **_ignored("the model type and the tensors say the same", "architectures"),
    **_ignored("names code or its version; no code of a file is run", "auto_map", "transformers_version"),
    **_ignored("where the file came from", "_name_or_path", "name_or_path", "_commit_hash", "model_name"),
    **_ignored(
        "written by training tools about themselves", "unsloth_version", "unsloth_fixed", "task_specific_params"
    ),
    **_ignored("weights are computed with as they are stored", "dtype", "torch_dtype"),
    **_ignored("names of a classifier's outputs", "id2label", "label2id", "problem_type", "num_labels"),
    **_ignored(
        "the shape of Python results", "return_dict", "output_attentions", "output_hidden_states", "use_return_dict"
    ),
    **_ignored("a cache changes no result", "use_cache", "cache_implementation"),
    **_ignored(
        "which kernel computes attention", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"
    ),
    **_ignored("computed whole here; Gemma reads it nowhere", "chunk_size_feed_forward"),
    **_ignored("how new weights are drawn", "initializer_range", "initializer_factor"),
    **_ignored("sampling settings stand in generation_config.json", *_GENERATION),
    **_ignored("older Python back ends", "tf_legacy_loss", "use_bfloat16", "torchscript", "tie_encoder_decoder"),
    **_ignored(
        "of encoder-decoders",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "prefix",
        "sep_token_id",
        "tokenizer_class",
        "finetuning_task",
    ),
    **_refused("the family has decoders alone", is_encoder_decoder=False),
    **_refused("no member is", is_decoder=False),
    **_refused("removed heads are not implemented", pruned_heads={}),
    **_refused("layers that differ by it are not implemented", per_layer_config={}),
    **_used("how weights are kept: gemkit's own form; others are refused by name", "quantization_config"),
    **_ignored("MLX's settings; weights that it packed have scales beside them, which are refused", "quantization"),
    **_used("the ids that tokenizer and answers go by", "bos_token_id", "eos_token_id", "pad_token_id"),
    **_used("false with no head in the file is refused; else the head of the file is used", "tie_word_embeddings"),
}
_DECODER: Table = {
    **_EVERY,
    **_used("rows of the embedding", "vocab_size"),
    **_used("widths and counts", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    **_used("widths and counts", "num_key_value_heads", "head_dim"),
    **_used("tokens in training; the unit of yarn and dynamic ropes", "max_position_embeddings"),
    **_used("added to the mean square of norms", "rms_norm_eps"),
    **_used("the rope; see its own keys", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    **_used("of yarn, where the rope does not say it", "original_max_position_embeddings"),
    **_noted("no dropout is applied while training here; it changes no answer", attention_dropout=0),
    **_refused("no member has biases there", attention_bias=False),
    **_refused("text that sees what follows it is not implemented", use_bidirectional_attention=False),
    **_ignored("counted from the tower", "num_image_tokens"),
}
_WINDOWED: Table = {
    **_DECODER,
    **_used("the activation", "hidden_activation"),
    **_ignored("this class reads hidden_activation", "hidden_act"),
    **_used("queries are divided by its root", "query_pre_attn_scalar"),
    **_used("visible tokens of sliding layers", "sliding_window"),
    **_used("the kind of each layer", "layer_types"),
    **_used("soft caps; null is none", "attn_logit_softcapping", "final_logit_softcapping"),
    **_ignored("the hybrid cache of Transformers", "sliding_window_size"),
}
CONFIGS: Mapping[str, Table] = {
    "gemma": {
        **_DECODER,
        **_used("the activation", "hidden_act"),
        **_noted("this class reads hidden_act", hidden_activation="gelu_pytorch_tanh"),
    },
    "gemma2": {**_WINDOWED, **_noted("every other layer slides, whatever it says", sliding_window_pattern=2)},
    "gemma3_text": {
        **_WINDOWED,
        "attn_logit_softcapping": Key("noted", "Transformers has the key in Gemma 3 and never applies it"),
        **_used("every n-th layer is global, where layer_types is absent", "sliding_window_pattern"),
        **_noted("layer_types says it", _sliding_window_pattern=6),
        **_used("base of the sliding layers, where rope_parameters has none", "rope_local_base_freq"),
        **_ignored("the vision tower's part", "mm_tokens_per_image"),
    },
    "recurrent_gemma": {
        **_DECODER,
        **_used("the activation", "hidden_activation"),
        **_used("width and taps of the recurrence", "lru_width", "conv1d_width"),
        **_used("visible tokens besides the current one", "attention_window_size"),
        **_used("the soft cap of the logits", "logits_soft_cap"),
        **_used("the pattern of layers", "block_types", "_block_types", "layers_block_type", "layer_types"),
        **_ignored("how new weights are drawn", "w_init_variance_scale", "final_w_init_variance_scale"),
        **_refused("every member scales its embeddings", embeddings_scale_by_sqrt_dim=True),
    },
    "paligemma": {
        **_EVERY,
        **_used("decoder and tower, each with a table of its own", "text_config", "vision_config"),
        **_used("the id that holds a patch's place", "image_token_index", "image_token_id"),
        **_used("width of the decoder", "projection_dim"),
        **_ignored("the decoder's own keys count", "hidden_size", "vocab_size", "_vocab_size"),
        **_ignored("no loss is computed at it here", "ignore_index"),
    },
    "gemma3": {
        **_EVERY,
        **_used(
            "the decoder, with a table of its own; the tower is left out, with a note", "text_config", "vision_config"
        ),
        **_ignored(
            "of the tower, which is left out with a note", "mm_tokens_per_image", "image_token_index", "image_token_id"
        ),
        **_ignored(
            "of the tower, which is left out with a note",
            "boi_token_index",
            "eoi_token_index",
            "boi_token_id",
            "eoi_token_id",
        ),
        **_ignored("the decoder's own keys count", "hidden_size", "vocab_size"),
    },
    "siglip_vision_model": {
        **_EVERY,
        **_used("widths and counts", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        **_used("pixels", "image_size", "patch_size"),
        **_used("1e-6 in every release", "layer_norm_eps"),
        **_used("gelu_pytorch_tanh and 3; others are refused", "hidden_act", "num_channels"),
        **_ignored(
            "counted from the sizes", "num_image_tokens", "projection_dim", "num_positions", "projector_hidden_act"
        ),
        **_ignored("of a head that pools the image, which nothing reads", "vision_use_head"),
        **_ignored("of a text tower, which there is none of", "vocab_size"),
        **_noted("no dropout is applied while training here; it changes no answer", attention_dropout=0),
    },
}


def check_keys(values: Mapping[str, Any], table: Table, where: str) -> list[str]:
    """Notes on the keys of a configuration that have no say.

    Raises:
        ConfigError: for a refused key at a value that would change a result.
    """
    notes = []
    for name, value in values.items():
        key = table.get(name)
        if key is None or value is None or value in key.neutral:
            continue
        if key.effect == "refused":
            raise ConfigError(f"{where}: {name}={value!r} is not implemented: {key.why}")
        if key.effect == "noted":
            notes.append(f"{where}: {name}={value!r} has no say: {key.why}")
    if unknown := sorted(name for name in values if name not in table):
        notes.append(f"{where}: not known here, and not used: {', '.join(unknown)}")
    return notes


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
