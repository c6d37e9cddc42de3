"""generation_config.json: what of it counts, and that the rest is named."""

import json

import numpy as np
import pytest
from transformers import GenerationConfig

from gemkit.errors import WeightsError
from gemkit.weights import generation


def read(tmp_path, **settings):
    (tmp_path / generation.FILE).write_text(json.dumps(settings))
    return generation.read(tmp_path)


def test_nothing_said(tmp_path):
    assert generation.read(tmp_path) == generation.Generation()
    found = read(tmp_path, _from_model_config=True, eos_token_id=[1, 106], cache_implementation="hybrid")
    assert (found.sampling, found.always, found.stop, found.notes) == (None, {}, (), ())


def test_sampling_is_that_of_transformers(tmp_path):
    found = read(tmp_path, do_sample=True, top_k=64, top_p=0.95, temperature=0.7, min_p=0.1)
    assert found.sampling == {"temperature": 0.7, "top_k": 64, "top_p": 0.95, "min_p": 0.1}
    defaults = GenerationConfig()._get_default_generation_params()
    assert read(tmp_path, do_sample=True).sampling == {key: defaults[key] for key in ("temperature", "top_k")}
    assert read(tmp_path, do_sample=True, top_k=0).sampling["top_k"] is None
    assert read(tmp_path, do_sample=False, temperature=0.5).sampling == {}
    found = read(tmp_path, temperature=0.5)
    assert found.sampling == {}
    assert "temperature=0.5 without do_sample" in found.notes[0]


def test_what_counts_always(tmp_path):
    found = read(
        tmp_path, repetition_penalty=1.2, suppress_tokens=[5], bad_words_ids=[[7], [8, 9]], stop_strings="\n\n"
    )
    assert found.always == {"repetition_penalty": 1.2, "logit_bias": {5: -float("inf"), 7: -float("inf")}}
    assert found.stop == ("\n\n",)
    assert found.notes == (
        "generation_config.json has bad_words_ids of several tokens, which are not kept out: [[8, 9]]",
    )


def test_what_is_not_done_is_named_once(tmp_path):
    found = read(tmp_path, num_beams=4, no_repeat_ngram_size=0, forced_eos_token_id=1, max_length=20, novelty=3)
    assert found.notes == (
        "generation_config.json: num_beams=4 is not used: an answer is one sequence",
        "generation_config.json: forced_eos_token_id=1 is not used: it is not implemented",
        "generation_config.json: max_length=20 is not used: the caller says how long an answer may be (max_tokens)",
        "generation_config.json: not known here, and not used: novelty",
    )


@pytest.mark.parametrize(
    "key", ["temperature", "repetition_penalty", "suppress_tokens", "stop_strings", "bad_words_ids"]
)
def test_values_that_cannot_be(tmp_path, key):
    with pytest.raises(WeightsError, match=key):
        read(tmp_path, **{key: [{}] if key != "temperature" else "hot"})


def test_what_transformers_writes_by_default_says_nothing(tmp_path):
    GenerationConfig(**GenerationConfig()._get_default_generation_params()).save_pretrained(tmp_path)
    assert all("max_length" in note or "do_sample" in note for note in generation.read(tmp_path).notes)


def test_the_metadata_of_a_gguf():
    assert generation.from_gguf({"general.name": "x"}, "x").sampling is None
    keys = {"general.sampling.top_k": 64, "tokenizer.ggml.suppress_tokens": np.array([5, 7], np.int32)}
    found = generation.from_gguf(keys, "x")
    assert found.sampling == {"temperature": 0.8, "top_k": 64, "top_p": 0.95, "min_p": 0.05}  # llama.cpp's defaults
    assert found.always == {"logit_bias": {5: -float("inf"), 7: -float("inf")}}
    assert generation.from_gguf({"general.sampling.temp": 0.0}, "x").sampling == {}
    with pytest.raises(WeightsError, match=r"general\.sampling\.temp"):
        generation.from_gguf({"general.sampling.temp": "hot"}, "x")
