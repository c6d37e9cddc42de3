"""What the trainer is tested with: an objective that is as plain as one can be, and steps without a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gemkit.family import DecoderConfig
from gemkit.train.batching import Example, ExampleGroup, PackedBatch
from gemkit.train.experiment import Experiment, Optimizer
from gemkit.train.initialise import new_module
from gemkit.train.objective import Loss
from support.tiny import VOCAB, tiny

PLAIN = Optimizer(1e-3, (0.9, 0.999), 1e-8, 0.1, warmup=0, decay="constant")


class NextToken:
    """Cross-entropy of all logits at once."""

    name = "pretrain"
    forms = ("text",)

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        return []

    def prepare(self, model: Any, units: Sequence[ExampleGroup], rng: np.random.Generator) -> list[ExampleGroup]:
        return list(units)

    def size(self, units: Sequence[ExampleGroup]) -> float:
        return float(sum(example.weights.sum() for unit in units for example in unit))

    def loss(self, model: Any, units: Sequence[ExampleGroup]) -> Loss:
        rows = PackedBatch.of([example for unit in units for example in unit])
        logits_MV = model.decoder.lm_head(rows.hidden(model))
        wide = torch.promote_types(logits_MV.dtype, torch.float32)
        losses_M = F.cross_entropy(logits_MV.to(wide), rows.targets, reduction="none")
        right = (logits_MV.argmax(-1) == rows.targets).float() * rows.weights
        return Loss((losses_M * rows.weights).sum(), {"right": float(right.sum())})


class Sequences:
    """Steps of random sequences of 2 to 11 tokens; each step is a function of its number."""

    def __init__(self, size: int = 6, seed: int = 0):
        self.size, self.seed, self.position = size, seed, 0

    def __iter__(self) -> Iterator[list[ExampleGroup]]:
        while True:
            units = self.at(self.position)
            self.position += 1
            yield units

    def at(self, position: int) -> list[ExampleGroup]:
        rng = np.random.default_rng([self.seed, position])
        return [(example(rng.integers(0, VOCAB, rng.integers(2, 12))),) for _ in range(self.size)]

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def resume(self, state: Mapping[str, Any], *, force: bool = False) -> None:
        self.position = state["position"]


def example(ids: np.ndarray, **extra: Any) -> Example:
    """All of it is learned, some tokens more than others."""
    weights = 0.5 + (ids % 3).astype(np.float32) / 2
    weights[0] = 0
    return Example(ids.astype(np.int64), weights, extra=extra)


def small(name: str = "gemma-3-270m", layers: int = 2) -> DecoderConfig:
    """Of the tiny member the first layers; of RecurrentGemma two recurrent ones and one of attention."""
    decoder = tiny(name)
    return replace(decoder, layers=decoder.layers[:layers])


def module(name: str = "gemma-3-270m", layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    made = new_module(small(name, layers), dtype=dtype, seed=seed)
    return made.requires_grad_(True)


def experiment(**changes: Any) -> Experiment:
    return replace(Experiment("pretrain", optimizer=PLAIN), **changes)
