"""Adapters in a folder as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, both ways.

    base_model.model.<module as Transformers names it>.lora_A.weight          (rank, in)
                                                      .lora_B.weight          (out, rank), and .bias (out,)
                                                      .lora_embedding_A       (rank, rows of the table)
                                                      .lora_embedding_B       (width, rank)
                                                      .lora_magnitude_vector  (out,), or of an embedding (width,): DoRA
                                                      .token_adapter.trainable_tokens_delta  (tokens, width)
                                                      .base_layer.bias        (out,): trained, or .base_layer.weight
                                                      .weight, .bias, ...     of a module that is saved whole

An adapter of Keras' rule is stored as the ordinary one that computes the same, so that everybody can read it: its B,
which all heads share, stands once for each head on the diagonal of a larger one. The metadata of our files says which
modules these are, and they are read back in their own form.

Source: huggingface/peft 0.21, utils/save_and_load.py and utils/other.py; `peft_config.py` has the settings. What
trainers leave around the names is taken off: the adapter's own name, and the wrappers of DDP, FSDP and torch.compile.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.adapters.peft_config import CONFIG, Settings, pattern_of, targets_of
from gemkit.errors import WeightsError
from gemkit.files import write_safetensors
from gemkit.weights.formats.base import parse_json
from gemkit.weights.formats.safetensors import SafetensorsReader
from gemkit.weights.maps import NameMap, Part

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "adapter_model.safetensors"
STARTER = "the starter model"  # a base that has no place of its own
_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"^module\.|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_KEY = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(.+))?")
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.([^.]+))?")
_OF_TRAINING = re.compile(r"\.lora_velora_embed(\.|$)")  # what VeLoRA's gradients are projected on
_NOTE_BASE, _NOTE_HEADS = "gemkit.base", "gemkit.heads"  # in the metadata: PEFT warns of keys that it does not know


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """What an adapter adds to one module: `scale * B A`."""

    module: str  # our name
    a: Tensor  # (rank, in), or (heads * rank, in); of an embedding (rank, rows of the table)
    b: Tensor  # (out, rank), or (out / heads, rank)
    scale: float
    heads: int = 1  # more: each has an A of its own, and all have this B
    dropout: float = 0.0
    bias: Tensor | None = None  # (out,), of B
    magnitude: Tensor | None = None  # (out,) of a DoRA, or (width,)

    @property
    def rank(self) -> int:
        return self.b.shape[1]


@dataclass
class Contents:
    """All that an adapter holds, in float32 and by our names."""

    changes: list[LowRankChange] = field(default_factory=list)
    rows: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)  # by module: ascending ids, (N, D)
    whole: dict[str, Tensor] = field(default_factory=dict)  # by parameter: in place of the model's own
    copies: dict[str, Tensor] = field(default_factory=dict)  # by module: a table as the adapter's base had it
    score: Tensor | None = None  # the head of a reward model
    taken_out: str | None = None  # as in `Settings`
    tied: bool = False  # what it has of the table and of the head is kept equal


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def base_of(folder: Path) -> str | None:
    """What an adapter was trained on, as `checkpoint.find` takes it; None is the starter model.

    Raises:
        WeightsError: if it does not say, or is no adapter that can be read.
    """
    if (folder / MODEL).is_file():
        with SafetensorsReader(folder / MODEL) as reader:
            if reader.metadata.get(_NOTE_BASE) == STARTER:
                return None
    base = Settings.read(folder).base
    if not base:
        raise WeightsError(
            f"{folder / CONFIG} names no base_model_name_or_path: give the model itself, and {folder} as its adapter"
        )
    return base


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(
    folder: str | os.PathLike[str], modules: Mapping[str, tuple[int, int]], parts: Iterable[Part], table: NameMap
) -> Contents:
    """What an adapter adds to a model.

    Args:
        modules: the modules that can have adapters, by our names, and the shapes of their weights.
        parts: how Transformers stores each parameter.
        table: Transformers' names for them.

    Raises:
        WeightsError: if it is damaged, of a kind that is not read here, or another model's: which tensor, and why.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder, and no id of an adapter on the hub (owner/name)")
    settings = Settings.read(folder)
    path = folder / MODEL
    if not path.is_file():
        pickle = "adapter_model.bin"
        why = f", only {pickle}, a pickle, which is never opened" if (folder / pickle).is_file() else ""
        raise WeightsError(f"{folder} holds no {MODEL}{why}: save the adapter again with a current PEFT")
    with SafetensorsReader(path) as reader:
        return _Reading(reader, settings, modules, {part.param_name: part for part in parts}, table).contents()


