"""`gemkit infill`: complete code at a caret."""

from __future__ import annotations

import argparse
import re
from typing import Any

from gemkit.cli.options import add_model, add_output, add_sampling, load_model, options, read_text, verb
from gemkit.cli.output import conclude, print_json, result_json, say, write, write_stream
from gemkit.errors import ConfigError

_EXAMPLES = """\
  gemkit infill -m codegemma-2b --prefix 'import ' --suffix $'\\nif __name__ == "__main__":\\n    sys.exit(0)'
  gemkit infill -m codegemma-2b main.py --at 12:5                 (line 12, before column 5, counted from 1)
  gemkit infill -m codegemma-7b main.py --at 340 --file util.py   (after 340 characters; util.py for context)"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "infill", "fill in code between a prefix and a suffix", _EXAMPLES)
    parser.add_argument("source", nargs="?", help="the file to complete, - for stdin")
    parser.add_argument("--at", metavar="CARET", help="where in it: LINE:COLUMN from 1, or a count of characters")
    parser.add_argument("--prefix", metavar="TEXT", help="the text before the caret, instead of a file")
    parser.add_argument("--suffix", metavar="TEXT", help="the text after the caret")
    parser.add_argument("--path", metavar="PATH", help="the path that the model is told (default: the source's)")
    parser.add_argument(
        "-f", "--file", action="append", default=[], metavar="PATH", help="another file for context (repeatable)"
    )
    parser.add_argument("--whole", action="store_true", help="print the whole completed text, not only what is new")
    add_sampling(parser, max_tokens=128)
    add_model(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prefix, suffix, path = _around_caret(args)
    files = [(name, read_text(name)) for name in args.file]
    chosen = options(args)
    model = load_model(args)
    stream = model.infill_stream(prefix, suffix, path=path, files=files, **chosen)
    for note in stream.prompt.notes:
        say(f"note: {note}")
    if args.json:
        result = stream.finish()
        answer = result_json(result, model.tokenizer)
        whole = {"whole": prefix + result.text + suffix} if args.whole else {}
        print_json({"model": model.label, "prefix": prefix, "suffix": suffix, **answer, **whole})
    elif args.whole:
        result = stream.finish()
        write(prefix + result.text + suffix, args.raw)
    else:
        result = write_stream(stream, args.raw)
    return conclude(args, model.tokenizer, result)


def _around_caret(args: argparse.Namespace) -> tuple[str, str, str | None]:
    if args.source is None:
        if args.prefix is None and args.suffix is None:
            raise ConfigError("nothing to complete: give a file and --at, or --prefix and --suffix")
        if args.at is not None:
            raise ConfigError("--at is a place in a file, but no file is given")
        return args.prefix or "", args.suffix or "", args.path
    if args.prefix is not None or args.suffix is not None:
        raise ConfigError("give either a file and --at, or --prefix and --suffix")
    if args.at is None:
        raise ConfigError(f"where in {args.source}? Give --at LINE:COLUMN or --at CHARACTERS")
    text = read_text(args.source)
    caret = _offset(text, args.at, args.source)
    return text[:caret], text[caret:], args.path or (None if args.source == "-" else args.source)


def _offset(text: str, at: str, name: str) -> int:
    """Characters before the caret."""
    line, colon, column = at.partition(":")
    if not (line.isdecimal() and (column.isdecimal() or not colon)):
        raise ConfigError(f"--at {at!r} must be LINE:COLUMN from 1, such as 12:5, or a count of characters")
    if not colon:
        if int(line) > len(text):
            raise ConfigError(f"--at {at}: {name} has {len(text)} characters")
        return int(line)
    # lines end as in editors, compilers and the language server protocol: a form feed or U+2028 ends none
    ends = [*re.finditer(r"\r\n|\n|\r", text)]
    starts = [0, *(end.end() for end in ends)]
    if not 1 <= int(line) <= len(starts):
        raise ConfigError(f"--at {at}: {name} has lines 1 to {len(starts)}")
    start = starts[int(line) - 1]
    width = (ends[int(line) - 1].start() if int(line) <= len(ends) else len(text)) - start
    if not 1 <= int(column) <= width + 1:
        raise ConfigError(f"--at {at}: line {line} of {name} has columns 1 to {width + 1}")
    return start + int(column) - 1
