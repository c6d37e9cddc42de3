"""One step of training: microbatches forward and back, and the gradient of their sum.

    units of a step ─ prepare ─ size ─ microbatches ─ (loss / size).backward() each ─ finite? ─ clip ─ AdamW

A step is the same whether it is computed at once or in parts: the loss of each part is a sum, and all are divided by
the size of the whole step, over all processes. Its random numbers come from the seed and the number of the step.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import deterministic as _deterministic

from gemkit import memory
from gemkit.nn import LanguageModel
from gemkit.train.batching import ExampleGroup
from gemkit.train.experiment import Experiment
from gemkit.train.objective import Objective
from gemkit.train.process import Process

deterministic: Any = _deterministic  # a module whose one setting torch's stubs do not know


@dataclass(frozen=True)
class Gradients:
    """A step that was computed: the gradients lie at the parameters, and the weights are as they were."""

    units: Sequence[ExampleGroup]  # as the objective prepared them
    parts: Sequence[Sequence[ExampleGroup]]
    size: float  # of the step, over all processes; 0: nothing in it has a weight in the loss
    loss: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    not_finite: str = ""  # why the numbers cannot be used; empty: they can

    @property
    def tokens(self) -> int:
        return sum(len(example) for unit in self.units for example in unit)


def compute(
    model: LanguageModel,
    objective: Objective,
    units: Sequence[ExampleGroup],
    *,
    seed: int,
    step: int,
    microbatch_tokens: int,
    process: Process,
) -> Gradients:
    """Forward and back: the gradient of the mean loss of a step, of the units that this process has of it."""
    seeded(seed, step)
    model.train()
    units = objective.prepare(model, units, np.random.default_rng([seed, step, 1]))
    model.train()  # answering prompts is done in evaluation mode
    size = process.sum(objective.size(units))
    if not size > 0:
        return Gradients(units, [], 0.0)
    parts = list(split_microbatches(units, microbatch_tokens))
    total, metrics, why = 0.0, dict[str, float](), ""
    for part in parts:
        loss = objective.loss(model, part)
        value = float(loss.total.detach()) / size
        total += value
        for name, amount in loss.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + amount / size
        if not math.isfinite(value):
            why = f"the loss is {value}"
            break
        (loss.total / size).backward()
        del loss
    metrics = {name: process.sum(amount) for name, amount in metrics.items()}
    return Gradients(units, parts, size, process.sum(total), metrics, why)


def evaluate(
    model: LanguageModel,
    objective: Objective,
    units: Sequence[ExampleGroup],
    *,
    seed: int,
    microbatch_tokens: int,
    process: Process,
) -> dict[str, float]:
    """The mean loss of units that are not trained on, and the objective's metrics of them."""
    seeded(seed, 0, purpose=2)
    model.eval()
    with torch.no_grad():
        units = objective.prepare(model, units, np.random.default_rng([seed, 2]))
        model.eval()
        sums = {"loss": 0.0}
        for part in split_microbatches(units, microbatch_tokens):
            loss = objective.loss(model, part)
            for name, value in {"loss": float(loss.total), **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value
    size = process.sum(objective.size(units))
    return {name: process.sum(value) / size if size else math.nan for name, value in sums.items()}


def split_microbatches(units: Sequence[ExampleGroup], tokens: int) -> Iterator[list[ExampleGroup]]:
    """Micro-batches of a step in its order, each of at most this many tokens; a longer unit is one by itself."""
    part: list[ExampleGroup] = []
    held = 0
    for unit in units:
        length = sum(map(len, unit))
        if part and held + length > tokens:
            yield part
            part, held = [], 0
        part.append(unit)
        held += length
    if part:
        yield part


def seeded(seed: int, step: int, purpose: int = 0) -> None:
    """Set every source of random numbers to its value for this step of this run, wherever the run began."""
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(3, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))
    random.seed(int(state[1]))
    np.random.seed(int(state[2] & np.uint64(0xFFFFFFFF)))  # noqa: NPY002  # for objectives that draw from it


# ── the state of torch and of the model while a run computes ────────────────────────────────────────────────────────


@contextlib.contextmanager
def reproducible(experiment: Experiment) -> Iterator[None]:
    """Threads and algorithms, on which the last bit of a sum depends, as the experiment has them."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
    torch.set_num_threads(experiment.step.threads or threads)
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # it would write all new memory twice
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def activation_checkpointing(model: LanguageModel, on: bool) -> Iterator[None]:
    """Keep the inputs of blocks alone, and compute their insides once more when the gradient needs them."""
    blocks: list[Any] = model.blocks
    for block in blocks:
        block.activation_checkpointing = on
    try:
        yield
    finally:
        for block in blocks:
            block.activation_checkpointing = False


def peak_memory(device: torch.device) -> int:
    """Bytes: the highest so far, of the device or else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak_memory()
