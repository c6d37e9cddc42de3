"""Models that Ollama has pulled: a manifest names the layers of a model, and a layer is a file by its hash.

    ~/.ollama/models/manifests/HOST/OWNER/NAME/TAG      JSON; library models have the owner `library`
    ~/.ollama/models/blobs/sha256-HASH                  GGUF, template, parameters, licence

`OLLAMA_MODELS` names another folder. Nothing is pulled here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemkit.errors import WeightsError
from gemkit.weights.formats.base import MAX_HEADER, parse_json

_NAME = re.compile(r"(?:(?P<owner>[A-Za-z0-9][\w-]*)/)?(?P<name>[A-Za-z0-9][\w.-]*)(?::(?P<tag>[A-Za-z0-9][\w.-]*))?")
_MODEL, _ADAPTER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"


def store() -> Path:
    """The folder of Ollama's models."""
    return Path(os.environ.get("OLLAMA_MODELS") or os.path.expanduser("~/.ollama/models"))  # without a home too


def is_name(name: str) -> bool:
    """Whether Ollama could have a model of this name."""
    return _NAME.fullmatch(name) is not None


def find(name: str) -> Path | None:
    """The GGUF of a model by its name in Ollama, such as `gemma3:1b`; None if it has no such model.

    Raises:
        WeightsError: if the store is damaged, or the model is an adapter on another one.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    where = f"*/{parts['owner'] or 'library'}/{parts['name']}/{parts['tag'] or 'latest'}"
    try:
        found = sorted(path for path in (store() / "manifests").glob(where) if path.is_file())
    except (OSError, RuntimeError):  # no home, or none of ours
        return None
    return _model_of(found[0], name) if found else None


def _model_of(manifest: Path, name: str) -> Path:
    if manifest.stat().st_size > MAX_HEADER:
        raise WeightsError(f"{manifest} is too large for a manifest")
    layers = parse_json(manifest.read_bytes(), str(manifest)).get("layers")
    kinds: dict[str, str] = {}
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict):
            kinds.setdefault(str(layer.get("mediaType")), str(layer.get("digest")))
    if _ADAPTER in kinds:
        raise WeightsError(f"{name} of Ollama is an adapter on a model; read the adapter in PEFT's layout instead")
    digest = re.fullmatch(r"sha256:([0-9a-f]{64})", kinds.get(_MODEL, ""))
    if digest is None:
        raise WeightsError(f"{manifest} names no model: pull it again (ollama pull {name})")
    blob = store() / "blobs" / f"sha256-{digest[1]}"
    if not blob.is_file():
        raise WeightsError(f"{blob}, the weights of {name}, is missing: pull it again (ollama pull {name})")
    return blob
