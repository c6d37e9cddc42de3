"""Understand a model: what it is made of, what each part costs, how two members differ. Nothing here imports torch.

`tree` prints the modules, `cost` counts, `compare` sets members side by side, `explain` says what a quantity means.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemkit import family
from gemkit.errors import UnknownModelError


@dataclass(frozen=True)
class Subject:
    """What is looked at: a member of the family, or a checkpoint of the user's own (then `member` is None)."""

    label: str
    decoder: family.Decoder
    vision: family.Vision | None = None
    member: family.Member | None = None


def subject(name: str) -> Subject:
    """The member of that name, else the checkpoint at that path (a folder or a `.gguf`); `./name` is always a path.

    Raises:
        UnknownModelError: if it is neither.
        WeightsError: if there is something at the path, but no checkpoint of this family.
    """
    try:
        member = family.get(name)
        return Subject(member.name, member.decoder, member.vision, member)
    except UnknownModelError:
        if not Path(name).exists():
            raise
    from gemkit.weights.checkpoint import resolve_decoder

    decoder, vision, label = resolve_decoder(Path(name))
    return Subject(label, decoder, vision)
