"""`gemkit merge`: a model with adapters added to its weights, in a folder that every reader of the layout opens."""

from __future__ import annotations

import argparse
from typing import Any

from gemkit.cli.options import add_output, load_model, verb
from gemkit.cli.output import print_json, say
from gemkit.errors import ConfigError

_EXAMPLES = """\
  gemkit merge gemma-2-2b-it --adapter runs/x -o my-gemma
  gemkit merge --adapter runs/x --adapter runs/y -o both --dtype bfloat16
  gemkit merge runs/x -o my-gemma                    (the folder of an adapter brings its base)"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "merge", "save a model with adapters added to its weights", _EXAMPLES)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="BASE",
        help="a member, hub id, folder, .gguf or .ckpt, or an adapter's folder (default: the starter model)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="a LoRA in PEFT's layout, a folder or hub id (repeatable)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="a new folder; gemkit -m opens it")
    parser.add_argument(
        "--dtype", metavar="TYPE", help="of the saved weights: bfloat16 or float32 (default: the file's own)"
    )
    parser.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    add_output(parser)
    parser.set_defaults(run=run, executor="torch", weights=None, dequantize=True)


def run(args: argparse.Namespace) -> int:
    if args.dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"--dtype {args.dtype} is not one of bfloat16, float32")
    from gemkit.weights.export.hf import new_folder

    new_folder(args.output)  # before anyone waits for a model that could not be saved
    # the sum is rounded once: what is stored in bfloat16 is summed in float32 and rounded back, what is not is rounded
    # when it is saved
    loaded_as = "float32" if args.dtype == "float32" else None
    model = load_model(argparse.Namespace(**{**vars(args), "dtype": loaded_as}))
    if not model.adapters():
        raise ConfigError("there is no adapter to merge: give one, --adapter DIR")
    merged = model.merge_adapters()
    import torch

    folder = model.save(args.output, dtype=None if args.dtype is None else getattr(torch, args.dtype))
    if args.json:
        print_json({"model": model.label, "folder": str(folder), "merged": merged})
    elif not args.quiet:
        say(f"{', '.join(merged)} merged; saved to {folder}")
    return 0