class _Reading:
    """One file of tensors on its way to `Contents`."""

    def __init__(
        self,
        reader: SafetensorsReader,
        settings: Settings,
        modules: Mapping[str, tuple[int, int]],
        parts: Mapping[str, Part],
        table: NameMap,
    ):
        self.reader, self.settings, self.shapes, self.parts = reader, settings, modules, parts
        self.modules = {theirs: name for name in modules for theirs in reversed(table.modules(name))}
        heads = [f"{name}.weight" for name in modules if name.endswith("lm_head")]
        self.params = {theirs: name for name in (*parts, *heads) for theirs in reversed(table.params(name))}
        self.found = Contents(taken_out=settings.taken_out, tied=settings.tied)
        self.names: set[str] = set()  # the adapter's own, where they were left in

    def contents(self) -> Contents:
        low_rank: dict[str, dict[str, str]] = defaultdict(dict)
        for key in self.reader.entries:
            name = _WRAPPERS.sub("", key)
            name = _WRAPPERS.sub("", name.removeprefix(_PREFIX))
            if _OF_TRAINING.search(name):
                continue
            if parsed := _KEY.fullmatch(name):
                side = parsed[2] + self._leaf(parsed[3])
                if side in low_rank[parsed[1]]:
                    raise WeightsError(f"{self.reader.path}: {key} is there twice, under two names")
                low_rank[parsed[1]][side] = key
            elif parsed := _TOKENS.fullmatch(name):
                self._leaf(parsed[2])
                self._token_rows(parsed[1], key)
            else:
                self._weight(name, key)
        if len(self.names) > 1:
            raise WeightsError(
                f"{self.reader.path} holds the adapters {', '.join(sorted(self.names))}: save each into its own folder"
            )
        heads = _heads(self.reader)
        for theirs, keys in low_rank.items():
            self._low_rank(theirs, keys, heads.get(theirs, 1))
        if not (self.found.changes or self.found.rows or self.found.whole):
            raise WeightsError(f"{self.reader.path} changes nothing: it holds no lora_A and lora_B")
        return self.found

    def _leaf(self, rest: str | None) -> str:
        """ "" of `weight` or nothing, "_bias" of `bias`; an adapter's name before them is noted."""
        name, _, leaf = (rest or "").rpartition(".")
        if leaf not in ("", "weight", "bias"):
            name, leaf = f"{name}.{leaf}".removeprefix("."), ""
        if name:
            self.names.add(name)
        return "_bias" if leaf == "bias" else ""

    def _low_rank(self, theirs: str, keys: Mapping[str, str], heads: int) -> None:
        settings, path = self.settings, self.reader.path
        if theirs not in self.modules:
            raise WeightsError(_unknown(path.parent, settings, theirs, self.modules))
        ours = self.modules[theirs]
        embeds = "embedding_A" in keys or "embedding_B" in keys
        if embeds != ours.endswith("embed_tokens"):
            key = next(iter(keys.values()))
            raise WeightsError(f"{path}: {key} is not the kind of adapter that {theirs} can have")
        kind = "embedding_" if embeds else ""
        a, b = (self._floats(keys, kind + side, theirs, 2) for side in "AB")
        shape = self.shapes[ours]
        out = shape[1] if embeds else shape[0]
        extra: dict[str, Any] = {}
        for setting, wanted, side, name in (
            ("use_dora", settings.dora, "magnitude_vector", "magnitude"),
            ("lora_bias", settings.lora_bias, "B_bias", "bias"),
        ):
            if wanted:
                extra[name] = self._floats(keys, side, theirs, 1)
                if extra[name].shape[0] != out:
                    raise WeightsError(
                        f"{path}: {keys[side]} has {extra[name].shape[0]} numbers, and {theirs} has {out}"
                    )
            elif side in keys:
                raise WeightsError(f"{path}: {keys[side]} is there, and {CONFIG} does not say {setting}")
        change = LowRankChange(ours, a, b, settings.scale_of(theirs), heads, settings.dropout, **extra)
        _check(path.parent, settings, theirs, change, shape[::-1] if embeds else shape)
        self.found.changes.append(change if heads == 1 else _in_own_form(path, theirs, change))

    def _token_rows(self, theirs: str, key: str) -> None:
        path, ours = self.reader.path, self.modules.get(theirs, "")
        ids = self.settings.tokens_of(theirs)
        if not ours.endswith(("embed_tokens", "lm_head")):
            raise WeightsError(f"{path}: {key}: the rows of {theirs} are no tokens of this model")
        rows = self._floats({"rows": key}, "rows", theirs, 2)
        if len(ids) != rows.shape[0]:
            raise WeightsError(f"{path}: {key} has {rows.shape[0]} rows, and {CONFIG} names {len(ids)} tokens for it")
        vocabulary, width = self.shapes[ours]
        if max(ids) >= vocabulary or rows.shape[1] != width:
            raise WeightsError(
                f"{path}: {key} is {tuple(rows.shape)} and reaches token {max(ids)}; here the table is {vocabulary} x "
                f"{width}: it belongs to another model, or its base had more tokens{_trained_on(self.settings)}"
            )
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.found.rows[ours] = tuple(ids[i] for i in order), rows[order]

    def _weight(self, name: str, key: str) -> None:
        """A weight that is there whole: one that is the adapter's own, or a copy of a table."""
        own = re.fullmatch(r"(.+)\.modules_to_save\.([^.]+)\.(.+)", name)
        if own:
            self.names.add(own[2])
            name = f"{own[1]}.{own[3]}"
        name = name.replace(".base_layer.", ".")
        path = self.reader.path
        if name == "score.weight":
            self.found.score = self._floats({"score": key}, "score", name, 2)
            return
        param = self.params.get(name)
        if param is None:
            raise WeightsError(f"{path}: {key} is no part of an adapter that is read here, and no weight of this model")
        module = param.removesuffix(".weight")
        if module.endswith(("embed_tokens", "lm_head")) and not own and not self._is_saved(name):
            self.found.copies[module] = self.reader.read(key)  # type: ignore[assignment]  # a dense tensor
            return
        part = self.parts.get(param)
        value = self._floats({"weight": key}, "weight", name, None)
        expected = self.shapes[module] if part is None else part.layout.shape
        if tuple(value.shape) != tuple(expected):
            raise WeightsError(
                f"{path}: {key} is {tuple(value.shape)}, and here it is {tuple(expected)}: it belongs to another model"
                f"{_trained_on(self.settings)}"
            )
        self.found.whole[param] = value if part is None else part.take(value)

    def _is_saved(self, name: str) -> bool:
        """Whether a table is one that the adapter trained whole, and not a copy beside an adapter of it."""
        module = name.removesuffix(".weight")
        both = self.settings.tied and any(w in ("embed_tokens", "lm_head") for w in self.settings.whole)
        return both or any(module.endswith(end) for end in self.settings.whole)

    def _floats(self, keys: Mapping[str, str], side: str, theirs: str, axes: int | None) -> Tensor:
        path = self.reader.path
        if side not in keys:
            raise WeightsError(f"{path}: {theirs} has {', '.join(keys.values())} and no lora_{side} to go with it")
        key = keys[side]
        entry = self.reader.entries[key]
        if entry.dtype not in ("F32", "F16", "BF16") or axes not in (None, len(entry.shape)):
            raise WeightsError(f"{path}: {key} is {entry.shape} {entry.dtype}, which is no array of floats that fits")
        value: Any = self.reader.read(key)
        if not value.isfinite().all():
            raise WeightsError(f"{path}: {key} has numbers that are not finite")
        return value.float()


