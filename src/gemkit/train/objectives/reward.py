"""A reward model: a number for each answer, larger for the one that people preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemkit.errors import ConfigError
from gemkit.nn import Batch, LanguageModel
from gemkit.text import Tokenizer
from gemkit.train import losses
from gemkit.train.batching import ExampleGroup
from gemkit.train.objective import Loss, Need
from gemkit.train.objectives.dpo import pair


class Reward:
    """The Bradley-Terry model of preferences on a scalar head, which reads the hidden row of the last token.

    The head is `score`, a projection from the width to one number, as in Transformers' `...ForSequenceClassification`;
    `attach` puts it there. It is trained beside whatever else is, all weights or adapters.

    Args:
        context: tokens of prompt and answer at most; longer pairs are left out.
    """

    name = "reward"
    forms: tuple[str, ...] = ("preference",)
    fields = ("margin",)  # of a record, beside those of its form: by how much the preferred answer should be better

    needs: AbstractSet[Need] = frozenset({"score"})

    @dataclass(frozen=True)
    class Options:
        """Settings of the objective. Raises: ConfigError."""

        # factor of the square of the sum of both rewards, which the loss of their difference leaves free
        # (arXiv:2312.09244, appendix A); 0.01 there
        centre: float = 0.0

        def __post_init__(self) -> None:
            if self.centre < 0:
                raise ConfigError(f"centre={self.centre} must not be negative")

    def __init__(self, tokenizer: Tokenizer, options: Options | None = None, *, context: int | None = None):
        self.tokenizer, self.options, self.context = tokenizer, options or self.Options(), context

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        chosen, rejected = pair(self.tokenizer, record, self.context)
        return [(replace(chosen, extra={"margin": float(record.get("margin") or 0)}), rejected)]

    def prepare(
        self, model: LanguageModel, units: Sequence[ExampleGroup], rng: np.random.Generator
    ) -> list[ExampleGroup]:
        return list(units)

    def size(self, units: Sequence[ExampleGroup]) -> float:
        return float(len(units))

    def loss(self, model: LanguageModel, units: Sequence[ExampleGroup]) -> Loss:
        rewards_E = rewards(model, [example.ids for example in chain.from_iterable(units)])
        chosen_B, rejected_B = rewards_E[0::2], rewards_E[1::2]
        wanted_B = chosen_B.new_tensor([chosen.extra["margin"] for chosen, _ in units])
        total = losses.bradley_terry(chosen_B, rejected_B, wanted_B).sum()
        if self.options.centre:
            total = total + self.options.centre * (chosen_B + rejected_B).square().sum()
        with torch.no_grad():
            margin_B = chosen_B - rejected_B
            metrics = {"margin": float(margin_B.sum()), "accuracy": float((margin_B > 0).sum())}
        return Loss(total, metrics)


def rewards(model: LanguageModel, sequences: Sequence[Any]) -> Tensor:
    """The reward of each sequence of ids, (B,): what `score` makes of its last token.

    Raises:
        ConfigError: if the model has no such head.
    """
    batch = Batch.of([torch.as_tensor(ids) for ids in sequences], device=model.device)
    return model(batch, None, (batch.starts[1:] - 1).to(model.device), output="reward")
