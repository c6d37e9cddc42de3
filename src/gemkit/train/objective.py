"""What can be learned, as the trainer sees it: an objective makes examples of records, and a loss of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from gemkit.nn import LanguageModel
from gemkit.train.batching import Unit


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of some units: a sum, which the trainer divides by the size of the whole step.

    So a step that is computed in parts, of whatever lengths, has the gradient of the step computed at once.
    """

    total: Tensor  # () differentiable
    metrics: Mapping[str, float] = field(default_factory=dict)  # sums too: each is divided by the step's size


class Objective(Protocol):
    """One way to learn. What it remembers (a reference model, a teacher) is given when it is made."""

    name: str  # "sft", "dpo", ...
    forms: tuple[str, ...]  # the forms of records that it takes, as `data` names them

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[Unit]:
        """What there is to learn of one record; an empty list if nothing. It depends on its arguments alone."""
        ...

    def prepare(self, model: LanguageModel, units: Sequence[Unit], rng: np.random.Generator) -> list[Unit]:
        """Once a step, before any gradient: what must be known of the units first, such as answers to their prompts."""
        ...

    def size(self, units: Sequence[Unit]) -> float:
        """What the losses of a whole step are divided by: the weights of its tokens, or the number of its pairs."""
        ...

    def loss(self, model: LanguageModel, units: Sequence[Unit]) -> Loss:
        """The loss of some units of a step, with a gradient."""
        ...
