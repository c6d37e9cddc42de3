"""Variants of GGUF files that people have, as tiny models: what llama.cpp answers to them is in tests/data/gguf.json.

`python tests/golden_gguf.py` (its docstring says how) writes that file anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemkit.block_types import KINDS
from gemkit.family import DecoderConfig, replace_layers
from gemkit.ops.quantized import Quantized
from gemkit.weights.formats.gguf_blocks import to_blocks
from support import gguf_files
from support.gguf_files import ARCHITECTURES, Kind
from support.tiny import reference
from support.tiny_models import tokenizer

TOKENS = 48  # several windows of 8
VOCABULARY = tokenizer(code=True)


def ids() -> list[int]:
    """<bos> and ordinary pieces."""
    first = VOCABULARY.id("▁")
    drawn = np.random.default_rng(3).integers(first, len(VOCABULARY), TOKENS - 1)
    return [VOCABULARY.bos, *map(int, drawn)]


def _config(name: str, wide: bool = False) -> DecoderConfig:
    config = replace(gguf_files.small(name), vocab_size=len(VOCABULARY), max_context=256)
    if not wide:
        return config
    # rows of one superblock: of every matrix the columns are the width, the feed-forward's or all heads'
    return replace_layers(
        replace(config, width=256, layers=config.layers[:6]),
        attention={"head_dim": 32, "scale": 32**-0.5},
        ffw={"width": 256},
    )


def written(name: str, kind: Any = Kind.F32, **settings: Any) -> Callable[[Path], None]:
    """A tiny member with the keys that the converter writes, and others."""

    def write(path: Path) -> None:
        config, given = _config(name), dict(settings)
        if (split := given.pop("split", 0)) != 0:
            given["writer"] = gguf.GGUFWriter(path, ARCHITECTURES[name], split_max_tensors=split)
        if (alignment := given.pop("alignment", 0)) != 0:
            given["writer"] = writer = gguf.GGUFWriter(path, ARCHITECTURES[name])
            writer.add_custom_alignment(alignment)
        model = reference(config)
        if given.pop("output", False):
            table = model.get_input_embeddings().weight.detach().numpy()
            given["tensors"] = {"output.weight": table.copy()}
        gguf_files.write(path, model, config, ARCHITECTURES[name], kind, tokenizer=VOCABULARY, **given)

    return write


def blocks(name: str, kind: str) -> Callable[[Path], None]:
    """A tiny member whose matrices are random blocks of a kind, of about unit gain; its table is Q8_0."""

    def write(path: Path) -> None:
        config = _config(name, wide=True)
        model, rng = reference(config), np.random.default_rng(11)
        tensors = {}
        architecture = ARCHITECTURES[name]
        for their_name, weight in model.model.named_parameters():
            stem = their_name.removesuffix(".weight")
            if "norm" not in stem and "embed" not in stem:
                tensors[gguf_files.name_of(stem, architecture)] = random_blocks(kind, tuple(weight.shape), rng)

        gguf_files.write(path, model, config, architecture, Kind.Q8_0, tokenizer=VOCABULARY, instead=(kind, tensors))

    return write


def random_blocks(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks (rows, bytes) with scales around those of a trained matrix."""
    weight = Quantized.empty(KINDS[kind], shape)
    for plane, tensor in weight.planes.items():
        array = tensor.numpy()
        if array.dtype == np.float16:
            array[:] = rng.uniform(0.5, 1.0, array.shape)
        elif plane in ("scales", "mins"):
            array[:] = 2 * rng.integers(0, 4, array.shape) + 1  # odd and small: every kind has these
        else:
            info = np.iinfo(array.dtype)
            array[:] = rng.integers(info.min, info.max + 1, array.shape)
    if KINDS[kind].minima:  # codes count from 0: the mean of what they add is taken away
        middle = (2 ** sum(KINDS[kind].bits) - 1) / 2
        for mins, scales in (("mins", "scales"), ("super_mins", "super_scales")):
            if mins in weight.planes:
                weight.planes[mins][:] = weight.planes[scales]
        if "super_mins" in weight.planes:
            weight.planes["super_mins"].mul_(middle)
        else:
            weight.planes["mins"].mul_(middle)
    if KINDS[kind].values is not None and kind not in ("IQ4_NL", "IQ4_XS"):
        _to_points(weight, rng)
    gain = float(weight.dequantize().square().mean().sqrt()) * shape[1] ** 0.5
    for plane in ("super_scales", "super_mins") if KINDS[kind].superblock else ("scales", "mins"):
        if plane in weight.planes:
            weight.planes[plane].div_(gain)
    return to_blocks(weight).reshape(shape[0], -1)


