"""Members side by side: every quantity, what differs, and what the difference costs.

The cost of a difference in shape is found by walking from one member to the other, one field at a time, and counting
after each step; so the costs add up to exactly what separates the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemkit.errors import ConfigError
from gemkit.family import Attention, DecoderConfig, Layer, Member, Modality, Rope
from gemkit.inspect import Subject, cost, units
from gemkit.inspect.explain import bfloat16, confusions, explanation


@dataclass(frozen=True)
class Row:
    """One quantity of several members."""

    key: str
    group: str  # a heading: Release, Shape, Details, Size, Memory, Arithmetic, Images
    label: str
    values: tuple[str, ...]  # as printed, one a member; "-" where a member has no such thing
    raw: tuple[Any, ...]  # the same as plain data
    costs: tuple[str, ...]  # of each member after the first, against the first; empty where nothing is to say
    explanation: str
    confusions: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Delta:
    """Difference that one step from a member towards another adds."""

    parameters: int
    cache: int  # bytes a token


def compare(subjects: Sequence[Subject]) -> list[Row]:
    """Every quantity of the members, in the order of printing.

    Raises:
        ConfigError: if there are fewer than two.
    """
    if len(subjects) < 2:
        raise ConfigError(f"{len(subjects)} model cannot be compared; name at least two")
    walks = [walk(subjects[0], other) for other in subjects[1:]]
    rows = []
    for quantity in _QUANTITIES:
        raw = tuple(quantity.of(subject) for subject in subjects)
        if all(value is None for value in raw):
            continue
        values = tuple("-" if value is None else quantity.show(value) for value in raw)
        rows.append(
            Row(
                key=quantity.key,
                group=quantity.group,
                label=quantity.label,
                values=values,
                raw=raw,
                costs=tuple(_cost(quantity, raw[0], value, steps) for value, steps in zip(raw[1:], walks, strict=True)),
                explanation=explanation(quantity.key),
                confusions=_confusions(quantity.key, subjects),
            )
        )
    crossing = _crossing(subjects)
    after = next(i for i, row in enumerate(rows) if row.key == "flops_empty")
    return rows[:after] + crossing + rows[after:]


def summary(subjects: Sequence[Subject]) -> list[str]:
    """The answer before the table: a sentence on each member, against the first."""
    first, *others = subjects
    said = [f"{first.label}: {_size(first)}"]
    for other in others:
        if other.label == first.label:
            said.append(f"{other.label}: the same model")
            continue
        if other.decoder == first.decoder and other.vision == first.vision:
            said.append(f"{other.label}: the same architecture, with other weights")
            continue
        larger = units.factor(_total(other) / _total(first))
        cache = units.factor(_cache(other.decoder) / _cache(first.decoder))
        said.append(f"{other.label}: {_size(other)}; {larger} x the parameters, {cache} x the cache")
    return said


def _size(subject: Subject) -> str:
    weights = units.memory(cost.weight_bytes(subject.decoder, subject.vision))
    cache = units.kib(_cache(subject.decoder))
    return f"{units.short(_total(subject))} parameters, {weights} in bfloat16, {cache} of cache a token"


def _total(subject: Subject) -> int:
    return cost.count(subject.decoder, subject.vision).total


# the rows that a walk can pay for after the layers themselves, in walking order: the part that each one changes (None
# is the decoder itself), and its field
_STEPS = (
    ("width", None, "width"),
    ("ffw_width", "ffw", "width"),
    ("head_dim", "attention", "head_dim"),
    ("heads", "attention", "heads"),
    ("kv_heads", "attention", "kv_heads"),
    ("vocabulary", None, "vocab_size"),
    ("norms", None, "post_norms"),
    ("qk_norm", "attention", "qk_norm"),
    ("biases", None, "biases"),
)


def walk(a: Subject, b: Subject) -> dict[str, Delta | None]:
    """Contribution of each difference in shape on the way from `a` to `b`, by the key of its row; the sums are exact.

    The first step gives `a` the layers of `b`, with the numbers of heads and feed-forwards that `a` has. A step that no
    decoder can take alone (8 heads on 16 key/value heads) is None, and taken with the next.
    """
    steps: dict[str, Delta | None] = {}
    here, pending = a.decoder, []
    for key, *step in (("layers",), *_STEPS):
        pending.append(step)
        try:
            there = _stepped(here, a.decoder, b.decoder, pending)
        except ConfigError:
            steps[key] = None
            continue
        if there != here:
            steps[key] = Delta(_parameters(there) - _parameters(here), _cache(there) - _cache(here))
            here = there
        pending = []
    tower = cost.count(b.decoder, b.vision).vision - cost.count(a.decoder, a.vision).vision
    if tower:
        steps["vision"] = Delta(tower, 0)
    return steps


def _stepped(here: DecoderConfig, a: DecoderConfig, b: DecoderConfig, steps: Sequence[Sequence[Any]]) -> DecoderConfig:
    """The decoder after these steps at once."""
    fields: dict[str | None, list[str]] = {}
    for step in steps:
        if step:
            fields.setdefault(step[0], []).append(step[1])
        else:
            here = replace(here, layers=tuple(_as_of(a, i, layer) for i, layer in enumerate(b.layers)))

    def stepped(layer: Layer, target: Layer) -> Layer:
        mixer, ffw = layer.mixer, replace(layer.ffw, **_fields(target.ffw, fields.get("ffw", [])))
        if isinstance(mixer, Attention):
            mixer = replace(mixer, **_fields(target.mixer, fields.get("attention", [])))
        return Layer(mixer, ffw)

    layers = tuple(stepped(layer, target) for layer, target in zip(here.layers, b.layers, strict=True))
    return replace(here, layers=layers, **_fields(b, fields.get(None, [])))


def _as_of(a: DecoderConfig, i: int, layer: Layer) -> Layer:
    """A layer of another decoder, with the numbers that the like of it have in `a`."""
    mixer = layer.mixer
    if isinstance(mixer, Attention) and a.attention:
        like = next((other for other in a.attention if other.kind == mixer.kind), a.attention[0])
        mixer = replace(mixer, **_fields(like, [name for _, part, name in _STEPS if part == "attention"]))
    return Layer(mixer, a.layers[min(i, len(a.layers) - 1)].ffw)


def _fields(part: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(part, name) for name in names}


def _parameters(decoder: DecoderConfig) -> int:
    return cost.count(decoder).total


def _cache(decoder: DecoderConfig) -> int:
    return cost.cache_bytes_per_token(decoder).total


def _confusions(key: str, subjects: Sequence[Subject]) -> tuple[str, ...]:
    """Common mistakes, each with the name of the model that it is about where it is not all of them."""
    about: dict[str, list[str]] = {}
    for subject in subjects:
        for note in confusions(key, subject.decoder, subject.vision):
            about.setdefault(note, []).append(subject.label)
    return tuple(
        note if len(labels) == len(subjects) else f"{', '.join(labels)}: {note}" for note, labels in about.items()
    )


@dataclass(frozen=True)
class _Quantity:
    key: str
    group: str
    label: str
    of: Callable[[Subject], Any]  # None where the member has no such thing
    show: Callable[[Any], str]
    ratio: bool = False  # a cost itself: what differs is told as a factor


def _cost(quantity: _Quantity, first: Any, other: Any, steps: dict[str, Delta | None]) -> str:
    if first == other:
        return ""
    if quantity.ratio:
        if not (first and other):
            return ""
        factor = other / first
        return f"x {units.factor(factor)}" if abs(factor - 1) > 0.05 else f"{100 * (factor - 1):+.2g} %"
    delta = steps.get(quantity.key)
    if delta is None:
        return "with the next row" if quantity.key in steps else ""
    parts = [
        *([f"{delta.parameters:+,}" if abs(delta.parameters) < 10_000 else _signed(delta.parameters, units.short)]
          if delta.parameters else []),
        *([f"{_signed(delta.cache, units.kib)}/token"] if delta.cache else []),
    ]  # fmt: skip
    return ", ".join(parts)


def _signed(n: int, show: Callable[[int], str]) -> str:
    return ("+" if n > 0 else "-") + show(abs(n))


def _crossing(subjects: Sequence[Subject]) -> list[Row]:
    """From which context a member needs less memory than the first, or more; no row if that never changes."""
    first = subjects[0]
    raw: list[Any] = [None]
    values = ["-"]
    for other in subjects[1:]:
        ahead = cost.weight_bytes(other.decoder, other.vision) - cost.weight_bytes(first.decoder, first.vision)
        together = cost.crossings(first.decoder, other.decoder, ahead)
        states = cost.crossings(first.decoder, other.decoder)
        raw.append({"with_weights": together, "state_alone": states} if together or states else None)
        values.append(_say_crossing(first, other, ahead, together, states))
    if not any(raw):
        return []
    text = explanation("crossing")
    costs = tuple("" for _ in subjects[1:])
    return [Row("crossing", "Memory", "needs less memory", tuple(values), tuple(raw), costs, text, ())]


def _say_crossing(first: Subject, other: Subject, ahead: int, together: list[int], states: list[int]) -> str:
    def less(head_start: int, crossings: list[int]) -> str:
        at = (crossings or [1])[-1]
        needs = cost.state_bytes(other.decoder, at).total + head_start
        smaller = needs < cost.state_bytes(first.decoder, at).total
        if not crossings:
            return "always" if smaller else "never"
        return f"{'from' if smaller else 'below'} {units.exact(at)}"

    if not (together or states):
        return "-"
    return f"{less(ahead, together)} (state alone: {less(0, states)})"


# ---------------------------------------------------------------- how shapes are said


def pattern(layers: tuple[Layer, ...]) -> str:
    """`13 x (sliding, global)`: the shortest period, repeated, and what is left of it."""
    kinds = [layer.mixer.kind for layer in layers]
    period = next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
    times, rest = divmod(len(kinds), period)
    if period == 1:
        return f"{times} {kinds[0]}"
    return f"{times} x ({_runs(kinds[:period])})" + (f" + {_runs(kinds[:rest])}" if rest else "")


def _runs(kinds: list[str]) -> str:
    runs: list[list[Any]] = []
    for kind in kinds:
        if runs and runs[-1][1] == kind:
            runs[-1][0] += 1
        else:
            runs.append([1, kind])
    return ", ".join(kind if n == 1 else f"{n} {kind}" for n, kind in runs)


def shared(values: Iterable[Any]) -> Any:
    """The one value of all layers; a tuple of the distinct ones where they differ; None of no layers."""
    distinct = tuple(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct or None


def each(show: Callable[[Any], str]) -> Callable[[Any], str]:
    """Shows what `shared` gives: one value, or each of several."""
    return lambda value: ", ".join(dict.fromkeys(map(show, value if isinstance(value, tuple) else (value,))))


def heads(decoder: DecoderConfig) -> str:
    """`8 of 256`: query heads and their size."""
    return _of_attention(decoder, lambda mixer: f"{mixer.heads} of {mixer.head_dim}")


def ffw_widths(decoder: DecoderConfig) -> str:
    """`9,216`, of one branch of the feed-forward."""
    return each(units.exact)(_ffw_width(decoder))


def sharing(decoder: DecoderConfig) -> str:
    """`4 (GQA, 2 heads each)`: key/value heads and who shares them."""

    def of(mixer: Attention) -> str:
        if mixer.kv_heads == mixer.heads:
            return f"{mixer.kv_heads} (MHA)"
        kind = "MQA" if mixer.kv_heads == 1 else "GQA"
        return f"{mixer.kv_heads} ({kind}, {mixer.heads // mixer.kv_heads} heads each)"

    return _of_attention(decoder, of)


def head_size(decoder: DecoderConfig) -> str:
    """`256 (x 16 = 4,096)`, of width 3,072: the heads together need not be as wide as the residual."""

    def of(mixer: Attention) -> str:
        together = mixer.heads * mixer.head_dim
        return f"{mixer.head_dim} (x {mixer.heads} = {'width' if together == decoder.width else units.exact(together)})"

    return _of_attention(decoder, of)


def _of_attention(decoder: DecoderConfig, say: Callable[[Attention], str]) -> str:
    return ", ".join(dict.fromkeys(map(say, decoder.attention))) or "none"


def _ffw_width(decoder: DecoderConfig) -> Any:
    return shared(layer.ffw.width for layer in decoder.layers)


def ropes(decoder: DecoderConfig) -> str:
    """`base 10,000`, or each kind's own where they differ."""
    said = {mixer.kind: _rope(mixer.rope) for mixer in decoder.attention}
    if len(set(said.values())) <= 1:
        return next(iter(said.values()), "none")
    return "; ".join(f"{kind} {text}" for kind, text in said.items())