def _check(folder: Path, settings: Settings, theirs: str, change: LowRankChange, shape: tuple[int, ...]) -> None:
    rank, a, b = settings.rank_of(theirs), change.a, change.b
    if a.shape[0] != rank or b.shape[1] != rank:
        raise WeightsError(
            f"{folder}: {theirs} has rank {a.shape[0]} in lora_A and {b.shape[1]} in lora_B; {CONFIG} says {rank}"
        )
    if (b.shape[0], a.shape[1]) != shape:
        raise WeightsError(
            f"{folder}: the adapter of {theirs} changes a matrix of {b.shape[0]} x {a.shape[1]}, and here it is "
            f"{shape[0]} x {shape[1]}: it belongs to another model{_trained_on(settings)}"
        )
    if change.heads > 1 and (rank % change.heads or b.shape[0] % change.heads):
        raise WeightsError(f"{folder}: {theirs} is said to have {change.heads} heads, which do not divide {rank} ranks")


def _unknown(folder: Path, settings: Settings, theirs: str, ours: Mapping[str, str]) -> str:
    leaf = theirs.rpartition(".")[2]
    known = sorted({name.rpartition(".")[2] for name in ours})
    why = "of which the model has fewer" if leaf in known else f"and the model has {', '.join(known)}"
    return f"{folder} changes {theirs}, {why}: it belongs to another model{_trained_on(settings)}"


