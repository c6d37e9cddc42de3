"""All members by name: as people say it, as the hub spells it, as Keras calls it."""

from __future__ import annotations

from functools import cache

from gemkit.errors import UnknownModelError, nearest
from gemkit.family import codegemma, gemma1, gemma2, gemma3, paligemma, recurrentgemma
from gemkit.family.schema import Member

_MEMBERS: tuple[Member, ...] = (
    *gemma1.MEMBERS,
    *codegemma.MEMBERS,
    *gemma2.MEMBERS,
    *recurrentgemma.MEMBERS,
    *paligemma.MEMBERS,
    *gemma3.MEMBERS,
)


def members() -> tuple[Member, ...]:
    """Every member, one family after the other."""
    return _MEMBERS


def names() -> tuple[str, ...]:
    """The name of every member, in the order of `members()`."""
    return tuple(member.name for member in _MEMBERS)


def get(name: str) -> Member:
    """The member of that name, hub id or alias; case does not matter, nor `_` for `-`.

    Raises:
        UnknownModelError: if there is none; the message names the nearest.
    """
    member = _index().get(_key(name))
    if member is None:
        raise UnknownModelError(
            f"no member of the family is called {name!r}; " + nearest(_key(name), names(), "`gemkit models` lists them")
        )
    return member


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")


@cache
def _index() -> dict[str, Member]:
    index: dict[str, Member] = {}
    for member in _MEMBERS:
        for name in (member.name, member.hub_id, *member.aliases):
            other = index.setdefault(_key(name), member)
            assert other is member, f"{name} names both {other.name} and {member.name}"
    return index
