"""`gemkit detect IMAGE "cat ; dog"`: boxes of things."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.options import verb
from gemkit.cli.pictures import add_find, find

_EXAMPLES = """\
  gemkit detect -m paligemma-3b-mix-448 street.jpg "car ; bicycle"
  gemkit detect -m paligemma-3b-mix-448 street.jpg car --overlay found.png
  gemkit detect -m paligemma-3b-mix-448 street.jpg car --json          (boxes as COCO has them: x, y, width, height)"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "detect", "find things in an image: labelled boxes", _EXAMPLES)
    add_find(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit.text import tasks

    return find(args, tasks.detect(args.things))
