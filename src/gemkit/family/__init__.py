"""WHAT each member of the family is: plain data, importable in milliseconds.

>>> get("gemma-2-2b").decoder.width
2304
"""

from gemkit.family.parameters import parameters
from gemkit.family.registry import difference, get, members, names
from gemkit.family.schema import (
    DecoderConfig,
    Global,
    Layer,
    Member,
    Prompt,
    Recurrent,
    Rope,
    Sliding,
    Tuning,
    Vision,
    repeat,
)

__all__ = [
    "DecoderConfig",
    "Global",
    "Layer",
    "Member",
    "Prompt",
    "Recurrent",
    "Rope",
    "Sliding",
    "Tuning",
    "Vision",
    "difference",
    "get",
    "members",
    "names",
    "parameters",
    "repeat",
]
