"""`gemkit caption IMAGE...`: captions of many images, a JSON line each."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from gemkit.cli.options import add_model, add_sampling, options, verb
from gemkit.cli.output import count, print_json, result_json, rewrite, say
from gemkit.cli.pictures import add_image, load_image_model
from gemkit.errors import GemkitError

_EXAMPLES = """\
  gemkit caption -m paligemma-3b-mix-224 cat.jpg
  gemkit caption -m paligemma-3b-mix-448 photos/*.jpg > captions.jsonl
  gemkit caption -m paligemma-3b-mix-448 --style describe --lang de cat.jpg"""


STYLES = ("caption", "cap", "describe")  # those of text.tasks, which help need not wait for


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "caption", "caption images, a JSON line each", _EXAMPLES)
    add_image(parser, nargs="+")
    parser.add_argument("--lang", default="en", metavar="CODE", help="language of the captions (default: en)")
    parser.add_argument(
        "--style",
        choices=STYLES,
        default="caption",
        help="caption is short; cap and describe are longer, for the mix models (default: caption)",
    )
    add_sampling(parser)
    add_model(parser, images=True)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="lines with ids, figures and how each answer ended")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A file that is no image costs its line, which says why, and the exit code; not the run."""
    from gemkit.text import tasks

    tasks.caption(args.lang, args.style)  # is refused before a model is loaded
    chosen = options(args)
    model = load_image_model(args)
    started, failed = time.monotonic(), 0
    for done, path in enumerate(args.image, 1):
        interrupted = False
        try:
            result = model.caption(path, args.lang, style=args.style, **chosen)
        except GemkitError as error:
            failed += 1
            line = {"image": path, "error": f"{type(error).__name__}: {error}"}
        else:
            more = {"model": model.label, **result_json(result, model.tokenizer)} if args.json else {}
            line = {"image": path, "caption": result.text, **more}
            interrupted = result.finish_reason == "interrupted"
        if done > 1 and _rewrites(args):
            rewrite("")  # the terminal may be that of stdout too
        print_json(line)
        if interrupted:
            return 130
        if not args.quiet:
            _progress(args, done, time.monotonic() - started)
    if failed:
        say(f"{count(failed, 'image')} of {len(args.image):,} could not be captioned")
    return 1 if failed else 0


def _rewrites(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def _progress(args: argparse.Namespace, done: int, seconds: float) -> None:
    """One line of a terminal that is rewritten; plain lines in a file, and at the end."""
    total = len(args.image)
    line = f"{done:,} of {count(total, 'image')} ({done / total:.0%}), {seconds / done:.1f} s each"
    if done < total:
        line += f", {seconds / done * (total - done):.0f} s left"
    if done < total and _rewrites(args):
        rewrite(line)
    else:
        say(line)
