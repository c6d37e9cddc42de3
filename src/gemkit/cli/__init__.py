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
    caption,
    chat,
    compare,
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
    doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="gemkit",
        description="Every member of Google's Gemma family of open models, on the machine you have.",
        epilog="`gemkit VERB --help` shows examples. Without -m, the starter model (Gemma 3 270M) runs.",
    )
    parser.add_argument("--version", action="version", version=f"gemkit {__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for verb in _VERBS:
        verb.add(subparsers)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows its code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            args = parser.parse_args(argv)
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
