"""How a model is meant to be asked: its generation_config.json, used as Transformers' `generate` uses it, or named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemkit.errors import WeightsError
from gemkit.weights.keys_beside import GENERATION
from gemkit.weights.known_keys import check_keys
from gemkit.weights.tokenizer_files import read_json

FILE = "generation_config.json"

# Keys that choose among tokens when `do_sample` is true, under the same names here.
SAMPLED = ("temperature", "top_k", "top_p", "min_p")


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
        source: where they come from, for people.
    """

    sampling: Mapping[str, Any] | None = None
    always: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    source: str = FILE


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
    return Generation(sampling, always, tuple(stop), (*check_keys(given, GENERATION, FILE), *notes, *more), given)


# Of llama.cpp (common.h), where a GGUF names some and not others; by the fields of `Sampling`.
_LLAMA_CPP = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


def from_gguf(metadata: Mapping[str, Any], label: str) -> Generation:
    """The defaults in the metadata of a GGUF, as llama.cpp uses them, but for conversations alone.

    Raises:
        WeightsError: for a value that its key cannot have.
    """
    named = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    keys = {name: f"general.sampling.{key}" for name, key in named.items()}
    found = {name: _number(metadata, key, label) for name, key in keys.items() if key in metadata}
    banned, _ = _banned(
        {"suppress_tokens": [int(token) for token in metadata.get("tokenizer.ggml.suppress_tokens", ())]}, label
    )
    sampling = {**_LLAMA_CPP, **found} if found else None
    if sampling is not None:
        sampling = {**sampling, "top_k": int(sampling["top_k"]) or None} if sampling["temperature"] > 0 else {}
    always = {"logit_bias": dict.fromkeys(banned, float("-inf"))} if banned else {}
    return Generation(sampling, always, source="the GGUF's general.sampling")


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


def _banned(given: Mapping[str, Any], path: Path | str) -> tuple[list[int], list[str]]:
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


def _number(given: Mapping[str, Any], key: str, path: Path | str) -> float | None:
    value = given.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise WeightsError(f"{path}: {key}={value!r} must be a number")
    return value
