"""`gemkit bench long`: decode rate and memory against depth, printed and drawn (`inspect.long_context` measures)."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.cli.options import verb
from gemkit.cli.output import count, print_json, put, say
from gemkit.errors import ConfigError

if TYPE_CHECKING:
    from gemkit.inspect import Subject
    from gemkit.inspect.long_context import Plan

_EXAMPLES = """\
  gemkit bench long                          RecurrentGemma 2B and Gemma 2B at a quarter of their widths
  gemkit bench long --scale full             at their published widths, one after the other (5.4 GB of memory)
  gemkit bench long -m recurrentgemma-9b     against the Gemma 1 of its size
  gemkit bench long --against gemma-3-1b --depths 1024,16384 --svg windows.svg
  gemkit bench long --decode-all --depths 4096,16384 --json"""


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "bench", "measure decode rate and memory against depth, two models in turn", _EXAMPLES)
    parser.add_argument("what", choices=("long",), help="what to measure: long sequences")
    parser.add_argument(
        "-m", "--model", default="recurrentgemma-2b", metavar="MODEL", help="a member, folder or .gguf: its shape alone"
    )
    parser.add_argument("--against", metavar="MODEL", help="the other (default: the Gemma 1 nearest in size)")
    parser.add_argument(
        "--scale",
        choices=("small", "full"),
        default="small",
        help="small: widths and vocabulary divided by 4, layers, heads and windows as published; "
        "full: as published, one model in memory at a time (default: small)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers of each")
    parser.add_argument(
        "--depths", default="512,2048,8192,32768", metavar="LIST", help="tokens remembered (512,2048,8192,32768)"
    )
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="to decode in each of 5 rounds (8)")
    parser.add_argument("--decode-all", action="store_true", help="reach each depth by generating, not by filling")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: as torch chooses)")
    parser.add_argument(
        "--svg", default="bench-long.svg", metavar="FILE", help="where to draw the curves (bench-long.svg)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit.inspect import long_context
    from gemkit.inspect.curves import require

    plan = _plan(args)
    require()  # told before anyone waits for figures, as the next
    svg = Path(args.svg).expanduser()
    if svg.is_dir() or not os.access(svg.parent, os.W_OK):
        raise ConfigError(f"--svg {args.svg}: no file can be written there; name one in a folder of yours")
    for subject in plan.subjects:
        limit = subject.decoder.max_context
        if plan.depths[-1] > limit:
            say(
                f"note: {subject.label} was trained on {limit:,} tokens; going beyond is fine here, "
                "where only rate and memory are measured"
            )
    ceiling = None if args.json else lambda report: _print_ceiling(plan, report)
    report = long_context.measure(plan, progress=say, ceiling=ceiling)
    svg.write_bytes(_drawing(report))
    report["svg"] = str(svg)
    if args.json:
        print_json(report)
    else:
        _print_measured(report)
    say(f"drawn into {svg}")
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    from gemkit.inspect import long_context, subject

    try:
        depths = sorted({int(depth) for depth in args.depths.split(",")})
    except ValueError:
        raise ConfigError(f"--depths {args.depths} must be whole numbers with commas between, as 512,8192") from None
    if depths[0] < 1:
        raise ConfigError(f"--depths {args.depths}: {depths[0]} must be at least 1")
    for option in ("tokens", "threads", "layers"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} {value} must be at least 1")
    first = subject(args.model)
    second = subject(args.against or long_context.same_size(first.decoder))
    if first.label == second.label:
        raise ConfigError(f"{first.label} against itself shows nothing: name another with --against")
    subjects = []
    for chosen in (first, second):
        decoder = chosen.decoder
        if args.layers is not None:
            if args.layers > len(decoder.layers):
                raise ConfigError(f"--layers {args.layers}: {chosen.label} has {len(decoder.layers)}")
            decoder = replace(decoder, layers=decoder.layers[: args.layers])
        subjects.append(replace(chosen, decoder=long_context.small(decoder) if args.scale == "small" else decoder))
    return long_context.Plan((subjects[0], subjects[1]), depths, args.scale, args.tokens, args.threads, args.decode_all)


# ---------------------------------------------------------------- showing


def _print_ceiling(plan: Plan, report: dict[str, Any]) -> None:
    from gemkit.cli.tables import print_table
    from gemkit.inspect import cost, long_context, units
    from gemkit.inspect.compare import pattern

    for subject, record in zip(plan.subjects, report["models"], strict=True):
        put(f"{record['model']}: {_shape(record)}, {pattern(subject.decoder.layers)}")
    print(_what_was_run(report))
    speed = report["read_bytes_per_second"]
    print(
        f"\nThe ceiling: a token reads all weights and the state, and {report['threads']} threads here read "
        f"{units.memory(speed)}/s."
    )

    def cells(subject: Subject, depth: int) -> list[str]:
        weights, state = (
            cost.weight_bytes(subject.decoder, dtype=long_context.DTYPE),
            cost.state_bytes(subject.decoder, depth).total,
        )
        return [
            "  " + subject.label,
            units.memory(weights),
            units.memory(state),
            units.memory(weights + state),
            f"{speed / (weights + state):.1f}",
        ]

    columns = [("", "left"), *((name, "right") for name in ("weights", "state", "read a token", "at most tok/s"))]
    print_table(columns, [(f"{depth:,} tokens", [cells(s, depth) for s in plan.subjects]) for depth in plan.depths])
    print(flush=True)


def _print_measured(report: dict[str, Any]) -> None:
    from gemkit.cli.tables import print_table
    from gemkit.inspect import units
    from gemkit.inspect.long_context import NOISE, ROUNDS

    ceiling = report["read_bytes_per_second"]

    def cells(label: str, row: dict[str, Any]) -> list[str]:
        memory = row["resident_bytes"]
        return [
            "  " + label,
            f"{row['tokens_per_second']:.1f}",
            f"{row['ms_per_token']:.1f}",
            f"{row['spread']:.0%}" + ("!" if row["spread"] > NOISE else " "),
            f"{row['read_bytes_per_second'] / ceiling:.0%}",
            units.memory(row["state_bytes_needed"]),
            units.memory(row["state_bytes"]),
            "-" if memory is None else units.memory(memory),
        ]

    a, b = report["models"]
    groups = []
    for one, other in zip(a["measured"], b["measured"], strict=True):
        ratios = [one[key] / other[key] for key in ("tokens_per_second", "state_bytes_needed", "state_bytes")]
        rate, needed, held = (f"x {ratio:.3g}" for ratio in ratios)
        rows = [cells(a["model"], one), cells(b["model"], other), ["  ratio", rate, "", "", "", needed, held, ""]]
        groups.append((f"{one['depth']:,} tokens", rows))
    print(f"Measured, medians of {ROUNDS} rounds of {report['tokens']} tokens:")
    headings = ("tok/s", "ms a token", "spread", "of ceiling", "state", "held", "resident")
    print_table([("", "left"), *((heading, "right") for heading in headings)], groups)
    print("\nstate: what must be remembered; held: with the spare room of its buffers; resident: the whole process")
    if len(report["depths"]) > 1:
        print(_conclusion(report))
    if any(row["spread"] > NOISE for model in (a, b) for row in model["measured"]):
        say(f"note: rounds marked ! differ by more than {NOISE:.0%}: the machine had other work, measure again")


def _conclusion(report: dict[str, Any]) -> str:
    def sentence(model: dict[str, Any]) -> str:
        first, last = model["measured"][0], model["measured"][-1]
        kept = last["tokens_per_second"] / first["tokens_per_second"]
        grown = last["state_bytes_needed"] / first["state_bytes_needed"]
        return f"{model['model']} keeps {kept:.0%} of its rate and its state grows x {grown:.3g}"

    a, b = report["models"]
    return f"From {report['depths'][0]:,} to {report['depths'][-1]:,} tokens {sentence(a)}; {sentence(b)}."


def _shape(record: dict[str, Any]) -> str:
    from gemkit.inspect import compare, units

    ffw_width = compare.each(units.exact)(record["ffw_width"])
    return (
        f"{units.short(record['parameters'])} parameters, {count(record['layers'], 'layer')} "
        f"of width {record['width']:,}, feed-forward {ffw_width}, vocabulary {record['vocab_size']:,}"
    )


def _what_was_run(report: dict[str, Any]) -> str:
    from gemkit.inspect.long_context import SMALL

    scale = {"small": f"Widths are the published ones divided by {SMALL}", "full": "Widths are as published"}
    states = "states are generated token by token" if report["decode_all"] else "states are filled, not computed"
    return f"{scale[report['scale']]}; weights are random {report['dtype']}; {states}; {report['threads']} threads."


def _drawing(report: dict[str, Any]) -> bytes:
    from gemkit.inspect import units
    from gemkit.inspect.curves import Curve, Panel, draw

    def curves(key: str) -> list[Curve]:
        return [
            Curve(model["model"], [(row["depth"], row[key]) for row in model["measured"]]) for model in report["models"]
        ]

    shapes = [f"{record['model']}: {_shape(record)}." for record in report["models"]]
    return draw(
        [
            Panel("decode rate (tokens per second)", curves("tokens_per_second"), lambda rate: f"{rate:.3g}"),
            Panel("memory held by the state (bytes)", curves("state_bytes"), units.memory),
        ],
        title="Decode rate and memory against depth",
        x_label="depth (tokens remembered, logarithmic)",
        notes=[*shapes, _what_was_run(report)],
    )
