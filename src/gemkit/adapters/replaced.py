"""Weights that an adapter brings whole, in place of the model's: PEFT's `modules_to_save`, and trained biases.

The weight itself is exchanged, so that every executor sees another one, and the model's own is kept to be put back. The
table of embeddings is the output table too: exchanged in the one module it stays what it was in the other, unless the
adapter brings the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gemkit.errors import ConfigError
from gemkit.nn import LanguageModel
from gemkit.ops import Quantized


@dataclass(eq=False)
class Replaced:
    """A weight of a model that stands in the place of its own."""

    adapter: str
    param: str  # its name
    own: Any  # the model's, dense or quantized
    trained: Parameter
    strength: float = 1.0  # share of the way from the model's own
    merged: bool = False


def of(module: LanguageModel, name: str | None = None) -> list[Replaced]:
    """What adapters have replaced, or the one of this name."""
    return [one for one in module.replaced if name is None or one.adapter == name]


def put(module: LanguageModel, name: str, weights: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Exchange weights of a model for an adapter's: those given for several names as one tensor are one parameter.

    Raises:
        ConfigError: if another adapter has exchanged one already; nothing is changed then.
    """
    taken = {one.param: one.adapter for one in module.replaced}
    if both := next((param for param in weights if param in taken), None):
        raise ConfigError(f"{name} and {taken[both]} each bring a {both} of their own: only one of them can be loaded")
    made: dict[int, Parameter] = {}
    for param, value in weights.items():
        own = module.get_param(param)
        dtype = module.decoder.norm.weight.dtype if isinstance(own, Quantized) else own.dtype
        if id(value) not in made:
            made[id(value)] = Parameter(value.detach().to(own.device, dtype, copy=True), requires_grad=trainable)
        module.replaced.append(Replaced(name, param, own, made[id(value)]))
        _exchange(module, param, made[id(value)])


def set_strength(module: LanguageModel, one: Replaced, strength: float) -> None:
    """The trained weight (1), the model's own (0), or what lies between."""
    one.strength = strength
    if strength == 1:
        value = one.trained
    elif strength == 0:
        value = _own(module, one)
    else:
        own = _own(module, one)
        dense = own.dequantize() if isinstance(own, Quantized) else own
        with torch.no_grad():
            between = torch.lerp(dense.float(), one.trained.float(), strength).to(one.trained.dtype)
        value = Parameter(between, requires_grad=False)
    _exchange(module, one.param, value)


def remove(module: LanguageModel, name: str) -> None:
    """Put the model's own weights back."""
    for one in of(module, name):
        _exchange(module, one.param, _own(module, one))
        module.replaced.remove(one)


def _own(module: LanguageModel, one: Replaced) -> Any:
    """The model's own weight, where the model is now."""
    if one.own.device == module.device:
        return one.own
    moved = one.own.to(module.device)
    return moved if isinstance(moved, Quantized) else Parameter(moved, requires_grad=False)


def _exchange(module: LanguageModel, param: str, value: Any) -> None:
    """Unlike `LanguageModel.set_param` this leaves a tied head alone."""
    path, _, leaf = param.rpartition(".")
    owner: Any = module.get_submodule(path)
    owner.set_param(leaf, value)
