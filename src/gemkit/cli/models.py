"""`gemkit models`: the family in one table."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from typing import Any

from gemkit.cli.options import verb
from gemkit.cli.output import say

EXAMPLES = """\
  gemkit models           every member, its size and what it answers to
  gemkit models --json    the same as data
"""


def add(subparsers: Any) -> None:
    """Add the parser of `gemkit models`."""
    parser = verb(subparsers, "models", "list the members of the family", EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the family."""
    from gemkit.cli.tables import print_table
    from gemkit.family import members

    records = [_record(member) for member in members()]
    if args.json:
        print(json.dumps({"models": records}))
        return 0
    columns = [
        ("", "left"),
        ("params", "right"),
        ("bf16", "right"),
        ("KiB/token", "right"),
        ("context", "right"),
        ("answers to", "left"),
    ]
    groups = groupby(records, lambda record: record["family"])
    print_table(columns, [(family, [_cells(record) for record in of]) for family, of in groups])
    say(f"\n{len(records)} members; gemkit show NAME tells more")
    return 0


def _record(member) -> dict[str, Any]:
    from gemkit.inspect import cost

    return {
        "name": member.name,
        "hub_id": member.hub_id,
        "family": member.family,
        "tuning": member.tuning,
        "prompts": member.prompts,
        "released": member.released,
        "aliases": member.aliases,
        "parameters": cost.count(member.decoder, member.vision).total,
        "weight_bytes": cost.weight_bytes(member.decoder, member.vision),
        "cache_bytes_per_token": cost.cache_bytes_per_token(member.decoder).total,
        "max_context": member.decoder.max_context,
    }


def _cells(record: dict[str, Any]) -> list[str]:
    from gemkit.inspect import units

    return [
        "  " + record["name"],
        units.short(record["parameters"]),
        units.memory(record["weight_bytes"]),
        f"{record['cache_bytes_per_token'] / 1024:g}",
        units.exact(record["max_context"]),
        ", ".join(record["prompts"]),
    ]
