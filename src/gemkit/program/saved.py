"""The Programs of the family's architectures, saved: a model that is one of them is run without its modules. No torch.

`saved.zip` holds the JSON form of each decoder and image tower, traced in float32, and the frequencies of their rotary
embeddings. It is written by `python -m gemkit.program.saved` (`make programs`); a test compares it with fresh traces.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemkit import family
from gemkit.program.ir import Program

if TYPE_CHECKING:
    from gemkit.family import DecoderConfig, Modality

PATH = Path(__file__).with_name("saved.zip")
_FREQUENCIES = "frequencies"
_BEGINNING = (1980, 1, 1, 0, 0, 0)  # of the time that zip files know: the same file every time


def programs(decoder: DecoderConfig, vision: Modality | None) -> list[Program] | None:
    """The saved program of a decoder, then that of its image tower if it sees; None if they are not saved."""
    found = [_read(key) for key in _keys(decoder, vision)]
    return None if None in found else [Program.from_json(text) for text in found if text is not None]


def frequencies(*given: object) -> np.ndarray | None:
    """`ops.rope_frequencies` of these arguments; None if no saved program has them."""
    return _frequencies().get(given)


def _keys(decoder: DecoderConfig, vision: Modality | None) -> list[str]:
    """A program depends on every field but the length of contexts in training."""
    described: list[tuple[object, ...]] = [("decoder", replace(decoder, max_context=1), vision is not None)]
    if vision is not None:
        described.append(("tower", vision, decoder.width))
    return [hashlib.sha256(repr(key).encode()).hexdigest()[:16] for key in described]


def _read(key: str) -> str | None:
    with zipfile.ZipFile(PATH) as archive:
        return archive.read(key).decode() if key in archive.NameToInfo else None


@cache
def _frequencies() -> dict[tuple[object, ...], np.ndarray]:
    rows = json.loads(_read(_FREQUENCIES) or "[]")
    return {tuple(given): np.frombuffer(bytes.fromhex(data), np.float32) for *given, data in rows}


def traced() -> dict[str, str]:
    """What `saved.zip` holds, made anew from the modules: text by key."""
    import torch

    from gemkit import ops
    from gemkit.nn import build
    from gemkit.program.trace import trace, trace_tower

    texts: dict[str, str] = {}
    rates: dict[tuple[Any, ...], str] = {}
    for member in family.members():
        keys = _keys(member.decoder, member.vision)
        if all(key in texts for key in keys):
            continue
        with torch.device("meta"):
            module = build(member.decoder, member.vision)
        made = [trace(module.decoder, sees=member.vision is not None)]
        if member.vision is not None:
            made.append(trace_tower(module))
        texts |= {key: program.to_json() for key, program in zip(keys, made, strict=True)}
        for node in made[0].nodes:
            if node.op == "rope_table":
                given = tuple(node.operands[name] for name in ("rotated", "base", "factor", "ramp"))
                rates[given] = ops.rope_frequencies(*given).numpy().tobytes().hex()
    return texts | {_FREQUENCIES: json.dumps([[*given, data] for given, data in sorted(rates.items(), key=str)])}


def save() -> None:
    """Write `saved.zip`."""
    with zipfile.ZipFile(PATH, "w", zipfile.ZIP_LZMA) as archive:
        for key, text in sorted(traced().items()):
            archive.writestr(zipfile.ZipInfo(key, _BEGINNING), text, zipfile.ZIP_LZMA)


if __name__ == "__main__":
    save()
