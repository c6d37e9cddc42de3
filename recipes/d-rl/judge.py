"""The reward that can be checked: is the answer right? With `PYTHONPATH=recipes/d-rl`, `--reward judge:correct`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def correct(prompt: Any, answer: str, record: Mapping[str, Any]) -> float:
    """1 for the right letters in the right order and nothing else, 0 for all else."""
    return float(answer == record["answer"])
