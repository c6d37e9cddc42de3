"""DPO: of two answers to a prompt the preferred one becomes likelier than it was, the other less likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from gemkit.errors import ConfigError, DataError
from gemkit.nn import LanguageModel
from gemkit.text import Tokenizer
from gemkit.train import losses
from gemkit.train.batching import ExampleGroup
from gemkit.train.data.encoding import encode_answer
from gemkit.train.objective import Loss, Need
from gemkit.train.objectives import reference
from gemkit.train.objectives.pretrain import rows_of


class Dpo:
    """Direct preference optimisation; its losses are `losses.dpo`, `losses.robust_dpo` and `losses.ipo`.

    The reference is the model without the adapters that are trained; where all weights are, the copy of it that
    `attach` makes, or any model given.

    Args:
        context: tokens of prompt and answer at most; longer pairs are left out.
    """

    name = "dpo"
    forms: tuple[str, ...] = ("preference",)
    needs: AbstractSet[Need] = frozenset({"reference"})

    @dataclass(frozen=True)
    class Options:
        """Settings of the objective. Raises: ConfigError."""

        beta: float = 0.1  # the cost of leaving the reference; larger stays nearer
        smoothing: float = 0.0  # share of preferences that are taken to be wrong
        # "sigmoid" is DPO, "robust" corrects it for the wrong ones, "ipo" is its squared variant, of mean
        # log-probabilities
        loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"

        def __post_init__(self) -> None:
            if self.loss not in ("sigmoid", "robust", "ipo"):
                raise ConfigError(f"loss={self.loss!r} is not one of sigmoid, robust, ipo")
            if not self.beta > 0 or not 0 <= self.smoothing < 0.5:
                raise ConfigError(f"beta={self.beta} must be above 0, and smoothing={self.smoothing} in [0, 0.5)")
            if self.loss == "ipo" and self.smoothing:
                raise ConfigError(f"smoothing={self.smoothing} has no part in loss='ipo'")

    def __init__(self, tokenizer: Tokenizer, options: Options | None = None, *, context: int | None = None):
        self.tokenizer, self.options, self.context = tokenizer, options or self.Options(), context
        self.reference: Any = None  # None: the model without its trained adapters

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        return [pair(self.tokenizer, record, self.context)]

    def prepare(
        self, model: LanguageModel, units: Sequence[ExampleGroup], rng: np.random.Generator
    ) -> list[ExampleGroup]:
        with reference.before_training(model, self.reference) as before:
            known = [[float(part.sum(dtype=torch.float64)) for part in reference.logprobs(before, u)] for u in units]
        return [
            tuple(
                replace(example, extra={**example.extra, "reference": sum_})
                for example, sum_ in zip(unit, sums, strict=True)
            )
            for unit, sums in zip(units, known, strict=True)
        ]

    def size(self, units: Sequence[ExampleGroup]) -> float:
        return float(len(units))

    def loss(self, model: LanguageModel, units: Sequence[ExampleGroup]) -> Loss:
        options, rows = self.options, rows_of(model, units)
        logprobs_M = rows.loss(model, losses.token_logprobs(rows.targets))
        sums_E = torch.stack([part.sum() for part in reference.per_sequence(logprobs_M, units)])
        known_E = sums_E.new_tensor([example.extra["reference"] for unit in units for example in unit])
        moved_E = sums_E - known_E
        if options.loss == "ipo":
            counts = [max(1, np.count_nonzero(example.weights)) for unit in units for example in unit]
            moved_E = moved_E / moved_E.new_tensor(counts)
            loss_B = losses.ipo(moved_E[0::2], moved_E[1::2], options.beta)
        else:
            of_pairs = losses.robust_dpo if options.loss == "robust" else losses.dpo
            loss_B = of_pairs(moved_E[0::2], moved_E[1::2], options.beta, options.smoothing)
        with torch.no_grad():
            margin_B = options.beta * (moved_E[0::2] - moved_E[1::2])
            metrics = {"margin": float(margin_B.sum()), "accuracy": float((margin_B > 0).sum())}
        return Loss(loss_B.sum(), metrics)


def pair(tokenizer: Tokenizer, record: Mapping[str, Any], context: int | None) -> ExampleGroup:
    """The preferred answer, then the other.

    Raises:
        DataError: if they are the same, to the token: nothing could be preferred.
    """
    chosen, rejected = (
        encode_answer(tokenizer, record["prompt"], record[side], context=context) for side in ("chosen", "rejected")
    )
    if np.array_equal(chosen.ids, rejected.ids):
        raise DataError("chosen and rejected are the same tokens, so neither can be preferred")
    return chosen, rejected
