"""The adapters that a model has: their names, sizes and strengths, and their removal."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import ModuleDict

from gemkit import family
from gemkit.adapters import replaced
from gemkit.adapters.layers import Adapter, LowRank
from gemkit.adapters.targets import owners_of
from gemkit.errors import ConfigError, nearest
from gemkit.nn import LanguageModel
from gemkit.nn.layers import LoRAHost
from gemkit.weights import hub

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Account:
    """What an adapter changes."""

    name: str
    ranks: tuple[int, ...]  # those that there are
    modules: tuple[str, ...]  # with a low-rank change
    before: int  # parameters of the model without adapters, the tied head counted once
    parameters: int  # of this adapter
    trainable: int  # parameters of the whole model that an optimizer may change
    tokens: int = 0  # with rows of their own
    replaced: tuple[str, ...] = ()  # weights that it brings whole

    def __str__(self) -> str:
        counts = Counter(name.rpartition(".")[2] for name in self.modules)
        matched = ", ".join(f"{leaf} {count}" for leaf, count in counts.items())
        parts = [f"{rank_range(self.ranks)} on {len(self.modules)} modules ({matched})"] if self.modules else []
        parts += [f"rows of {self.tokens} tokens"] if self.tokens else []
        parts += [f"{len(self.replaced)} weights whole"] if self.replaced else []
        kind = f"adapter {self.name}: {', '.join(parts)}"
        if self.trainable:
            return f"{kind}; of {self.before:,} parameters before, {self.trainable:,} are trained now"
        return f"{kind}, {self.parameters:,} parameters beside {self.before:,}"


def rank_range(ranks: Collection[int]) -> str:
    return "rank " + " to ".join(map(str, sorted({min(ranks), max(ranks)})))


def names(module: LanguageModel) -> list[str]:
    """The adapters that a model has, merged ones included, in the order in which they came."""
    found = [name for _, name, _ in _all(module)]
    return list(dict.fromkeys([*found, *(one.adapter for one in replaced.of(module))]))


def merged(module: LanguageModel) -> list[str]:
    """Those of them that are in the weights now."""
    inside = [name for owner in owners_of(module).values() if owner.merged for name in owner.merged.names]
    return list(dict.fromkeys([*inside, *(one.adapter for one in replaced.of(module) if one.merged)]))


def _all(module: LanguageModel) -> Iterator[tuple[str, str, Any]]:
    """(module, name of the adapter, adapter) of every one."""
    for path, owner in owners_of(module).items():
        held = dict(owner.merged.adapters.items()) if owner.merged else {}
        held |= dict(owner.adapters.items()) if owner.adapters is not None else {}
        for name, adapter in held.items():
            yield path, name, adapter


def name_of(module: LanguageModel, name: str | None) -> str:
    """The name of an adapter that there is. None: of the only one.

    Raises:
        ConfigError: if there is none, or it must be said which.
    """
    known = names(module)
    if not known:
        raise ConfigError("the model has no adapter: enable_lora or load_adapter makes one")
    if name is None and len(known) > 1:
        raise ConfigError(f"the model has the adapters {', '.join(known)}: say which by name")
    name = known[0] if name is None else name
    if name not in known:
        raise ConfigError(f"there is no adapter {name!r}; {nearest(name, known)}")
    return name


def adapters_of(module: LanguageModel, name: str | None) -> dict[str, Any]:
    """The adapters of a name, by module. None: of the only name that there is. Raises as `name_of`."""
    name = name_of(module, name)
    return {path: adapter for path, held, adapter in _all(module) if held == name}


def account(module: LanguageModel, name: str | None = None) -> Account:
    """What an adapter changes. Raises as `name_of`."""
    name = name_of(module, name)
    of, whole = adapters_of(module, name), replaced.of(module, name)
    before = sum(math.prod(shape) for _, shape in family.parameters(module.config, module.vision))
    low_rank = {path: adapter for path, adapter in of.items() if isinstance(adapter, LowRank)}
    own = {id(p): p for adapter in of.values() for p in adapter.parameters()}
    own |= {id(one.trained): one.trained for one in whole}
    return Account(
        name,
        tuple(sorted({adapter.rank for adapter in low_rank.values()})),
        tuple(low_rank),
        before,
        sum(p.numel() for p in own.values()),
        sum(p.numel() for p in module.parameters() if p.requires_grad),
        max((len(adapter.ids) for path, adapter in of.items() if path not in low_rank), default=0),
        tuple(one.param for one in whole),
    )


def set_strength(module: LanguageModel, strength: float, name: str | None = None) -> None:
    """Let an adapter count more or less than it was trained to: 1 is as it was, 0 is off. It is not saved.

    Raises:
        ConfigError: if the adapter is merged.
    """
    name = name_of(module, name)
    if not math.isfinite(strength):
        raise ConfigError(f"strength={strength!r} must be a number")
    _expect_beside(module, name)
    for adapter in adapters_of(module, name).values():
        adapter.strength = float(strength)
    for one in replaced.of(module, name):
        replaced.set_strength(module, one, float(strength))


def remove(module: LanguageModel, name: str | None = None) -> None:
    """Take an adapter away.

    Raises:
        ConfigError: if there is none of that name, or it is merged.
    """
    name = name_of(module, name)
    _expect_beside(module, name)
    owners = owners_of(module)
    for path in adapters_of(module, name):
        for held in (owners[path].adapters, owners[path].merged and owners[path].merged.adapters):
            if held and name in held:
                del held[name]
        if not owners[path].adapters:
            owners[path].adapters = None
    replaced.remove(module, name)


def _expect_beside(module: LanguageModel, name: str) -> None:
    if name in merged(module):
        raise ConfigError(f"the adapter {name!r} is merged into the weights: unmerge first")


# ── those that are trained ──────────────────────────────────────────────────────────────────────────────────────────


def trains(module: LanguageModel) -> bool:
    """Whether adapters are trained, and so the model without them is what it was before."""
    return bool(_trained(module)) or any(one.trained.requires_grad for one in replaced.of(module))


@contextlib.contextmanager
def trained_ones_off(module: LanguageModel) -> Iterator[None]:
    """The adapters that are trained count nothing inside."""
    beside, whole = _trained(module), [one for one in replaced.of(module) if one.trained.requires_grad]
    strengths = [adapter.strength for adapter in beside]
    try:
        for adapter in beside:
            adapter.strength = 0.0
        for one in whole:
            replaced.set_strength(module, one, 0.0)
        yield
    finally:
        for adapter, strength in zip(beside, strengths, strict=True):
            adapter.strength = strength
        for one in whole:
            replaced.set_strength(module, one, 1.0)


def _trained(module: LanguageModel) -> list[Adapter]:
    return [
        part
        for part in module.modules()
        if isinstance(part, Adapter) and any(weight.requires_grad for weight in part.parameters())
    ]


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def put(owner: LoRAHost, name: str, adapter: Adapter) -> None:
    """Put an adapter beside a weight."""
    if owner.adapters is None:
        owner.adapters = ModuleDict()
    owner.adapters[name] = adapter.train(owner.training)


def expect_free(module: LanguageModel, name: str) -> None:
    """Raises: ConfigError, if a new adapter cannot have that name."""
    if not _NAME.fullmatch(name) or hasattr(ModuleDict, name):
        raise ConfigError(f"name={name!r} cannot name an adapter: letters, digits, _ and - are used, such as default")
    if name in names(module):
        raise ConfigError(f"there is an adapter {name!r} already: remove it first, or give another name")


def free_name(module: LanguageModel, folder: Path) -> str:
    """A name for the adapter of a folder: the folder's, with a number behind it if there is one of that name."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", hub.named(folder)).strip("-")[:50] or "adapter"
    if hasattr(ModuleDict, stem):
        stem += "-adapter"
    taken, name, number = names(module), stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
