"""Answers to prompts: `Completer` makes them, `Stream` is one as it comes, `Conversation` keeps turns and their state.

They stand on an executor, a tokenizer and prompts, whatever holds these.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gemkit import generate as loop
from gemkit import text as formats
from gemkit.errors import StateError
from gemkit.files import atomic_folder
from gemkit.generate import Defaults, Event, Options, Request, Result, Sampling, StopFlag
from gemkit.text import Prompt, Tokenizer


class Runtime(Protocol):
    """Provides the executor of a model that may change (`runtime.open.Runtime`)."""

    def sync(self) -> Any:
        """The executor of the model as it is now."""
        ...


class Stream(Iterator[str]):
    """The text of one answer as it comes; `result` is there when it has ended.

    A Ctrl-C while the model computes ends the answer and keeps what there is, with `result.finish_reason`
    "interrupted". One that arrives between two pieces is yours to catch: `interrupt()` then does the same. Any thread
    may call any method.

    Args:
        events: those of a loop with one request.
        stop: the flag that the loop was given.
        on_result: called with the result, by the thread that reads the end.
    """

    def __init__(
        self,
        prompt: Prompt,
        events: Generator[Event],
        stop: StopFlag,
        on_result: Callable[[Result], None] | None = None,
    ):
        self.prompt = prompt  # what the model was shown, of this turn
        self.result: Result | None = None
        self._events = events
        self._stop = stop
        self._on_result = on_result
        self._lock = threading.RLock()  # a generator that runs in one thread cannot be entered by another

    def __next__(self) -> str:
        with self._lock:
            return self._take(next(self._events))

    def interrupt(self) -> Result:
        """End the answer here, and the step that another thread computes for it; the result has everything up to now.

        Raises:
            StateError: if the answer was dropped (`close`).
        """
        self._stop.set()  # before the lock, which a reader that takes it again at once could keep to the end
        with self._lock:
            return self._rest()

    def finish(self) -> Result:
        """Read to the end without looking at the text, or to a Ctrl-C.

        Raises:
            StateError: if the answer was dropped (`close`).
        """
        try:
            return self._rest()
        except KeyboardInterrupt:
            return self.interrupt()

    def close(self) -> None:
        """Drop the answer: nothing more comes, and without a result yet there will be none."""
        with self._lock:
            self._events.close()

    def _rest(self) -> Result:
        for _ in self:
            pass
        if self.result is None:
            raise StateError("this answer was dropped before its end: the next turn of its conversation has begun")
        return self.result

    def _take(self, event: Event) -> str:
        if event.result is not None:
            cancelled = event.result.finish_reason == "cancelled"  # by `interrupt`, which alone sets the flag
            self.result = replace(event.result, finish_reason="interrupted") if cancelled else event.result
            if self._on_result is not None:
                self._on_result(self.result)
        return event.text


class Completer:
    """Completes prompts with one model. Calls of several threads take turns inside its executor.

    Args:
        runtime: asked for the executor once before each answer.
        unused: ids that no answer holds (`generate.unused_ids`).
        defaults: where the options of an answer say nothing.
    """

    def __init__(
        self, runtime: Runtime, tokenizer: Tokenizer, unused: Collection[int] = (), defaults: Defaults | None = None
    ):
        self.runtime, self.tokenizer, self.unused = runtime, tokenizer, unused
        self.defaults = Defaults() if defaults is None else defaults

    def request(self, prompt: Prompt, options: Options, defaults: Sampling | None = None, **more: Any) -> Request:
        """The request that `generate.Request.from_prompt` makes of a prompt, options and default sampling: None is that
        of `defaults.plain`."""
        sampling = self.defaults.plain if defaults is None else defaults
        return Request.from_prompt(prompt, options, sampling, banned=self.unused, stop=self.defaults.stop, **more)

    def complete(
        self,
        prompts: Sequence[Prompt],
        options: Options,
        defaults: Sampling | None = None,
        images: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> list[Result]:
        """The answers to all prompts, computed as one batch; `images` are those of each, preprocessed."""
        each = [()] * len(prompts) if images is None else images
        requests = [self.request(p, options, defaults, images=i) for p, i in zip(prompts, each, strict=True)]
        return loop.complete(self.runtime.sync(), requests, **loop.loop_options(options, self.tokenizer.stream))

    def stream(
        self, prompt: Prompt, options: Options, defaults: Sampling | None = None, images: Sequence[np.ndarray] = ()
    ) -> Stream:
        """The answer to a prompt as it comes."""
        request = self.request(prompt, options, defaults, images=images)
        options_of_loop = loop.loop_options(options, self.tokenizer.stream)
        stop = StopFlag()
        return Stream(prompt, loop.generate(self.runtime.sync(), [request], stop=stop, **options_of_loop), stop)


class _Past(NamedTuple):
    """The turns that count: as messages, as ids, and a snapshot of a beginning of these."""

    messages: list[dict[str, str]]
    ids: list[int]
    snapshot: Any


class Conversation:
    """Turns with one model; the state of the turns before is kept, so that history is never computed again.

    talk = model.conversation(system="Answer in one sentence.")
    print(talk.say("What is a tide?"))
    print(talk.say("And a spring tide?"))
    talk.save("tides")  # model.load_conversation("tides") goes on, in another process too

    Any thread may take the next turn: `say` waits for the `say` of another. A turn that is streamed and not yet at its
    end is dropped by the next one, as if it had never been: the snapshot from before it is restored.

    Args:
        system: instructions, put at the head of the first turn.
        options: of every answer.
    """

    def __init__(self, completer: Completer, system: str | None = None, options: Options | None = None):
        self.completer = completer
        self._system = system
        self._options: Options = {} if options is None else options
        self._executor: Any = None
        self._state: Any = None
        self._past = _Past(self._preamble(), [], None)
        self._earlier: list[_Past] = []  # before each turn; the newest alone with its snapshot
        self._turn: Stream | None = None
        self._lock = threading.RLock()

    @property
    def options(self) -> Options:
        """Options of the answers to come, which may be changed."""
        return self._options

    @property
    def ids(self) -> list[int]:
        """The whole conversation as the model has seen and written it."""
        return self._past.ids

    def say(self, words: str) -> Result:
        """The model's answer to the user's next turn."""
        with self._lock:
            return self.stream(words).finish()

    def stream(self, words: str) -> Stream:
        """`say`, piece by piece. A turn counts once it is read to its end or interrupted."""
        with self._lock:
            if self._turn is not None:
                self._turn.close()
            asked = [*self._past.messages, {"role": "user", "content": words}]
            prompt, goes_on = self._prompt(asked)
            history = self.ids if goes_on else []
            executor = self.completer.runtime.sync()
            if executor is not self._executor or not goes_on:  # its past is computed anew
                self._renew(executor)
            elif self._turn is not None and self._turn.result is None:
                self._state.restore(self._past.snapshot, 0)
            sampling = self.completer.defaults.chat
            request = self.completer.request(prompt, self._options, sampling, history=history, slot=0)
            options = loop.loop_options(self._options, self.completer.tokenizer.stream)
            stop = StopFlag()
            events = loop.generate(executor, [request], state=self._state, stop=stop, **options)
            self._turn = Stream(prompt, events, stop, lambda result: self._remember(asked, request, result))
            return self._turn

    def undo(self) -> bool:
        """Forget the last turn, one of this process; False if there is none. What came before it is remembered by the
        model, but for turns that are undone one after the other: then the next turn computes it anew."""
        with self._lock:
            if self._turn is not None:
                self._turn.close()
            if not self._earlier:
                return False
            past, self._turn = self._earlier.pop(), None
            if past.snapshot is not None:
                self._state.restore(past.snapshot, 0)
            else:
                past = past._replace(snapshot=self._executor.new_state(1).snapshot(0))
                self._executor = None
            self._past = past
            return True

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a new folder that `load` reads: the turns, the options, and the state, so that nothing is computed
        again. A turn that is not yet at its end is no part of it.

        Raises:
            StateError: if nothing has been said yet, or it cannot be written: a folder that is there stays.
        """
        past, folder = self._past, Path(path).expanduser()  # ids and snapshot of one moment
        if not past.ids:
            raise StateError("nothing has been said yet: there is nothing to save")
        options: dict[str, Any] = dict(self._options)
        if "logit_bias" in options:  # JSON has no numbers as keys
            options["logit_bias"] = list(options["logit_bias"].items())
        record = {"version": _VERSION, "ids": past.ids, "messages": past.messages, "options": options}
        try:
            with atomic_folder(folder) as work:
                past.snapshot.save(work / _STATE)
                (work / _RECORD).write_text(json.dumps(record, default=_number), encoding="utf-8")
        except OSError as error:
            raise StateError(f"cannot write {folder}: {error.strerror or error}") from error
        return folder

    @classmethod
    def load(cls, completer: Completer, path: str | os.PathLike[str]) -> Conversation:
        """A conversation that was saved, with the same model and executor; the architecture is checked.

        Raises:
            StateError: if it is damaged, or of another architecture or executor.
        """
        folder = Path(path).expanduser()
        ids, messages, options = _read(folder / _RECORD, len(completer.tokenizer))
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        talk, executor = cls(completer, system, options), completer.runtime.sync()
        talk._renew(executor)
        snapshot = talk._state.load(folder / _STATE)
        if snapshot.length > len(ids):
            raise StateError(f"{folder} is damaged: its state has {snapshot.length} tokens, its turns {len(ids)}")
        talk._state.restore(snapshot, 0)
        talk._past = _Past(messages, ids, snapshot)
        return talk

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns so far, as they are given to `Gemma.chat`."""
        return [dict(message) for message in self._past.messages]

    def _preamble(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system else []

    def _renew(self, executor: Any) -> None:
        """A state that has seen nothing of the turns so far."""
        self._executor, self._state = executor, executor.new_state(1)
        self._past = self._past._replace(snapshot=self._state.snapshot(0))

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[Prompt, bool]:
        """What the model is shown of the last message, and whether that carries on what it has seen."""
        tokenizer, ids = self.completer.tokenizer, self.ids
        if not ids:
            return formats.chat(tokenizer, messages), True
        if (template := tokenizer.settings.chat_template) is None:
            return formats.next_turn(tokenizer, ids, messages[-1]["content"]), True
        added = template.continued(tokenizer, ids, messages)
        return (formats.chat(tokenizer, messages), False) if added is None else (added, True)

    def _remember(self, asked: list[dict[str, str]], request: Request, result: Result) -> None:
        """Add a turn; called by the thread that reads its end, before the next turn can begin (`Stream.close`)."""
        tokenizer, ids = self.completer.tokenizer, [*request.ids, *result.ids]
        # the family's <eos> ends the answer, but not the conversation; a template of its own may write it
        if ids[-1] == tokenizer.eos and tokenizer.settings.chat_template is None:
            ids.pop()  # it was drawn last, so the state has not seen it
        answered = [*asked, {"role": "assistant", "content": result.text}]
        self._earlier = [*(past._replace(snapshot=None) for past in self._earlier), self._past]
        self._past = _Past(answered, ids, self._state.snapshot(0))


_RECORD, _STATE, _VERSION = "conversation.json", "state.safetensors", 2


def _number(value: Any) -> Any:
    """JSON's form of a number of NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"an option of the type {type(value).__name__}")


def _read(path: Path, vocab_size: int) -> tuple[list[int], list[dict[str, str]], Options]:
    """Ids, messages and options of a saved conversation."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["version"]
        if version != _VERSION:
            raise StateError(f"{path} is of version {version!r}; this version of gemkit reads {_VERSION}")
        ids, messages, options = (record[key] for key in ("ids", "messages", "options"))
        if "logit_bias" in options:
            options["logit_bias"] = {int(token): float(bias) for token, bias in options["logit_bias"]}
        if not set(options) <= set(Options.__annotations__):
            raise ValueError("unknown options")
        if not (
            messages and all(set(m) == {"role", "content"} and set(map(type, m.values())) == {str} for m in messages)
        ):
            raise ValueError("messages without role and content")
        if not (ids and all(type(i) is int and 0 <= i < vocab_size for i in ids)):
            raise ValueError("ids that the vocabulary does not have")
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}: Conversation.save writes it") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StateError(f"{path} is no conversation, or damaged: {error}") from None
    return ids, messages, Options(**options)
