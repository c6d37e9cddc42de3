"""The reference model of DPO and of RL's KL penalty: the policy as it was before training began."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from gemkit.adapters import registry
from gemkit.nn import LanguageModel
from gemkit.train import losses
from gemkit.train.batching import ExampleGroup
from gemkit.train.objectives.pretrain import rows_of


def frozen(model: LanguageModel) -> Any:
    """The model as it is now, for as long as it is trained; None where adapters are trained: without them it is that.

    What is copied is every weight, so a full fine-tuning holds the model twice.
    """
    if registry.trains(model):
        return None
    kept = copy.deepcopy(model).requires_grad_(False)
    return kept.eval()


@contextlib.contextmanager
def before_training(model: LanguageModel, other: Any) -> Iterator[Any]:
    """The reference: another model, or this one with the adapters off that are trained. Nothing is recorded."""
    was_training = model.training
    reference = model if other is None else other
    try:
        with registry.trained_ones_off(model) if other is None else contextlib.nullcontext(), torch.no_grad():
            reference.eval()
            yield reference
    finally:
        model.train(was_training)


def logprobs(model: LanguageModel, unit: ExampleGroup, temperature: float = 1.0) -> list[Tensor]:
    """Log-probability of each token that counts, of each sequence of a unit."""
    rows = rows_of(model, [unit])
    found_M = rows.loss(model, losses.token_logprobs(rows.targets, temperature=temperature))
    return [found_M[rows.sequences == i] for i in range(len(unit))]


def per_sequence(values_M: Tensor, units: Sequence[ExampleGroup]) -> list[Tensor]:
    """Values of the rows of units, sequence by sequence."""
    counts = [int((example.weights != 0).sum()) for example in chain.from_iterable(units)]
    ends = [*accumulate(counts)]
    return [values_M[end - count : end] for end, count in zip(ends, counts, strict=True)]
