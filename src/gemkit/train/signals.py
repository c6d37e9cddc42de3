"""Signals that end a run: the first SIGTERM or Ctrl-C after the step that is being computed, a second one at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


class StopSignals:
    """A context in which SIGTERM and SIGINT are counted. Outside of the main thread they are left alone.

    Args:
        say: is told once how the run will end.
    """

    def __init__(self, say: Callable[[str], Any]):
        self.count = 0
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # signals can be handled in the main thread alone
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        self.count += 1
        if self.count > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._say(f"{signal.Signals(number).name}: this step is finished and saved; once more to exit at once")
