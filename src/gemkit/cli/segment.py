"""`gemkit segment IMAGE "cat"`: boxes and masks of things."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.options import verb
from gemkit.cli.output import say
from gemkit.cli.pictures import add_find, find

_EXAMPLES = """\
  gemkit segment -m paligemma-3b-mix-448 cat.jpg cat --masks vae-oid.npz --overlay found.png
  gemkit segment -m paligemma-3b-mix-448 cat.jpg "cat ; dog" --json    (masks as COCO has them: run lengths)"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "segment", "find things in an image: boxes and masks", _EXAMPLES)
    parser.add_argument("--masks", metavar="PATH", help="the decoder of masks, vae-oid.npz (default: $GEMKIT_MASKS)")
    add_find(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit import detections
    from gemkit.text import tasks

    task, decoder = tasks.segment(args.things), detections.find_masks(args.masks)
    if decoder is None:
        say(f"note: {detections.NO_MASKS}")
    return find(args, task, decoder)
