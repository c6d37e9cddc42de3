"""From a module with its weights to a packed model: traced, lowered, and its weights laid out for the kernels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemkit import ops
from gemkit.executors.native import dequantize
from gemkit.executors.native.lower import Dora, Frequencies, Lowered, lower
from gemkit.executors.native.packfile import Pack
from gemkit.executors.native.writer import Progress, Source, write_pack
from gemkit.nn import LanguageModel
from gemkit.ops.adapters import dora_gain
from gemkit.program.ir import Weight
from gemkit.program.trace import trace, trace_tower

dequantize.enable()

TOWER = ("vision_tower.", "multi_modal_projector.")
_DENSE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def pack(
    module: LanguageModel,
    target: Path | None = None,
    source: str = "",
    notes: Sequence[str] = (),
    *,
    over: Pack | None = None,
    changed: Collection[str] = (),
    progress: Progress | None = None,
) -> Pack:
    """The packed model of a decoder, or of one with its image tower; other arguments are those of `write_pack`.

    Args:
        notes: what a user should know of how the weights were read.

    Raises:
        ModelError: if the native executor cannot run the module.
        WeightsError: if there is no memory for it.
    """
    programs = [lower(trace(module.decoder, sees=module.vision is not None))]
    if module.decoder.score is not None:
        add_score(programs[0], module.decoder.score.weight.shape)
    if module.vision is not None:
        programs.append(lower(trace_tower(module)))
    given = ModuleWeights(module, notes)
    return write_pack(programs, given, target, source, over=over, changed=changed, progress=progress)


def add_score(lowered: Lowered, shape: Sequence[int]) -> None:
    """Hold the head of a reward model beside a decoder's program."""
    rows, width = shape
    lowered.beside.append(Weight("score.weight", (rows, width), "float32", 4 * rows * width))


class ModuleWeights:
    """The weights of a module, for `write_pack`."""

    def __init__(self, module: LanguageModel, notes: Sequence[str]):
        self._module, self._notes = module, notes

    def notes(self) -> list[str]:
        return list(self._notes)

    def rows(self, weight: Weight) -> Source:
        value = self._held(weight.name)
        planes = value.planes if isinstance(value, ops.Quantized) else {"dense": value.detach()}
        held = {name: plane.cpu().contiguous() for name, plane in planes.items()}
        dense = _DENSE[held["dense"].dtype] if "dense" in held else "F32"
        return Source.memory({name: plane.data_ptr() for name, plane in held.items()}, held, dense)

    def floats(self, weight: Weight | Dora) -> np.ndarray:
        if isinstance(weight, Dora):
            return self._dora(weight)
        value: Tensor = self._held(weight.name)
        return value.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()

    def frequencies(self, rates: Frequencies) -> np.ndarray:
        return ops.rope_frequencies(*astuple(rates)).numpy()

    def _dora(self, of: Dora) -> np.ndarray:
        magnitude, weight, a, b = (self._held(source.name) for source in (of.magnitude, *of.changed))
        share = of.strength * dora_gain(magnitude.detach(), weight, a.detach(), b.detach(), of.factor, of.of_table)
        base = 1 - of.strength + share
        if of.bias is not None:
            base = (1 - base) * self._held(of.bias.name).detach()
        found = share if of.part == "low" else base
        return found.to(device="cpu", dtype=torch.float32).contiguous().numpy()

    def _held(self, name: str) -> Any:
        """A weight by its name in a program: the decoder's are named from the decoder on."""
        module = self._module
        return module.get_param(name) if name.startswith(TOWER) else module.decoder.get_param(name)
