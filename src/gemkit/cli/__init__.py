"""The command line: one file a verb, each of which parses, calls the library and prints.

Results go to stdout, talk and progress to stderr. An error of the user's prints its message, without a traceback, and
exits with 1; a command line that cannot be read exits with 2; Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from gemkit import __version__
from gemkit.cli import (
    ask,
    bench,
    cache,
    caption,
    chat,
    compare,
    completion,
    detect,
    doctor,
    explain_prompt,
    generate,
    infill,
    merge,
    models,
    quantize,
    score,
    segment,
    show,
    tune,
)
from gemkit.cli.output import say
from gemkit.errors import GemkitError
from gemkit.memory import processors

# Threads that spin while they wait cost everyone a busy machine: on two cores with other work, a token took 5 s with
# torch's default and 0.4 s with this. It must be set before torch is imported: here, and not in the library.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_VERBS = (
    generate,
    chat,
    infill,
    ask,
    caption,
    detect,
    segment,
    score,
    tune,
    quantize,
    merge,
    show,
    compare,
    models,
    explain_prompt,
    bench,
    cache,
    doctor,
    completion,
)


_MAKERS = ("tune", "quantize", "merge")  # verbs whose result is a folder: what they print is not missed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        completion.complete(parser())
    given = [*(sys.argv[1:] if argv is None else argv)]
    if not _open_streams() and given[:1] and given[0] not in _MAKERS:
        say("ConfigError: stdout is closed: there is no place for the answer; give it one, as with > FILE")
        return 1
    _heed_quota()
    try:
        try:
            args = parser().parse_args(given)
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, not when the process ends: a pipe may be broken, a disk full
    except GemkitError as error:
        say(f"{type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, has gone: nothing is wrong
            return 0
        say(f"{type(error).__name__}: {error}")
        return 1


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = argparse.ArgumentParser(
        prog="gemkit",
        description="Every member of Google's Gemma family of open models, on the machine you have.",
        epilog="`gemkit VERB --help` shows examples. Without -m, the starter model (Gemma 3 270M) runs.",
    )
    made.add_argument("--version", action="version", version=f"gemkit {__version__}")
    subparsers = made.add_subparsers(metavar="VERB", required=True)
    for verb in _VERBS:
        verb.add(subparsers)
    return made


def _open_streams() -> bool:
    """Give every standard stream that a service or a launcher has closed the null device; whether stdout was open.

    A file that is opened later would otherwise get the number of the closed stream, and what a library writes to it.
    """
    was_open = sys.stdout is not None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows its code
        sys.stdout.reconfigure(errors="backslashreplace")
    return was_open


def _heed_quota() -> None:
    """Let torch compute with the processors of this container: it counts those of the machine."""
    if (allowed := processors()) < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed))
