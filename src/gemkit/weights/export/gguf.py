"""A GGUF of a model: quantized weights block for block as they are, norms as `1 + w` in float32.

The metadata are those that this package reads and that name the architecture to others: sizes, ropes, caps and the
tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemkit.errors import ConfigError, WeightsError
from gemkit.family import Prompt
from gemkit.files import DTYPES, atomic_file
from gemkit.nn import LanguageModel
from gemkit.ops import Quantized
from gemkit.text import Tokenizer
from gemkit.text.prompts import templates_of
from gemkit.text.vocabulary import UNK
from gemkit.weights import config_gguf
from gemkit.weights.export.tensors import file_parts, file_tensors
from gemkit.weights.formats.gguf_blocks import to_blocks
from gemkit.weights.formats.gguf_writer import TensorSpec, write_gguf
from gemkit.weights.maps import Part

_NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}


def save_gguf(
    module: LanguageModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    prompts: Collection[Prompt] = ("complete",),
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a GGUF.

    Args:
        path: a file; one of that name is replaced when the new one is complete.
        prompts: what the model was tuned for. With "chat" its template is written too.
        dtype: of dense matrices. None: as they are.

    Raises:
        ConfigError: if no GGUF architecture can express the decoder, or the format has no place for a part of the
            model.
        WeightsError: if the file cannot be written.
    """
    if module.vision is not None or module.score is not None:
        part = "an image tower" if module.vision is not None else "the head of a reward model"
        raise ConfigError(f"a GGUF has no place for {part}: save the model as safetensors")
    metadata = config_gguf.to_gguf(module.config)
    if tokenizer is not None:
        metadata |= _vocabulary(tokenizer, prompts)
    specs = [_spec(module, name, parts, dtype) for name, parts in file_parts(module, "gguf").items()]
    target = Path(path).expanduser()
    try:
        with atomic_file(target) as file:
            write_gguf(file, metadata, specs, _contents(module, dtype))
    except OSError as error:
        raise WeightsError(f"could not save to {target}: {error}") from error
    return target


def _spec(module: LanguageModel, name: str, parts: list[Part], dtype: torch.dtype | None) -> TensorSpec:
    part, value = parts[0], module.get_param(parts[0].param_name)
    if isinstance(value, Quantized):
        return TensorSpec(name, value.kind.name, part.shape)
    stored = torch.float32 if part.layout.plus_one else dtype or value.dtype
    return TensorSpec(name, _NAMES[str(stored).removeprefix("torch.")], part.layout.shape)


def _contents(module: LanguageModel, dtype: torch.dtype | None) -> Iterator[np.ndarray]:
    for _, value in file_tensors(module, "gguf", dtype=dtype, quantized=True):
        yield to_blocks(value) if isinstance(value, Quantized) else value.reshape(-1).view(torch.uint8).numpy()


def _vocabulary(tokenizer: Tokenizer, prompts: Collection[Prompt]) -> dict[str, Any]:
    vocabulary = tokenizer.vocabulary
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": list(vocabulary.pieces),
        "scores": np.asarray(vocabulary.scores, np.float32),
        "token_type": np.asarray(vocabulary.types, np.int32),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.id(tokenizer.settings.special["eos_token"]),
        "padding_token_id": tokenizer.pad,
        "unknown_token_id": tokenizer.id(UNK),
        "add_bos_token": tokenizer.settings.add_bos,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if "chat" not in prompts:
        return metadata
    templates = templates_of(tokenizer)
    metadata["tokenizer.chat_template"] = templates.pop("default")
    return metadata | {f"tokenizer.chat_template.{name}": text for name, text in templates.items()}
