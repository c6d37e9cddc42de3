"""Layouts by parameter name: which dimension of a weight is divided along which axis of a mesh, as plain data.

A layout is a list of rules, as Keras' `LayoutMap` and the partition rules of T5X are; `Layout.place` applies it to a
member on a mesh. Torch and XLA both read the result: a `Shard` is torch's `Shard(dim)` on one axis of a `DeviceMesh`,
and an entry of JAX's `PartitionSpec`.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gemkit.errors import ConfigError, nearest
from gemkit.family import Attention, DecoderConfig, Modality, Recurrent, parameters
from gemkit.parallel.mesh import AXES, Mesh

Unit = Literal["elements", "heads"]

# modules of a recurrence whose first dimension is its channels, block after block of the gates
_CHANNELS = {"linear_x", "linear_y", "conv_1d", "rg_lru", "input_gate", "recurrent_gate"}


@dataclass(frozen=True)
class Shard:
    """Division of dimension `dim` into equal consecutive parts along a mesh axis.

    `unit="heads"` divides whole heads: query heads in `q_proj` and `o_proj`, key/value heads in `k_proj` and `v_proj`,
    blocks of the gates in a recurrence, heads of an image tower. The parts are then computed with independently.
    """

    dim: int
    axis: str
    unit: Unit = "elements"

    def __post_init__(self):
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 0:
            raise ConfigError(f"dim={self.dim!r} of a shard must be a whole number from 0")
        if self.axis not in AXES:
            raise ConfigError(f"axis={self.axis!r} of a shard is not one of {', '.join(AXES)}")
        if self.unit not in get_args(Unit):
            raise ConfigError(f"unit={self.unit!r} of a shard is not one of {', '.join(get_args(Unit))}")

    def __str__(self) -> str:
        return f"dim {self.dim} by {self.axis}" + (" (heads)" if self.unit == "heads" else "")


Rule = Shard | tuple[Shard, ...] | None


@dataclass(frozen=True)
class Placed:
    """A weight on a mesh."""

    name: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]  # those that apply: what cannot be divided is not among them
    local: tuple[int, ...]  # shape on every device

    def place(self, mesh: Mesh, device: int) -> tuple[slice, ...]:
        """The part of the whole weight that a device holds."""
        where = mesh.coordinates(device)
        first = [0] * len(self.shape)
        for shard in self.shards:
            first[shard.dim] = where[shard.axis] * self.local[shard.dim]
        return tuple(slice(start, start + size) for start, size in zip(first, self.local, strict=True))


@dataclass(frozen=True)
class Placement:
    """The weights of a member on a mesh, in the order of `family.parameters`."""

    mesh: Mesh
    weights: Mapping[str, Placed]
    notes: tuple[str, ...]  # of what is not divided though a rule asks for it, and of what has no rule
    without_rule: tuple[str, ...]  # names of weights that no rule matches: whole on every device


@dataclass(frozen=True)
class Layout:
    """Rules by regular expressions on parameter names: `Layout({r"self_attn\\.q_proj": Shard(0, "model", "heads")})`.

    The first rule that `re.search` finds in a name is the weight's. None: whole on every device, on purpose. A weight
    without a rule is whole on every device too, and `Placement.notes` says so.

    Raises:
        ConfigError: for a pattern that is no regular expression, and a rule that names one axis or one dimension twice.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)

    def __post_init__(self):
        for pattern, rule in self.rules.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"layout rule {pattern!r} is no regular expression: {error}") from error
            axes, dims = [shard.axis for shard in _shards(rule)], [shard.dim for shard in _shards(rule)]
            if len(set(axes)) < len(axes):
                raise ConfigError(
                    f"layout rule {pattern!r} names axis {next(a for a in axes if axes.count(a) > 1)!r} twice"
                )
            if len(set(dims)) < len(dims):
                raise ConfigError(
                    f"layout rule {pattern!r} names dim {next(d for d in dims if dims.count(d) > 1)} twice"
                )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Layout:
        """The layout of a TOML file: a rule a line, as in `"q_proj" = { dim = 0, axis = "model", unit = "heads" }`.

        A list of such tables divides several dimensions; an empty list leaves the weight whole.

        Raises:
            ConfigError: if the file cannot be read, or a line is no rule.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no layout: {error}") from error
        rules: dict[str, Rule] = {}
        for pattern, rule in table.items():
            shards = rule if isinstance(rule, list) else [rule]
            rules[pattern] = tuple(_shard(part, f"{path}: {pattern!r}") for part in shards) or None
        return cls(rules)

    def place(self, mesh: Mesh, decoder: DecoderConfig, vision: Modality | None = None) -> Placement:
        """Where every weight of a member lies on a mesh.

        Raises:
            ConfigError: for a rule that matches no weight or comes after others that match all of its own, an axis
                that the mesh does not have, a dimension that a weight does not have (a bias is left whole), and heads
                of a weight without heads.
        """
        shapes = dict(parameters(decoder, vision))
        chosen = self._chosen(shapes)
        weights, without_rule, refused = {}, [], dict[tuple[str, int], list[str]]()
        for name, shape in shapes.items():
            if (pattern := chosen[name]) is None:
                without_rule.append(name)
                shards: tuple[Shard, ...] = ()
            else:
                shards = _shards(self.rules[pattern])
            local, applied = list(shape), []
            for shard in shards:
                if shard.axis not in mesh.axes:
                    raise ConfigError(
                        f"layout rule {pattern!r} divides along {shard.axis!r}, which mesh {mesh} does not have; "
                        f"{mesh},{shard.axis}=1 has it"
                    )
                if shard.dim >= len(shape):
                    if name.endswith("bias"):
                        continue
                    raise ConfigError(f"layout rule {pattern!r}: {name} of shape {shape} has no dim {shard.dim}")
                count, noun, rest = _units(shard, name, shape, decoder, vision)
                over = mesh.size(shard.axis)
                if count % over:
                    said = f"{count:,} {noun}{rest} is" if count == 1 else f"{count:,} {noun}s{rest} are"
                    refused.setdefault((f"{said} not divided over {shard.axis}={over}", over), []).append(name)
                    continue
                local[shard.dim] //= over
                applied.append(shard)
            weights[name] = Placed(name, shape, tuple(applied), tuple(local))
        notes = [f"{said}: {_kinds(names)} whole on each of the {over}" for (said, over), names in refused.items()]
        if without_rule:
            notes.append(f"no rule of the layout matches {_kinds(without_rule)} whole on every device")
        return Placement(mesh, weights, tuple(notes), tuple(without_rule))

    def _chosen(self, names: Iterable[str]) -> dict[str, str | None]:
        """The pattern of each weight, once every rule is found to have one."""
        names = list(names)
        chosen = {name: next((p for p in self.rules if re.search(p, name)), None) for name in names}
        for pattern in self.rules.keys() - set(chosen.values()):
            taken = [name for name in names if re.search(pattern, name)]
            if taken:
                raise ConfigError(
                    f"layout rule {pattern!r} is never used: {chosen[taken[0]]!r} before it matches {taken[0]}, and "
                    "the first match wins"
                )
            raise ConfigError(f"layout rule {pattern!r} matches no weight; {_nearest(pattern, names)}")
        return chosen


def default(decoder: DecoderConfig, vision: Modality | None = None) -> Layout:
    """Tensor parallelism by heads and feed-forward along "model", and the vocabulary by rows (Megatron,
    arXiv:1909.08053).

    Of every pair of projections the first is divided by outputs and the second by inputs, so that a layer has one sum
    over devices after its mixer and one after its feed-forward. It is keras-hub's built-in map without the division
    along its data axis, which ZeRO-3 makes here.
    """
    heads_out, heads_in = Shard(0, "model", "heads"), Shard(1, "model", "heads")
    out, into = Shard(0, "model"), Shard(1, "model")
    rules: dict[str, Rule] = {
        r"vision_tower\..*self_attn\.[qkv]_proj": heads_out,
        r"vision_tower\..*self_attn\.out_proj": heads_in,
        r"vision_tower\..*mlp\.fc1": out,
        r"vision_tower\..*mlp\.fc2": into,
        r"vision_tower\.embeddings|layer_norm[12]\.|post_layernorm\.|multi_modal_projector": None,
        r"embed_tokens": out,
        r"self_attn\.[qkv]_proj": heads_out,
        r"self_attn\.o_proj": heads_in,
        r"recurrent\.(linear_[xy]|conv_1d|rg_lru)": heads_out,
        r"recurrent\.linear_out": heads_in,
        r"mlp\.(gate|up)_proj": out,
        r"mlp\.down_proj": into,
        r"(^|[._])(layer)?norm\.weight$": None,
    }
    names = [name for name, _ in parameters(decoder, vision)]
    return Layout({pattern: rule for pattern, rule in rules.items() if any(re.search(pattern, n) for n in names)})


def _shards(rule: Rule) -> tuple[Shard, ...]:
    return () if rule is None else (rule,) if isinstance(rule, Shard) else rule


def _shard(part: Any, where: str) -> Shard:
    """A table of a file as a shard."""
    wanted = 'write { dim = 0, axis = "model" } or { dim = 0, axis = "model", unit = "heads" }'
    if not isinstance(part, dict) or not {"dim", "axis"} <= part.keys() <= {"dim", "axis", "unit"}:
        raise ConfigError(f"{where} is {part!r}: {wanted}, a list of them, or [] for a weight that stays whole")
    return Shard(**part)


def _units(
    shard: Shard, name: str, shape: tuple[int, ...], decoder: DecoderConfig, vision: Modality | None
) -> tuple[int, str, str]:
    """How many of the shard's units the dimension holds, and what they are called: a noun, and what follows it."""
    if shard.unit == "elements":
        return shape[shard.dim], "element", f" of dim {shard.dim}"
    module = name.rsplit(".", 2)[-2]
    if name.startswith("vision_tower."):
        assert vision is not None
        if (module, shard.dim) in {("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("out_proj", 1)}:
            return vision.tower.num_heads, "head", " of the image tower"
    elif found := re.search(r"layers\.(\d+)\.", name):
        match decoder.layers[int(found[1])].mixer, (module, shard.dim):
            case Attention() as mixer, ("q_proj", 0) | ("o_proj", 1):
                return mixer.heads, "query head", ""
            case Attention() as mixer, ("k_proj", 0) | ("v_proj", 0):
                return mixer.kv_heads, "key/value head", ""
            case Recurrent() as mixer, ("linear_out", 1):
                return mixer.num_blocks, "block", " of the recurrence"
            case Recurrent() as mixer, (channels, 0) if channels in _CHANNELS:
                return mixer.num_blocks, "block", " of the recurrence"
    raise ConfigError(f"{shard} of {name}: it has no heads along it; divide it by elements")


def _kinds(names: Iterable[str]) -> str:
    """Modules by their last names, each once, and a verb: "k_proj and v_proj are"."""
    kinds = list(dict.fromkeys(name.rsplit(".", 2)[-2] for name in names))
    if len(kinds) == 1:
        return f"{kinds[0]} is"
    return f"{', '.join(kinds[:-1])} and {kinds[-1]} are"


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """A clause with the names of which some stretch is most like a pattern."""
    stretches: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for first in range(len(parts)):
            for end in range(first + 1, len(parts) + 1):
                stretches.setdefault(".".join(parts[first:end]), name)
    plain = re.sub(r"\\(.)", r"\1", pattern).replace("d+", "0")
    close = difflib.get_close_matches(plain, stretches, n=3, cutoff=0.6)
    if not close:
        return nearest(plain, names)
    return "did you mean " + " or ".join(dict.fromkeys(stretches[part] for part in close)) + "?"
