"""Supervised fine-tuning: the answers of conversations, and completions of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemkit.text import Tokenizer
from gemkit.train.batching import Unit
from gemkit.train.data.encoding import encode_answer, encode_chat
from gemkit.train.objectives.pretrain import NextToken


class Sft(NextToken):
    """Only what the model has to say is learned, and the token that ends it; what it is asked is read.

    Args:
        context: a conversation that is longer loses turns at its end; a completion that is longer is left out.
        smoothing: label smoothing; the transfers of PaliGemma (arXiv:2407.07726) were made with 0 to 0.3.
        learn_prompt: count the tokens of a completion's prompt as well.
    """

    name = "sft"
    forms = ("chat", "completion")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int | None = None,
        smoothing: float = 0.0,
        learn_prompt: bool = False,
    ):
        self.tokenizer, self.context = tokenizer, context
        self.smoothing, self.learn_prompt = smoothing, learn_prompt

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[Unit]:
        if "messages" in record:
            return [(encode_chat(self.tokenizer, record["messages"], context=self.context),)]
        prompt, completion = record["prompt"], record["completion"]
        example = encode_answer(
            self.tokenizer, prompt, completion, context=self.context, learn_prompt=self.learn_prompt
        )
        return [(example,)]
