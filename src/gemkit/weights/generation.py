"""How a model is meant to be asked: its generation_config.json, used as Transformers' `generate` uses it, or named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemkit.errors import WeightsError
from gemkit.weights.tokenizer_files import read_json

FILE = "generation_config.json"

# Keys that choose among tokens when `do_sample` is true, under the same names here.
SAMPLED = ("temperature", "top_k", "top_p", "min_p")
# Keys that count with and without sampling.
ALWAYS = ("repetition_penalty", "suppress_tokens", "bad_words_ids", "stop_strings")

# Keys that say nothing about which tokens an answer has, and why not.
NO_EFFECT = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), "the tokenizer has them"),
    "eos_token_id": "used: the ends of answers",
    **dict.fromkeys(("_from_model_config", "transformers_version", "generation_kwargs"), "about the file"),
    **dict.fromkeys(("use_cache", "cache_implementation", "cache_config", "max_cache_len"), "how it is computed"),
    **dict.fromkeys(("prefill_chunk_size", "compile_config", "disable_compile", "low_memory"), "how it is computed"),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), "what is given back"),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), "what is given back"),
    **dict.fromkeys(("assistant_confidence_threshold", "num_assistant_tokens"), "speculation, same answer"),
    **dict.fromkeys(("num_assistant_tokens_schedule", "prompt_lookup_num_tokens"), "speculation, same answer"),
    **dict.fromkeys(("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"), "speculation, same answer"),
    **dict.fromkeys(("max_matching_ngram_size", "is_assistant", "use_mtp"), "speculation, same answer"),
    **dict.fromkeys(("early_stopping", "length_penalty"), "of beams alone"),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values"), "the order of tokens stays"),
    **dict.fromkeys(("max_length", "max_new_tokens"), "the caller says how long an answer may be (max_tokens)"),
}

# Keys that change answers and are not implemented, with the value at which they do nothing.
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), 0.0),
}


@dataclass(frozen=True)
class Generation:
    """Defaults of a model.

    Args:
        sampling: of conversations, by the fields of `generate.Sampling`; empty for greedy, None where the file says
            nothing.
        always: fields that count in every answer: `repetition_penalty`, and `logit_bias` with banned ids.
        stop: strings that end an answer.
        notes: for the user: what the file asks for and is not done.
        given: the file as it is.
    """

    sampling: Mapping[str, Any] | None = None
    always: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)


def read(folder: Path) -> Generation:
    """The defaults of a folder; those of the class if it has no generation_config.json.

    Raises:
        WeightsError: for a value that its key cannot have.
    """
    path = folder / FILE
    if not path.is_file():
        return Generation()
    given = {key: value for key, value in read_json(path).items() if value is not None}
    stop = given.get("stop_strings", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise WeightsError(f"{path}: stop_strings={stop!r} must be texts")
    banned, notes = _banned(given, path)
    always: dict[str, Any] = {"logit_bias": dict.fromkeys(banned, float("-inf"))} if banned else {}
    penalty = _number(given, "repetition_penalty", path)
    if penalty not in (None, 1):
        always["repetition_penalty"] = penalty
    sampling, more = _sampling(given, path)
    unused = [
        f"{key}={value!r}"
        for key, value in given.items()
        if key not in (*SAMPLED, *ALWAYS, "do_sample", *NO_EFFECT) and NEUTRAL.get(key) != value
    ]
    unused += [f"{key}={given[key]!r}" for key in ("max_length", "max_new_tokens") if key in given]
    if unused:
        notes.append(f"{FILE} asks for {', '.join(unused)}, which is not used")
    return Generation(sampling, always, tuple(stop), (*notes, *more), given)


def _sampling(given: Mapping[str, Any], path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Fields of `Sampling`, and notes: Transformers samples only where `do_sample` is true, and from 50 tokens unless
    `top_k` says otherwise."""
    found = {key: _number(given, key, path) for key in SAMPLED if key in given}
    do_sample = given.get("do_sample")
    if do_sample is None and not found:
        return None, []
    if do_sample is not True:
        idle = ", ".join(f"{key}={value}" for key, value in found.items())
        return {}, [f"{FILE} has {idle} without do_sample, so that conversations are greedy"] if idle else []
    if found.get("temperature") == 0:
        return {}, []
    made = {"temperature": 1.0, "top_k": 50, **found}
    made["top_k"] = int(made["top_k"]) or None
    return made, []


def _banned(given: Mapping[str, Any], path: Path) -> tuple[list[int], list[str]]:
    """Ids that are never drawn, and notes of words of several tokens that are."""
    suppressed, words = given.get("suppress_tokens", []), given.get("bad_words_ids", [])
    try:
        ids = [*suppressed, *(id for word in words for id in word)]
        if not all(type(id) is int and id >= 0 for id in ids) or not all(isinstance(word, list) for word in words):
            raise TypeError
    except TypeError:
        raise WeightsError(f"{path}: suppress_tokens and bad_words_ids must be ids and lists of ids") from None
    long = [word for word in words if len(word) != 1]
    notes = [f"{FILE} has bad_words_ids of several tokens, which are not kept out: {long}"] if long else []
    return [*suppressed, *(word[0] for word in words if len(word) == 1)], notes


def _number(given: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = given.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise WeightsError(f"{path}: {key}={value!r} must be a number")
    return value
