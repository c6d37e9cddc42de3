"""Rewards of answers: by a reward model, or by a user's function, whose mistakes must not end a run."""

from __future__ import annotations

import importlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from gemkit.errors import ConfigError, ModelError
from gemkit.family import Prompt
from gemkit.nn import LanguageModel
from gemkit.text import Tokenizer
from gemkit.train.data.encoding import encode_answer
from gemkit.train.objectives.reward import rewards

Judge = Callable[[Any, str, Mapping[str, Any]], float]  # reward(prompt, answer, record)


class Reward:
    """A reward model as a function of a prompt and an answer.

    Args:
        module, tokenizer: of the reward model.
        prompts: what it was trained to answer: with "chat" a prompt that is a text becomes the user's turn.

    Raises:
        ModelError: if it has no reward head.
    """

    def __init__(self, module: LanguageModel, tokenizer: Tokenizer, prompts: Collection[Prompt] = ()):
        if getattr(module, "score", None) is None:
            raise ModelError("the model has no reward head (score.weight): `gemkit tune reward` trains one")
        self.module, self.tokenizer, self.in_turns = module, tokenizer, "chat" in prompts

    def __call__(
        self, prompt: str | Sequence[Mapping[str, str]], answer: str, record: Mapping[str, Any] | None = None
    ) -> float:
        if isinstance(prompt, str) and prompt and self.in_turns:
            prompt = [{"role": "user", "content": prompt}]
        with torch.no_grad():
            return float(rewards(self.module, [encode_answer(self.tokenizer, prompt, answer).ids]))


def function(name: str) -> Judge:
    """The function that a user names at the command line, as module:function; the module is imported, so it is run.

    Never call it with what a file says.

    Raises:
        ConfigError: if there is none of that name.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{name!r} names no function: write module:function, such as my_rewards:correct")
    if "" not in sys.path:
        sys.path.insert(0, "")  # what lies beside the user
    try:
        found: Judge = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{name!r} is no function: it is called as reward(prompt, answer, record)")
    return found


class _Late(BaseException):
    """Not an `Exception`: the function must not catch it by the way."""


class Verdicts:
    """A reward function with a limit to its time: one that raises, hangs, or gives what is no finite number counts 0.

    The limit is a signal of the system, which reaches the main thread alone; in another one there is no limit. It ends
    any Python code and most of what waits, but not a library that never returns to the interpreter.

    `failed` is how many counted 0 so, and `why` says what the last of them did.
    """

    def __init__(self, judge: Judge, timeout: float):
        self.judge, self.timeout = judge, timeout
        self.failed, self.why = 0, ""

    def __call__(self, prompt: Any, answer: str, record: Mapping[str, Any]) -> float:
        try:
            reward = float(self._limited(prompt, answer, record))
        except _Late:
            return self._fail(f"it took more than {self.timeout:g} s")
        except Exception as error:  # whatever a stranger's function may raise
            return self._fail(f"{type(error).__name__}: {error}")
        return reward if math.isfinite(reward) else self._fail(f"it gave {reward}")

    def _limited(self, prompt: Any, answer: str, record: Mapping[str, Any]) -> float:
        if isinstance(self.judge, Reward) or threading.current_thread() is not threading.main_thread():
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
