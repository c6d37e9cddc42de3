"""A model from nothing: the architecture of a table `[model.new]` of an experiment, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from gemkit.errors import ConfigError, nearest
from gemkit.family import Attention, DecoderConfig, Layer, Mixer, Mlp, Modality, Recurrent, Vision, get, repeat
from gemkit.text import Tokenizer
from gemkit.train.tables import convert


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
    fitted = {name: convert(value, hints[name], where, name) for name, value in given.items() if name in top}
    found = {**base, "vocab_size": vocab_size, **fitted, "layers": layers}
    if missing := [f.name for f in fields(DecoderConfig) if f.name not in found and _is_required(f)]:
        raise _missing(missing[0], where)
    decoder = DecoderConfig(**found)
    if tower is None:
        return decoder, None
    seen = None if member is None else member.vision
    vision = convert({**(seen.tower.__dict__ if seen else {}), **tower}, Vision, where, "vision")
    return decoder, Modality(vision, placeholder=vocab_size - 1)


# fields of `family.Attention` that `[model.new]` sets for every attention layer
_EVERY_LAYER = ("heads", "kv_heads", "head_dim", "scale", "softcap", "qk_norm")


def _new_layers(given: dict[str, Any], like: DecoderConfig | None, where: str) -> tuple[Layer, ...]:
    """The layers that a table asks for; what it says of them is taken out of `given`."""
    depth, pattern = given.pop("depth", None), given.pop("layers", None)
    hints = get_type_hints(Attention)
    every = {n: convert(given.pop(n), hints[n], where, n) for n in _EVERY_LAYER if n in given}
    if "head_dim" in every:
        every.setdefault("scale", max(every["head_dim"], 1) ** -0.5)
    ffw_width = convert(given.pop("ffw_width"), int, where, "ffw_width") if "ffw_width" in given else None
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
        return convert(rest, Recurrent, f"{where}: {name}")
    if values["kind"] == "sliding" and "window" not in rest:
        raise ConfigError(f"{where}: {name}: window is missing")
    if values["kind"] == "global" and "window" in rest:
        raise ConfigError(f"{where}: {name}: there is no window in a global layer; a sliding one has it")
    if "head_dim" in rest:
        rest.setdefault("scale", rest["head_dim"] ** -0.5 if isinstance(rest["head_dim"], int) else 1.0)
    numbers = {**every, **rest}
    if missing := [f.name for f in fields(Attention) if _is_required(f) and f.name not in numbers]:
        raise _missing(missing[0], where)
    return convert(numbers, Attention, f"{where}: {name}")


def new_tokenizer(path: str, *, places: bool) -> Tokenizer:
    """The tokenizer of a new model: a tokenizer.model, a tokenizer.json, or a folder with the first.

    Args:
        places: with the pieces for images and places, of a model that sees images.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.model" if file.is_dir() else file
    tokenizer = Tokenizer.from_json(file) if file.suffix == ".json" else Tokenizer.from_model(file)
    return tokenizer.with_places() if places else tokenizer
