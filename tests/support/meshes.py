"""Tiny models on a mesh of processes, beside the same in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gemkit.family import Attention, DecoderConfig, Modality
from gemkit.nn import build
from gemkit.ops import ChunkedLoss
from gemkit.parallel.layout import Layout, default
from gemkit.parallel.mesh import Mesh
from gemkit.parallel.place import Parts, device_mesh
from gemkit.train import losses
from gemkit.train.batching import Example, ExampleGroup, PackedBatch
from gemkit.train.initialise import new_module
from support.tiny import TOWER, tiny


def member(name: str, layers: int = 2, **attention: Any) -> tuple[DecoderConfig, Modality | None]:
    """The first layers of a member's tiny twin, with some numbers of its attention changed."""
    decoder = tiny(name)
    chosen = tuple(
        replace(layer, mixer=replace(layer.mixer, **attention) if isinstance(layer.mixer, Attention) else layer.mixer)
        for layer in decoder.layers[:layers]
    )
    return replace(decoder, layers=chosen), TOWER if name.startswith("paligemma") else None


def whole(decoder: DecoderConfig, vision: Modality | None, dtype: torch.dtype = torch.float32) -> Any:
    """A model in one process, whose norms and biases are no zeros, so that each of them has a part in the result."""
    made = new_module(decoder, vision, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator).to(dtype))
    return made.requires_grad_(True)


def divided(
    model: Any, shape: str, layout: Layout | None = None, zero: int = 3, dtype: torch.dtype | None = None
) -> Any:
    """The same model over a mesh, filled weight by weight."""
    mesh = Mesh.parse(shape)
    decoder, vision = model.config, model.vision
    placement = (layout or default(decoder, vision)).place(mesh, decoder, vision)
    with torch.device("meta"):
        made = build(decoder, vision)
    for weight, of in zip(made.parameters(), model.parameters(), strict=True):
        weight.requires_grad_(of.requires_grad)
    parts = Parts(made, placement, device_mesh(mesh, zero))
    parts.shard(zero, dtype or torch.float32)
    for name, value in model.named_parameters():
        parts.fill(name, value.detach())
    made.decoder.embed_tokens.run_dtype = dtype or torch.float32
    return made


def units(vision: Modality | None, count: int = 5, seed: int = 0) -> list[ExampleGroup]:
    """Sequences of 3 to 11 tokens, with an image in front of each where the model sees images."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(0, 300, rng.integers(3, 12))
        weights = 0.5 + (ids % 3).astype(np.float32) / 2
        weights[0] = 0
        if vision is None:
            made.append((Example(ids.astype(np.int64), weights),))
            continue
        places = np.full(vision.tokens, vision.placeholder)
        size = vision.tower.image_size
        made.append((Example(
            np.concatenate([places, ids]).astype(np.int64), np.concatenate([0 * places, weights]).astype(np.float32),
            prefix=len(places) + 1, images=(rng.uniform(-1, 1, (3, size, size)).astype(np.float32),),
            image_token=vision.placeholder,
        ),))  # fmt: skip
    return made


def loss(model: Any, some: Sequence[ExampleGroup], make: Any = losses.cross_entropy, **options: Any) -> torch.Tensor:
    """The summed loss of some units by the model's own forward."""
    rows = PackedBatch.of([example for unit in some for example in unit])
    made: ChunkedLoss = make(rows.targets, rows.weights, **options)
    return rows.loss(model, made)[0]


def full(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def off(model: Any, wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The gradient that is furthest from what it should be, over its largest element.

    Those that are zero but for rounding, as that of a bias of keys, are measured by a hundredth of the largest of all.
    """
    worst, least = (0.0, ""), 1e-2 * max(grad.abs().max().item() for grad in wanted.values())
    for name, weight in model.named_parameters():
        grad = full(weight.grad)
        largest = max(wanted[name].abs().max().item(), least)
        worst = max(worst, ((grad - wanted[name]).abs().max().item() / largest, name))
    return worst
