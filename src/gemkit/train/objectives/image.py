"""Tasks on pictures: the answer of a PaliGemma is learned, and the `<eos>` after it, from all that comes before it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gemkit.family import Modality
from gemkit.text import Tokenizer
from gemkit.train.batching import ExampleGroup
from gemkit.train.data.encoding import encode_image
from gemkit.train.objective import Need
from gemkit.train.objectives.pretrain import NextToken


class Image(NextToken):
    """The loss on the suffix, which the PaliGemma report (arXiv:2407.07726) found best: a loss on what is asked, or on
    the pictures, made transfers worse.
    """

    name = "image"
    forms = ("image",)
    needs: AbstractSet[Need] = frozenset({"vision"})

    @dataclass(frozen=True)
    class Options:
        """Settings of the objective."""

        # "example", as published: an answer counts the same whatever its length. "token": each token does
        average: Literal["example", "token"] = "example"

    def __init__(
        self, tokenizer: Tokenizer, options: Options | None = None, *, vision: Modality, context: int | None = None
    ):
        self.options = options or self.Options()
        self.tokenizer, self.vision, self.context = tokenizer, vision, context

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        example = encode_image(
            self.tokenizer,
            record["image"],
            record["prompt"],
            record["suffix"],
            vision=self.vision,
            context=self.context,
            average=self.options.average,
        )
        return [(example,)]
