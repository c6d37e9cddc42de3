"""The options that verbs share, and the model, sampling and text that they name."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.cli.output import Progress, say
from gemkit.errors import ConfigError, TextError
from gemkit.files import decode_text

if TYPE_CHECKING:
    from gemkit.gemma import Gemma
    from gemkit.generate import Options


def verb(subparsers: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A verb's parser; its help starts with examples that run."""
    return subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\nexamples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
    )


def add_model(parser: argparse.ArgumentParser, *, runs: bool = True, images: bool = False) -> None:
    """-m, and how to run it; for `images` one that sees them, which the starter model does not."""
    group = parser.add_argument_group("model")
    what = "a PaliGemma: a member" if images else "a member"
    of = "hub id or folder" if images else "hub id, folder, .gguf or .ckpt (default: the starter model)"
    named = group.add_argument("-m", "--model", metavar="MODEL", help=f"{what}, {of}")
    named.completer = _members  # type: ignore[attr-defined]  # asked by argcomplete
    if runs:
        group.add_argument("--dtype", metavar="TYPE", help="run dtype: bfloat16 or float32 (default: the file's own)")
        group.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
        group.add_argument(
            "--executor",
            default="auto",
            metavar="NAME",
            help="what computes it: native (C++, on a CPU), torch, or auto, which takes native where it can",
        )
        group.add_argument(
            "--dequantize", action="store_true", help="make quantized weights dense: faster in torch, larger in memory"
        )
        group.add_argument(
            "--weights",
            choices=("int8", "int4"),
            help="quantize them on the way (int4 takes a while: `gemkit quantize`)",
        )
        group.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="DIR",
            help="a LoRA in PEFT's layout beside the model, a folder or hub id (repeatable); -m opens it with its base",
        )


def _members(prefix: str, **_: Any) -> list[str]:
    """Names of members, for a shell that completes one."""
    from gemkit.family import members

    return [member.name for member in members() if member.name.startswith(prefix)]


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int = 256) -> None:
    """How the answer is made. What is left out is decided where the library decides it."""
    group = parser.add_argument_group("sampling (default: the most likely token, always; chat: as published)")
    group.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"to generate at most (default: {max_tokens})",
    )
    group.add_argument("-t", "--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K best tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the best tokens that hold this probability")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below this share of the best one's")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: say less again")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    group.add_argument(
        "--beyond-context", action="store_true", help="go on past the trained context; quality is undefined there"
    )
    group.add_argument(
        "--speculate",
        nargs="?",
        type=int,
        const=True,
        default=False,
        metavar="N",
        help="guess up to N tokens a step from text before them: the same answer, sooner where it repeats",
    )


def options(args: argparse.Namespace) -> Options:
    """The sampling options that were given.

    Raises:
        ConfigError: for a value out of its range, before anyone waits for a model to be loaded.
    """
    from gemkit.generate import Sampling
    from gemkit.generate.speculate import draft_limit
    from gemkit.generate.stops import StopStrings

    sampling: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        if getattr(args, name) is not None:
            sampling[name] = getattr(args, name)
    Sampling(**sampling)
    StopStrings(args.stop)
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens {args.max_tokens} must be at least 1; to rate a text as it is, use score")
    if args.beyond_context:
        say(BEYOND_CONTEXT)
    draft_limit(args.speculate)
    plain: Options = {
        "max_tokens": args.max_tokens,
        "stop": args.stop,
        "beyond_context": args.beyond_context,
        "speculate": args.speculate,
    }
    return {**plain, **sampling}  # type: ignore[typeddict-item]  # its keys are those of Sampling


BEYOND_CONTEXT = "note: beyond the trained context quality is undefined: the model has never seen these positions"


def add_output(parser: argparse.ArgumentParser, *, each: str = "") -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help=f"print one JSON object{each}")
    group.add_argument("--raw", action="store_true", help="on a terminal, do not escape control characters")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress and no figures on stderr")


def load_model(args: argparse.Namespace, **options: Any) -> Gemma:
    """The model that the command line names, with progress on stderr; `options` are further ones of `gemkit.load`."""
    from gemkit.gemma import load

    with Progress(enabled=not getattr(args, "quiet", False)) as progress:
        model = load(
            args.model,
            device=args.device,
            dtype=args.dtype,
            executor=args.executor,
            quantized=not args.dequantize,
            weights=args.weights,
            adapter=getattr(args, "adapter", ()),
            progress=progress,
            **options,
        )
    if not getattr(args, "quiet", False):
        size = f"{model.report.nbytes / 1e6:,.0f} MB, {model.report.dtype}"
        runner = f"{model.executor.name}: {model.executor.about()}"
        say(f"{model.label}: {size}, loaded in {model.report.seconds:.1f} s; {runner}")
        for note in model.report.notes:
            say(f"note: {note}")
    return model


def read_text(path: str) -> str:
    """The text of a file, or of stdin for "-", as `files.decode_text` reads it.

    Raises:
        TextError: if it is not UTF-8 or UTF-16.
    """
    name = "stdin" if path == "-" else path
    try:
        if path == "-":
            data = b"" if sys.stdin is None else sys.stdin.buffer.read()
        else:
            data = Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return decode_text(data)
    except TextError as error:
        raise TextError(f"{name}: {error}") from None


def texts(given: Sequence[str], files: Sequence[str] = ()) -> list[str]:
    """The texts of a command line: its arguments, of which "-" is what comes from a pipe, then files. Without any of
    them, what comes from a pipe.

    The line break that `echo` puts at the end of a pipe is no part of its text; a file is taken as it is.
    """
    found = [_piped() if text == "-" else text for text in given] + [read_text(path) for path in files]
    if not found and sys.stdin is not None and not sys.stdin.isatty():
        with contextlib.suppress(ConfigError):  # stdin that cannot be read is none
            found = [text for text in [_piped()] if text]
    return found


def _piped() -> str:
    text = read_text("-")
    return text.removesuffix("\n").removesuffix("\r")
