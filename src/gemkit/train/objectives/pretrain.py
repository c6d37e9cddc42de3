"""Pretraining: the next token of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from gemkit.nn import LanguageModel
from gemkit.text import Tokenizer
from gemkit.train import losses
from gemkit.train.batching import ExampleGroup, PackedBatch
from gemkit.train.data.encoding import encode_text
from gemkit.train.objective import Loss, Need


class NextToken:
    """Cross-entropy of each token with a weight, over the sum of all weights: what differs is how records become that.

    The base of pretraining, infilling, fine-tuning and tasks on images.
    """

    name: str
    forms: tuple[str, ...]
    needs: AbstractSet[Need] = frozenset()
    smoothing = 0.0  # share of the target that is spread over the vocabulary
    z_loss = 0.0  # factor of the square of log Z

    def prepare(
        self, model: LanguageModel, units: Sequence[ExampleGroup], rng: np.random.Generator
    ) -> list[ExampleGroup]:
        return list(units)

    def size(self, units: Sequence[ExampleGroup]) -> float:
        return weight(units)

    def loss(self, model: LanguageModel, units: Sequence[ExampleGroup]) -> Loss:
        alike = sorted(units, key=lambda unit: [(example.prefix, len(example)) for example in unit])
        rows = rows_of(model, alike)  # attention takes short neighbours of one length at once
        loss = losses.cross_entropy(rows.targets, rows.weights, smoothing=self.smoothing, z_loss=self.z_loss)
        total, values_M2 = rows.loss(model, loss)
        plain = self.smoothing == self.z_loss == 0
        return Loss(total, {} if plain else {"nll": float(values_M2[:, 1].sum())})


class Pretrain(NextToken):
    """Every token of a text is learned, and the `<eos>` at its end.

    Args:
        context: longer texts are cut into pieces of this many tokens.
    """

    @dataclass(frozen=True)
    class Options:
        """Settings of the objective."""

        z_loss: float = 0.0  # factor of (log Z)^2, such as 1e-4 in PaLM; keeps logits from drifting in long runs

    name = "pretrain"
    forms = ("text",)

    def __init__(self, tokenizer: Tokenizer, options: Options | None = None, *, context: int | None = None):
        self.options = options or self.Options()
        self.tokenizer, self.context, self.z_loss = tokenizer, context, self.options.z_loss

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        return [(piece,) for piece in encode_text(self.tokenizer, record["text"], context=self.context)]


def rows_of(model: LanguageModel, units: Sequence[ExampleGroup]) -> PackedBatch:
    """All sequences of units, end to end, where the model is."""
    return PackedBatch.of([*chain.from_iterable(units)], model.device)


def weight(units: Sequence[ExampleGroup]) -> float:
    """The sum of what all tokens count."""
    return float(sum(example.weights.sum(dtype=np.float64) for unit in units for example in unit))
