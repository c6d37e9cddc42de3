"""Supervised fine-tuning: the answers of conversations, and completions of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gemkit.text import Tokenizer
from gemkit.train.batching import ExampleGroup
from gemkit.train.data.encoding import encode_answer, encode_chat
from gemkit.train.objectives.image import Image
from gemkit.train.objectives.pretrain import NextToken


class Sft(NextToken):
    """Only what the model has to say is learned, and the token that ends it; what it is asked is read.

    Args:
        context: a conversation that is longer loses turns at its end; a completion that is longer is left out.
    """

    name = "sft"
    forms = ("chat", "completion")
    by_form: ClassVar = {"image": Image}  # records of other forms, and the objective that takes them

    @dataclass(frozen=True)
    class Options:
        """Settings of the objective."""

        smoothing: float = 0.0  # label smoothing; the transfers of PaliGemma (arXiv:2407.07726) had 0 to 0.3
        learn_prompt: bool = False  # count the tokens of a completion's prompt as well

    def __init__(self, tokenizer: Tokenizer, options: Options | None = None, *, context: int | None = None):
        self.options = options or self.Options()
        self.tokenizer, self.context, self.smoothing = tokenizer, context, self.options.smoothing

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        if "messages" in record:
            return [(encode_chat(self.tokenizer, record["messages"], context=self.context),)]
        prompt, completion = record["prompt"], record["completion"]
        example = encode_answer(
            self.tokenizer, prompt, completion, context=self.context, learn_prompt=self.options.learn_prompt
        )
        return [(example,)]
