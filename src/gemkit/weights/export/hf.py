"""Hugging Face's layout: a folder that Transformers, and every other reader of the layout, loads unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemkit.errors import WeightsError
from gemkit.family import Prompt
from gemkit.files import atomic_folder, refuse_existing, write_safetensors
from gemkit.nn import LanguageModel
from gemkit.ops import Quantized
from gemkit.text import Tokenizer
from gemkit.text.prompts import stop_ids, templates_of
from gemkit.weights import config_hf, config_vision
from gemkit.weights.export.tensors import file_tensors
from gemkit.weights.fit import SCORE

SHARD_BYTES = 5_000_000_000  # as published checkpoints are cut


def save_hf(
    module: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    prompts: Collection[Prompt] = ("complete",),
    dtype: torch.dtype | None = None,
    quantized: bool = False,
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
) -> Path:
    """Write configuration, weights and vocabulary.

    The folder appears under its name only when it is complete, and one that exists with something in it is never
    touched. The tied head is written once, as the embedding.

    Args:
        prompts: what the model was tuned for. With "chat" its template is written too, and its turns end answers.
        dtype: of the written weights. None: as they are; quantized ones are made dense in float32, exactly.
        quantized: write quantized weights as they are, each plane as a tensor `<weight>.<plane>`, their block types in
            the configuration. Such a folder is for gemkit alone.
        generation: what the model's generation_config.json says, to be kept; None: it has none.
        shard_bytes: a file is closed before it grows beyond this.
        card: the README.md (`weights.model_card`); None: there is none.

    Raises:
        WeightsError: if the folder exists, or cannot be written; nothing is left behind then.
        ConfigError: if no published configuration can express the decoder.
    """
    config = config_hf.to_hf(module.config, module.vision)
    if module.score is not None:
        config = config_hf.as_reward_model(config)
    with appearing(folder) as work:
        kinds: dict[str, str] | None = {} if quantized else None
        saved_as = _write_weights(module, work, dtype, kinds, shard_bytes)
        quantization = config_hf.quantization_to_hf(kinds or {})
        _write_json(work / "config.json", {**config, "dtype": saved_as, **quantization})
        if tokenizer is not None:
            _write_vocabulary(tokenizer, prompts, generation or {}, work)
        if module.vision is not None:
            _write_json(work / "preprocessor_config.json", config_vision.preprocessor_to_hf(module.vision))
        if card is not None:
            (work / "README.md").write_text(card, encoding="utf-8")
    return Path(folder).expanduser()


@contextmanager
def appearing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which appears under its name when the block ends, and not at all if it fails.

    Raises:
        WeightsError: if the folder exists with something in it, or cannot be written; nothing is left behind then.
    """
    target = new_folder(folder)
    try:
        with atomic_folder(target) as work:
            yield work
    except OSError as error:
        raise WeightsError(f"could not save to {target}: {error}") from error


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """Where to save, unless something is there.

    Raises:
        WeightsError: if it is a file, or a folder that is not empty.
    """
    target = Path(folder).expanduser()
    try:
        refuse_existing(target)
    except FileExistsError:
        raise WeightsError(f"{target} exists and is not empty: save to a new folder") from None
    return target


def _write_vocabulary(
    tokenizer: Tokenizer, prompts: Collection[Prompt], generation: Mapping[str, Any], folder: Path
) -> None:
    tokenizer.save(folder / "tokenizer.model")
    names = {name: piece for name, piece in tokenizer.settings.special.items() if piece in tokenizer}
    settings: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": tokenizer.settings.add_bos,
        **names,
    }
    ends = {tokenizer.eos} | tokenizer.settings.ends
    if "chat" in prompts:
        templates = templates_of(tokenizer)
        named = [{"name": name, "template": text} for name, text in templates.items()]
        settings["chat_template"] = named if len(named) > 1 else templates["default"]
        ends = stop_ids(tokenizer, "chat")
    stops = {"bos_token_id": tokenizer.bos, "eos_token_id": sorted(ends), "pad_token_id": tokenizer.pad}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {**generation, **stops})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_weights(
    module: LanguageModel, folder: Path, dtype: torch.dtype | None, kinds: dict[str, str] | None, shard_bytes: int
) -> str:
    dtypes: set[torch.dtype] = set()
    files: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(_published(module, dtype, kinds), shard_bytes):
        path = folder / f"part-{len(files)}"
        dtypes |= {value.dtype for name, value in shard.items() if name.rpartition(".")[0] not in (kinds or {})}
        total += sum(value.nbytes for value in shard.values())
        with open(path, "wb") as file:
            write_safetensors(file, shard, {"format": "pt"})
        files.append((path, list(shard)))
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
    else:
        weight_map = {}
        for number, (path, names) in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            path.rename(folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    widest = torch.float32 if torch.float32 in dtypes else dtypes.pop()
    return str(widest).removeprefix("torch.")


def _published(
    module: LanguageModel, dtype: torch.dtype | None, kinds: dict[str, str] | None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its published name; of quantized ones, if `kinds` is given, the planes, their block types into
    `kinds`."""
    for name, value in file_tensors(module, "safetensors", dtype=dtype, quantized=kinds is not None):
        if isinstance(value, Quantized):
            assert kinds is not None
            kinds[name] = value.kind.name
            yield from ((f"{name}.{plane}", codes.contiguous()) for plane, codes in value.planes.items())
        else:
            yield name, value
    if (score := module.score) is not None:
        yield SCORE, score.weight.detach().to(device="cpu", dtype=dtype).contiguous()


def _shards(weights: Iterator[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, value in weights:
        if shard and size + value.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard
