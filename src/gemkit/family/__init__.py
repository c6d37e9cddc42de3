"""The members of the family as plain data, importable in milliseconds.

>>> get("gemma-2-2b").decoder.width
2304
"""

from gemkit.family.parameters import parameters
from gemkit.family.registry import get, members, names
from gemkit.family.schema import (
    Attention,
    DecoderConfig,
    Global,
    Layer,
    Member,
    Mixer,
    Mlp,
    Modality,
    Pixels,
    Projection,
    Prompt,
    Recurrent,
    Rope,
    Sliding,
    Tuning,
    Vision,
    Yarn,
    repeat,
    replace_layers,
)

__all__ = [
    "Attention",
    "DecoderConfig",
    "Global",
    "Layer",
    "Member",
    "Mixer",
    "Mlp",
    "Modality",
    "Pixels",
    "Projection",
    "Prompt",
    "Recurrent",
    "Rope",
    "Sliding",
    "Tuning",
    "Vision",
    "Yarn",
    "get",
    "members",
    "names",
    "parameters",
    "repeat",
    "replace_layers",
]
