"""The dataclasses of a member: frozen data, read by the decoder, the cost model and the file formats alike.

Nothing here imports torch, and nothing here knows a member by name. A decoder is a tuple of layers, each a mixer and a
feed-forward that carry their own numbers, so that layers may differ and "sliding without a window" cannot be written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from gemkit.errors import ConfigError, ContextError


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): stretching by `Rope.factor` of the dimension pairs that turn slowly, and of those alone.

    A pair that turns `beta_fast` times or more in `context` tokens keeps its frequency, one that turns `beta_slow`
    times or fewer is stretched, and between them the share grows linearly with the number of the pair.
    """

    context: int  # tokens seen in training before the stretching
    attention_factor: float = 1.0  # rotated queries and keys are multiplied by it, which sharpens attention
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the two ends of the ramp are whole pairs

    def ramp(self, rotated: int, base: float) -> tuple[float, float]:
        """Pairs between which the share of the stretching grows from 0 to 1, of `rotated` dimensions."""
        low, high = (
            rotated * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return float(max(low, 0)), float(min(high, rotated - 1))


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer (arXiv:2104.09864), half-split pairing.

    Dimension pair i of the rotated part (R = fraction * head_dim dimensions) turns by
    `position / factor * base ** (-2i / R)` radians.
    """

    base: float = 10_000.0
    factor: float = 1.0  # stretching of positions: 8 in the global layers of Gemma 3 from 4B up
    fraction: float = 1.0  # share of each head that is rotated, from its front: 0.5 in RecurrentGemma
    yarn: Yarn | None = None  # which pairs `factor` stretches; None: all alike
    # Dynamic NTK scaling by this factor: from `max_context` on every frequency depends on the length of the sequence,
    # so that remembered keys would have to turn anew with every token. Longer sequences are refused.
    dynamic: float | None = None


Reach = Literal["past", "both", "all"]


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (arXiv:2305.13245): `heads` query heads on `kv_heads` key/value heads of `head_dim` each.

    `reach` says which tokens a token sees besides those of its own span: "past" (itself and those before), "both" (a
    window on each side) or "all". A `window` counts the visible tokens on one side, the token itself included; None:
    no limit.

    Raises:
        ConfigError: if the numbers contradict each other.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # queries are multiplied by this before the dot product
    window: int | None = None
    rope: Rope = Rope()
    reach: Reach = "past"
    softcap: float | None = None  # on the scores (Gemma 2)
    qk_norm: bool = False  # RMSNorm over each query and key head (Gemma 3)

    def __post_init__(self):
        _check_counts(self, "attention", "heads", "kv_heads", "head_dim")
        _check_positive(self, "attention", "scale")
        _check_softcap(self, "softcap")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: "
                "each key/value head serves a whole number of query heads"
            )
        if self.window is not None:
            _check_counts(self, "attention (the current token counts)", "window")
        if self.reach not in get_args(Reach):
            raise ConfigError(f"reach={self.reach!r} of attention is not one of {', '.join(get_args(Reach))}")
        if self.reach != "past" and (self.window is not None) != (self.reach == "both"):
            raise ConfigError(f"reach={self.reach!r} with window={self.window}: 'both' needs a window, 'all' has none")
        rotated = self.rope.fraction * self.head_dim
        if not (0 < self.rope.fraction <= 1) or rotated != int(rotated) or int(rotated) % 2:
            raise ConfigError(f"rope.fraction={self.rope.fraction} of head_dim={self.head_dim} is not an even number")
        if self.rope.base <= 0 or self.rope.factor <= 0:
            raise ConfigError(f"{self.rope} needs a positive base and factor")
        if self.rope.yarn is not None and (self.rope.fraction != 1 or self.rope.base <= 1):
            raise ConfigError(f"{self.rope}: YaRN stretches heads that are rotated whole, by a base above 1")

    @property
    def rotation(self) -> tuple[int, float, float, tuple[float, float] | None]:
        """Rotated dimensions of each head, and base, factor and ramp of the rotation (`ops.rope_table`)."""
        rope, rotated = self.rope, int(self.rope.fraction * self.head_dim)
        return rotated, rope.base, rope.factor, None if rope.yarn is None else rope.yarn.ramp(rotated, rope.base)

    @property
    def score_scale(self) -> float:
        """The factor of a query's dot product with a key: `scale`, and YaRN's factor of both of them."""
        return self.scale if self.rope.yarn is None else self.scale * self.rope.yarn.attention_factor**2

    @property
    def kind(self) -> Literal["global", "sliding"]:
        return "global" if self.window is None else "sliding"

    @property
    def visible(self) -> tuple[int | None, int | None]:
        """(before, after): tokens that a token sees before and after itself; None: all of them."""
        side = None if self.window is None else self.window - 1
        return side, {"past": 0, "both": side, "all": None}[self.reach]

    def __str__(self) -> str:
        return "global" if self.window is None else f"sliding {self.window}"


def Global(**numbers: Any) -> Attention:
    """Attention without a window, of the fields of `Attention`."""
    return Attention(**numbers)


def Sliding(window: int, **numbers: Any) -> Attention:
    """Attention over the last `window` tokens, the current one included, of the fields of `Attention`."""
    return Attention(window=window, **numbers)


@dataclass(frozen=True)
class Recurrent:
    """Griffin's recurrent block (arXiv:2402.19427): causal convolution, then a gated linear recurrence (RG-LRU)."""

    width: int  # channels of the recurrence
    num_blocks: int  # blocks of the block-diagonal gates
    conv_width: int = 4  # taps, the current token included

    kind = "recurrent"

    def __post_init__(self):
        _check_counts(self, "the recurrence", "width", "num_blocks", "conv_width")
        if self.width % self.num_blocks:
            raise ConfigError(f"{self}, num_blocks={self.num_blocks}: num_blocks must divide width")

    def __str__(self) -> str:
        return f"recurrent {self.width}"


@dataclass(frozen=True)
class Mlp:
    """The gated feed-forward (GeGLU, arXiv:2002.05202). `width` counts ONE branch (some sources count both: 32768 for
    Gemma 2B)."""

    width: int

    def __post_init__(self):
        _check_counts(self, "the feed-forward", "width")


Mixer = Attention | Recurrent


@dataclass(frozen=True)
class Layer:
    """A residual block: a mixer of positions, then a feed-forward."""

    mixer: Mixer
    ffw: Mlp


@dataclass(frozen=True)
class DecoderConfig:
    """The text decoder of a member.

    `vocab_size` counts the rows of the released embedding table, which may exceed the pieces of the tokenizer. The
    embedding is tied to the output head in every member.
    """

    vocab_size: int
    width: int
    layers: tuple[Layer, ...]
    max_context: int  # tokens seen in training
    post_norms: bool = False  # norms on the outputs of mixer and feed-forward too (Gemma 2 and 3)
    final_softcap: float | None = None
    biases: bool = False  # on the feed-forward, the attention output and the recurrent linears (RecurrentGemma)
    norm_eps: float = 1e-6
    # sqrt(width) multiplies the embeddings after rounding to this: the run dtype, or always bf16 (RecurrentGemma)
    embed_scale_dtype: Literal["run", "bfloat16"] = "run"

    def __post_init__(self):
        _check_counts(self, "the decoder", "vocab_size", "width", "max_context")
        _check_positive(self, "the decoder", "norm_eps")
        _check_softcap(self, "final_softcap")
        if not self.layers:
            raise ConfigError("layers=() is empty: a decoder has at least one layer")

    @property
    def embed_scale(self) -> float:
        """sqrt(width), before any rounding."""
        return math.sqrt(self.width)

    @property
    def attention(self) -> tuple[Attention, ...]:
        """The attention mixers, in the order of the layers."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention))

    @property
    def recurrent(self) -> tuple[Recurrent, ...]:
        """The recurrent mixers, in the order of the layers."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Recurrent))

    @property
    def longest(self) -> int | None:
        """Tokens of a sequence at most, where a rotation ends there (`Rope.dynamic`); None: no limit."""
        return self.max_context if any(mixer.rope.dynamic is not None for mixer in self.attention) else None

    def check_length(self, tokens: int) -> None:
        """Raises: ContextError, for a sequence of more tokens than the rotations reach."""
        if self.longest is not None and tokens > self.longest:
            raise ContextError(
                f"{tokens:,} tokens: this model stretches its rotary embedding dynamically from {self.longest:,} on, "
                "by the length of the whole sequence, which keys that are remembered cannot follow; shorten it, or "
                "give rope_scaling a fixed form in config.json (linear or yarn)"
            )

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct windows of its attention, ascending."""
        return tuple(sorted({mixer.window for mixer in self.attention if mixer.window is not None}))


def repeat(*pattern: Mixer, ffw: Mlp, total: int) -> tuple[Layer, ...]:
    """The first `total` layers of `pattern` repeated, each with the feed-forward `ffw`."""
    return tuple(Layer(pattern[i % len(pattern)], ffw) for i in range(total))


def replace_layers(
    decoder: DecoderConfig,
    attention: Mapping[str, Any] | None = None,
    recurrent: Mapping[str, Any] | None = None,
    ffw: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """The decoder with fields changed in every layer: of each attention, of each recurrence, of each feed-forward."""
    return replace(
        decoder,
        layers=tuple(
            Layer(
                replace(layer.mixer, **((attention if isinstance(layer.mixer, Attention) else recurrent) or {})),
                replace(layer.ffw, **(ffw or {})),
            )
            for layer in decoder.layers
        ),
    )


def _check_counts(part: Any, where: str, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r} of {where} must be a whole number from 1")


def _check_positive(part: Any, where: str, name: str) -> None:
    value = getattr(part, name)
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value!r} of {where} must be positive and finite")


def _check_softcap(part: Any, name: str) -> None:
    value = getattr(part, name)
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be positive, or None for no cap")


@dataclass(frozen=True)
class Vision:
    """A SigLIP image tower (arXiv:2303.15343)."""

    image_size: int  # pixels on a side
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_width: int = 4304
    norm_eps: float = 1e-6

    def __post_init__(self):
        _check_counts(self, "the image tower", "image_size", "patch_size", "width", "depth", "num_heads", "mlp_width")
        _check_positive(self, "the image tower", "norm_eps")
        if self.image_size % self.patch_size:
            raise ConfigError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads={self.num_heads} does not divide the tower's width={self.width}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Projection:
    """A linear projection of a tower's features to the decoder's width."""

    bias: bool = True


PillowFilter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]  # in the order of its numbers
PILLOW_FILTERS: tuple[PillowFilter, ...] = get_args(PillowFilter)
Resample = PillowFilter | Literal["tensorflow"]
Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class Pixels:
    """Resizing and scaling of a picture before an image tower: a level x of 0 to 255 becomes (scale x - mean) / std.

    The default is that of every release.

    Args:
        resample: a filter of Pillow, or "tensorflow": bilinear without antialiasing, as the models were trained.
        scale: factor of levels; None leaves them.
        mean, std: of each channel.
    """

    resample: Resample = "bicubic"
    scale: float | None = 1 / 255
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Modality:
    """One kind of input besides text: its tower, the projection of features, and their place in a prompt."""

    tower: Vision
    placeholder: int  # the token id that holds the place of one feature in a prompt
    projection: Projection = Projection()
    pixels: Pixels = field(default=Pixels(), repr=False)  # no part of what is traced or packed

    @property
    def tokens(self) -> int:
        """Placeholders of one image: one a patch."""
        return self.tower.num_patches


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
    vision: Modality | None = None
    aliases: tuple[str, ...] = ()
    source: str = ""  # report and configuration that the numbers come from
