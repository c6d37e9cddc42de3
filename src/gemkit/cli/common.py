"""What several verbs share: their options, loading with progress, and printing text that a model wrote."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gemkit.errors import ConfigError, TextError

if TYPE_CHECKING:
    from gemkit.conversation import Stream
    from gemkit.gemma import Gemma
    from gemkit.generate import Options, Result, TokenLogprob
    from gemkit.text import Tokenizer


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
    group.add_argument("-m", "--model", metavar="MODEL", help=f"{what}, {of}")
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
    from gemkit.generate import Sampling, room_for
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
    room_for(args.speculate)
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


class Progress:
    """Bytes read, on one line of a terminal that is rewritten; silent for the first second, and in a file."""

    def __init__(self, enabled: bool):
        self._enabled = enabled and sys.stderr.isatty()
        self._start = self._last = time.monotonic()
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            rewrite("")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        elapsed = now - self._start
        if self._enabled and elapsed > 1 and now - self._last > 0.1:
            self._shown, self._last = True, now
            left = elapsed * (total - done) / max(done, 1)
            rewrite(f"loading {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {left:.0f} s left")


def rewrite(line: str) -> None:
    """Talk on a terminal: what the line says instead of what it said; "" leaves it free."""
    sys.stderr.write(f"\r\x1b[K{line}")
    sys.stderr.flush()


def say(line: str) -> None:
    """Talk: a line on stderr."""
    print(printable(line, stream=sys.stderr), file=sys.stderr, flush=True)


def read_text(path: str) -> str:
    """The text of a file, or of stdin for "-".

    Raises:
        TextError: if it cannot be read as UTF-8.
    """
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        name = "stdin" if path == "-" else path
        raise TextError(f"{name} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error


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


def print_json(record: dict[str, Any]) -> None:
    """One object on one line, out at once: the reader of a pipe may be waiting for it."""
    print(json.dumps(record, ensure_ascii=False), flush=True)


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
