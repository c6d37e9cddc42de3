"""Settings between TOML and dataclasses: msgspec checks every value against the type of its field, tomli-w writes.

A key that a dataclass does not have is an error here, with the nearest that it has, or with its new name if it was
renamed; msgspec alone would pass over it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import tomli_w

from gemkit.errors import ConfigError, nearest

T = TypeVar("T")

RENAMED = {  # keys of version 0.1, for the message about an old file
    "watch": "monitor",
    "optimizer.clip": "optimizer.grad_clip",
    "optimizer.final": "optimizer.final_lr_share",
    "step.max_tokens": "step.microbatch_tokens",
    "step.checkpointing": "step.activation_checkpointing",
}


def read(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def convert(values: Any, kind: type[T], where: str, path: str = "") -> T:
    """A value of a type (a dataclass from a table, mostly), each of its parts checked.

    Args:
        where: the name of the whole, for messages.
        path: the dotted name of `values` in it.

    Raises:
        ConfigError: for a key that there is not, or a value of another type; with its dotted name.
    """
    if is_dataclass(kind):
        values = _known(values, kind, where, path)
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `$")
        name = f"{path}{place}".rstrip("`").lstrip(".")
        raise ConfigError(f"{where}: {_shown(name, values, place)}: {said}{_choices(kind, place)}") from None


def _known(values: Any, kind: Any, where: str, path: str) -> Any:
    """The table, after its keys were compared with the fields; text for a list becomes a list of one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {path} must be a table")
    hints, found = get_type_hints(kind), {}
    for name, value in values.items():
        dotted = f"{path}.{name}" if path else name
        if name not in hints:
            now = f"it is called {RENAMED[dotted]} now" if dotted in RENAMED else nearest(name, hints)
            raise ConfigError(f"{where}: there is no {dotted}; {now}")
        if is_dataclass(hints[name]):
            found[name] = _known(value, hints[name], where, dotted)
        elif get_origin(hints[name]) is tuple and isinstance(value, str):  # `--set lora.targets=q_proj`
            found[name] = [value]
        else:
            found[name] = value
    return found


def _shown(name: str, values: Any, place: str) -> str:
    """The name of what is wrong, with its value where one can be shown."""
    for part in filter(None, place.rstrip("`").split(".")):
        if not isinstance(values, Mapping) or part not in values:
            return name
        values = values[part]
    return f"{name}={values!r}" if name else repr(values)


def _choices(kind: Any, place: str) -> str:
    """The values of a field that takes only some."""
    for part in filter(None, place.rstrip("`").split(".")):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    literal = next((each for each in (kind, *get_args(kind)) if get_origin(each) is Literal), None)
    return f"; one of {', '.join(map(repr, get_args(literal)))}" if literal else ""


def to_tables(settings: Any) -> dict[str, Any]:
    """A dataclass as tables of plain values: None is left out."""
    plain = {f.name: _plain(getattr(settings, f.name)) for f in fields(settings)}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_tables(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def to_toml(settings: Any) -> str:
    """The text of a TOML file that holds a dataclass; empty tables are left out."""
    return tomli_w.dumps(_without_empty(to_tables(settings)))


def _without_empty(table: Mapping[str, Any]) -> dict[str, Any]:
    inner = {key: _without_empty(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    return {key: value for key, value in inner.items() if value != {}}
