"""`gemkit cache`: the packed models that are kept, checked and removed."""

from __future__ import annotations

import argparse
import time
from typing import Any

from gemkit.cli.options import verb
from gemkit.cli.output import count, print_json, say

_EXAMPLES = """\
  gemkit cache             what is kept, of which files, and how much room it takes
  gemkit cache verify      compare every byte with its checksum; a damaged model is removed
  gemkit cache clear       remove all of it: a model is packed anew when it is next opened"""


def add(subparsers: Any) -> None:
    """Add the parser of `gemkit cache`."""
    parser = verb(subparsers, "cache", "list, verify or clear the packed models that are kept", _EXAMPLES)
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "verify", "clear"),
        default="list",
        help="what to do (default: list)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; 1 if verifying found damage."""
    from gemkit.runtime import pack_cache

    folder = pack_cache.folder()
    report: dict[str, Any] = {"folder": None if folder is None else str(folder), "limit_bytes": pack_cache.limit()}
    report["models"] = [_record(file) for file in pack_cache.kept()]
    if args.action == "clear":
        gone = {str(file.path) for file in pack_cache.clear()}
        report["removed"] = [record for record in report["models"] if record["path"] in gone]
    if args.action == "verify":
        for file, record in zip(pack_cache.kept(), report["models"], strict=True):
            record["damage"] = None if file.unfinished else pack_cache.damage(file)
            if record["damage"]:
                file.path.unlink(missing_ok=True)
    if args.json:
        print_json(report)
    else:
        _print(args.action, report)
    return int(any(record.get("damage") for record in report["models"]))


def _record(file: Any) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "of": file.sources,
        "bytes": file.nbytes,
        "used": time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used)),
        "unfinished": file.unfinished,
    }


def _print(action: str, report: dict[str, Any]) -> None:
    from gemkit.inspect import units

    folder, models = report["folder"] or "there is no home folder, and GEMKIT_CACHE names none", report["models"]
    if action == "clear":
        removed = report["removed"]
        freed = units.memory(sum(record["bytes"] for record in removed))
        print(f"{folder}: {count(len(removed), 'packed model')} removed, {freed}")
        return
    print(folder)
    for record in models:  # the path last, and whole however long it is
        print(f"{units.memory(record['bytes']):>9}  used {record['used']}  {_state(record)}{_of(record)}")
        if record.get("damage"):
            print(f"{record['path']}: {record['damage']}")
    total, limit = sum(record["bytes"] for record in models), report["limit_bytes"]
    say(f"\n{units.memory(total)} of {units.memory(limit)} (GEMKIT_CACHE_LIMIT)")


def _of(record: dict[str, Any]) -> str:
    first, *others = record["of"] or [record["path"]]
    return f"  {first}" + (f" and {count(len(others), 'more file')}" if others else "")


def _state(record: dict[str, Any]) -> str:
    if record["unfinished"]:
        return "unfinished"
    if "damage" not in record:
        return "" if record["of"] else "of another version"
    return "damaged, removed" if record["damage"] else "whole"
