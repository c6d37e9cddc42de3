"""Weights from a checkpoint into the modules of `gemkit.nn`: strict both ways, and nothing changes silently."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gemkit import family
from gemkit.block_types import KINDS, Kind
from gemkit.errors import ConfigError, WeightsError
from gemkit.memory import available_memory
from gemkit.nn import LanguageModel, build
from gemkit.nn.layers import Score
from gemkit.ops import Quantized
from gemkit.weights import quantize
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.fit import FLOATS, SCORE, TIED_HEADS
from gemkit.weights.maps import Part, by_file_name
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
) -> tuple[LanguageModel, Report]:
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
    parts = [part for part in checkpoint.parts if part.param_name.startswith(only)]
    run_dtype = _run_dtype(dtype, {checkpoint.reader.entries[part.file_name].dtype for part in parts})
    with torch.device("meta"):
        module = build(checkpoint.decoder, checkpoint.vision)
    kinds = {} if weights is None else _kinds(checkpoint, module, weights, quantized)
    _check_memory(checkpoint, run_dtype, torch.device(device), quantized, kinds)
    report = Report(dtype=str(run_dtype).removeprefix("torch."), notes=list(checkpoint.description.notes))
    loading = _Loading(checkpoint, module, parts, run_dtype, torch.device(device), quantized, kinds, report, progress)
    fitted = {name: kind for name, kind in kinds.items() if calibrate is not False and kind is not quantize.INT8}
    for name, sharing in by_file_name(part for part in parts if part.param_name not in fitted).items():
        loading.read(name, sharing)
    module.decoder.embed_tokens.run_dtype = run_dtype
    if SCORE in checkpoint.reader.entries and only == ("",):
        put_score(module, checkpoint.reader.read(SCORE))
    if fitted:
        text = quantize.calibration_text() if calibrate is True else str(calibrate)
        ids = checkpoint.tokenizer.encode(text)
        report.roundings += quantize.calibrate(module, fitted, loading.take, checkpoint.tokenizer.bos, ids)
    if only == ("",):
        report.notes += _check_tied_heads(checkpoint, module, weights)
    report.notes += loading.notes()
    if weights is not None:
        report.notes += _quantizing(module, report.roundings, bool(fitted))
    report.notes += loading.casts()
    report.nbytes, report.nbytes_read = weight_bytes(module), loading.total
    report.seconds = time.perf_counter() - start
    return module.eval(), report


class _Loading:
    """Tensors of a file on their way into a module, counted as they pass."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: LanguageModel,
        parts: Sequence[Part],
        run_dtype: torch.dtype,
        device: torch.device,
        quantized: bool,
        kinds: Mapping[str, Kind],
        report: Report,
        progress: Progress | None,
    ):
        self._reader, self._module, self._report, self._progress = checkpoint.reader, module, report, progress
        self._parts = {part.param_name: part for part in parts}
        self._run_dtype, self._device, self._quantized, self._kinds = run_dtype, device, quantized, kinds
        self.total = sum(self._reader.entries[name].nbytes for name in {part.file_name for part in parts})
        self._done = self._made_dense = 0
        self._rounded: Counter[str] = Counter()  # weights by the dtype that they were stored in

    def read(self, name: str, sharing: Sequence[Part]) -> None:
        """Read a tensor once and put each parameter that is in it into the module."""
        stored = self._reader.read(name)
        for part in sharing:
            self._put(part.param_name, _part_of(stored, part))
        self._advance(name)

    def take(self, param_name: str) -> Tensor | Quantized:
        """A parameter as it is stored, for calibration."""
        part = self._parts[param_name]
        value = _part_of(self._reader.read(part.file_name), part)
        self._advance(part.file_name)
        return value

    def _put(self, name: str, value: Tensor | Quantized) -> None:
        stored_as = value.kind.name if isinstance(value, Quantized) else str(value.dtype).removeprefix("torch.")
        if name in self._kinds:
            before, value = value, quantize.nearest(quantize.dense(value), self._kinds[name], name)
            self._report.roundings.append(quantize.rounding(name, before, value))
        elif isinstance(value, Quantized) and not self._quantized:
            value = value.dequantize()
            self._made_dense += 1
        if isinstance(value, Quantized):
            self._module.set_param(name, value.to(self._device))
            return
        cast = value.to(self._run_dtype)
        if cast.dtype != value.dtype and not torch.equal(cast.to(value.dtype), value):
            self._rounded[stored_as] += 1
        self._module.set_param(name, Parameter(cast.to(self._device), requires_grad=False))

    def _advance(self, name: str) -> None:
        self._done += self._reader.entries[name].nbytes
        if self._progress is not None:
            self._progress(min(self._done, self.total), self.total)

    def notes(self) -> list[str]:
        return [f"{self._made_dense} quantized weights were made dense"] if self._made_dense else []

    def casts(self) -> list[str]:
        """Notes on what the run dtype cannot hold."""
        dtype = self._report.dtype
        return [f"{count} weights were rounded from {stored} to {dtype}" for stored, count in self._rounded.items()]


