"""Adapters into the weights and out again: a merged model computes the same without adapters beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleDict, Parameter

from gemkit.adapters import replaced
from gemkit.adapters.layers import Adapter, EmbeddingLoRA, LowRank
from gemkit.adapters.registry import merged, name_of, names
from gemkit.adapters.targets import owners_of
from gemkit.errors import ConfigError, WeightsError
from gemkit.nn import LanguageModel
from gemkit.nn.layers import Embedding, LoRAHost
from gemkit.ops import Quantized
from gemkit.ops.adapters import dora_gain


@dataclass(frozen=True, eq=False)
class _Merged:
    """What unmerging needs: the weights as they were, for subtracting what was added would leave rounding behind."""

    weight: Tensor
    bias: Tensor | None
    adapters: ModuleDict  # all that there were
    names: tuple[str, ...]  # of them that are in the weight now


def merge(module: LanguageModel, only: str | None = None) -> list[str]:
    """Put adapters into the weights: the model computes the same without them beside it.

    The sum is made in float32 and rounded once. The weights as they were are kept for `unmerge`, so a merged model
    takes the room of its changed weights twice.

    Args:
        only: the adapter of this name; None: all.

    Returns:
        The adapters that were merged.

    Raises:
        ConfigError: if there is none, if some are merged already, or if one changes a quantized weight, or the table of
            embeddings and the head in two ways; nothing is changed then.
        WeightsError: if a sum is not finite; nothing is changed then.
    """
    if only is not None or not names(module):
        name_of(module, only)
    if already := merged(module):
        raise ConfigError(f"{', '.join(already)} {_are(already)} merged already: unmerge first, to merge anew")
    wanted = names(module) if only is None else [only]
    owners = {path: owner for path, owner in owners_of(module).items() if owner.adapters is not None}
    owners = {path: owner for path, owner in owners.items() if any(name in owner.adapters for name in wanted)}
    for path, owner in owners.items():
        _check_can_merge(module, path, owner, wanted)
    _expect_one_table(module, wanted)
    try:
        for path, owner in owners.items():
            _merge(path, owner, [name for name in owner.adapters if name in wanted])
        decoder = module.decoder
        if isinstance(decoder.embed_tokens.merged, _Merged) and isinstance(decoder.lm_head.merged, _Merged):
            decoder.lm_head.set_param("weight", decoder.embed_tokens.weight)  # the same numbers: one table again
    except BaseException:
        for owner in owners.values():
            _unmerge(owner)
        raise
    for name in wanted:
        for one in replaced.of(module, name):
            one.merged = True
    return wanted


def _check_can_merge(module: LanguageModel, path: str, owner: LoRAHost, wanted: Collection[str]) -> None:
    if isinstance(owner.weight, Quantized):
        raise ConfigError(
            f"{path} is quantized ({owner.weight.kind.name}), and most of what an adapter adds would be rounded away: "
            "load the model dense to merge (quantized=False; `gemkit merge` does)"
        )
    left = [name for name in owner.adapters if name not in wanted]
    if left and any(_lengthens(adapter) for adapter in owner.adapters.values()):
        raise ConfigError(f"{path} has a DoRA, whose lengths are those of all its adapters together: merge them all")
    biased = [name for name in wanted if name in owner.adapters and getattr(owner.adapters[name], "biased", False)]
    if biased and getattr(owner, "bias", None) is None:
        raise ConfigError(
            f"{path} has no bias that the one of {biased[0]} (lora_bias) could be merged into: keep it beside"
        )


def _lengthens(adapter: Adapter) -> bool:
    return isinstance(adapter, LowRank) and adapter.magnitude is not None


def _expect_one_table(module: LanguageModel, wanted: Collection[str]) -> None:
    """Raises: ConfigError, if the table of embeddings and the output table, which are one weight of a file, would not
    be one any more."""
    table, head = module.decoder.embed_tokens, module.decoder.lm_head
    of_table, of_head = ([n for n in wanted if owner.adapters and n in owner.adapters] for owner in (table, head))
    one = table.weight is head.weight
    if one and not of_table and not of_head:
        return
    if one and of_table and of_head:
        ours, theirs = _sum(table, of_table), _sum(head, of_head)
        if torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(ours.abs().max())):  # a product in another order
            return
    if one:
        path, other = ("embed_tokens", "logits") if of_table else ("lm_head", "embeddings")
        raise ConfigError(
            f"{path} has an adapter, and its weight is embedding and output table in one: merged, it would change the "
            f"{other} too. Keep the adapter beside the model (save_adapter, --adapter), or train without this target"
        )
    raise ConfigError(
        "an adapter brings embed_tokens or lm_head whole, and they would be two tables, which the files of this model "
        "do not have: keep the adapter beside the model (save_adapter, --adapter), or train both as one"
    )


def _merge(path: str, owner: LoRAHost, wanted: Sequence[str]) -> None:
    before, beside = owner.weight, owner.adapters
    bias: Any = getattr(owner, "bias", None)
    total = _sum(owner, wanted).to(before.dtype)
    if not total.isfinite().all():
        raise WeightsError(f"{path} would have numbers that are not finite with {', '.join(wanted)} merged into it")
    rest = {name: adapter for name, adapter in beside.items() if name not in wanted}
    owner.set_param("weight", Parameter(total, requires_grad=False))
    if added := [beside[name] for name in wanted if getattr(beside[name], "biased", False)]:
        moved = bias.detach().float() + sum(a.factor * a.lora_B.bias.detach().float() for a in added)
        owner.set_param("bias", Parameter(moved.to(bias.dtype), requires_grad=False))
    owner.merged = _Merged(before, bias, beside, tuple(wanted))
    owner.adapters = ModuleDict(rest) if rest else None


@torch.no_grad()
def _sum(owner: LoRAHost, wanted: Sequence[str]) -> Tensor:
    """The weight in float32 with adapters in it, one after another as they change its product."""
    total = owner.weight.detach().float()
    for name in wanted:
        adapter: Any = owner.adapters[name]
        if not isinstance(adapter, LowRank):  # rows of tokens
            total = total.clone()
            ids = torch.tensor(adapter.ids, device=total.device)
            total[ids] = torch.lerp(total[ids], adapter.rows.float(), adapter.strength)
        elif adapter.magnitude is None:
            total = total + delta(adapter)
        else:
            of_table = isinstance(owner, Embedding)
            a, b = adapter.lora_A.weight, adapter.lora_B.weight
            gain = dora_gain(adapter.magnitude, owner.weight, a, b, adapter.scale, of_table)
            along = gain if of_table else gain[:, None]
            total = torch.lerp(total, along * (total + delta(adapter)), adapter.strength)
    return total


@torch.no_grad()
def delta(adapter: LowRank) -> Tensor:
    """(out, in) float32: what an adapter of a projection adds to its weight; of an embedding, (V, D)."""
    a, b = adapter.lora_A.weight.float(), adapter.lora_B.weight.float()
    if isinstance(adapter, EmbeddingLoRA):
        return (a @ b.T) * adapter.factor
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
    for one in replaced.of(module):
        one.merged = False
    return out


def _unmerge(owner: LoRAHost) -> None:
    if owner.merged is None:
        return
    record, now = owner.merged, owner.weight.device
    added_since = [] if owner.adapters is None else [i for i in owner.adapters.items() if i[0] not in record.adapters]
    for leaf, value in (("weight", record.weight), ("bias", record.bias)):
        if value is not None:
            back = value if value.device == now else Parameter(value.to(now), requires_grad=False)
            owner.set_param(leaf, back)
    owner.merged = None
    owner.adapters = record.adapters.to(now)
    for name, adapter in added_since:
        owner.adapters[name] = adapter


def _are(things: Collection[str]) -> str:
    return "is" if len(things) == 1 else "are"
