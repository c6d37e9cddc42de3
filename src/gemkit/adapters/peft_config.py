"""`adapter_config.json` of PEFT, both ways: each of its keys is used, ignored for a reason, or refused by its name.

Source: huggingface/peft 0.21, tuners/lora/config.py and config.py. A key that stands in no table here is of a newer
version: it is refused unless its value is one that switches something off.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemkit.errors import WeightsError
from gemkit.weights.formats.base import MAX_HEADER, parse_json
from gemkit.weights.known_keys import Key, Table, check_keys, ignored, refused, used

CONFIG = "adapter_config.json"

_FROM_TENSORS = "the file's own tensors say which modules it changes"
_BEFORE = "it is how an adapter began, which its tensors no longer tell"
_PLACE = "it says where and by which program the adapter was made"
_MERGE = "merge it into the model with PEFT (merge_and_unload, save_pretrained) and open that"
_OTHER_FORWARD = f"it computes something else than a LoRA; {_MERGE}"
_NEUTRAL = (False, "", [], {})
ADAPTER: Table = {
    **used("LORA; other kinds are refused", "peft_type"),
    **used("the model that it was trained on", "base_model_name_or_path"),
    **used("rank and strength", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    **used("while it is trained further", "lora_dropout"),
    **used("the kind of change", "use_dora", "lora_bias"),
    **used("PiSSA and OLoRA take a part out of the base; starts that cannot be repeated are refused",
           "init_lora_weights"),
    **used("modules and rows that it brings whole", "modules_to_save", "trainable_token_indices"),
    **used("table and head change alike", "ensure_weight_tying"),
    **ignored(_FROM_TENSORS, "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    **ignored(_FROM_TENSORS, "target_parameters"),
    **ignored("it turns the weights of GPT-2's Conv1D; PEFT sets it back for a Linear", "fan_in_fan_out"),
    **ignored(_BEFORE, "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    **ignored("it changes gradients alone", "velora_config"),
    **ignored("it belongs to use_qalora", "qalora_group_size"),
    **ignored("an adapter is frozen unless it is loaded to be trained", "inference_mode"),
    **ignored("PEFT ignores it in a file too", "runtime_config"),
    **ignored("it belongs to megatron_config", "megatron_core"),
    **ignored(_PLACE, "task_type", "auto_mapping", "peft_version"),
    **ignored("the base is opened by its name, and -m BASE --adapter FOLDER opens another", "revision"),
    **refused("an activated LoRA changes only the tokens after its invocation, and cannot be merged",
              ["alora_invocation_tokens"], *_NEUTRAL),
    **refused("a router chooses among several adapters for each token; load one of them", ["arrow_config"], *_NEUTRAL),
    **refused("it makes a deeper model; PEFT writes it with merge_and_unload and save_pretrained",
              ["layer_replication"], *_NEUTRAL),
    **refused("it was trained on modules of Megatron; save it from the model that Transformers loads",
              ["megatron_config"], *_NEUTRAL),
    **refused(_OTHER_FORWARD, ["kasa_config", "monteclora_config", "use_bdlora", "use_qalora"], *_NEUTRAL),
}  # fmt: skip
_NEWER = Key("refused", "a setting of a newer PEFT, and the adapter might not compute the same without it", _NEUTRAL)

# Ways to begin (`init_lora_weights`) that leave the base as it is.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Those that take a part out of the base, which PEFT computes anew from the base each time it loads the adapter.
TAKEN_OUT = ("pissa", "olora")
_CONVERT = (
    "save it as an ordinary LoRA: PEFT's save_pretrained with path_initial_model_for_weight_conversion writes one"
)
_LOST_STARTS = {
    "pissa_niter": "an approximation of the base that is drawn anew each time was taken out of it",
    "corda": "what was taken out of the base depends on data that is not in the file, and PEFT does not load it either",
    "loftq": "the base was quantized in its own way before training",
    "lora_ga": "what was taken out of the base depends on gradients that are not in the file, and PEFT adds the rest "
    "to the whole base",
}


@dataclass(frozen=True)
class Settings:
    """What an `adapter_config.json` says, checked."""

    where: Path
    base: str | None
    rank: int
    alpha: float
    dropout: float
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    taken_out: str | None = None  # "pissa" or "olora": the part of the base that A and B began as
    tied: bool = False  # adapters of the table and of the head are kept equal
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()  # ends of the names of modules that it brings whole
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # ids by the end of a module's name

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Those of a folder.

        Raises:
            WeightsError: if there are none, or they say something that is not implemented; names it.
        """
        where = folder / CONFIG
        try:
            if where.stat().st_size > MAX_HEADER:
                raise WeightsError(f"{where}: {where.stat().st_size:,} bytes is too large for a configuration")
            config = parse_json(where.read_bytes(), str(where))
        except OSError as error:
            raise WeightsError(f"{folder} is no adapter: cannot read {CONFIG}: {error.strerror}") from None
        _refuse(config, where)
        base = config.get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise WeightsError(f"{where}: base_model_name_or_path={base!r} is no name")
        start = config.get("init_lora_weights")
        if config.get("use_dora") and config.get("lora_bias"):
            raise WeightsError(f"{where}: use_dora and lora_bias, which PEFT refuses together")
        return cls(
            where,
            base,
            _whole(config.get("r", 8), where, "r"),
            _number(config.get("lora_alpha", 8), where, "lora_alpha"),
            _share(config.get("lora_dropout"), where),
            bool(config.get("use_rslora")),
            bool(config.get("use_dora")),
            bool(config.get("lora_bias")),
            start.lower() if isinstance(start, str) and start.lower() in TAKEN_OUT else None,
            bool(config.get("ensure_weight_tying")),
            {k: _whole(v, where, f"rank_pattern of {k}") for k, v in _patterns(config, "rank_pattern", where).items()},
            {
                k: _number(v, where, f"alpha_pattern of {k}")
                for k, v in _patterns(config, "alpha_pattern", where).items()
            },
            _names(config, "modules_to_save", where),
            _tokens(config.get("trainable_token_indices"), where),
        )

    def rank_of(self, theirs: str) -> int:
        """The rank of a module by Transformers' name."""
        return _matching(self.ranks, theirs, self.rank)

    def scale_of(self, theirs: str) -> float:
        """The factor of a module's B A."""
        rank, alpha = self.rank_of(theirs), _matching(self.alphas, theirs, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def tokens_of(self, theirs: str) -> tuple[int, ...]:
        """The ids whose rows of a module are the adapter's own."""
        return next((ids for end, ids in self.tokens.items() if theirs.endswith(end)), ())


def _refuse(config: Mapping[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise WeightsError(f"{where}: peft_type={kind!r}; only LORA is read here: {_MERGE}")
    start = config.get("init_lora_weights")
    known = start.lower() if isinstance(start, str) else start
    if known not in _PLAIN_STARTS and known not in TAKEN_OUT:
        why = next((why for name, why in _LOST_STARTS.items() if str(known).startswith(name)), "it is not known here")
        raise WeightsError(f"{where}: init_lora_weights={start!r}: {why}; {_CONVERT}")
    check_keys(config, ADAPTER, str(where), unknown=_NEWER, error=WeightsError)


def _whole(value: Any, where: Path, name: str) -> int:
    if type(value) not in (int, float) or value != value // 1 or value < 1:
        raise WeightsError(f"{where}: {name}={value!r} must be a whole number from 1")
    return int(value)


def _number(value: Any, where: Path, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise WeightsError(f"{where}: {name}={value!r} must be a number")
    return value


def _share(value: Any, where: Path) -> float:
    if value is None:
        return 0.0
    if not 0 <= _number(value, where, "lora_dropout") < 1:
        raise WeightsError(f"{where}: lora_dropout={value!r} must be from 0 to less than 1")
    return value


def _names(config: Mapping[str, Any], name: str, where: Path) -> tuple[str, ...]:
    value = config.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise WeightsError(f"{where}: {name}={value!r} must be a list of names")
    return tuple(value)


def _tokens(value: Any, where: Path) -> dict[str, tuple[int, ...]]:
    by_module = value if isinstance(value, dict) else {"embed_tokens": value} if value else {}
    for ids in by_module.values():
        plain = isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)
        if not plain or len(set(ids)) < len(ids):
            raise WeightsError(f"{where}: trainable_token_indices={value!r} must be lists of token ids, each once")
    return {name: tuple(ids) for name, ids in by_module.items()}


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


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────


def pattern_of(values: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
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


def targets_of(changed: Iterable[str], everything: Iterable[str]) -> list[str] | str:
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
