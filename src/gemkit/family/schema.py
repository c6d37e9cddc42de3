"""What a member of the family is: frozen data, read by the decoder, the cost model and the file formats alike.

Nothing here imports torch, and nothing here knows a member by name. A layer pattern is a tuple of small objects that
carry their own numbers, so that "sliding without a window" cannot be written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gemkit.errors import ConfigError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer (arXiv:2104.09864), half-split pairing.

    Dimension pair i of the rotated part (R = fraction * head_dim dimensions) turns by
    `position / factor * base ** (-2i / R)` radians.
    """

    base: float = 10_000.0
    factor: float = 1.0  # linear stretching of positions: 8 in the global layers of Gemma 3 from 4B up
    fraction: float = 1.0  # share of each head that is rotated, from its front: 0.5 in RecurrentGemma


@dataclass(frozen=True)
class Global:
    """Causal attention over everything before."""

    rope: Rope = Rope()

    def __str__(self) -> str:
        return "global"


@dataclass(frozen=True)
class Sliding:
    """Causal attention over the last `window` tokens, the current one included."""

    window: int
    rope: Rope = Rope()

    def __str__(self) -> str:
        return f"sliding {self.window}"


@dataclass(frozen=True)
class Recurrent:
    """Griffin's recurrent block (arXiv:2402.19427): causal convolution, then a gated linear recurrence (RG-LRU)."""

    width: int  # channels of the recurrence
    num_blocks: int  # blocks of the block-diagonal gates
    conv_width: int = 4  # taps, the current token included

    def __str__(self) -> str:
        return f"recurrent {self.width}"


Layer = Global | Sliding | Recurrent


@dataclass(frozen=True)
class DecoderConfig:
    """The text decoder of a member.

    `ffw_width` counts ONE branch of the gated MLP (some sources count both: 32768 for Gemma 2B). `vocab_size` counts
    the rows of the released embedding table, which may exceed the pieces of the tokenizer. The embedding is tied to
    the output head in every member.
    """

    vocab_size: int
    width: int
    ffw_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    max_context: int  # tokens seen in training
    query_scale: float  # queries are multiplied by this before the dot product
    post_norms: bool = False  # norms on the outputs of mixer and MLP too (Gemma 2 and 3)
    qk_norm: bool = False  # norms over each query and key head (Gemma 3)
    attention_softcap: float | None = None
    final_softcap: float | None = None
    biases: bool = False  # on the MLP, the attention output and the recurrent linears (RecurrentGemma)
    norm_eps: float = 1e-6
    # sqrt(width) multiplies the embeddings after rounding to this: the run dtype, or always bf16 (RecurrentGemma)
    embed_scale_dtype: Literal["run", "bfloat16"] = "run"

    def __post_init__(self):
        for field in ("vocab_size", "width", "ffw_width", "num_heads", "num_kv_heads", "head_dim", "max_context"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field}={value!r} must be a whole number from 1")
        for field in ("query_scale", "norm_eps"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise ConfigError(f"{field}={getattr(self, field)!r} must be positive and finite")
        for field in ("attention_softcap", "final_softcap"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field}={value!r} must be positive, or None for no cap")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: "
                "each key/value head serves a whole number of query heads"
            )
        if not self.layers:
            raise ConfigError("layers=() is empty: a decoder has at least one layer")
        for i, layer in enumerate(self.layers):
            _check_layer(i, layer, self.head_dim)

    @property
    def embed_scale(self) -> float:
        """sqrt(width), before any rounding."""
        return math.sqrt(self.width)


def _check_layer(i: int, layer: Layer, head_dim: int) -> None:
    if isinstance(layer, Recurrent):
        if layer.width < 1 or layer.conv_width < 1 or layer.num_blocks < 1 or layer.width % layer.num_blocks:
            raise ConfigError(f"layers[{i}]={layer!r}: num_blocks must divide width, and all must be positive")
        return
    if isinstance(layer, Sliding) and layer.window < 1:
        raise ConfigError(f"layers[{i}]: window={layer.window} must be at least 1 (the current token)")
    rotated = layer.rope.fraction * head_dim
    if not (0 < layer.rope.fraction <= 1) or rotated != int(rotated) or int(rotated) % 2:
        raise ConfigError(
            f"layers[{i}]: rope.fraction={layer.rope.fraction} of head_dim={head_dim} is not an even number"
        )
    if layer.rope.base <= 0 or layer.rope.factor <= 0:
        raise ConfigError(f"layers[{i}]: {layer.rope} needs a positive base and factor")


@dataclass(frozen=True)
class Vision:
    """A SigLIP image tower (arXiv:2303.15343) and its projection to the decoder's width."""

    image_size: int  # pixels on a side
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_width: int = 4304
    norm_eps: float = 1e-6
    image_token: int = 257_152  # the id that holds the place of a patch in a prompt

    def __post_init__(self):
        for field in ("image_size", "patch_size", "width", "depth", "num_heads", "mlp_width"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field}={value!r} of the image tower must be a whole number from 1")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"norm_eps={self.norm_eps!r} of the image tower must be positive and finite")
        if self.image_size % self.patch_size:
            raise ConfigError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads={self.num_heads} does not divide the tower's width={self.width}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


Tuning = Literal["pretrained", "instruction-tuned", "mix"]
Prompt = Literal["complete", "chat", "infill", "image"]


@dataclass(frozen=True)
class Member:
    """One released model: an architecture, how it was tuned, and how it is to be talked to."""

    name: str  # as people say it: "gemma-2-2b-it"
    hub_id: str  # "google/gemma-2-2b-it"
    family: str  # a heading for tables: "Gemma 2"
    decoder: DecoderConfig
    tuning: Tuning
    vocabulary: Literal["gemma", "codegemma", "paligemma", "gemma3"]
    prompts: tuple[Prompt, ...]  # what it was trained to answer
    released: str  # ISO date
    vision: Vision | None = None
    aliases: tuple[str, ...] = ()
    source: str = ""  # report and configuration that the numbers come from


def repeat(*pattern: Layer, total: int) -> tuple[Layer, ...]:
    """The first `total` layers of `pattern` repeated: `repeat(Sliding(4096), Global(), total=42)`."""
    return tuple(pattern[i % len(pattern)] for i in range(total))
