"""The output of verbs: results on stdout, talk on stderr, text of a model as it comes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import rich.progress

    from gemkit.conversation import Stream
    from gemkit.generate import Result, TokenLogprob
    from gemkit.text import Tokenizer


class Progress:
    """A bar of bytes read, on a terminal; silent for the first second, and in a file."""

    def __init__(self, enabled: bool):
        self._enabled = enabled and sys.stderr.isatty()
        self._start = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if not self._enabled or time.monotonic() - self._start < 1:
                return
            self._bar = _bar()
            self._bar.add_task("loading", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)


def _bar() -> rich.progress.Progress:
    """Drawn on stderr; stdout is not captured, for it may be a pipe."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    return progress.Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def rewrite(line: str) -> None:
    """Talk on a terminal: what the line says instead of what it said; "" leaves it free."""
    _tell(f"\r\x1b[K{line}")


def say(line: str) -> None:
    """Talk: a line on stderr."""
    _tell(printable(line, stream=sys.stderr) + "\n")


def _tell(text: str) -> None:
    """Write to stderr. Talk that nobody can read any more is no error: the result still has its place."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process


def printable(text: str, raw: bool = False, stream: TextIO | None = None) -> str:
    """Text for stdout or another stream. On a terminal control characters are shown, not obeyed: a model may have
    learnt bad ones, and a file may hold them in its names."""
    if raw or not (stream or sys.stdout).isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0x9F else f"\\x{ord(c):02x}" for c in text)


def write(text: str, raw: bool = False) -> None:
    sys.stdout.write(printable(text, raw))
    sys.stdout.flush()


def write_stream(stream: Stream, raw: bool) -> Result:
    """Print the pieces as they come. Ctrl-C keeps what there is."""
    guard, shown = _Guard(), 0
    with guard.installed():
        try:
            for piece in stream:
                guard.busy = True
                write(piece, raw)
                shown += len(piece)
                guard.free()
        except KeyboardInterrupt:
            guard.busy = True
            stream.interrupt()
        assert stream.result is not None
        write(stream.result.text[shown:] + "\n", raw)  # a piece that Ctrl-C came between us and
    return stream.result


class _Guard:
    """Ctrl-C waits while something is `busy`, so that it is done once and counted. A mask of signals would not do: any
    thread of any library may be the one that is told."""

    busy = False
    _waiting = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler:  # somebody else's, or ignored
            yield
            return
        signal.signal(signal.SIGINT, self._told)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def free(self) -> None:
        """Not busy any more; what waited is raised."""
        self.busy = False
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt

    def _told(self, *_: object) -> None:
        self._waiting = True
        if not self.busy:
            self.free()


def put(line: str = "") -> None:
    """Result: a line on stdout."""
    print(printable(line))


def print_json(record: dict[str, Any]) -> None:
    """One object on one line, out at once: the reader of a pipe may be waiting for it."""
    text = json.dumps(record, ensure_ascii=False)  # which escapes all but these of what a terminal obeys
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def conclude(args: argparse.Namespace, tokenizer: Tokenizer, *results: Result) -> int:
    """Say how the answers went, unless --quiet; the exit code, 130 if Ctrl-C ended one."""
    if not args.quiet:
        for result in results:
            say(figures(result, tokenizer))
    return 130 if any(result.finish_reason == "interrupted" for result in results) else 0


def figures(result: Result, tokenizer: Tokenizer) -> str:
    """One line on how an answer went."""
    t = result.timings
    stop = tokenizer.piece(result.stopped_by) if isinstance(result.stopped_by, int) else repr(result.stopped_by)
    why = {
        "stop": f"stopped at {stop}",
        "length": "reached --max-tokens",
        "context": "reached the end of the context",
        "interrupted": "interrupted",
    }[result.finish_reason]
    parts = [
        f"prompt {count(t.prompt_tokens, 'token')}" + (f" ({t.cached_tokens} remembered)" if t.cached_tokens else "")
    ]
    if t.prompt_tokens_per_second is not None:
        parts[0] += f" at {t.prompt_tokens_per_second:.1f} tok/s"
    if t.first_token_seconds is not None:
        parts.append(f"first token after {t.first_token_seconds:.2f} s")
    rate = t.decode_tokens_per_second
    parts.append(count(t.generated_tokens, "token") + (f" at {rate:.1f} tok/s" if rate is not None else ""))
    if t.drafted_tokens:
        parts.append(f"{t.accepted_tokens:,} of {t.drafted_tokens:,} guesses right")
    return "; ".join([*parts, why])


def logprob_json(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token, its log-probability in nats and its likeliest alternatives."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "piece": tokenizer.piece(token), "logprob": logprob}

    return {**one(entry.id, entry.logprob), "top": [one(*other) for other in entry.top]}


def result_json(result: Result, tokenizer: Tokenizer) -> dict[str, Any]:
    """A result as a JSON object."""
    t = result.timings
    return {
        "text": result.text,
        "ids": list(result.ids),
        "finish_reason": result.finish_reason,
        "stopped_by": result.stopped_by,
        "seed": result.seed,
        "logprobs": None if result.logprobs is None else [logprob_json(e, tokenizer) for e in result.logprobs],
        "timings": {
            "prompt_tokens": t.prompt_tokens,
            "cached_tokens": t.cached_tokens,
            "generated_tokens": t.generated_tokens,
            "first_token_seconds": t.first_token_seconds,
            "prompt_tokens_per_second": t.prompt_tokens_per_second,
            "decode_tokens_per_second": t.decode_tokens_per_second,
            "drafted_tokens": t.drafted_tokens,
            "accepted_tokens": t.accepted_tokens,
        },
    }
