"""A reward model: a number for each answer, larger for the one that people preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemkit.errors import ConfigError
from gemkit.nn import Batch, LanguageModel
from gemkit.text import Tokenizer
from gemkit.train import losses
from gemkit.train.batching import Unit
from gemkit.train.objective import Loss
from gemkit.train.objectives.dpo import pair


class Reward:
    """The Bradley-Terry model of preferences on a scalar head, which reads the hidden row of the last token.

    The head is `score`, a projection from the width to one number, as in Transformers' `...ForSequenceClassification`;
    `attach` puts it there. It is trained beside whatever else is, all weights or adapters.

    Args:
        centre: factor of the square of the sum of both rewards, which only their difference tells otherwise
            (arXiv:2312.09244, appendix A); 0.01 there.
        context: tokens of prompt and answer at most; longer pairs are left out.
    """

    name = "reward"
    forms: tuple[str, ...] = ("preference",)

    def __init__(self, tokenizer: Tokenizer, *, centre: float = 0.0, context: int | None = None):
        if centre < 0:
            raise ConfigError(f"centre={centre} must not be negative")
        self.tokenizer, self.centre, self.context = tokenizer, centre, context

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[Unit]:
        return [pair(self.tokenizer, record, self.context)]

    def prepare(self, model: LanguageModel, units: Sequence[Unit], rng: np.random.Generator) -> list[Unit]:
        return list(units)

    def size(self, units: Sequence[Unit]) -> float:
        return float(len(units))

    def loss(self, model: LanguageModel, units: Sequence[Unit]) -> Loss:
        rewards_E = rewards(model, [example.ids for example in chain.from_iterable(units)])
        chosen_B, rejected_B = rewards_E[0::2], rewards_E[1::2]
        total = losses.bradley_terry(chosen_B, rejected_B).sum()
        if self.centre:
            total = total + self.centre * (chosen_B + rejected_B).square().sum()
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