def put_score(module: LanguageModel, weight_1D: Any) -> None:
    """Give a model the head of a reward model, in float32, which records no gradients.

    Raises:
        WeightsError: if it is not one row as wide as the model, or the model is one that has none.
    """
    if module.vision is not None or tuple(weight_1D.shape) != (1, module.config.width):
        wanted = "a model of text alone" if module.vision is not None else f"(1, {module.config.width})"
        raise WeightsError(f"{SCORE} is {tuple(weight_1D.shape)}: a reward head is one row, for {wanted}")
    module.score = Score(module.config.width)
    device = module.device
    module.score.weight = Parameter(weight_1D.detach().to(device, torch.float32), requires_grad=False)


def _kinds(checkpoint: Checkpoint, module: LanguageModel, weights: Weights, quantized: bool) -> dict[str, Kind]:
    """The block type of each weight that is quantized on the way."""
    kinds = {}
    for part in checkpoint.parts:
        stored = KINDS.get(checkpoint.reader.entries[part.file_name].dtype)
        kind = quantize.kind_of(module, part.param_name, weights)
        if kind is not None and not (quantized and stored is not None and quantize.is_as_small(stored, kind)):
            kinds[part.param_name] = kind
    return kinds


def _quantizing(module: LanguageModel, roundings: list[Rounding], calibrated: bool) -> list[str]:
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


def _quantized(module: LanguageModel) -> list[tuple[str, Quantized]]:
    """The quantized weights of a module."""
    values = [(name, module.get_param(name)) for name, _ in family.parameters(module.config, module.vision)]
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
                f"{part.file_name} is stored as {stored.kind.name}; norms and fused matrices are never quantized"
            )
        return stored
    return part.take(stored)


def _check_memory(
    checkpoint: Checkpoint, run_dtype: torch.dtype, device: torch.device, quantized: bool, kinds: Mapping[str, Kind]
) -> None:
    """Refuse what cannot fit, before the machine starts to swap or the process is killed."""
    if device.type != "cpu" or (available := available_memory()) is None:
        return
    needed = 0
    for part in checkpoint.parts:
        entry = checkpoint.reader.entries[part.file_name]
        if part.param_name in kinds:
            needed += math.prod(part.shape) * (sum(kinds[part.param_name].bits) + 1) // 8
        elif entry.dtype in FLOATS or not quantized:
            needed += math.prod(part.shape) * run_dtype.itemsize
        else:
            needed += int(math.prod(part.shape) * KINDS[entry.dtype].bits_per_weight / 8)
    if needed > available:
        raise ConfigError(
            f"{checkpoint.label} needs {needed / 1e9:.1f} GB in memory and {available / 1e9:.1f} GB are free: close "
            "something, use dtype=bfloat16 or weights=int4, or take a quantized .gguf of it"
        )


def _check_tied_heads(checkpoint: Checkpoint, module: LanguageModel, weights: Weights | None) -> list[str]:
    """Refuse a head that is not the embedding; notes on one that is stored in another dtype."""
    notes: list[str] = []
    for name in TIED_HEADS:
        if name in checkpoint.reader.entries:
            head, table = checkpoint.reader.read(name), module.decoder.embed_tokens.weight
            if weights is not None and isinstance(head, Tensor) and isinstance(table, Quantized):
                head = quantize.nearest(head, table.kind, name)  # as the embedding was: equal if they were equal
            if isinstance(table, Quantized) and isinstance(head, Quantized):
                same = head.kind == table.kind and all(
                    torch.equal(head.planes[p], table.planes[p]) for p in head.planes
                )
            elif isinstance(table, Tensor) and isinstance(head, Tensor):
                # a trainer may have stored the one rounded and the other not
                coarse = min(head.dtype, table.dtype, key=lambda dtype: dtype.itemsize)
                same = head.shape == table.shape and torch.equal(head.to(coarse), table.cpu().to(coarse))
                if same and head.dtype != table.dtype:
                    notes.append(f"{name} is the embedding in {str(head.dtype)[6:]}: the embedding is used for both")
            else:
                same = False
            if not same:
                raise WeightsError(
                    f"{checkpoint.label}: {name} differs from the embedding. Every member ties the two; a fine-tune "
                    "that untied them is not supported"
                )
    return notes


def weight_bytes(module: LanguageModel) -> int:
    """Bytes of all weights, the tied head counted once."""
    names = [name for name, _ in family.parameters(module.config, module.vision)]
    return sum(module.get_param(name).nbytes for name in names)
