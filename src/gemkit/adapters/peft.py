"""Adapters in a folder as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, both ways.

    base_model.model.<module as Transformers names it>.lora_A.weight     (rank, in)
                                                      .lora_B.weight     (out, rank)
                                                      .lora_embedding_A  (rank, rows of the table)
                                                      .lora_embedding_B  (width, rank)

An adapter of Keras' rule is stored as the ordinary one that computes the same, so that everybody can read it: its B,
which all heads share, stands once for each head on the diagonal of a larger one. The metadata of our files says which
modules these are, and they are read back in their own form.

Source: huggingface/peft 0.21, utils/save_and_load.py and tuners/lora/config.py. What changes the numbers and is not
done here, such as DoRA, is refused by its name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.errors import WeightsError
from gemkit.files import write_safetensors
from gemkit.weights.formats.base import MAX_HEADER, parse_json
from gemkit.weights.formats.safetensors import SafetensorsReader
from gemkit.weights.maps import NameMap

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
STARTER = "the starter model"  # a base that has no place of its own
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_COPY = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.weight")
_NOTE_BASE, _NOTE_HEADS = "gemkit.base", "gemkit.heads"  # in the metadata: PEFT warns of keys that it does not know

# Settings that change nothing of what a stored adapter computes, or that are read below.
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config", "eva_config",
    "megatron_core", "qalora_group_size", "loftq_config",
}  # fmt: skip
# Ways to begin that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, CorDA) change it, and what is stored is
# what is to be added to the changed one.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to one module: `scale * B A`."""

    module: str  # our name
    a: Tensor  # (rank, in), or (heads * rank, in); of an embedding (rank, rows of the table)
    b: Tensor  # (out, rank), or (out / heads, rank)
    scale: float
    heads: int = 1  # more: each has an A of its own, and all have this B
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return self.b.shape[1]


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
    base = _Settings.read(folder).base
    if not base:
        raise WeightsError(
            f"{folder / CONFIG} names no base_model_name_or_path: give the model itself, and {folder} as its adapter"
        )
    return base


