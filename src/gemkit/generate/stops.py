"""Stop strings in a stream of text: nothing is let out that might still turn out to belong to one."""

from __future__ import annotations

from collections.abc import Sequence

from gemkit.errors import ConfigError


class StopStrings:
    """Cuts a stream of text at the first stop string.

    The text ends at the first character that completes a stop string, and is cut where that stop string began; of
    several that end at the same character the longest counts. So the outcome depends on the text alone and not on how
    it was cut into tokens.

    Raises:
        ConfigError: an empty stop string, which would stop everything, or a lone string in place of a sequence.
    """

    def __init__(self, strings: Sequence[str]):
        if isinstance(strings, str):
            raise ConfigError(f"stop_strings={strings!r} must be a sequence of strings: [{strings!r}]")
        for string in strings:
            if not isinstance(string, str) or not string:
                raise ConfigError(f"stop_strings holds {string!r}: each must be a string of at least one character")
        self._strings = tuple(strings)
        self._held = ""  # the longest end of the text so far with which some stop string begins
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text and return what is now certain. Once a stop string has `matched`, text is ignored."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._strings if (at := text.find(s)) >= 0]
        if found:
            _, start, self.matched = min(found)  # earliest end, then earliest start
            self._held = ""
            return text[:start]
        self._held = self._open_end(text)
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """No more text comes: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> str:
        longest = max(map(len, self._strings), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(s.startswith(text[start:]) for s in self._strings):
                return text[start:]
        return ""
