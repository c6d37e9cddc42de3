"""Spellings of control tokens in a text: found where they are whole, broken where they must be text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any


class ControlTable:
    """The spellings of control tokens, laid out for looking them up at any place of a text."""

    def __init__(self, pieces: Iterable[str]):
        self.pieces = frozenset(pieces)
        self.lengths = sorted({len(piece) for piece in self.pieces}, reverse=True)
        self.longest = max(self.lengths, default=0)
        self.firsts = re.compile(f"[{re.escape(''.join(sorted({piece[0] for piece in self.pieces})))}]")

    @cached_property
    def prefixes(self) -> frozenset[str]:
        """What a control token begins with and is not all of it."""
        return frozenset(piece[:n] for piece in self.pieces for n in range(1, len(piece)))

    @cached_property
    def suffixes(self) -> frozenset[str]:
        """What a control token ends with and is not all of it."""
        return frozenset(piece[n:] for piece in self.pieces for n in range(1, len(piece)))


class Breaker:
    """Breaks what spells a control token by a mark, and finds those that are whole.

    Args:
        mark: one character that occurs nowhere else.
    """

    def __init__(self, table: ControlTable, mark: str):
        self._table, self._mark = table, mark

    def controls(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the control tokens in a text, the longest of those that begin at one place."""
        found, at = [], 0
        for match in self._table.firsts.finditer(text):
            start = match.start()
            if start >= at and (length := self._longest(text, start)):
                at = start + length
                found.append((start, at))
        return found

    def content(self, text: str) -> str:
        """`text` that makes no control token by itself, at its borders, or as the inside of one."""
        body = text.strip()
        if body and len(body) < self._table.longest and any(body in piece for piece in self._table.pieces):
            text = text.replace(body, f"{self._mark}{body}{self._mark}", 1)
        return self.text(text)

    def text(self, text: str) -> str:
        """`text` with every control token in it broken, and its borders if they could be part of one."""
        table = self._table
        broken = {m.start() + 1 for m in table.firsts.finditer(text) if self._longest(text, m.start())}
        ends, starts = {len(text), len(text.rstrip())}, {0, len(text) - len(text.lstrip())}
        reach = range(1, min(table.longest, len(text) + 1))
        broken |= {end for end in ends if any(text[max(end - n, 0) : end] in table.prefixes for n in reach)}
        broken |= {start for start in starts if any(text[start : start + n] in table.suffixes for n in reach)}
        borders = [0, *sorted(broken), len(text)]
        return self._mark.join(text[start:end] for start, end in pairwise(borders)) if broken else text

    def values(self, value: Any) -> Any:
        """All strings within a value of JSON, by `text`."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.values(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.values(inner) for inner in value]
        return value

    def _longest(self, text: str, start: int) -> int:
        pieces = self._table.pieces
        return next((len(found) for n in self._table.lengths if (found := text[start : start + n]) in pieces), 0)