def _to_points(weight: Quantized, rng: np.random.Generator) -> None:
    """Codes of points that the grid of the kind has: those of random blocks."""
    from gemkit.weights.formats.gguf_blocks import block_bytes, load_blocks

    kind = weight.kind
    nbytes = weight.shape[0] * weight.shape[1] // 256 * block_bytes(kind.name)
    drawn = Quantized.empty(kind, weight.shape)
    load_blocks(drawn, rng.integers(0, 256, nbytes, dtype=np.uint8))
    for plane in ("codes", "high"):
        if plane in weight.planes:
            weight.planes[plane][:] = drawn.planes[plane]


def table_as(kind: Kind, rest: Kind) -> Callable[[str], Kind]:
    return lambda name: kind if name == "token_embd.weight" else rest


_ROPE = "{arch}.rope.scaling."
_END = {"tokenizer.ggml.eos_token_id": VOCABULARY.id("<end_of_turn>")}
_FIM = {f"tokenizer.ggml.{name}_token_id": VOCABULARY.id(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle")}
_TYPES = [1 if piece.startswith("<") and kind == 3 else int(kind) for piece, kind in zip(
    VOCABULARY.vocabulary.pieces, VOCABULARY.vocabulary.types, strict=True)]  # fmt: skip

VARIANTS: dict[str, Callable[[Path], None]] = {
    **{f"{name} {kind}": written(name, Kind[kind]) for name in ARCHITECTURES for kind in ("F32", "F16", "BF16")},
    **{f"gemma-3-1b {kind}": written("gemma-3-1b", Kind[kind]) for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")},
    **{f"gemma-2-2b blocks {kind}": blocks("gemma-2-2b", kind) for kind in KINDS if "_K" in kind or "IQ" in kind},
    "bf16 table": written("gemma-3-1b", table_as(Kind.BF16, Kind.Q4_0)),
    "f16 table": written("gemma-3-1b", table_as(Kind.F16, Kind.Q4_0)),
    "f16 table of f32": written("gemma-2b", table_as(Kind.F16, Kind.F32)),
    "q8 table of f32": written("gemma-2-2b", table_as(Kind.Q8_0, Kind.F32)),
    "linear": written("gemma-2-2b", keys={_ROPE + "type": "linear", _ROPE + "factor": 8.0}),
    "linear of gemma3": written("gemma-3-1b", keys={_ROPE + "type": "linear", _ROPE + "factor": 8.0}),
    "factor without a type": written("gemma-2-2b", keys={_ROPE + "factor": 4.0}),
    "factor in the old key": written("gemma-2b", keys={"{arch}.rope.scale_linear": 4.0}),
    "factor of none": written("gemma-2b", keys={_ROPE + "type": "none", _ROPE + "factor": 4.0}),
    "yarn": written(
        "gemma-3-1b",
        keys={_ROPE + "type": "yarn", _ROPE + "factor": 4.0, _ROPE + "original_context_length": 64},
        without=("{arch}.attention.sliding_window",),
    ),
    "yarn with windows": written(
        "gemma-3-1b", keys={_ROPE + "type": "yarn", _ROPE + "factor": 4.0, _ROPE + "original_context_length": 64}
    ),
    "yarn of gemma2": written(
        "gemma-2-2b", keys={_ROPE + "type": "yarn", _ROPE + "factor": 4.0, _ROPE + "original_context_length": 64}
    ),
    "no window": written("gemma-3-1b", without=("{arch}.attention.sliding_window",)),
    "every third global": written("gemma-3-1b", keys={"{arch}.attention.sliding_window_pattern": 3}),
    "global by layer": written(
        "gemma-2-2b", keys={"{arch}.attention.sliding_window_pattern": [i % 5 != 0 for i in range(26)]}
    ),
    "another local base": written("gemma-3-1b", keys={"{arch}.rope.freq_base_swa": 5_000.0}),
    "no caps": written(
        "gemma-2-2b", without=("{arch}.attn_logit_softcapping", "{arch}.final_logit_softcapping")
    ),
    "in parts": written("gemma-3-1b", split=100),
    "aligned to 64": written("gemma-2b", alignment=64),
    "unknown keys": written("gemma-2b", keys={"general.swirl": 3, "{arch}.swirl": [1, 2]}),
    "no types of tokens": written("gemma-2b", without=("tokenizer.ggml.token_type",)),
    "control typed normal": written("gemma-2b", keys={"tokenizer.ggml.token_type": _TYPES}),
    "old infilling keys": written("gemma-2b", keys=_FIM),
    "end of turn for the end": written("gemma-2b", keys=_END),
    "equal head": written("gemma-3-1b", output=True),
}  # fmt: skip
