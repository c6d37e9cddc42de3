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
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gemkit.errors import ConfigError, nearest
from gemkit.family import Attention, DecoderConfig, Layer, Mixer, Mlp, Modality, Recurrent, Vision, get, repeat
from gemkit.train import OBJECTIVES

Decay = Literal["constant", "cosine", "linear", "rsqrt"]


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = ""  # a member, a hub id, a folder, a file; empty: the starter model, or a new one
    new: Mapping[str, Any] = field(default_factory=dict)  # fields of a model to begin from nothing, see `new_model`
    tokenizer: str = ""  # of a new model: a tokenizer.model or tokenizer.json
    dtype: str = ""  # "bfloat16" or "float32"; empty: the file's own, float32 for a new model
    device: str = "cpu"  # any torch device
    weights: str = ""  # "int8" or "int4": quantize what LoRA leaves as it is
    freeze: tuple[str, ...] = ()  # beginnings of the names of weights that stay as they are: ["vision_tower"]


@dataclass(frozen=True)
class Data:
    """What it is trained on, and how much of it is one step."""

    train: str = ""  # .jsonl or .parquet, or hub:owner/name
    held_out: str = ""  # the same, never trained on
    form: str = ""  # "text", "chat", ...; empty: as the records show
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


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its rate. None: as published for the model, see `published`."""

    learning_rate: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    clip: float = 1.0  # of the norm of all gradients; 0: never
    warmup: float | None = None  # steps, or below 1 a share of all
    decay: Decay | None = None
    final: float = 0.0  # the rate at the end of cosine and linear, as a share of the highest


@dataclass(frozen=True)
class Step:
    """How a step is computed. What is here changes memory and time, and results by rounding alone."""

    max_tokens: int = 2048  # computed at once; a step of more is computed in parts, exactly
    checkpointing: Literal["auto", "on", "off"] = "auto"  # compute blocks again for the gradient, instead of keeping
    threads: int = 0  # 0: as torch chooses; the number is written down, for results depend on it
    skip_nonfinite: int = 0  # so many steps in a row with a loss or gradient that is not finite are left out


@dataclass(frozen=True)
class Watch:
    """What is looked at on the way. Every number of steps: 0 is never."""

    log_every: int = 1
    evaluate_every: int = 0  # on the held-out data
    evaluate_examples: int = 256  # at most
    sample_every: int = 0
    samples: tuple[str, ...] = ()  # prompts to answer
    sample_tokens: int = 64


@dataclass(frozen=True)
class Save:
    """What is kept. A checkpoint is also written at the end, and when the run is stopped."""

    every: int = 100  # steps; 0: only then
    keep: int = 2  # the newest so many
    dtype: str = ""  # of the finished model: "bfloat16" or "float32"; empty: as it was trained


@dataclass(frozen=True)
class Experiment:
    """All of it."""

    objective: str = ""  # one of `OBJECTIVES`
    steps: int = 0  # 0: as many as `epochs` take
    epochs: float = 1.0  # passes over the data
    seed: int = 0
    model: Model = Model()
    data: Data = Data()
    lora: LoRA = LoRA()
    optimizer: Optimizer = Optimizer()
    step: Step = Step()
    watch: Watch = Watch()
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
            "step.max_tokens": (self.step.max_tokens, 2),
            "step.threads": (self.step.threads, 0),
            "step.skip_nonfinite": (self.step.skip_nonfinite, 0),
            "watch.log_every": (self.watch.log_every, 1),
            "watch.evaluate_every": (self.watch.evaluate_every, 0),
            "watch.sample_every": (self.watch.sample_every, 0),
            "watch.sample_tokens": (self.watch.sample_tokens, 1),
            "save.every": (self.save.every, 0),
            "save.keep": (self.save.keep, 1),
            "optimizer.clip": (self.optimizer.clip, 0),
            "optimizer.final": (self.optimizer.final, 0),
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
        ConfigError: if it cannot be read, or says what there is not.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return from_tables(values, str(path))


def from_tables(values: Mapping[str, Any], where: str) -> Experiment:
    """The experiment that parsed TOML describes; `where` is its name, for messages."""
    return _typed(Experiment, values, where, "")


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
    tables = to_tables(experiment)
    for name, value in changes:
        *path, leaf = name.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: {part} is a value, not a table")
        table[leaf] = value
    return from_tables(tables, "what was set")


def _value(text: str) -> Any:
    """A value as TOML writes it; what is none is text, so that quotes can be left out."""
    try:
        values = tomllib.loads(f"value = {text.strip()}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return values["value"] if len(values) == 1 else text.strip()


def to_tables(experiment: Any) -> dict[str, Any]:
    """As a TOML file holds it: None is left out."""
    tables = {}
    for f in fields(experiment):
        value = getattr(experiment, f.name)
        if value is not None:
            tables[f.name] = to_tables(value) if is_dataclass(value) else _plain(value)
    return tables


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def to_toml(experiment: Experiment) -> str:
    """The text of a file that `read` gives back as the same experiment."""
    return "\n".join([*_lines(to_tables(experiment), ""), ""])


def _lines(table: Mapping[str, Any], path: str) -> list[str]:
    lines = [f"{_key(key)} = {written(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            name = f"{path}{_key(key)}"
            inner = _lines(value, f"{name}.")
            lines += ["", f"[{name}]", *inner]
    return lines


def _key(key: str) -> str:
    plain = key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
    return key if plain else written(key)


def written(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            {"\\": "\\\\", '"': '\\"'}.get(c, c) if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {written(inner)}" for key, inner in value.items()) + "}"
    return repr(value)


def _typed(kind: type, values: Any, where: str, path: str) -> Any:
    """A dataclass from a table, each value checked against the type of its field."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {path[:-1]} must be a table")
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: there is no {path}{name}; " + nearest(name, known))
    return kind(**{name: _fitting(hints[name], value, where, path + name) for name, value in values.items()})


