"""`gemkit ask IMAGE "question"`: a question about an image."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.options import add_model, add_output, add_sampling, options, verb
from gemkit.cli.output import conclude, print_json, result_json, write_stream
from gemkit.cli.pictures import add_image, load_image_model, read_all
from gemkit.errors import ConfigError

_EXAMPLES = """\
  gemkit ask -m paligemma-3b-mix-224 cat.jpg "where is the cat?"
  gemkit ask -m paligemma-3b-mix-448 cat.jpg "wo ist die Katze?" --lang de
  gemkit ask -m paligemma-3b-mix-448 page.png --task ocr          (a whole task, in the words of its training)
  gemkit ask -m ./my-paligemma left.jpg right.jpg "is it the same room?" """


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "ask", "ask about an image", _EXAMPLES)
    add_image(parser, nargs="+")
    parser.add_argument("question", help="the question; several images before it are seen together")
    parser.add_argument("--lang", metavar="CODE", help="language of the answer (default: en)")
    parser.add_argument(
        "--task", action="store_true", help="the question is a whole task, such as ocr or 'describe en'"
    )
    add_sampling(parser)
    add_model(parser, images=True)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit.text import tasks

    if args.task and args.lang is not None:
        raise ConfigError(f"--lang {args.lang} has no place in a --task, which names its language: 'caption de'")
    # worded here, so that what is no question is refused before a model is loaded
    task = args.question if args.task else tasks.answer(args.question, args.lang or "en")
    pictures = tuple(read_all(args.image))
    chosen = options(args)
    model = load_image_model(args)
    stream = model.ask_stream(pictures, task, lang=None, **chosen)
    if args.json:
        result = stream.finish()
        answer = result_json(result, model.tokenizer)
        print_json({"model": model.label, "images": args.image, "question": args.question, **answer})
    else:
        result = write_stream(stream, args.raw)
    return conclude(args, model.tokenizer, result)