def read(
    folder: str | os.PathLike[str], modules: Mapping[str, tuple[int, int]], table: NameMap
) -> tuple[list[LowRank], dict[str, Tensor]]:
    """What an adapter adds to a model.

    Args:
        modules: the modules that can have adapters, by our names, and the shapes of their weights.
        table: Transformers' names for them.

    Returns:
        One for each module that it changes, in float32; and copies of tables that PEFT stores beside adapters of them,
        by our names of the modules, which must equal the model's own; and under "score" the head of a reward model.

    Raises:
        WeightsError: if it is damaged, of a kind that is not read here, or another model's: which tensor, and why.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder, and no id of an adapter on the hub (owner/name)")
    settings = _Settings.read(folder)
    path = folder / MODEL
    if not path.is_file():
        pickle = "adapter_model.bin"
        why = f", only {pickle}, a pickle, which is never opened" if (folder / pickle).is_file() else ""
        raise WeightsError(f"{folder} holds no {MODEL}{why}: save the adapter again with a current PEFT")
    ours = {theirs: name for name in modules for theirs in reversed(table.modules(name))}
    with SafetensorsReader(path) as reader:
        pairs: dict[str, dict[str, str]] = defaultdict(dict)
        copies = {}
        for key in reader.entries:
            if found := _KEY.fullmatch(key):
                pairs[found[1]][(found[2] or "") + found[3]] = key
            elif (found := _COPY.fullmatch(key)) and ours.get(found[1], "").endswith(("embed_tokens", "lm_head")):
                copies[ours[found[1]]] = reader.read(key)
            elif found and found[1] == "score":
                copies["score"] = reader.read(key)
            else:
                raise WeightsError(f"{path}: {key} is no part of an adapter that is read here{_why(key)}")
        if not pairs:
            raise WeightsError(f"{path} changes nothing: it holds no lora_A and lora_B")
        heads = _heads(reader)
        changes = []
        for theirs, keys in pairs.items():
            if theirs not in ours:
                raise WeightsError(_unknown(folder, settings, theirs, ours))
            a, b = (_matrix(reader, keys, side, theirs) for side in "AB")
            shape = modules[ours[theirs]]
            if ("embedding_A" in keys) != ours[theirs].endswith("embed_tokens"):
                raise WeightsError(f"{path}: {keys.popitem()[1]} is not the kind of adapter that {theirs} can have")
            if "embedding_A" in keys:
                shape = shape[1], shape[0]  # a token's row of the table is a column of B A
            change = settings.change(ours[theirs], theirs, a, b, heads.get(theirs, 1))
            _check(folder, settings, theirs, change, a, b, shape)
            changes.append(change if change.heads == 1 else _in_own_form(path, theirs, change))
    return changes, copies


def write(
    folder: Path,
    changes: Sequence[LowRank],
    modules: Iterable[str],
    table: NameMap,
    *,
    base: str | None,
    named: str,
    text_only: bool,
    score: Tensor | None = None,
) -> None:
    """Write both files.

    Args:
        folder: that exists.
        modules: all that can have adapters, those without one too, by our names.
        base: what `checkpoint.find` opened; None is the starter model.
        named: how others find the base: a hub id, or a folder.
        text_only: whether the model sees no images.
        score: the head of a reward model, which goes with it.

    Raises:
        WeightsError: if a number is not finite: nothing is written then.
    """
    tensors, heads, ranks, alphas = {}, {}, {}, {}
    for change in changes:
        theirs = table.module(change.module)
        a, b = change.a, _on_diagonal(change.b, change.heads)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise WeightsError(f"the adapter of {change.module} has numbers that are not finite: it is not saved")
        if change.module.endswith("embed_tokens"):
            names = ("lora_embedding_A", "lora_embedding_B")
        else:
            names = ("lora_A.weight", "lora_B.weight")
        for name, value in zip(names, (a, b), strict=True):
            tensors[f"{_PREFIX}{theirs}.{name}"] = value.detach().float().cpu().contiguous()
        ranks[theirs] = b.shape[1]
        alphas[theirs] = _tidy(change.scale * b.shape[1])
        if change.heads > 1:
            heads[theirs] = change.heads
    rank, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if text_only else None,
        "base_model_name_or_path": named,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(change.dropout for change in changes),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _targets(ranks, [table.module(name) for name in modules]),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if score is not None:
        if not score.isfinite().all():
            raise WeightsError("the reward head has numbers that are not finite: it is not saved")
        tensors[f"{_PREFIX}score.weight"] = score.detach().float().cpu().contiguous()
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    notes = {"format": "pt"}
    if base is None:
        notes[_NOTE_BASE] = STARTER
    if heads:
        notes[_NOTE_HEADS] = json.dumps(heads)
    with open(folder / MODEL, "wb") as file:
        write_safetensors(file, tensors, notes)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Settings:
    """What an `adapter_config.json` says, checked."""

    where: Path
    base: str | None
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path) -> _Settings:
        where = folder / CONFIG
        try:
            if where.stat().st_size > MAX_HEADER:
                raise WeightsError(f"{where}: {where.stat().st_size:,} bytes is too large for a configuration")
            config = parse_json(where.read_bytes(), str(where))
        except OSError as error:
            raise WeightsError(f"{folder} is no adapter: cannot read {CONFIG}: {error.strerror}") from None
        _refuse_other_kinds(config, where)
        base = config.get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise WeightsError(f"{where}: base_model_name_or_path={base!r} is no name")
        return cls(
            where,
            base,
            _whole(config.get("r", 8), where, "r"),
            _number(config.get("lora_alpha", 8), where, "lora_alpha"),
            _share(config.get("lora_dropout", 0.0), where),
            bool(config.get("use_rslora")),
            {k: _whole(v, where, f"rank_pattern of {k}") for k, v in _patterns(config, "rank_pattern", where).items()},
            {
                k: _number(v, where, f"alpha_pattern of {k}")
                for k, v in _patterns(config, "alpha_pattern", where).items()
            },
        )

    def change(self, ours: str, theirs: str, a: Tensor, b: Tensor, heads: int) -> LowRank:
        rank, alpha = self.rank_of(theirs), _matching(self.alphas, theirs, self.alpha)
        scale = alpha / math.sqrt(rank) if self.rslora else alpha / rank
        return LowRank(ours, a, b, scale, heads, self.dropout)

    def rank_of(self, theirs: str) -> int:
        return _matching(self.ranks, theirs, self.rank)


def _refuse_other_kinds(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise WeightsError(f"{where}: peft_type={config.get('peft_type')!r}; only LORA is read here")
    if config.get("bias", "none") != "none":
        raise WeightsError(f"{where}: bias={config['bias']!r} trains biases too, which is not read here")
    if (initial := config.get("init_lora_weights")) not in _INITIAL:
        raise WeightsError(
            f"{where}: init_lora_weights={initial!r} has changed the base weights; save it as an ordinary LoRA first "
            "(PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in config.items():
        if name == "modules_to_save" and value == ["score"]:  # the head of a reward model
            continue
        if name not in _HARMLESS and value not in (None, False, "", [], {}):
            raise WeightsError(f"{where}: {name}={value!r} is not done here, and the adapter would not be the same")


def _whole(value: Any, where: Path, name: str) -> int:
    if type(value) is not int or value < 1:
        raise WeightsError(f"{where}: {name}={value!r} must be a whole number from 1")
    return value


def _number(value: Any, where: Path, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise WeightsError(f"{where}: {name}={value!r} must be a number")
    return value


def _share(value: Any, where: Path) -> float:
    if not 0 <= _number(value, where, "lora_dropout") < 1:
        raise WeightsError(f"{where}: lora_dropout={value!r} must be from 0 to less than 1")
    return value


def _patterns(config: Mapping[str, Any], name: str, where: Path) -> Mapping[str, Any]:
    """Values by pattern, a regular expression of the end of a name. They come from a file and may be hostile: one with
    nested repeats could take longer than the universe."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise WeightsError(f"{where}: {name}={patterns!r} must map names to numbers")
    for pattern in patterns:
        plain = re.sub(r"\\.", "_", pattern)
        if len(pattern) > 300 or len(re.findall(r"[*+?{]", plain)) > 3 or re.search(r"\)[*+?{]|\(\?", plain):
            raise WeightsError(f"{where}: {name} has {pattern!r}, which is more than a pattern of a module's name")
        try:
            re.compile(f"(.*\\.)?({pattern})$")
        except re.error as error:
            raise WeightsError(f"{where}: {name} has {pattern!r}, which is no regular expression: {error}") from None
    return patterns