def _fitting(hint: Any, value: Any, where: str, name: str) -> Any:
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _typed(hint, value, where, f"{name}.")
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = [kind for kind in inner if kind is not type(None)]
        return _fitting(hint, value, where, name)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{where}: {name}={value!r} is not one of {', '.join(map(repr, inner))}")
        return value
    if origin is tuple:
        if isinstance(value, str):  # one of a list: `--set lora.targets=q_proj`
            value = [value]
        exact = inner[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (exact and len(value) != len(inner)):
            raise ConfigError(f"{where}: {name}={value!r} must be a list" + (f" of {len(inner)}" if exact else ""))
        kinds = inner if exact else [inner[0]] * len(value)
        return tuple(_fitting(kind, item, where, name) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = Mapping if origin is not None else hint
    if not isinstance(value, plain) or (isinstance(value, bool) and hint is not bool):
        said = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a table")
        raise ConfigError(f"{where}: {name}={value!r} must be {said}")
    return value


# ── a model from nothing ────────────────────────────────────────────────────────────────────────────────────────────


def new_model(values: Mapping[str, Any], vocab_size: int) -> tuple[DecoderConfig, Modality | None]:
    """The architecture that a table `[model.new]` describes.

    Its keys are the fields of `family.DecoderConfig`, and beside them `heads`, `kv_heads`, `head_dim`, `scale`,
    `softcap` and `qk_norm` of every attention layer and `ffw_width` of every feed-forward. `like` names a member whose
    numbers are those that are left out. `layers` is a pattern that is repeated to `depth` layers, of tables such as
    {kind = "sliding", window = 512}, {kind = "global"} and {kind = "recurrent", width = 256, num_blocks = 4}; a `rope`
    is a table with `base`, and any field of `family.Attention` may stand in a layer's own table. `vision` is a table of
    the fields of `family.Vision`; the placeholder of its patches is the last row until a vocabulary tells another.
    `scale` is by default that of `head_dim`, the rows of the table are `vocab_size`.

    Raises:
        ConfigError: for a field that there is not, or that is missing.
    """
    where = "[model.new]"
    given = dict(values)
    like = given.pop("like", None)
    member = None if like is None else get(like)
    tower = given.pop("vision", None)
    top = {f.name for f in fields(DecoderConfig)}
    known = {*top, *_EVERY_LAYER, "depth", "ffw_width"}
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: there is no {name}; " + nearest(name, known | {"like", "vision"}))
    layers = _new_layers(given, None if member is None else member.decoder, where)
    base = {} if member is None else {name: getattr(member.decoder, name) for name in top}
    hints = get_type_hints(DecoderConfig)
    fitted = {name: _fitting(hints[name], value, where, name) for name, value in given.items() if name in top}
    found = {**base, "vocab_size": vocab_size, **fitted, "layers": layers}
    if missing := [f.name for f in fields(DecoderConfig) if f.name not in found and _is_required(f)]:
        raise _missing(missing[0], where)
    decoder = DecoderConfig(**found)
    if tower is None:
        return decoder, None
    seen = None if member is None else member.vision
    vision = _typed(Vision, {**(seen.tower.__dict__ if seen else {}), **tower}, where, "vision.")
    return decoder, Modality(vision, placeholder=vocab_size - 1)


# fields of `family.Attention` that `[model.new]` sets for every attention layer
_EVERY_LAYER = ("heads", "kv_heads", "head_dim", "scale", "softcap", "qk_norm")


def _new_layers(given: dict[str, Any], like: DecoderConfig | None, where: str) -> tuple[Layer, ...]:
    """The layers that a table asks for; what it says of them is taken out of `given`."""
    depth, pattern = given.pop("depth", None), given.pop("layers", None)
    hints = get_type_hints(Attention)
    every = {n: _fitting(hints[n], given.pop(n), where, n) for n in _EVERY_LAYER if n in given}
    if "head_dim" in every:
        every.setdefault("scale", max(every["head_dim"], 1) ** -0.5)
    ffw_width = _fitting(int, given.pop("ffw_width"), where, "ffw_width") if "ffw_width" in given else None
    if pattern is None:
        mixers = [] if like is None else [layer.mixer for layer in like.layers]
        mixers = [replace(mixer, **every) if isinstance(mixer, Attention) else mixer for mixer in mixers]
    elif not isinstance(pattern, list | tuple) or not pattern:
        raise ConfigError(f"{where}: layers={pattern!r} must be a list of tables")
    else:
        first = None if like is None or not like.attention else like.attention[0]
        base = {} if first is None else {name: getattr(first, name) for name in _EVERY_LAYER}
        mixers = [_mixer(layer, {**base, **every}, where, f"layers[{i}]") for i, layer in enumerate(pattern)]
    total = len(mixers) if depth is None else depth
    if isinstance(total, bool) or not isinstance(total, int) or not 0 < total <= 1000 or not mixers:
        raise ConfigError(f"{where}: depth={total!r} must be a whole number from 1, of a pattern of layers")
    if ffw_width is None and like is None:
        raise _missing("ffw_width", where)
    return repeat(*mixers, ffw=like.layers[0].ffw if ffw_width is None and like else Mlp(ffw_width or 0), total=total)


def _missing(name: str, where: str) -> ConfigError:
    return ConfigError(f"{where}: {name} is missing; `like` takes what is left out from a member")


def _is_required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _mixer(values: Any, every: Mapping[str, Any], where: str, name: str) -> Mixer:
    """The mixer that one table of `layers` describes, with the numbers of `every` layer that it leaves out."""
    if not isinstance(values, Mapping) or values.get("kind") not in ("global", "sliding", "recurrent"):
        raise ConfigError(f"{where}: {name}: a layer is a table whose kind is one of global, sliding, recurrent")
    rest = {key: value for key, value in values.items() if key != "kind"}
    if values["kind"] == "recurrent":
        if missing := [f.name for f in fields(Recurrent) if _is_required(f) and f.name not in rest]:
            raise ConfigError(f"{where}: {name}: {missing[0]} is missing")
        return _typed(Recurrent, rest, f"{where}: {name}", "")
    if values["kind"] == "sliding" and "window" not in rest:
        raise ConfigError(f"{where}: {name}: window is missing")
    if values["kind"] == "global" and "window" in rest:
        raise ConfigError(f"{where}: {name}: there is no window in a global layer; a sliding one has it")
    if "head_dim" in rest:
        rest.setdefault("scale", rest["head_dim"] ** -0.5 if isinstance(rest["head_dim"], int) else 1.0)
    numbers = {**every, **rest}
    if missing := [f.name for f in fields(Attention) if _is_required(f) and f.name not in numbers]:
        raise _missing(missing[0], where)
    return _typed(Attention, numbers, f"{where}: {name}", "")
