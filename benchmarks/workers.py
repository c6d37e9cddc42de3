"""Engines in processes of their own, as the runner sees them: it asks one at a time, so that one at a time computes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import Foreign, Moment

HERE = Path(__file__).parent
PAUSE = 0.05  # seconds before a request: the threads of the engine before may still spin, waiting for work
SILENCE = 3600  # seconds after which an engine that does not answer is given up


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Lost(Exception):
    """An engine that is not there, or failed: in words."""


def environment(threads: int) -> dict[str, str]:
    """Of a process that is measured: so many threads, no network, compiled modules as an installation has them."""
    libraries = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **offline, **libraries, "GEMKIT_THREADS": str(threads)}


class Worker:
    """An engine in its own process.

    Args:
        script: that serves it, in this folder or at a path of its own.
    """

    def __init__(self, name: str, python: Path, threads: int, script: str | Path = "worker.py"):
        self.name = name
        command = [python, HERE / script, name, str(threads)]
        self.started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment(threads),
            )
        except OSError as error:
            raise Lost(f"{python} cannot be started: {error.strerror} (`make bench` installs the rivals)") from None
        try:
            self.imported_bytes = self._answer()["imported_bytes"]
        except Lost:
            self.close()
            raise

    def ask(self, do: str, foreign: Foreign | None = None, **options: Any) -> dict[str, Any]:
        """The answer to a request; what others did on the machine meanwhile is added to `foreign`."""
        time.sleep(PAUSE)
        before = Moment.now()
        try:
            self._process.stdin.write((json.dumps({"do": do, **options}) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Lost("its process ended") from None
        answer = self._answer()
        if foreign is not None:
            foreign.add(before, Moment.now(), answer["cpu_seconds"])
        return answer

    def _answer(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(SILENCE):
                self._process.kill()  # it may be busy, and would disturb the others
                raise Lost(f"no answer for {SILENCE} s")
        line = self._process.stdout.readline()
        if not line:
            raise Lost(f"its process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Lost(answer["error"])
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may be gone, with a request unread
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
