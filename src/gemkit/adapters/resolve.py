"""The base of an adapter: an adapter's folder can stand wherever a model's name can."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gemkit.adapters import peft
from gemkit.errors import AccessError, UnknownModelError, WeightsError
from gemkit.family import Prompt
from gemkit.text import Tokenizer
from gemkit.weights import describe
from gemkit.weights.checkpoint import Checkpoint, open_checkpoint
from gemkit.weights.resolve import Place
from gemkit.weights.resolve import resolve as resolve_model


def resolve(name: str | os.PathLike[str] | None, *, weights: bool = True) -> Place:
    """The place of a model; of an adapter's base, with the adapter's folder in `adapters`, if the name is an adapter's.

    Arguments and errors are those of `weights.resolve.resolve`.

    Raises:
        WeightsError: if the adapter does not name its base, or names another adapter.
    """
    place = resolve_model(name, weights=weights)
    if not peft.is_adapter(place.path):
        return place
    base = peft.base_of(place.path)
    way_out = f"give its base by name: -m BASE --adapter {place.label}"
    if base is not None and peft.is_adapter(Path(base).expanduser()):
        raise WeightsError(f"{place.label} names {base} as its base, which is an adapter itself: {way_out}")
    try:
        found = resolve_model(base, weights=weights)
    except (UnknownModelError, AccessError) as error:
        raise type(error)(f"{place.label} was trained on {base}: {error}; or {way_out}") from error
    return replace(found, label=f"{found.label} + {place.label}", adapters=(place.path,))


def vocabulary_of(name: str | os.PathLike[str] | None) -> tuple[str, Tokenizer, tuple[Prompt, ...]]:
    """Label, tokenizer and prompt formats of a model; from the hub, nothing else of it is downloaded.

    Raises as `resolve` and `weights.checkpoint.open_checkpoint`.
    """
    place = resolve(name, weights=False)
    if place.name is not None and not os.path.isabs(place.name) and place.path.is_dir():  # on the hub
        return place.label, *describe.vocabulary_of(place)
    with open_checkpoint(place) as checkpoint:
        return checkpoint.label, checkpoint.tokenizer, checkpoint.prompts


def find(name: str | os.PathLike[str] | None) -> Checkpoint:
    """The checkpoint of a model, or of an adapter's base. Raises as `resolve` and `open_checkpoint`."""
    return open_checkpoint(resolve(name))
