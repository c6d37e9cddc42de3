"""The one form in which it is told what each key of a file does here, and the one reader of it.

A key is used; or ignored, with the reason why it cannot change a result; or refused, but at values that change nothing;
or noted: it is not used, and a note tells so where its value would mean something. A key that no table knows is noted
by name. The tables, from which `docs/configuration-keys.md` is made:

    keys_config.py              config.json
    keys_beside.py              generation_config.json, tokenizer_config.json, tokenizer.json, preprocessor_config.json
    keys_gguf.py                metadata of a GGUF
    adapters/peft_config.py     adapter_config.json
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemkit.errors import ConfigError, GemkitError


@dataclass(frozen=True)
class Key:
    """The effect of one key.

    Args:
        effect: "used", "ignored", "refused" or "noted".
        why: its use, or the reason.
        neutral: of a refused or noted key, values besides null at which nothing is said.
    """

    effect: Literal["used", "ignored", "refused", "noted"]
    why: str
    neutral: tuple[Any, ...] = ()


Table = Mapping[str, Key]  # a name that ends with * stands for all names that begin so

UNKNOWN = Key("noted", "not known here")


def used(why: str, *names: str) -> dict[str, Key]:
    return {name: Key("used", why) for name in names}


def ignored(why: str, *names: str) -> dict[str, Key]:
    return {name: Key("ignored", why) for name in names}


def refused(why: str, names: Iterable[str], *neutral: Any) -> dict[str, Key]:
    """Keys whose values, but null and these neutral ones, are an error."""
    return {name: Key("refused", why, neutral) for name in names}


def noted(why: str, names: Iterable[str], *neutral: Any) -> dict[str, Key]:
    """Keys whose values, but null and these neutral ones, are noted."""
    return {name: Key("noted", why, neutral) for name in names}


def find(table: Table, name: str) -> Key | None:
    """The entry of a key: its own, or that of the longest beginning of its name."""
    if name in table:
        return table[name]
    starred = [known for known in table if known.endswith("*") and name.startswith(known[:-1])]
    return table[max(starred, key=len)] if starred else None


def _says_nothing(value: Any, key: Key) -> bool:
    return isinstance(value, bool | int | float | str | list | dict) and value in key.neutral


def check_keys(
    values: Mapping[str, Any],
    table: Table,
    where: str,
    *,
    prefix: str = "",
    unknown: Key = UNKNOWN,
    error: type[GemkitError] = ConfigError,
) -> list[str]:
    """Notes on the keys of a file that are not used.

    Args:
        where: the file, for messages.
        prefix: left out of names before they are looked up.
        unknown: the effect of keys that are in no table.

    Raises:
        GemkitError: `error`, for a refused key at a value that would change a result.
    """
    notes, strange = [], []
    for name, value in values.items():
        key = find(table, name.removeprefix(prefix))
        if key is None and unknown.effect == "noted":
            strange.append(name)
            continue
        key = key or unknown
        if key.effect in ("used", "ignored") or value is None or _says_nothing(value, key):
            continue
        shown = repr(value) if len(repr(value)) <= 80 else f"({type(value).__name__})"
        if key.effect == "refused":
            raise error(f"{where}: {name}={shown} is not implemented: {key.why}")
        notes.append(f"{where}: {name}={shown} is not used: {key.why}")
    if strange:
        notes.append(f"{where}: not known here, and not used: {', '.join(sorted(strange))}")
    return notes
