"""Training objectives as the trainer sees them: examples made of records, and a loss of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from gemkit.nn import LanguageModel
from gemkit.train.batching import ExampleGroup


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of some units: a sum, which the trainer divides by the size of the whole step.

    So a step that is computed in parts, of whatever lengths, has the gradient of the step computed at once.
    """

    total: Tensor  # () differentiable
    metrics: Mapping[str, float] = field(default_factory=dict)  # sums too: each is divided by the step's size


# what an objective must be given before training, by `objectives.attach`: a teacher model, the model before training,
# a judge of answers; a reward head on the model itself; and, when it is made, the image tower
Need = Literal["teacher", "reference", "judge", "score", "vision"]


class Objective(Protocol):
    """One way to learn. Its class has `Options`, a frozen dataclass of the settings that an experiment may give it."""

    name: str  # "sft", "dpo", ...
    forms: tuple[str, ...]  # the forms of records that it takes, as `data` names them

    @property
    def needs(self) -> AbstractSet[Need]: ...

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        """Examples of one record; an empty list if it teaches nothing. They depend on the arguments alone."""
        ...

    def prepare(
        self, model: LanguageModel, units: Sequence[ExampleGroup], rng: np.random.Generator
    ) -> list[ExampleGroup]:
        """Once a step, before any gradient: what must be known of the units first, such as answers to their prompts."""
        ...

    def size(self, units: Sequence[ExampleGroup]) -> float:
        """Denominator of a whole step's loss: the weights of its tokens, or the number of its pairs."""
        ...

    def loss(self, model: LanguageModel, units: Sequence[ExampleGroup]) -> Loss:
        """The loss of some units of a step, with a gradient."""
        ...
