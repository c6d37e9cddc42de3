"""Understand a model: what it is made of, what each part costs, how two members differ. Nothing here imports torch.

`tree` prints the modules, `cost` counts, `compare` sets members side by side, `explain` says what a quantity means.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemkit import family
from gemkit.errors import UnknownModelError


@dataclass(frozen=True)
class Subject:
    """Subject of an inspection: a member of the family, or a checkpoint of the user's own (then `member` is None)."""

    label: str
    decoder: family.DecoderConfig
    vision: family.Modality | None = None
    member: family.Member | None = None


def subject(name: str) -> Subject:
    """The checkpoint at that path (a folder or a file), else the member of that name.

    Raises:
        UnknownModelError: if it is neither.
        WeightsError: if there is something at the path, but no checkpoint of this family.
    """
    from gemkit.weights import hub

    place, member = hub.locate(name)
    if member is not None:
        return Subject(member.name, member.decoder, member.vision, member)
    if isinstance(place, str):
        raise UnknownModelError(f"{name} is no member of the family; download it, and give the folder")
    from gemkit.adapters.resolve import find

    with find(place) as checkpoint:
        return Subject(checkpoint.label, checkpoint.decoder, checkpoint.vision)
