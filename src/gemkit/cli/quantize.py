"""`gemkit quantize`: a model in 8 or 4 bits, in a folder of its own, and what that changed."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemkit.cli.options import add_output, load_model, read_text, verb
from gemkit.cli.output import print_json, say
from gemkit.errors import ConfigError

if TYPE_CHECKING:
    from gemkit.weights.quantize import Rounding

_EXAMPLES = """\
  gemkit quantize gemma-2-2b-it -o gemma-2-2b-it-int4
  gemkit quantize ./my-model -o my-model-int8 --weights int8
  gemkit quantize ./my-model -o my-model-int4 --calibration my-domain.txt --evaluate held-out.txt
  gemkit quantize ./my-model.gguf -o my-model-int4 --json"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "quantize", "save a model with its weights in 8 or 4 bits", _EXAMPLES)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a member, hub id, folder, .gguf or .ckpt (default: the starter model)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="a new folder; gemkit -m opens it")
    parser.add_argument(
        "--weights", choices=("int8", "int4"), default="int4", help="bits of the large matrices (default: %(default)s)"
    )
    parser.add_argument(
        "--no-calibrate",
        action="store_true",
        help="int4: round each weight by itself, at once and worse, instead of by what the model computes from a text",
    )
    parser.add_argument("--calibration", metavar="FILE", help="the text for that (default: one of our own)")
    parser.add_argument("--evaluate", metavar="FILE", help="perplexity of this text before and after")
    parser.add_argument(
        "--dtype", metavar="TYPE", help="of what stays dense: bfloat16 or float32 (default: the file's)"
    )
    parser.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    parser.add_argument(
        "--dequantize", action="store_true", help="quantize again what is stored in as few bits, instead of keeping it"
    )
    add_output(parser)
    parser.set_defaults(run=run, executor="torch")


def run(args: argparse.Namespace) -> int:
    if args.calibration is not None and (args.no_calibrate or args.weights == "int8"):
        why = "--no-calibrate" if args.no_calibrate else "--weights int8, which rounds each weight by itself"
        raise ConfigError(f"--calibration {args.calibration} cannot take effect with {why}")
    calibrate = not args.no_calibrate if args.calibration is None else read_text(args.calibration)
    text = None if args.evaluate is None else read_text(args.evaluate)
    from gemkit.weights.export.hf import new_folder

    new_folder(args.output)  # before anyone waits for a model that could not be saved
    before = None if text is None else _perplexity(args, text)
    model = load_model(args, calibrate=calibrate)
    folder = model.save(args.output, quantized=True)
    after = None if text is None else model.score(text).perplexity
    report = model.report
    sizes = {"nbytes_before": report.nbytes_read, "nbytes": report.nbytes}
    if args.json:
        weights = [asdict(rounding) for rounding in report.roundings]
        perplexities = {} if text is None else {"perplexity_before": before, "perplexity": after}
        record = {"model": model.label, "folder": str(folder), "weights": args.weights, **sizes, **perplexities}
        print_json({**record, "notes": report.notes, "tensors": weights})
        return 0
    _print(report.roundings)
    print(f"{report.nbytes_read / 1e6:,.1f} MB of weights became {report.nbytes / 1e6:,.1f} MB")
    if before is not None and after is not None:
        print(f"perplexity {before:.4f} before, {after:.4f} after: {after / before - 1:+.2%}")
    if not args.quiet:
        say(f"saved to {folder}")
    return 0


def _perplexity(args: argparse.Namespace, text: str) -> float | None:
    """Of the model as it is; it is gone from memory before the quantized one is made."""
    return load_model(argparse.Namespace(**{**vars(args), "weights": None})).score(text).perplexity


def _print(roundings: list[Rounding]) -> None:
    """A row for each matrix of a layer, all layers together, and for the table."""
    from gemkit.cli.tables import print_table

    alike: dict[tuple[str, str], list[Rounding]] = {}
    for rounding in roundings:
        alike.setdefault((re.sub(r"\.\d+\.", ".*.", rounding.name), rounding.kind), []).append(rounding)
    if not alike:
        return
    columns = [("", "left"), ("count", "right"), ("kind", "left"), ("off by", "right"), ("worst", "right")]
    columns += [("MB before", "right"), ("MB", "right")]
    rows = []
    for (name, kind), of in sorted(alike.items()):
        errors = [rounding.error for rounding in of]
        before, after = (sum(sizes) / 1e6 for sizes in zip(*((r.nbytes_before, r.nbytes) for r in of), strict=True))
        mean = (sum(error**2 for error in errors) / len(errors)) ** 0.5
        rows.append([name, str(len(of)), kind, f"{mean:.2%}", f"{max(errors):.2%}", f"{before:,.1f}", f"{after:,.1f}"])
    print_table(columns, [("root mean square of the change over that of the weight", rows)])