def _rope(rope: Rope) -> str:
    text = f"base {rope.base:,.0f}"
    if rope.factor != 1:
        text += f", factor {rope.factor:g}" + (" (YaRN)" if rope.yarn is not None else "")
    if rope.dynamic is not None:
        text += f", dynamic by {rope.dynamic:g} beyond the context"
    if rope.fraction != 1:
        text += f", {rope.fraction:.0%} of a head"
    return text


def scale(query_scale: float) -> str:
    """`1/16`, `1/12.9615`."""
    return f"1/{round(1 / query_scale, 4):g}"


def _embed_scale(decoder: DecoderConfig) -> str:
    exact = decoder.width**0.5
    return f"{bfloat16(exact):g} (bf16)" if decoder.embed_scale_dtype == "bfloat16" else f"{exact:.6g}"


def _optional(x: Any) -> Any:
    return x or None


def _yes(x: bool) -> str:
    return "yes" if x else "no"


def _windows(subject: Subject) -> list[int] | None:
    return list(subject.decoder.windows) or None


def _of_layers(field: str) -> Callable[[Subject], Any]:
    return lambda s: shared(getattr(mixer, field) for mixer in s.decoder.attention)


def _of_vision(measure: Callable[[DecoderConfig, Modality], Any]) -> Callable[[Subject], Any]:
    return lambda s: measure(s.decoder, s.vision) if s.vision else None