def _matching(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that a name ends with, as PEFT looks it up."""
    return next((v for pattern, v in patterns.items() if re.match(f"(.*\\.)?({pattern})$", name)), otherwise)


def _pattern(values: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
    """The value that most modules have, and patterns for the others: the last part of their names, where all that end
    with it have the same."""
    usual = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[float]] = defaultdict(set)
    for name, value in values.items():
        by_leaf[name.rpartition(".")[2]].add(value)
    patterns = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        if len(by_leaf[leaf]) > 1:
            patterns[re.escape(name)] = value
        elif value != usual:
            patterns[leaf] = value
    return usual, patterns


def _targets(changed: Iterable[str], everything: Iterable[str]) -> list[str] | str:
    """`target_modules` that select the changed modules and no others: the last parts of their names if these do, with
    those of a language model beside an image tower as PEFT's own patterns have them, else every name."""
    changed, everything = set(changed), list(everything)
    leaves = sorted({name.rpartition(".")[2] for name in changed})
    if {name for name in everything if name.rpartition(".")[2] in leaves} == changed:
        return leaves
    pattern = rf"(.*\.)?language_model\..*\.({'|'.join(leaves)})"
    if {name for name in everything if re.fullmatch(pattern, name)} == changed:
        return pattern
    return sorted(changed)


def _tidy(alpha: float) -> float:
    """The whole number that a float was before it was divided and multiplied again."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _matrix(reader: SafetensorsReader, keys: Mapping[str, str], side: str, theirs: str) -> Tensor:
    key = keys.get(side) or keys.get("embedding_" + side)
    if key is None:
        raise WeightsError(f"{reader.path}: {theirs} has {', '.join(keys.values())} and no lora_{side} to go with it")
    entry = reader.entries[key]
    if entry.dtype not in ("F32", "F16", "BF16") or len(entry.shape) != 2:
        raise WeightsError(f"{reader.path}: {key} is {entry.shape} {entry.dtype}, which is no matrix of floats")
    value = reader.read(key)
    if not value.isfinite().all():  # type: ignore[union-attr]  # a dense tensor
        raise WeightsError(f"{reader.path}: {key} has numbers that are not finite")
    return value.float()  # type: ignore[union-attr]


def _check(
    folder: Path, settings: _Settings, theirs: str, change: LowRank, a: Tensor, b: Tensor, shape: tuple[int, int]
) -> None:
    rank = settings.rank_of(theirs)
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


def _unknown(folder: Path, settings: _Settings, theirs: str, ours: Mapping[str, str]) -> str:
    leaf = theirs.rpartition(".")[2]
    known = sorted({name.rpartition(".")[2] for name in ours})
    why = "of which the model has fewer" if leaf in known else f"and the model has {', '.join(known)}"
    return f"{folder} changes {theirs}, {why}: it belongs to another model{_trained_on(settings)}"


def _trained_on(settings: _Settings) -> str:
    return f"; it was trained on {settings.base}" if settings.base else ""


def _why(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return ": it is DoRA's, which is not done here"
    if key.endswith(".bias"):
        return ": biases were trained too"
    return ""


def _heads(reader: SafetensorsReader) -> dict[str, int]:
    """Modules whose adapters are of Keras' rule, and their heads."""
    if (text := reader.metadata.get(_NOTE_HEADS)) is None:
        return {}
    heads = parse_json(text.encode(), f"{reader.path}: {_NOTE_HEADS}")
    if any(type(count) is not int or count < 2 for count in heads.values()):
        raise WeightsError(f"{reader.path}: {_NOTE_HEADS} must map modules to their number of heads")
    return heads


def _on_diagonal(b: Tensor, heads: int) -> Tensor:
    """(out, heads * rank) from (out / heads, rank): once for each head, and zeros beside it."""
    import torch

    return b if heads == 1 else torch.block_diag(*[b.detach()] * heads)


def _in_own_form(path: Path, theirs: str, change: LowRank) -> LowRank:
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
    return LowRank(change.module, change.a, b, change.scale, change.heads, change.dropout)
