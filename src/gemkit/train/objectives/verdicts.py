"""Rewards from somebody's function: what it does wrong must not end a run."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any


class _Late(BaseException):
    """Not an `Exception`: the function must not catch it by the way."""


class Verdicts:
    """A reward function with a limit to its time: one that raises, hangs, or gives what is no finite number counts 0.

    The limit is a signal of the system, which reaches the main thread alone; in another one there is no limit. It ends
    any Python code and most of what waits, but not a library that never returns to the interpreter.

    `failed` is how many counted 0 so, and `why` says what the last of them did.
    """

    def __init__(self, judge: Callable[[str, str, Mapping[str, Any]], float], timeout: float):
        self.judge, self.timeout = judge, timeout
        self.failed, self.why = 0, ""

    def __call__(self, prompt: Any, answer: str, record: Mapping[str, Any]) -> float:
        try:
            reward = float(self._limited(prompt, answer, record))
        except _Late:
            return self._fail(f"it took more than {self.timeout:g} s")
        except Exception as error:  # noqa: BLE001  # whatever a stranger's function may raise
            return self._fail(f"{type(error).__name__}: {error}")
        return reward if math.isfinite(reward) else self._fail(f"it gave {reward}")

    def _limited(self, prompt: Any, answer: str, record: Mapping[str, Any]) -> float:
        if threading.current_thread() is not threading.main_thread():
            return self.judge(prompt, answer, record)

        def late(*_: Any) -> None:
            raise _Late

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, self.timeout)
        try:
            return self.judge(prompt, answer, record)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _fail(self, why: str) -> float:
        self.failed += 1
        self.why = why
        return 0.0