def _weights(dtype: cost.Dtype) -> _Quantity:
    return _Quantity(
        dtype,
        "Memory",
        f"weights, {dtype}",
        lambda s: cost.weight_bytes(s.decoder, s.vision, dtype),
        units.memory,
        True,
    )


def _of_member(read: Callable[[Member], Any]) -> Callable[[Subject], Any]:
    return lambda s: read(s.member) if s.member else None


_QUANTITIES = (
    _Quantity("family", "Release", "family", _of_member(lambda m: m.family), str),
    _Quantity("tuning", "Release", "tuning", _of_member(lambda m: m.tuning), str),
    _Quantity("prompts", "Release", "answers to", _of_member(lambda m: m.prompts), ", ".join),
    _Quantity("pieces", "Release", "pieces named for", _of_member(lambda m: m.vocabulary), str),
    _Quantity("released", "Release", "released", _of_member(lambda m: m.released), str),
    _Quantity("width", "Shape", "width", lambda s: s.decoder.width, units.exact),
    _Quantity("layers", "Shape", "layers", lambda s: pattern(s.decoder.layers), str),
    _Quantity("window", "Shape", "window", _windows, lambda ws: ", ".join(map(units.exact, ws))),
    _Quantity("heads", "Shape", "heads", _of_layers("heads"), each(str)),
    _Quantity("kv_heads", "Shape", "key/value heads", lambda s: sharing(s.decoder), str),
    _Quantity("head_dim", "Shape", "head size", lambda s: head_size(s.decoder), str),
    _Quantity("ffw_width", "Shape", "MLP width", lambda s: _ffw_width(s.decoder), each(units.exact)),
    _Quantity("vocabulary", "Shape", "vocabulary", lambda s: s.decoder.vocab_size, units.exact),
    _Quantity("context", "Shape", "context", lambda s: s.decoder.max_context, units.exact),
    _Quantity("norms", "Details", "norms a layer", lambda s: 4 if s.decoder.post_norms else 2, str),
    _Quantity("qk_norm", "Details", "query/key norm", _of_layers("qk_norm"), each(_yes)),
    _Quantity("attention_softcap", "Details", "attention cap", _of_layers("softcap"), each("{:g}".format)),
    _Quantity("final_softcap", "Details", "final cap", lambda s: s.decoder.final_softcap, "{:g}".format),
    _Quantity("query_scale", "Details", "query scale", _of_layers("scale"), each(scale)),
    _Quantity("rope", "Details", "rope", lambda s: ropes(s.decoder), str),
    _Quantity("embed_scale", "Details", "embedding scale", lambda s: _embed_scale(s.decoder), str),
    _Quantity("biases", "Details", "biases", lambda s: s.decoder.biases, _yes),
    _Quantity("parameters", "Size", "parameters", lambda s: cost.count(s.decoder, s.vision).total, units.exact, True),
    _Quantity("embedding", "Size", "embedding", lambda s: cost.count(s.decoder).embedding, units.exact, True),
    _Quantity(
        "non_embedding", "Size", "non-embedding", lambda s: cost.count(s.decoder).non_embedding, units.exact, True
    ),
    _Quantity(
        "vision", "Size", "image tower", lambda s: _optional(cost.count(s.decoder, s.vision).vision), units.exact
    ),
    _weights("float32"),
    _weights("bfloat16"),
    _weights("int8"),
    _weights("int4"),
    _Quantity("cache_per_token", "Memory", "cache a token", lambda s: _cache(s.decoder), units.kib, True),
    _Quantity(
        "state_8k",
        "Memory",
        "cache, 8,192 tokens",
        lambda s: cost.state_bytes(s.decoder, 8192).total,
        units.memory,
        True,
    ),
    _Quantity(
        "state_full",
        "Memory",
        "cache, full context",
        lambda s: cost.state_bytes(s.decoder, s.decoder.max_context).total,
        units.memory,
        True,
    ),
    _Quantity(
        "recurrent_state",
        "Memory",
        "recurrent state",
        lambda s: _optional(cost.state_bytes(s.decoder, 0).recurrent),
        units.memory,
    ),
    _Quantity(
        "flops_empty", "Arithmetic", "FLOP a token", lambda s: cost.decode_flops(s.decoder, 0), units.flops, True
    ),
    _Quantity(
        "flops_full",
        "Arithmetic",
        "FLOP, full context",
        lambda s: cost.decode_flops(s.decoder, s.decoder.max_context),
        units.flops,
        True,
    ),
    _Quantity(
        "bytes_full",
        "Arithmetic",
        "bytes, full context",
        lambda s: cost.decode_bytes(s.decoder, s.decoder.max_context),
        units.memory,
        True,
    ),
    _Quantity("image_size", "Images", "pixels on a side", _of_vision(lambda _, v: v.tower.image_size), units.exact),
    _Quantity("image_tokens", "Images", "tokens an image", _of_vision(lambda _, v: v.tokens), units.exact, True),
    _Quantity(
        "image_share",
        "Images",
        "of the context",
        _of_vision(lambda d, v: v.tokens / d.max_context),
        "{:.1%}".format,
    ),
    _Quantity("image_flops", "Images", "FLOP an image", _of_vision(cost.image_flops), units.flops, True),
    _Quantity(
        "image_state",
        "Images",
        "cache an image",
        _of_vision(lambda d, v: cost.state_bytes(d, v.tokens).total),
        units.memory,
        True,
    ),
)
