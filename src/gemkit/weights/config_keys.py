"""Typed access to the keys of published configurations, and the check that one expresses a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import fields
from typing import Any

from gemkit.errors import ConfigError, WeightsError
from gemkit.family import DecoderConfig


class Keys:
    """Typed access to untrusted keys.

    Attributes:
        notes: for the user, on keys that have no say.
    """

    def __init__(self, values: Mapping[str, Any], where: str, notes: list[str] | None = None):
        self._values = values
        self.where = where
        self.notes = [] if notes is None else notes

    def note(self, name: str, text: str) -> None:
        """Tell the user how a key was read."""
        if (said := f"{self.where}: {name}: {text}") not in self.notes:
            self.notes.append(said)

    def keys(self) -> Set[str]:
        return self._values.keys()

    def section(self, name: str) -> Mapping[str, Any] | None:
        """The keys that are nested under a key; None if it is absent or null."""
        found = self._values.get(name)
        if found is not None and not isinstance(found, Mapping):
            raise WeightsError(f"{self.where}: {name}={found!r} must be an object")
        return found

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._values.get(name, default)
        if value is None:
            raise WeightsError(f"{self.where}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise WeightsError(f"{self.where}: {name}={value!r} must be a whole number from 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.optional_number(name, default)
        if value is None:
            raise WeightsError(f"{self.where}: {name} is missing")
        return value

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        value = self._values.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WeightsError(f"{self.where}: {name}={value!r} must be a number")
        return float(value)


def section(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise WeightsError(f"{where}: model_type {config.get('model_type')!r} without a {name}")
    return found


def refuse_differences(decoder: DecoderConfig, read: DecoderConfig, what: str) -> None:
    """Raises: ConfigError, if a configuration that was written for a decoder is read as another one: the first field
    that it would lose. `what` names the configuration.
    """
    for where, ours, theirs in _differences(decoder, read):
        raise ConfigError(f"{what} can express this decoder: its {where} is {ours!r}, and would be read as {theirs!r}")


def _differences(a: DecoderConfig, b: DecoderConfig) -> Iterator[tuple[str, Any, Any]]:
    """Field and both values wherever two decoders differ by more than the last bits of a number."""
    for field in fields(DecoderConfig):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name != "layers" and ours != theirs:
            yield field.name, ours, theirs
    for i, (ours, theirs) in enumerate(zip(a.layers, b.layers, strict=True)):
        if type(ours.mixer) is not type(theirs.mixer):
            yield f"layer {i}", ours, theirs
            continue
        for part in ("mixer", "ffw"):
            mine, other = getattr(ours, part), getattr(theirs, part)
            for field in fields(mine):
                x, y = getattr(mine, field.name), getattr(other, field.name)
                # `x ** -0.5 ** -2` is not always x to the last bit
                if x != y and not (field.name == "scale" and abs(x - y) < 1e-9):
                    yield f"{field.name} in the {part} of layer {i}", x, y
