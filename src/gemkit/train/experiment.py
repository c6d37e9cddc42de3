"""An experiment is one TOML file: what is trained, on what, how, and what is kept. Everything else follows from it.

    objective = "sft"
    seed = 0

    [model]
    name = "gemma-3-270m"

    [data]
    train = "answers.jsonl"

    [optimizer]
    learning_rate = 5e-5

Each table is a dataclass below, each key a field of it; `set_fields` changes any of them by its dotted name. A key that
there is not is an error. A run folder holds the experiment as it was resolved, so that it can be run again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from gemkit.errors import ConfigError, nearest
from gemkit.family import DecoderConfig, Modality
from gemkit.train import OBJECTIVES, tables

Decay = Literal["constant", "cosine", "linear", "rsqrt"]


@dataclass(frozen=True)
class Model:
    """The model that is trained."""

    name: str = ""  # a member, a hub id, a folder, a file; empty: the starter model, or a new one
    new: Mapping[str, Any] = field(default_factory=dict)  # fields of a model to begin from nothing, see `new_model`
    tokenizer: str = ""  # of a new model: a tokenizer.model or tokenizer.json
    dtype: str = ""  # "bfloat16" or "float32"; empty: the file's own, float32 for a new model
    device: str = "cpu"  # any torch device
    weights: str = ""  # "int8" or "int4": quantize what LoRA leaves as it is
    freeze: tuple[str, ...] = ()  # beginnings of the names of weights that stay as they are: ["vision_tower"]


@dataclass(frozen=True)
class Data:
    """The training data, and how much of it is one step."""

    train: str = ""  # .jsonl, .json, .csv or .parquet, or hub:owner/name
    held_out: str = ""  # the same, never trained on
    form: str = ""  # "text", "chat", ...; empty: as each record shows
    map: Mapping[str, str] = field(default_factory=dict)  # fields by other names: {prompt = "question_en"}
    control: bool = False  # text that spells control tokens, such as <start_of_turn>, is these tokens
    max_length: int = 0  # tokens of an example at most; 0: 1024, or what the model was trained to see if that is less
    batch_size: int = 8  # examples (pairs, prompts) a step
    batch_tokens: int = 0  # tokens a step instead; 0: count examples
    on_bad: Literal["error", "skip"] = "error"  # about a broken record; more than 1 % of them are never skipped


@dataclass(frozen=True)
class LoRA:
    """Adapters instead of all weights."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float | None = None  # the change is multiplied by alpha / rank; None: by 1
    targets: tuple[str, ...] = ()  # names of projections; empty: those that suit the member
    dropout: float = 0.0
    rule: Literal["", "keras"] = ""  # "keras": an A for each head
    use_dora: bool = False  # train the lengths of the changed weights' rows apart
    use_rslora: bool = False  # the change is multiplied by alpha / sqrt(rank)
    modules_to_save: tuple[str, ...] = ()  # names of modules that are trained whole


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its rate. None: as published for the model, see `published`."""

    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    grad_clip: float = 1.0  # of the norm of all gradients; 0: never
    warmup: float | None = None  # steps, or below 1 a share of all
    decay: Decay | None = None
    final_lr_share: float = 0.0  # the rate at the end of cosine and linear, as a share of the highest


@dataclass(frozen=True)
class Step:
    """How a step is computed. What is here changes memory and time, and results by rounding alone."""

    microbatch_tokens: int = 2048  # computed at once; a step of more is computed in parts, exactly
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"  # compute blocks again for the gradient
    threads: int = 0  # 0: as torch chooses; the number is written down, for results depend on it
    skip_nonfinite: int = 0  # steps in a row that are left out for a loss or gradient that is not finite


@dataclass(frozen=True)
class Monitor:
    """Logging, evaluation and samples on the way. Every number of steps: 0 is never."""

    log_every: int = 1
    evaluate_every: int = 0  # on the held-out data
    evaluate_examples: int = 256  # at most
    sample_every: int = 0
    samples: tuple[str, ...] = ()  # prompts to answer
    sample_tokens: int = 64


@dataclass(frozen=True)
class Save:
    """Checkpoints and the finished model. A checkpoint is also written at the end, and when the run is stopped."""

    every: int = 100  # steps; 0: only then
    keep: int = 2  # checkpoints, the newest
    dtype: str = ""  # of the finished model: "bfloat16" or "float32"; empty: as it was trained


@dataclass(frozen=True)
class Experiment:
    """The root table: a model, data, an objective, and how it is trained."""

    objective: str = ""  # one of `OBJECTIVES`
    steps: int = 0  # 0: as many as `epochs` take
    epochs: float = 1.0  # passes over the data
    seed: int = 0
    model: Model = Model()
    data: Data = Data()
    lora: LoRA = LoRA()
    optimizer: Optimizer = Optimizer()
    step: Step = Step()
    monitor: Monitor = Monitor()
    save: Save = Save()
    options: Mapping[str, Any] = field(default_factory=dict)  # of the objective: `beta = 0.1` of dpo

    def __post_init__(self):
        """Raises: ConfigError, for a value that cannot be."""
        if self.objective and self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r} is none; " + nearest(self.objective, OBJECTIVES))
        at_least: dict[str, tuple[float, float]] = {
            "steps": (self.steps, 0),
            "epochs": (self.epochs, 0),
            "seed": (self.seed, 0),
            "data.max_length": (self.data.max_length, 0),
            "data.batch_size": (self.data.batch_size, 1),
            "data.batch_tokens": (self.data.batch_tokens, 0),
            "lora.rank": (self.lora.rank, 0),
            "step.microbatch_tokens": (self.step.microbatch_tokens, 2),
            "step.threads": (self.step.threads, 0),
            "step.skip_nonfinite": (self.step.skip_nonfinite, 0),
            "monitor.log_every": (self.monitor.log_every, 1),
            "monitor.evaluate_every": (self.monitor.evaluate_every, 0),
            "monitor.sample_every": (self.monitor.sample_every, 0),
            "monitor.sample_tokens": (self.monitor.sample_tokens, 1),
            "save.every": (self.save.every, 0),
            "save.keep": (self.save.keep, 1),
            "optimizer.grad_clip": (self.optimizer.grad_clip, 0),
            "optimizer.final_lr_share": (self.optimizer.final_lr_share, 0),
        }
        for name in ("learning_rate", "eps", "weight_decay", "warmup"):
            if (value := getattr(self.optimizer, name)) is not None:
                at_least[f"optimizer.{name}"] = (value, 0)
        for name, (value, least) in at_least.items():
            if not value >= least or value == float("inf"):  # a NaN is not at least anything
                raise ConfigError(f"{name}={value:g} must be at least {least:g}, and finite")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas or ()):
            raise ConfigError(f"optimizer.betas={self.optimizer.betas} must be from 0 to below 1")
        if not 0 <= self.lora.dropout < 1:
            raise ConfigError(f"lora.dropout={self.lora.dropout:g} must be from 0 to below 1")
        if self.model.new and self.model.name:
            raise ConfigError(f"model.name={self.model.name!r} and [model.new] are both given: train one or the other")
        if self.model.new and not self.model.tokenizer:
            raise ConfigError("[model.new] needs model.tokenizer: a tokenizer.model or tokenizer.json")
        if self.model.new and self.lora.rank:
            raise ConfigError(f"lora.rank={self.lora.rank}: a new model has nothing yet that adapters could change")
        if self.model.weights and not self.lora.rank:
            raise ConfigError(
                f"model.weights={self.model.weights!r}: quantized weights cannot be trained; give lora.rank, to train "
                "adapters beside them"
            )


def published(settings: Optimizer, decoder: DecoderConfig, vision: Modality | None, *, new: bool) -> Optimizer:
    """The settings, with what was left out as the family publishes it.

    RecurrentGemma's fine-tuning colab: rate 1e-4, betas 0.9 and 0.96, decay 0.1. PaliGemma's transfers (big_vision,
    forkme.py): rate 1e-5 by a cosine with 5 % of warm-up, and a decay of 3e-7 that is not multiplied with the rate,
    which is 0.03 of it. The others by the tutorials of Keras: rate 5e-5 that stays, decay 0.01. Their pretraining is
    not published; a new model takes RecurrentGemma's betas and decay, and ten times its rate, which small models bear.
    """
    if new:
        known = Optimizer(1e-3, (0.9, 0.96), 1e-8, 0.1, warmup=0.05, decay="cosine")
    elif vision is not None:
        known = Optimizer(1e-5, (0.9, 0.999), 1e-8, 0.03, warmup=0.05, decay="cosine")
    elif decoder.recurrent:
        known = Optimizer(1e-4, (0.9, 0.96), 1e-8, 0.1, warmup=0.0, decay="constant")
    else:
        known = Optimizer(5e-5, (0.9, 0.999), 1e-8, 0.01, warmup=0.0, decay="constant")
    left_out = [f.name for f in fields(settings) if getattr(settings, f.name) is None]
    return replace(settings, **{name: getattr(known, name) for name in left_out})


# ── from a file, and to one ─────────────────────────────────────────────────────────────────────────────────────────


def read(path: str | Path) -> Experiment:
    """The experiment of a TOML file.

    Raises:
        ConfigError: if it cannot be read, or has a key that there is not.
    """
    return tables.convert(tables.read(path), Experiment, str(path))


def set_fields(experiment: Experiment, assignments: Sequence[str]) -> Experiment:
    """The experiment with some fields changed, each as "optimizer.learning_rate=1e-4".

    Raises:
        ConfigError: for an assignment that is none, or of a field that there is not.
    """
    changes = []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} sets nothing: write FIELD=VALUE, as optimizer.learning_rate=1e-4")
        changes.append((name.strip(), _value(value)))
    return with_fields(experiment, changes)


def with_fields(experiment: Experiment, changes: Iterable[tuple[str, Any]]) -> Experiment:
    """The experiment with fields changed, each by its dotted name, all at once: some are only right together."""
    changed = tables.to_tables(experiment)
    for name, value in changes:
        *path, leaf = name.split(".")
        table = changed
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: {part} is a value, not a table")
        table[leaf] = value
    return tables.convert(changed, Experiment, "what was set")


def _value(text: str) -> Any:
    """A value as TOML writes it; anything else is text, so that quotes can be left out."""
    try:
        values = tomllib.loads(f"value = {text.strip()}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return values["value"] if len(values) == 1 else text.strip()
