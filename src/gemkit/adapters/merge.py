"""Adapters into the weights and out again: a merged model computes the same without adapters beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import ModuleDict, Parameter

from gemkit.adapters.layers import LoRA
from gemkit.adapters.lora import adapters_of, merged, names, owners_of
from gemkit.errors import ConfigError, WeightsError
from gemkit.nn import LanguageModel
from gemkit.nn.layers import Embedding, Head, LoRAHost
from gemkit.ops import Quantized


@dataclass(frozen=True, eq=False)
class _Merged:
    """What unmerging needs: the weight as it was, for subtracting what was added would leave rounding behind."""

    weight: Tensor
    adapters: ModuleDict  # all that there were
    names: tuple[str, ...]  # of them that are in the weight now


def merge(module: LanguageModel, only: str | None = None) -> list[str]:
    """Add adapters to the weights: the model computes the same without them beside it.

    The sum is made in float32 and rounded once. The weights as they were are kept for `unmerge`, so a merged model
    takes the room of its changed weights twice.

    Args:
        only: the adapter of this name; None: all.

    Returns:
        The adapters that were merged.

    Raises:
        ConfigError: if there is none, if some are merged already, or if one changes a quantized weight or the tied
            table; nothing is changed then.
        WeightsError: if a sum is not finite; nothing is changed then.
    """
    if only is not None or not names(module):
        adapters_of(module, only)
    if already := merged(module):
        raise ConfigError(f"{', '.join(already)} {_are(already)} merged already: unmerge first, to merge anew")
    wanted = names(module) if only is None else [only]
    owners = {path: owner for path, owner in owners_of(module).items() if owner.adapters is not None}
    owners = {path: owner for path, owner in owners.items() if any(name in owner.adapters for name in wanted)}
    for path, owner in owners.items():
        _check_can_merge(path, owner)
    try:
        for path, owner in owners.items():
            _merge(path, owner, [name for name in owner.adapters if name in wanted])
    except BaseException:
        for owner in owners.values():
            _unmerge(owner)
        raise
    return wanted


def _check_can_merge(path: str, owner: LoRAHost) -> None:
    if isinstance(owner, Head | Embedding):
        other = "embeddings" if isinstance(owner, Head) else "logits"
        raise ConfigError(
            f"{path} has an adapter, and its weight is embedding and output table in one: merged, it would change the "
            f"{other} too. Keep the adapter beside the model (save_adapter, --adapter), or train without this target"
        )
    if isinstance(owner.weight, Quantized):
        raise ConfigError(
            f"{path} is quantized ({owner.weight.kind.name}), and most of what an adapter adds would be rounded away: "
            "load the model dense to merge (quantized=False; `gemkit merge` does)"
        )


def _merge(path: str, owner: LoRAHost, wanted: Sequence[str]) -> None:
    before, beside = owner.weight, owner.adapters
    total = before.detach().float()
    for name in wanted:
        total = total + delta(beside[name])
    total = total.to(before.dtype)
    if not total.isfinite().all():
        raise WeightsError(f"{path} would have numbers that are not finite with {', '.join(wanted)} merged into it")
    rest = {name: adapter for name, adapter in beside.items() if name not in wanted}
    owner.set_param("weight", Parameter(total, requires_grad=False))
    owner.merged = _Merged(before, beside, tuple(wanted))
    owner.adapters = ModuleDict(rest) if rest else None


@torch.no_grad()
def delta(adapter: LoRA) -> Tensor:
    """(out, in) float32: what an adapter of a projection adds to its weight."""
    a, b = adapter.lora_A.weight.float(), adapter.lora_B.weight.float()
    by_head = a.unflatten(0, (adapter.heads, adapter.rank))
    return (b @ by_head).flatten(0, 1) * adapter.factor


def unmerge(module: LanguageModel) -> list[str]:
    """Take merged adapters out of the weights again, which are then bit for bit what they were.

    Returns:
        The adapters, which stand beside the weights again.

    Raises:
        ConfigError: if none is merged.
    """
    out = merged(module)
    if not out:
        raise ConfigError("no adapter is merged into the weights: there is nothing to unmerge")
    for owner in owners_of(module).values():
        _unmerge(owner)
    return out


def _unmerge(owner: LoRAHost) -> None:
    if owner.merged is None:
        return
    record, now = owner.merged, owner.weight.device
    added_since = [] if owner.adapters is None else [i for i in owner.adapters.items() if i[0] not in record.adapters]
    weight = record.weight if record.weight.device == now else Parameter(record.weight.to(now), requires_grad=False)
    owner.set_param("weight", weight)
    owner.merged = None
    owner.adapters = record.adapters.to(now)
    for name, adapter in added_since:
        owner.adapters[name] = adapter


def _are(things: Collection[str]) -> str:
    return "is" if len(things) == 1 else "are"
