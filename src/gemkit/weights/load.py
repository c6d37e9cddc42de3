"""Weights from a checkpoint into the modules of `gemkit.nn`: strict both ways, and nothing changes silently."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gemkit import family
from gemkit.block_types import KINDS, Kind
from gemkit.errors import ConfigError, WeightsError
from gemkit.nn import Decoder, PaliGemma, build
from gemkit.nn.layers import Score
from gemkit.ops import Quantized
from gemkit.weights import quantize
from gemkit.weights.checkpoint import FLOATS, SCORE, TIED_HEADS, Checkpoint
from gemkit.weights.maps import Part
from gemkit.weights.quantize import Rounding, Weights
from gemkit.weights.report import Report

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Progress = Callable[[int, int], Any]  # (bytes read, bytes in all)


def load_module(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantized: bool = True,
    only: tuple[str, ...] = ("",),
    weights: Weights | None = None,
    calibrate: bool | str = True,
    progress: Progress | None = None,
) -> tuple[Decoder | PaliGemma, Report]:
    """The model of a checkpoint with its weights, which record no gradients.

    Args:
        dtype: run dtype, "float32" or "bfloat16". None: bfloat16 where the file has it, else float32.
        device: any torch device.
        quantized: keep quantized weights as they are. False makes them dense in the run dtype.
        only: beginnings of the names of the weights that are read; the others stay on the meta device.
        weights: quantize on the way, one tensor at a time (see `weights.quantize`). Weights that are stored in no more
            bits stay as they are, unless `quantized` is False.
        calibrate: how int4 is rounded: by what the model computes from a text of ours (True) or from this text, or
            each weight to the nearest code (False).
        progress: is called as bytes are read.

    Raises:
        ConfigError: for a dtype that these models cannot run in, or weights that cannot fit into memory.
        WeightsError: if the tensors do not fit the architecture, or the file is damaged.
    """
    start = time.perf_counter()
    quantize.check(weights)
    reader, entries = checkpoint.reader, checkpoint.reader.entries
    parts = {part.ours: part for part in checkpoint.parts if part.ours.startswith(only)}
    run_dtype = _run_dtype(dtype, {entries[part.theirs].dtype for part in parts.values()})
    report = Report(dtype=str(run_dtype).removeprefix("torch."), notes=list(checkpoint.notes))
    with torch.device("meta"):
        module = build(checkpoint.decoder, checkpoint.vision)
    kinds = {} if weights is None else _kinds(checkpoint, module, weights, quantized)
    _check_room(checkpoint, run_dtype, torch.device(device), quantized, kinds)
    fitted = {name: kind for name, kind in kinds.items() if calibrate is not False and kind is not quantize.INT8}
    total = sum(entries[name].nbytes for name in {part.theirs for part in parts.values()})
    done, dense = 0, 0
    rounded: Counter[str] = Counter()
    by_tensor: dict[str, list[Part]] = {}  # several parameters may be rows of one tensor, which is then read once
    for name, part in parts.items():
        if name not in fitted:
            by_tensor.setdefault(part.theirs, []).append(part)

    def advance(name: str) -> None:
        nonlocal done
        done += entries[name].nbytes
        if progress is not None:
            progress(min(done, total), total)

    for name, sharing in by_tensor.items():
        stored = reader.read(name)
        for part in sharing:
            value = _part_of(stored, part)
            kind = value.kind.name if isinstance(value, Quantized) else str(value.dtype).removeprefix("torch.")
            if part.ours in kinds:
                before, value = value, quantize.nearest(quantize.dense(value), kinds[part.ours], part.ours)
                report.roundings.append(quantize.rounding(part.ours, before, value))
            elif isinstance(value, Quantized) and not quantized:
                value = value.dequantize()
                dense += 1
            if isinstance(value, Quantized):
                module.hold(part.ours, value.to(device))
                continue
            cast = value.to(run_dtype)
            if cast.dtype != value.dtype and not torch.equal(cast.to(value.dtype), value):
                rounded[kind] += 1
            module.hold(part.ours, Parameter(cast.to(device), requires_grad=False))
        advance(name)
    module.embed_tokens.run_dtype = run_dtype
    if SCORE in entries and only == ("",):
        put_score(module, reader.read(SCORE))
    if fitted:

        def take(name: str) -> Tensor | Quantized:
            value = _part_of(reader.read(parts[name].theirs), parts[name])
            advance(parts[name].theirs)
            return value

        text = quantize.calibration_text() if calibrate is True else str(calibrate)
        ids = checkpoint.tokenizer.encode(text)
        report.roundings += quantize.calibrate(module, fitted, take, checkpoint.tokenizer.bos, ids)
    if only == ("",):
        _check_tied_heads(checkpoint, module, weights)
    if dense:
        report.notes.append(f"{dense} quantized weights were made dense")
    if weights is not None:
        report.notes += _quantizing(module, report.roundings, bool(fitted))
    report.notes += [
        f"{count} weights were rounded from {stored} to {report.dtype}" for stored, count in rounded.items()
    ]
    report.nbytes, report.nbytes_read = weight_bytes(module), total
    report.seconds = time.perf_counter() - start
    return module.eval(), report


def put_score(module: Decoder | PaliGemma, weight_1D: Any) -> None:
    """Give a model the head of a reward model, in float32, which records no gradients.

    Raises:
        WeightsError: if it is not one row as wide as the model, or the model is one that has none.
    """
    if isinstance(module, PaliGemma) or tuple(weight_1D.shape) != (1, module.config.width):
        wanted = "a model of text alone" if isinstance(module, PaliGemma) else f"(1, {module.config.width})"
        raise WeightsError(f"{SCORE} is {tuple(weight_1D.shape)}: a reward head is one row, for {wanted}")
    module.score = Score(module.config.width)
    device = module.norm.weight.device
    module.score.weight = Parameter(weight_1D.detach().to(device, torch.float32), requires_grad=False)


def _kinds(checkpoint: Checkpoint, module: Decoder | PaliGemma, weights: Weights, quantized: bool) -> dict[str, Kind]:
    """What each weight that must be quantized becomes."""
    kinds = {}
    for part in checkpoint.parts:
        stored = KINDS.get(checkpoint.reader.entries[part.theirs].dtype)
        kind = quantize.kind_of(module, part.ours, weights)
        if kind is not None and not (quantized and stored is not None and quantize.is_as_small(stored, kind)):
            kinds[part.ours] = kind
    return kinds


def _quantizing(module: Decoder | PaliGemma, roundings: list[Rounding], calibrated: bool) -> list[str]:
    """What a user should know of how weights were quantized."""
    notes = []
    for kind in (quantize.INT8, quantize.INT5, quantize.INT4):
        how = ", calibrated" if calibrated and kind is not quantize.INT8 else ""
        errors = [rounding.error for rounding in roundings if rounding.kind == kind.name]
        if errors:
            off = (sum(error**2 for error in errors) / len(errors)) ** 0.5
            notes.append(f"{len(errors)} weights were quantized to {kind.name}{how}: {off:.2%} off (root mean square)")
    stored = Counter(value.kind.name for _, value in _quantized(module))
    kept = stored - Counter(rounding.kind for rounding in roundings)
    notes += [f"{count} weights were {kind} and stay as they are" for kind, count in kept.items()]
    if odd := quantize.undivided(module):
        notes.append(f"{len(odd)} matrices stay dense: their rows do not divide into {quantize.GROUP}; first {odd[0]}")
    return notes


def _quantized(module: Decoder | PaliGemma) -> list[tuple[str, Quantized]]:
    """The quantized weights of a module."""
    values = [(name, weight(module, name)) for name, _ in family.parameters(module.config, module.vision)]
    return [(name, value) for name, value in values if isinstance(value, Quantized)]


def _run_dtype(asked: str | torch.dtype | None, stored: set[str]) -> torch.dtype:
    if asked is None:
        return torch.bfloat16 if "BF16" in stored else torch.float32
    name = str(asked).removeprefix("torch.")
    if name in ("float16", "half", "fp16"):
        raise ConfigError(
            "dtype=float16: activations of these models exceed its largest number, 65504, and become infinite; use "
            "bfloat16, which is as small, or float32"
        )
    name = {"fp32": "float32", "bf16": "bfloat16"}.get(name, name)
    if name not in _DTYPES:
        raise ConfigError(f"dtype={name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _part_of(stored: Tensor | Quantized, part: Part) -> Tensor | Quantized:
    """A parameter from the tensor that holds it."""
    if isinstance(stored, Quantized):
        if not part.plain:
            raise WeightsError(
                f"{part.theirs} is stored as {stored.kind.name}; norms and fused matrices are never quantized"
            )
        return stored
    return part.take(stored)


def _check_room(
    checkpoint: Checkpoint, run_dtype: torch.dtype, device: torch.device, quantized: bool, kinds: Mapping[str, Kind]
) -> None:
    """Refuse what cannot fit, before the machine starts to swap or the process is killed."""
    if device.type != "cpu" or (available := available_memory()) is None:
        return
    needed = 0
    for part in checkpoint.parts:
        entry = checkpoint.reader.entries[part.theirs]
        if part.ours in kinds:
            needed += math.prod(part.shape) * (sum(kinds[part.ours].bits) + 1) // 8
        elif entry.dtype in FLOATS or not quantized:
            needed += math.prod(part.shape) * run_dtype.itemsize
        else:
            needed += entry.nbytes
    if needed > available:
        raise ConfigError(
            f"{checkpoint.label} needs {needed / 1e9:.1f} GB in memory and {available / 1e9:.1f} GB are free: close "
            "something, use dtype=bfloat16 or weights=int4, or take a quantized .gguf of it"
        )


def available_memory() -> int | None:
    """Bytes that a process can take without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _check_tied_heads(checkpoint: Checkpoint, module: Decoder | PaliGemma, weights: Weights | None) -> None:
    for name in TIED_HEADS:
        if name in checkpoint.reader.entries:
            head, table = checkpoint.reader.read(name), module.embed_tokens.weight
            if weights is not None and isinstance(head, Tensor) and isinstance(table, Quantized):
                head = quantize.nearest(head, table.kind, name)  # as the embedding was: equal if they were equal
            if isinstance(table, Quantized) and isinstance(head, Quantized):
                same = head.kind == table.kind and all(
                    torch.equal(head.planes[p], table.planes[p]) for p in head.planes
                )
            elif isinstance(table, Tensor) and isinstance(head, Tensor):
                same = head.shape == table.shape and torch.equal(head.to(table.dtype), table.cpu())
            else:
                same = False
            if not same:
                raise WeightsError(
                    f"{checkpoint.label}: {name} differs from the embedding. Every member ties the two; a fine-tune "
                    "that untied them is not supported"
                )


def weight_bytes(module: Decoder | PaliGemma) -> int:
    """Bytes of all weights, the tied head counted once."""
    names = [name for name, _ in family.parameters(module.config, module.vision)]
    return sum(weight(module, name).nbytes for name in names)


def weight(module: Decoder | PaliGemma, name: str) -> Tensor | Quantized:
    """A weight by its name, dense or quantized."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)
