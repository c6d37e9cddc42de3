"""A model's name or path to the place of its files; what is on the hub is downloaded on the way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gemkit import family
from gemkit.family import Member
from gemkit.weights import hub


@dataclass(frozen=True)
class Place:
    """The files of a model, found and not yet opened."""

    path: Path  # a folder, or one file
    label: str  # the model in messages and tables
    member: Member | None = None  # the member that was asked for by its name
    name: str | None = None  # `resolve` gives the same place for it, from any folder; None is the starter model
    adapters: tuple[Path, ...] = ()  # folders of adapters to put beside the weights

    @property
    def folder(self) -> Path:
        """The folder of the configuration and the tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent


def resolve(name: str | os.PathLike[str] | None, *, weights: bool = True) -> Place:
    """The place of the model that a user means.

    Args:
        name: a path (a folder in the Hugging Face layout, a .gguf, a .ckpt or .pt of Google's PyTorch code), a
            member's name or alias, a name on the hub (`weights.hub_names`), one of Ollama's that it has pulled, or
            None for the starter model.
        weights: False downloads only the configuration and the tokenizer.

    Raises:
        UnknownModelError: if it is none of these; the message names the nearest members.
        AccessError: if the weights cannot be had.
        WeightsError: if the hub knows no such repository.
    """
    if name is None:
        return Place(hub.starter(), "gemma-3-270m (starter, Q4_K_M)", family.get(hub.STARTER))
    where, member = hub.locate(os.fspath(name))
    if isinstance(where, Path):
        return Place(where, os.fspath(name), name=os.path.abspath(where))
    return Place(hub.download(where, weights=weights), member.name if member else where, member, where)
