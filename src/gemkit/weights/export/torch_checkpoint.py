"""Checkpoints of Google's PyTorch code: gemma_pytorch's `.ckpt`, and the `.pt` of DeepMind's RecurrentGemma."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gemkit.errors import ConfigError, WeightsError
from gemkit.files import atomic_file
from gemkit.nn import LanguageModel
from gemkit.weights.export.tensors import file_tensors


def save_torch_checkpoint(
    module: LanguageModel, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> Path:
    """Write the weights as `torch.save` does: {"model_state_dict": {name: tensor}}, or {name: tensor} for a
    RecurrentGemma. Such a file has no configuration: it is read back as the member of these shapes.

    Args:
        path: a file; one of that name is replaced when the new one is complete.
        dtype: of the weights. None: as they are. Quantized ones are made dense, in float32 if it is None.

    Raises:
        ConfigError: if the format has no place for a part of the model.
        WeightsError: if the file cannot be written.
    """
    if module.score is not None:
        raise ConfigError("a .ckpt has no place for the head of a reward model: save it as safetensors")
    target = Path(path).expanduser()
    tensors = dict(file_tensors(module, "ckpt", dtype=dtype))
    recurrent = any(name.startswith("blocks.") for name in tensors)  # DeepMind's names
    try:
        with atomic_file(target) as file:
            torch.save(tensors if recurrent else {"model_state_dict": tensors}, file)
    except OSError as error:
        raise WeightsError(f"could not save to {target}: {error}") from error
    return target
