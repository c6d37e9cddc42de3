"""Requests: how they are made of prompts and options, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gemkit.errors import ConfigError
from gemkit.generate import GREEDY, INSTRUCTION_TUNED, MAX_TOKENS, Request, Sampling, loop_options, unused_ids
from gemkit.text.prompts import Prompt, Span
from support.fake_executors import BOS, ByteStream, tiny_decoder

PROMPT = Prompt("complete", (Span("control", "<bos>", (BOS,)), Span("content", "ab", (2, 3))), frozenset({1}))
PICTURED = Prompt("image", (Span("control", "<image>" * 2, (9, 9)), Span("content", "ab", (2, 3))), frozenset({1}))


def test_what_the_options_do_not_say_is_the_default():
    made = Request.from_prompt(PROMPT, {}, INSTRUCTION_TUNED)
    assert made == Request([BOS, 2, 3], INSTRUCTION_TUNED, max_tokens=MAX_TOKENS, stop_ids=frozenset({1}))
    assert Request.from_prompt(PROMPT, {}).sampling == GREEDY


def test_what_the_options_say_counts():
    made = Request.from_prompt(
        PROMPT,
        {"temperature": 0.5, "seed": 3, "max_tokens": None, "stop": ["x"], "logprobs": 2, "speculate": True},
        INSTRUCTION_TUNED,
        history=[BOS, 7],
        slot=4,
    )
    assert made.sampling == replace(INSTRUCTION_TUNED, temperature=0.5, seed=3)
    assert (made.ids, made.max_tokens, made.stop_strings) == ([BOS, 7, BOS, 2, 3], None, ["x"])
    assert (made.logprobs, made.slot, made.spans) == (2, 4, ())


def test_temperature_zero_is_greedy_whatever_was_published():
    assert Request.from_prompt(PROMPT, {"temperature": 0}, INSTRUCTION_TUNED).sampling == GREEDY


def test_a_setting_without_effect_and_an_unknown_one_are_refused():
    with pytest.raises(ConfigError, match="top_k=4 cannot take effect at temperature 0"):
        Request.from_prompt(PROMPT, {"top_k": 4})
    with pytest.raises(ConfigError, match="unknown option 'warmth'; options are max_tokens, temperature"):
        Request.from_prompt(PROMPT, {"warmth": 1})
    with pytest.raises(ConfigError, match="top_p=2"):
        Request.from_prompt(PROMPT, {"temperature": 1.0, "top_p": 2})


def test_banned_ids_are_never_drawn_unless_the_caller_says_so():
    made = Request.from_prompt(PROMPT, {"logit_bias": {9: 1.0}}, banned=[8, 9])
    assert made.sampling.logit_bias == {8: -math.inf, 9: 1.0}


def test_rows_beyond_the_tokenizer_and_the_placeholder_of_images_are_unused():
    assert unused_ids(tiny_decoder(vocab_size=12), 10) == [10, 11]
    assert unused_ids(tiny_decoder(vocab_size=12), 12, image_token=9) == [9]
    assert unused_ids(tiny_decoder(vocab_size=12), 12) == []


def test_a_prompt_with_images_sees_itself_whole_behind_a_history_too():
    assert Request.from_prompt(PICTURED, {}).spans == [(0, 4)]
    assert Request.from_prompt(PICTURED, {}, history=[BOS, 5, 6]).spans == [(3, 7)]


def test_options_that_are_no_part_of_a_request_go_to_the_loop():
    options = {"text_stream": ByteStream, "beyond_context": False, "speculate": False}
    assert loop_options({"temperature": 1.0}, ByteStream) == options
    assert loop_options({"speculate": 3, "beyond_context": True}, ByteStream) == {
        **options,
        "speculate": 3,
        "beyond_context": True,
    }


def test_a_request_is_checked_against_a_model():
    decoder = tiny_decoder(max_context=8)
    Request([BOS] * 8).check(decoder)
    Request([BOS] * 9, max_tokens=1).check(decoder, beyond_context=True)
    with pytest.raises(ConfigError, match="stop_strings need a text_stream"):
        Request([BOS], Sampling(), stop_strings=["a"]).check(decoder, has_text=False)
