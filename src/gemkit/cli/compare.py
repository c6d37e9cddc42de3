"""`gemkit compare A B ...`: what differs between models, and what the difference costs."""

from __future__ import annotations

import argparse
import json
import textwrap
from itertools import groupby
from typing import Any

from gemkit.cli.options import verb
from gemkit.cli.output import put, say

EXAMPLES = """\
  gemkit compare gemma-2b gemma-7b               what differs, and what it costs
  gemkit compare gemma-2b recurrentgemma-2b      from which context a recurrence pays
  gemkit compare gemma-2-9b gemma-3-12b --all    what is the same, too
  gemkit compare gemma-2b gemma-7b --explain     what each quantity means
"""

ROOM_FOR_COSTS = 100  # columns of terminal from which more than two models leave room for a column of costs


def add(subparsers: Any) -> None:
    """Add the parser of `gemkit compare`."""
    parser = verb(subparsers, "compare", "print what differs between models and what it costs", EXAMPLES)
    parser.add_argument("first", metavar="A", help="a member of the family, a folder or a .gguf")
    parser.add_argument("others", metavar="B", nargs="+", help="one or more to compare it with")
    parser.add_argument("--all", action="store_true", help="print what is the same, too")
    parser.add_argument("--explain", action="store_true", help="say what each quantity is and what more of it does")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the models named by `args` side by side."""
    from gemkit.cli.tables import width
    from gemkit.inspect import subject
    from gemkit.inspect.compare import compare, summary

    subjects = [subject(name) for name in (args.first, *args.others)]
    labels = [s.label for s in subjects]
    rows = compare(subjects)
    if args.json:
        print(json.dumps({"models": labels, "rows": [_record(row) for row in rows]}))
        return 0
    for line in summary(subjects):
        put(line)
    print()
    with_costs = len(subjects) == 2 or width() >= ROOM_FOR_COSTS
    shown = [row for row in rows if args.all or row.differs]
    if args.explain:
        _print_explained(labels, shown)
    else:
        _print_table(labels, shown, with_costs)
    hints = [] if with_costs or args.explain else ["a wider terminal shows what each difference costs"]
    hints += [] if args.all else [f"{len(rows) - len(shown)} more are the same (--all)"]
    hints += [] if args.explain else ["--explain says what each one means"]
    if hints:
        say("\n" + "; ".join(hints))
    return 0


def _print_table(labels: list[str], rows, with_costs: bool) -> None:
    from gemkit.cli.tables import print_table

    def cells(row) -> list[str]:
        return ["  " + row.label, *row.values, *([_costs(row)] if with_costs else [])]

    headings = ["", *labels, *(["what it costs"] if with_costs else [])]
    groups = groupby(rows, lambda row: row.group)
    print_table([(heading, "left") for heading in headings], [(group, list(map(cells, of))) for group, of in groups])


def _costs(row) -> str:
    """The cost of each difference, one to a line where there are several models."""
    return "\n".join(cost or "-" for cost in row.costs) if any(row.costs) else ""


def _print_explained(labels: list[str], rows) -> None:
    from gemkit.cli.tables import width

    room = min(width(), 100)  # longer lines of prose are hard to read
    name = max(map(len, labels))
    for group, of_group in groupby(rows, lambda row: row.group):
        print(group.upper())
        for row in of_group:
            print(f"\n{row.label}")
            for label, value, cost in zip(labels, row.values, ("", *row.costs), strict=True):
                print(f"  {label:<{name}}  {value}" + (f"   ({cost})" if cost else ""))
            print(textwrap.fill(row.explanation, room, initial_indent="    ", subsequent_indent="    "))
            for note in row.confusions:
                print(textwrap.fill(note, room, initial_indent="    ! ", subsequent_indent="      "))
        print()


def _record(row) -> dict[str, Any]:
    return {
        "key": row.key,
        "group": row.group,
        "label": row.label,
        "values": row.raw,
        "text": row.values,
        "differs": row.differs,
        "costs": row.costs,
        "explanation": row.explanation,
        "confusions": row.confusions,
    }