def _trained_on(settings: Settings) -> str:
    return f"; it was trained on {settings.base}" if settings.base else ""


def _heads(reader: SafetensorsReader) -> dict[str, int]:
    """Modules whose adapters are of Keras' rule, and their heads."""
    if (text := reader.metadata.get(_NOTE_HEADS)) is None:
        return {}
    heads = parse_json(text.encode(), f"{reader.path}: {_NOTE_HEADS}")
    if any(type(count) is not int or count < 2 for count in heads.values()):
        raise WeightsError(f"{reader.path}: {_NOTE_HEADS} must map modules to their number of heads")
    return heads


def _in_own_form(path: Path, theirs: str, change: LowRankChange) -> LowRankChange:
    """B as all heads share it, from where it stands on the diagonal."""
    import torch

    size, rank = change.b.shape[0] // change.heads, change.b.shape[1] // change.heads
    b = change.b[:size, :rank].clone()
    if not torch.equal(change.b, _on_diagonal(b, change.heads)):
        raise WeightsError(
            f"{path}: {theirs} is said to share one B among {change.heads} heads, and its lora_B does not: it was "
            f"changed by something else; remove {_NOTE_HEADS} from the metadata to read it as an ordinary LoRA"
        )
    # alpha / (heads * rank) of the ordinary one is the scale of this one: it multiplies the same product
    return LowRankChange(change.module, change.a, b, change.scale, change.heads, change.dropout)


