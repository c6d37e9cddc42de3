"""Distillation: a student learns what a larger teacher would have said at each place of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemkit.errors import ConfigError
from gemkit.nn import LanguageModel
from gemkit.text import Tokenizer
from gemkit.train import losses
from gemkit.train.batching import ExampleGroup
from gemkit.train.objective import Loss, Need
from gemkit.train.objectives.pretrain import Pretrain, rows_of, weight
from gemkit.train.objectives.sft import Sft


class Distill:
    """Divergence from a teacher that is asked online, in place of the next token.

    The teacher's hidden rows are computed once a step, or with `sampled` the tokens that are drawn from it; its logits
    are never all there.

    Args:
        teacher: a module with the student's vocabulary; it is never trained. `attach` may give it later.
        context: as for pretraining and fine-tuning.
    """

    name = "distill"
    forms: tuple[str, ...] = ("text", "chat", "completion")
    needs: AbstractSet[Need] = frozenset({"teacher"})

    @dataclass(frozen=True)
    class Options:
        """Settings of the objective. Raises: ConfigError."""

        teacher: str = ""  # the name of a model, which `attach` loads
        beta: float = 0.0  # 0 is the forward divergence of Gemma 2, 1 the reverse, between them GKD's mixture
        temperature: float = 1.0  # both distributions are flattened by it
        sampled: int = 0  # tokens drawn of the teacher at each place, to learn these alone, as Gemma 3 did with 256

        def __post_init__(self) -> None:
            if self.sampled < 0 or (self.sampled and (self.beta or self.temperature != 1)):
                raise ConfigError(
                    f"sampled={self.sampled} must not be negative, and is a cross-entropy that beta={self.beta} and "
                    f"temperature={self.temperature} have no part in"
                )

    def __init__(
        self, tokenizer: Tokenizer, options: Options | None = None, *, teacher: Any = None, context: int | None = None
    ):
        self.options, self.teacher = options or self.Options(), teacher
        self._text, self._answers = Pretrain(tokenizer, context=context), Sft(tokenizer, context=context)

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        return (self._text if "text" in record else self._answers).encode(record, rng)

    @torch.no_grad()
    def prepare(
        self, model: LanguageModel, units: Sequence[ExampleGroup], rng: np.random.Generator
    ) -> list[ExampleGroup]:
        if self.teacher is None:
            raise ConfigError("distill has no teacher: name one")
        if self.teacher.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"the teacher has a vocabulary of {self.teacher.config.vocab_size} and the student of "
                f"{model.config.vocab_size}: distillation needs the same"
            )
        drawn = torch.Generator(model.device).manual_seed(int(rng.integers(2**62)))
        return [self._taught(unit, drawn) for unit in units]

    def _taught(self, unit: ExampleGroup, drawn: torch.Generator) -> ExampleGroup:
        rows = rows_of(self.teacher, [unit])
        told: Sequence[Tensor]
        if self.options.sampled:
            told = losses.sample_teacher(partial(rows.loss, self.teacher), self.options.sampled, drawn)
        else:
            told = (rows.hidden(self.teacher),)
        return tuple(
            replace(example, extra={**example.extra, "teacher": [part[rows.sequences == i] for part in told]})
            for i, example in enumerate(unit)
        )

    def size(self, units: Sequence[ExampleGroup]) -> float:
        return weight(units)

    def loss(self, model: LanguageModel, units: Sequence[ExampleGroup]) -> Loss:
        rows = rows_of(model, units)
        told: list[Tensor] = [
            torch.cat(parts).to(rows.weights.device)
            for parts in zip(*(example.extra["teacher"] for example in chain.from_iterable(units)), strict=True)
        ]
        if self.options.sampled:
            loss = losses.sampled_cross_entropy(told[0], told[1], rows.weights)
        else:
            loss = losses.distillation(
                self.teacher, told[0], rows.weights, beta=self.options.beta, temperature=self.options.temperature
            )
        return Loss(rows.loss(model, loss)[0])
