"""Tasks on pictures: the answer of a PaliGemma is learned, and the `<eos>` after it, from all that comes before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from gemkit.family import Modality
from gemkit.text import Tokenizer
from gemkit.train.batching import Unit
from gemkit.train.data.encoding import encode_image
from gemkit.train.objectives.pretrain import NextToken


class Image(NextToken):
    """The loss on the suffix, which the PaliGemma report (arXiv:2407.07726) found best: a loss on what is asked, or on
    the pictures, made transfers worse.

    Args:
        average: "example", as published: an answer counts the same whatever its length. "token": each token does.
    """

    name = "image"
    forms = ("image",)

    def __init__(
        self,
        tokenizer: Tokenizer,
        vision: Modality,
        *,
        context: int | None = None,
        average: Literal["example", "token"] = "example",
    ):
        self.tokenizer, self.vision, self.context = tokenizer, vision, context
        self.average: Literal["example", "token"] = average

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[Unit]:
        example = encode_image(
            self.tokenizer,
            record["image"],
            record["prompt"],
            record["suffix"],
            vision=self.vision,
            context=self.context,
            average=self.average,
        )
        return [(example,)]
