"""The origin of a loss or a gradient that is not finite: the step is computed once more, with hooks on every module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from gemkit.train.batching import ExampleGroup
from gemkit.train.checkpoint import is_finite


def locate(
    model: Module, parts: Sequence[Sequence[ExampleGroup]], loss: Callable[[Sequence[ExampleGroup]], Tensor]
) -> str:
    """The first thing that is not finite, in the order in which it is computed, for people.

    Args:
        parts: the step, as it was computed.
        loss: the differentiable loss of some units, with the random numbers that it had.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f"the weight {name} is not finite"
    before = 0
    for units in parts:
        lengths = [len(example) for unit in units for example in unit]
        owners = [before + i for i, unit in enumerate(units) for _ in unit]
        with _watched(model, lengths, owners) as seen, torch.enable_grad():
            total = loss(units)
            if seen.forward:
                return seen.forward
            if not is_finite(total):
                return _row(units, before, loss)
            total.backward()
        if seen.backward:
            return seen.backward
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not is_finite(parameter.grad):
                return f"the gradient of {name} is not finite"
        before += len(units)
    return "no single op: the sum of the parts of the step overflows"


def _row(units: Sequence[ExampleGroup], before: int, loss: Callable[[Sequence[ExampleGroup]], Tensor]) -> str:
    """Which of some units has a loss that is not finite, of hidden states that are."""
    with torch.no_grad():
        for i, unit in enumerate(units):
            if not is_finite(loss([unit])):
                return f"the loss of {_named(unit, before + i)} is not finite, and every module's output is"
    return "the loss is not finite, that of each example by itself is"


def _named(unit: ExampleGroup, number: int) -> str:
    source = next((f", {example.extra['source']}" for example in unit if "source" in example.extra), "")
    return f"example {number + 1} of the step{source}"


class _Seen:
    forward = backward = ""


@contextlib.contextmanager
def _watched(model: Module, lengths: Sequence[int], owners: Sequence[int]) -> Iterator[_Seen]:
    seen = _Seen()

    def where(value: Tensor) -> str:
        """The example that the first bad row belongs to, if rows are tokens."""
        bad = (~torch.isfinite(value.detach())).reshape(len(value), -1).any(1).nonzero()
        row = int(bad[0, 0])
        kind = "NaN" if bool(torch.isnan(value[row]).any()) else "an infinite number"
        if len(value) != sum(lengths):
            return f"{kind} in row {row}"
        for length, owner in zip(lengths, owners, strict=True):
            if row < length:
                return f"{kind} at token {row} of example {owner + 1} of the step"
            row -= length
        return kind

    def hook(name: str, module: Module) -> Callable[..., None]:
        kind = type(module).__name__

        def after(_: Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if not seen.forward and not is_finite(output):
                given = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
                bad_input = next((x for x in given if not is_finite(x)), None)
                made = f"{name} ({kind}) is given" if bad_input is not None else f"{name} ({kind}) makes"
                seen.forward = f"{made} {where(output if bad_input is None else bad_input)}"
            if output.requires_grad:
                output.register_hook(back)

        def back(grad: Tensor) -> None:
            if not seen.backward and not is_finite(grad):
                seen.backward = f"the gradient of the output of {name} ({kind}) has {where(grad)}"

        return after

    handles = [module.register_forward_hook(hook(name, module)) for name, module in model.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
