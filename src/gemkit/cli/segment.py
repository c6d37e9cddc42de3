"""`gemkit segment IMAGE "cat"`: boxes and masks of things."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.common import add_model, add_output, add_sampling, say, verb
from gemkit.cli.pictures import add_image, add_overlay, find

_EXAMPLES = """\
  gemkit segment -m paligemma-3b-mix-448 cat.jpg cat --masks vae-oid.npz --overlay found.png
  gemkit segment -m paligemma-3b-mix-448 cat.jpg "cat ; dog" --json    (masks as COCO has them: run lengths)"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "segment", "find things in an image: boxes and masks", _EXAMPLES)
    add_image(parser)
    parser.add_argument("things", help="what to look for; several between semicolons")
    parser.add_argument("--masks", metavar="PATH", help="the decoder of masks, vae-oid.npz (default: $GEMKIT_MASKS)")
    add_overlay(parser)
    add_sampling(parser)
    add_model(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit import sight
    from gemkit.text import tasks

    task, decoder = tasks.segment(args.things), sight.find_masks(args.masks)
    if decoder is None:
        say(f"note: {sight.NO_MASKS}")
    return find(args, task, decoder)
