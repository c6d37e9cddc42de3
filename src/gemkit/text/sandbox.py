"""A chat template that came with a model, run where it can do no harm: in a process of its own, with limits.

A template is a program, and files come from strangers. Jinja's sandbox keeps it from Python's objects; it cannot keep
it from an endless loop or from a text of gigabytes, which no thread of this process could end. The process
(`template_child.py`) starts when a template is first rendered and ends with its owner.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gemkit.errors import TextError

_CHILD = Path(__file__).with_name("template_child.py")
_START, _WAIT = 60.0, 20.0  # seconds on the clock, for a machine that has other things to do; the child limits itself
_REPLY = 256 << 20  # bytes: what goes beyond is no conversation


class TemplateProcess:
    """The process of one template. Any thread may call it; calls take turns.

    Args:
        source: the template, as text.
        name: where it came from, for messages.
    """

    def __init__(self, source: str, name: str):
        self.source, self.name = source, name
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a process that was forked off does not speak into its parent's pipe
        self._lock = threading.Lock()

    def render(
        self,
        variables: Mapping[str, Any],
        asked: Sequence[tuple[int, bool]],
        generation_marks: tuple[str, str] = ("", ""),
    ) -> list[str]:
        """The text of the template for so many of the messages each, with `add_generation_prompt` or without.

        Args:
            generation_marks: put around what stands between `{% generation %}` and `{% endgeneration %}`.

        Raises:
            TextError: what the template raises, with its words; one that uses up its time, its memory or its length;
                one that is not Jinja.
        """
        with self._lock:
            try:
                if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                    self._start()
                return self._ask({"variables": variables, "asked": asked, "marks": generation_marks})
            except BaseException:  # whatever it was, nobody reads a late reply
                self._end()
                raise

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in ("TZ", "LANG", "LC_ALL") if name in os.environ}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise TextError(f"{self.name} cannot be run: no process for it: {error.strerror or error}") from None
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _stop, process, os.getpid())
        if self._read(_START) is None:
            raise TextError(f"{self.name} cannot be run: its process did not start (is jinja2 installed?)")
        self._ask(self.source)

    def _ask(self, request: Any) -> list[str]:
        assert self._process is not None
        try:
            pipe: IO[bytes] = self._process.stdin  # type: ignore[assignment]
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
        except (BrokenPipeError, OSError):
            raise self._refused("its process ended") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise TextError(f"messages for {self.name} must be what JSON can hold: {error}") from None
        reply = self._read(_WAIT)
        if reply is None:
            raise self._refused("it takes too long, or too much memory")
        if "error" in reply:
            line = f" (line {reply['line']})" if reply.get("line") else ""
            raise self._refused(f"{reply['error']}{line}")
        return reply["texts"]

    def _refused(self, why: str) -> TextError:
        return TextError(f"{self.name} refuses these messages: {why}")

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next line that the process writes; None if it ends or says nothing for so long."""
        assert self._process is not None
        pipe: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        parts: list[bytes] = []
        size, end = 0, time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while selector.select(max(0.0, end - time.monotonic())):
                part = os.read(pipe.fileno(), 1 << 20)
                parts.append(part)
                size += len(part)
                if part.endswith(b"\n"):
                    return json.loads(b"".join(parts))
                if not part or size > _REPLY:
                    return None
        return None

    def _end(self) -> None:
        if self._process is not None:
            _stop(self._process, self._owner)
        self._process = None


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a child, in the process that started it."""
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # what was written last was never read
                continue