def _on_diagonal(b: Tensor, heads: int) -> Tensor:
    """(out, heads * rank) from (out / heads, rank): once for each head, and zeros beside it."""
    import torch

    return b if heads == 1 else torch.block_diag(*[b.detach()] * heads)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(
    folder: Path,
    contents: Contents,
    modules: Iterable[str],
    parts: Iterable[Part],
    table: NameMap,
    *,
    base: str | None,
    named: str,
    text_only: bool,
) -> None:
    """Write both files.

    Args:
        folder: that exists.
        contents: the adapter; its low-rank changes all are DoRAs, or none is.
        modules: all that can have adapters, those without one too, by our names.
        parts: how Transformers stores each parameter.
        base: what `checkpoint.find` opened; None is the starter model.
        named: how others find the base: a hub id, or a folder.
        text_only: whether the model sees no images.

    Raises:
        WeightsError: if a number is not finite: nothing is written then.
    """
    tensors, heads, config = _low_rank_parts(contents.changes, [*modules], table)
    changed, layouts = config.pop("changed"), {part.param_name: part for part in parts}
    for module, (_, rows) in contents.rows.items():
        tensors[f"{table.module(module)}.token_adapter.trainable_tokens_delta"] = rows
    if contents.rows:
        by_module = {table.module(module): list(ids) for module, (ids, _) in contents.rows.items()}
        config["trainable_token_indices"] = by_module
    biases: list[str] = []
    for param, value in contents.whole.items():
        theirs = table.params(param)[0]
        if param.endswith(".bias") and not _with_its_weight(param, contents.whole):
            if theirs.removesuffix(".bias") in changed:
                theirs = theirs.replace(".bias", ".base_layer.bias")
            biases.append(theirs)
        tensors[theirs] = layouts[param].give(value) if param in layouts else value
    saved = _modules_to_save(contents, table)
    task = "CAUSAL_LM" if text_only else None
    if contents.score is not None:
        tensors["score.weight"] = contents.score
        task, saved = "SEQ_CLS", [*saved, "score"]
    config |= {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": named,
        "modules_to_save": saved or None,
        "ensure_weight_tying": contents.tied,
        # biases of changed modules alone can be said to be trained alone
        "bias": "none" if not biases else "lora_only" if all(".base_layer." in name for name in biases) else "all",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise WeightsError(f"{name} of the adapter has numbers that are not finite: it is not saved")
    stored = {_PREFIX + name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    notes = {"format": "pt"}
    if base is None:
        notes[_NOTE_BASE] = STARTER
    if heads:
        notes[_NOTE_HEADS] = json.dumps(heads)
    with open(folder / MODEL, "wb") as file:
        write_safetensors(file, stored, notes)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _low_rank_parts(
    changes: Sequence[LowRankChange], modules: list[str], table: NameMap
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any]]:
    """The tensors of low-rank changes, the heads of those of Keras' rule, and what a configuration says of them."""
    tensors, heads, ranks, alphas = {}, {}, {}, {}
    for change in changes:
        theirs = table.module(change.module)
        kind, end = ("embedding_", "") if change.module.endswith("embed_tokens") else ("", ".weight")
        b = _on_diagonal(change.b, change.heads)
        tensors |= {f"{theirs}.lora_{kind}A{end}": change.a, f"{theirs}.lora_{kind}B{end}": b}
        if change.magnitude is not None:
            tensors[f"{theirs}.lora_magnitude_vector"] = change.magnitude
        if change.bias is not None:
            tensors[f"{theirs}.lora_B.bias"] = change.bias
        ranks[theirs] = b.shape[1]
        alphas[theirs] = _tidy(change.scale * b.shape[1])
        if change.heads > 1:
            heads[theirs] = change.heads
    rank, rank_pattern = pattern_of(ranks) if ranks else (8, {})
    alpha, alpha_pattern = pattern_of(alphas) if alphas else (8, {})
    config = {
        "changed": set(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((change.dropout for change in changes), default=0.0),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": targets_of(ranks, [table.module(name) for name in modules]),
        "use_rslora": False,
        "use_dora": any(change.magnitude is not None for change in changes),
        "lora_bias": any(change.bias is not None for change in changes),
    }
    return tensors, heads, config


def _with_its_weight(param: str, whole: Mapping[str, Tensor]) -> bool:
    return param.removesuffix("bias") + "weight" in whole


def _modules_to_save(contents: Contents, table: NameMap) -> list[str]:
    """The modules that are saved whole, by names that PEFT finds no others by."""
    whole = [param for param in contents.whole if not param.endswith(".bias")]
    whole += [p for p in contents.whole if p.endswith(".bias") and _with_its_weight(p, contents.whole)]
    return sorted({table.params(param)[0].rpartition(".")[0] for param in whole})


def _tidy(alpha: float) -> float:
    """The whole number that a float was before it was divided and multiplied again."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha
