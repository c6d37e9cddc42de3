"""Costs of a member: parameters, bytes and arithmetic, from its data alone.

Pure functions of a `DecoderConfig` (and a `Modality`), exact by the lists that `family.parameters` gives. Bytes of a
state count what must be remembered, not what an implementation reserves. A context is a number of tokens, the one being
decoded included; contexts beyond `max_context` are arithmetic like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from gemkit.block_types import KINDS
from gemkit.errors import ConfigError
from gemkit.family import Attention, DecoderConfig, Modality, Recurrent, parameters

Dtype = Literal["float32", "bfloat16", "int8", "int4"]

BLOCK = 32  # weights that share one scale
BLOCK_BYTES: dict[Dtype, int] = {  # bytes of 32 weights
    "float32": 4 * BLOCK,
    "bfloat16": 2 * BLOCK,
    "int8": int(KINDS["Q8_0"].bits_per_weight * BLOCK / 8),
    "int4": int(KINDS["Q4_0"].bits_per_weight * BLOCK / 8),
}


@dataclass(frozen=True)
class Count:
    """Parameters of a member; the embedding, which is also the output head, counts once."""

    embedding: int
    non_embedding: int  # the rest of the decoder
    vision: int  # image tower and projection

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding + self.vision


@dataclass(frozen=True)
class ByKind:
    """Bytes by the kind of layer that holds them."""

    global_attention: int
    sliding_attention: int
    recurrent: int

    @property
    def total(self) -> int:
        return self.global_attention + self.sliding_attention + self.recurrent


def count(decoder: DecoderConfig, vision: Modality | None = None) -> Count:
    """Parameters, split as the family's reports split them."""
    embedding = decoder.vocab_size * decoder.width
    text = sum(prod(shape) for _, shape in parameters(decoder))
    return Count(
        embedding=embedding,
        non_embedding=text - embedding,
        vision=sum(prod(shape) for _, shape in parameters(decoder, vision)) - text,
    )


def weight_bytes(decoder: DecoderConfig, vision: Modality | None = None, dtype: Dtype = "bfloat16") -> int:
    """Bytes of the weights.

    In int8 and int4 the decoder's projections and its embedding are in blocks of 32 with a scale each (8.5 and 4.5
    bits a weight); norms, biases, the recurrence's gates and convolution, and the image tower stay in bfloat16.

    Raises:
        ConfigError: if `dtype` is not one of `BLOCK_BYTES`.
    """
    if dtype not in BLOCK_BYTES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(BLOCK_BYTES)}")
    total = 0
    for name, shape in parameters(decoder, vision):
        in_blocks = len(shape) == 2 and shape[1] % BLOCK == 0 and not name.startswith(("vision_tower", "multi_modal"))
        per_block = BLOCK_BYTES[dtype] if in_blocks or dtype == "float32" else BLOCK_BYTES["bfloat16"]
        total += prod(shape) * per_block // BLOCK
    return total


def state_bytes(decoder: DecoderConfig, context: int) -> ByKind:
    """Bytes remembered of one sequence of `context` tokens.

    An attention layer holds a key and a value of every token it may still look at, in bfloat16: all of them, or the
    last `window`. A recurrent layer holds its hidden state in float32 and the inputs its convolution looks back on in
    bfloat16, however long the sequence.

    Raises:
        ConfigError: if `context` is negative.
    """
    if context < 0:
        raise ConfigError(f"context={context} must not be negative")
    full = sliding = recurrent = 0
    for layer in decoder.layers:
        match layer.mixer:
            case Attention(window=None) as mixer:
                full += _entry_bytes(mixer) * context
            case Attention() as mixer:
                sliding += _entry_bytes(mixer) * _visible(mixer, context)
            case Recurrent(width, _, conv_width):
                recurrent += 4 * width + 2 * width * (conv_width - 1)
    return ByKind(full, sliding, recurrent)


def cache_bytes_per_token(decoder: DecoderConfig) -> ByKind:
    """Bytes that one more token adds, in bfloat16, while no window is full."""
    return ByKind(
        global_attention=sum(_entry_bytes(mixer) for mixer in decoder.attention if mixer.window is None),
        sliding_attention=sum(_entry_bytes(mixer) for mixer in decoder.attention if mixer.window is not None),
        recurrent=0,
    )


def _entry_bytes(mixer: Attention) -> int:
    return 2 * mixer.kv_heads * mixer.head_dim * 2  # a key and a value of each head, 2 bytes a number


def _visible(mixer: Attention, context: int) -> int:
    return context if mixer.window is None else min(context, mixer.window)


def decode_flops(decoder: DecoderConfig, context: int) -> int:
    """Floating-point operations to decode one token of one sequence.

    Args:
        context: tokens attended to; a sliding layer reads at most its window of them. 0 leaves attention out.

    Returns:
        2 per matmul weight (a multiply, an add), the output head included, plus 4*N*H*min(context, window) per
        attention layer. Lookups, norms, softmax and elementwise steps are left out.

    Source: PaLM, arXiv:2204.02311, appendix B, adapted to windows by layer.
    """
    matmuls = sum(prod(shape) for _, shape in parameters(decoder) if len(shape) > 1)
    attended = sum(mixer.heads * mixer.head_dim * _visible(mixer, context) for mixer in decoder.attention)
    return 2 * matmuls + 4 * attended


def decode_bytes(decoder: DecoderConfig, context: int, dtype: Dtype = "bfloat16") -> int:
    """Bytes read from memory to decode one token of one sequence: every weight once, and the whole state.

    The embedding counts once, for the output head reads all of it. On most machines this over the memory bandwidth is
    the time of a token.
    """
    return weight_bytes(decoder, dtype=dtype) + state_bytes(decoder, context).total


def image_flops(decoder: DecoderConfig, vision: Modality) -> int:
    """Floating-point operations of the image tower and projection for one image, counted as in `decode_flops`."""
    weights = sum(
        prod(shape)
        for name, shape in parameters(decoder, vision)
        if not name.startswith("language_model") and len(shape) > 1 and "position_embedding" not in name
    )
    patches = vision.tokens
    return 2 * weights * patches + 4 * vision.tower.width * patches * patches * vision.tower.depth


RESOLUTIONS = (224, 448, 896)  # that members with an image tower are released for


@dataclass(frozen=True)
class Image:
    """Cost of one image at a resolution."""

    size: int  # pixels on a side
    tokens: int  # of the context
    state_bytes: int  # kept for the rest of the sequence
    flops: int  # of tower and projection


def images(decoder: DecoderConfig, vision: Modality) -> list[Image]:
    """Cost of an image at the resolution of this tower, and then at the other published ones, for comparison.

    Each resolution is a member of its own, with its own table of positions; all else of the tower is the same.
    """
    others = [size for size in RESOLUTIONS if size != vision.tower.image_size and size % vision.tower.patch_size == 0]
    sizes = (vision.tower.image_size, *others)
    sights = [replace(vision, tower=replace(vision.tower, image_size=size)) for size in sizes]
    return [
        Image(size, sight.tokens, state_bytes(decoder, sight.tokens).total, image_flops(decoder, sight))
        for size, sight in zip(sizes, sights, strict=True)
    ]


def crossings(a: DecoderConfig, b: DecoderConfig, head_start: int = 0) -> list[int]:
    """Contexts from which the other of two members needs less memory for one sequence, ascending.

    Args:
        head_start: bytes that `b` needs besides its state, over those of `a`; 0 compares the states alone.

    Both curves are straight between the lengths of the windows, so every crossing is found exactly.
    """

    def gap(context: int) -> int:
        return state_bytes(b, context).total + head_start - state_bytes(a, context).total

    corners = sorted({1, *a.windows, *b.windows})
    last_slope = gap(corners[-1] + 1) - gap(corners[-1])
    beyond = corners[-1] + (abs(gap(corners[-1])) // abs(last_slope) + 1 if last_slope else 1)
    found, leader = [], gap(corners[0])
    for start, end in zip(corners, [*corners[1:], beyond], strict=True):
        before, after = gap(start), gap(end)
        if leader * after < 0:
            found.append(start + abs(before) * (end - start) // (abs(before) + abs(after)) + 1)
        leader = after or leader
    return found
