"""From a Program to the steps that the native executor runs (`csrc/executor.h`). No torch.

What is fused here:

- Projections of the same input (q, k and v; gate and up; the two branches of a recurrent block) are one step over one
  quantization of it, and their results lie side by side.
- Splitting and merging heads moves nothing. A norm, a rotation and a sum write where they read when nobody reads that
  again.
- The executor runs neighbouring steps over rows as one: a sum, the norm that follows and the quantization for the next
  projection are one pass over a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gemkit.errors import ModelError
from gemkit.executors.native.buffers import RENAMES, Allocation, Buffer, Slice
from gemkit.program.ir import Memory, Node, Program, Value, Weight

# As `csrc/executor.h` numbers them.
OPS = (
    "embed",
    "rope_table",
    "rms_norm",
    "quantize",
    "linear",
    "rope",
    "remember",
    "attend",
    "geglu",
    "gelu",
    "add",
    "mul",
    "bias",
    "softcap",
    "take_rows",
    "causal_conv1d",
    "block_linear",
    "rg_lru",
    "put_rows",
    "scale",
    "layer_norm",
    "add_positions",
    "attend_within",
    "gain",
    "replace_rows",
    "replace_columns",
)
DENSE = ("float32", "bfloat16")  # kinds of weights whose products are of floats
STEP_WEIGHTS = 8


@dataclass(frozen=True)
class Frequencies:
    """Radians a position, of each pair of channels: what a rope table is made from (`ops.rope_frequencies`)."""

    rotated: int
    base: float
    factor: float
    ramp: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sketch:
    """The coarse copy of an output table, by which its rows are screened (`executors.native.screening`)."""

    table: Weight


@dataclass(frozen=True)
class Signs:
    """The signs of the rotation of a sketch."""

    columns: int


@dataclass(frozen=True)
class Ids:
    """Token ids, ascending, as floats."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ScaledRows:
    """A few rows of a table of embeddings, scaled as these are."""

    rows: Weight
    scale: float


@dataclass(frozen=True)
class Dora:
    """A vector of DoRA, with g = m / |W + factor B A| and t its strength: "base" is `1 + t (g - 1)`, which the product
    is multiplied by, "low" is `t g`, which the low-rank change is, and "bias" is `(1 - base) bias`, which is added."""

    part: str
    magnitude: Weight
    changed: tuple[Weight, Weight, Weight]
    factor: float
    strength: float
    of_table: bool
    bias: Weight | None = None

    @property
    def sources(self) -> tuple[Weight, ...]:
        """The weights that it is made from."""
        return self.magnitude, *self.changed, *([self.bias] if self.bias else [])


# handed to the executor as an array of floats, or of bytes it knows
Plain = Weight | Frequencies | Sketch | Signs | Ids | ScaledRows | Dora

# An output table of fewer rows costs less than screening it.
SCREENED_ROWS = 16_384


@dataclass(frozen=True)
class Step:
    """One step of the executor, and the nodes that it stands for."""

    op: str
    reads: tuple[Slice, ...] = ()
    writes: Slice | None = None
    weights: tuple[Weight, ...] = ()  # packed
    plain: tuple[Plain, ...] = ()
    numbers: tuple[int, ...] = ()
    scalars: tuple[float, ...] = ()
    nodes: tuple[Node, ...] = ()


@dataclass
class Lowered:
    """A program as the executor takes it."""

    steps: list[Step] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    beside: list[Plain] = field(default_factory=list)  # held in the packed file, and read by no step

    def __str__(self) -> str:
        return "\n".join(map(_line, self.steps))


def lower(program: Program) -> Lowered:
    """The steps of a traced decoder.

    Raises:
        ModelError: for an op that the executor does not have; names it.
    """
    return _Lowering(program).lowered()


class _Lowering:
    def __init__(self, program: Program):
        self.program = program
        self.steps: list[Step] = []
        self.places = Allocation(program)
        self.done: set[int] = set()  # results of linears that were computed with an earlier one
        self.sharing: dict[int, list[Node]] = {}  # the linears that read a value
        for node in program.nodes:
            if node.op == "linear":
                self.sharing.setdefault(self.places.root(node.operands["x_TI"]), []).append(node)

    def lowered(self) -> Lowered:
        for i, node in enumerate(self.program.nodes):
            if node.op not in RENAMES:
                lower_one = getattr(self, f"_{node.op}", None)
                if lower_one is None:
                    raise ModelError(f"{node.op} is no op of the native executor; --executor torch runs it")
                lower_one(i, node)
            self.places.release(i)
        return Lowered(self.steps, self.places.buffers)

    def _step(self, op: str, *reads: Slice, to: Slice | None, nodes: Sequence[Node], **given) -> None:
        self.steps.append(Step(op, tuple(reads), to, nodes=tuple(nodes), **given))

    # ── the ops ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _embed(self, i: int, node: Node) -> None:
        scale = node.operands["scale"]
        if node.operands["scale_dtype"] == "bfloat16":
            scale = _rounded_to_bfloat16(scale)
        to = self.places.place(node.result)
        self._step("embed", to=to, nodes=[node], weights=(node.operands["table_VD"],), scalars=(scale,))

    def _rope_table(self, i: int, node: Node) -> None:
        cos, sin = node.results
        half = int(cos.shape[1])
        buffer = self.places.new(2 * half, "T")
        self.places.put(cos, Slice(buffer, 0, half))
        self.places.put(sin, Slice(buffer, half, half))
        rates = Frequencies(*(node.operands[name] for name in ("rotated", "base", "factor", "ramp")))
        self._step("rope_table", to=Slice(buffer, 0, 2 * half), nodes=[node], plain=(rates,))

    def _rms_norm(self, i: int, node: Node) -> None:
        x, weight = node.operands["x"], node.operands["weight_D"]
        at = self.places.at(x)
        to = self.places.over(i, x, node.result)
        heads = at.width // weight.shape[0]
        self._step(
            "rms_norm", at, to=to, nodes=[node], plain=(weight,), numbers=(heads,), scalars=(node.operands["eps"],)
        )

    def _linear(self, i: int, node: Node) -> None:
        if node.result.number in self.done:
            return
        x = node.operands["x_TI"]
        if len(x.shape) != 2:
            raise ModelError(f"linear of {x.shape}: the native executor multiplies rows; --executor torch runs this")
        together = [n for n in self.sharing[self.places.root(x)] if n.result.number not in self.done]
        dense = [n for n in together if n.operands["weight_OI"].kind in DENSE]
        if dense and len(dense) < len(together):  # products of floats and of integers do not mix
            together = dense if node in dense else [n for n in together if n not in dense]
        together = together[:STEP_WEIGHTS]
        weights = tuple(n.operands["weight_OI"] for n in together)
        source = self.places.at(x)
        if is_quantized := weights[0].kind not in DENSE:
            source = self._quantize(x, node)
        elif source.width < self.places.buffers[source.buffer].width:  # a linear reads whole rows
            whole = Slice(self.places.new(source.width, str(x.shape[0])), 0, source.width)
            self._step("scale", source, to=whole, nodes=[], scalars=(1.0,))
            source = whole
        width = sum(weight.shape[0] for weight in weights)
        logits = any(self.places.is_result(n.result) for n in together)
        buffer = self.places.new(width, str(node.result.shape[0]), "logits" if logits else "floats")
        offset = 0
        for other in together:
            rows = other.operands["weight_OI"].shape[0]
            self.places.put(other.result, Slice(buffer, offset, rows))
            self.done.add(other.result.number)
            offset += rows
        to = Slice(buffer, 0, width)
        given: dict[str, Any] = {}
        if logits and weights[0].shape[0] >= SCREENED_ROWS:
            given["plain"] = Sketch(weights[0]), Signs(weights[0].shape[1])
            given["scalars"] = (self._cap(node),)
        reads = (source, self.places.at(x)) if given else (source,)
        self._step("linear", *reads, to=to, nodes=together, weights=weights, numbers=(int(is_quantized),), **given)
        for other in together:
            if (bias := other.operands["bias_O"]) is not None:
                at = self.places.at(other.result)
                self._step("bias", at, to=at, nodes=[], plain=(bias,))

    def _cap(self, head: Node) -> float:
        """What the logits are capped at after the head; 0: not at all."""
        caps = (n.operands["cap"] for n in self.program.nodes if n.op == "softcap" and n.operands["x"] == head.result)
        return next(caps, 0.0)

    def _quantize(self, x: Value, node: Node) -> Slice:
        to, is_new = self.places.quantized(x, str(node.result.shape[0]))
        if is_new:
            self._step("quantize", self.places.at(x), to=to, nodes=[])
        return to

    def _dora(self, i: int, node: Node) -> None:
        given = node.operands
        if given["base_TO"] is not None:
            raise ModelError(f"{node.scope} drops inputs, which is for training; --executor torch runs this")
        low, base = self.places.at(given["low_TO"]), self.places.at(given["y_TO"])
        to = self.places.over(i, given["y_TO"], node.result)
        numbers = given["factor"], given["strength"], given["of_table"]
        vectors = {part: Dora(part, given["magnitude_O"], given["changed"], *numbers) for part in ("base", "low")}
        self._step("gain", base, to=to, nodes=[node], plain=(vectors["base"],))
        self._step("gain", low, to=low, nodes=[], plain=(vectors["low"],))
        self._step("add", to, low, to=to, nodes=[])
        if (bias := given["bias_O"]) is not None:
            self._step("bias", to, to=to, nodes=[], plain=(replace(vectors["base"], part="bias", bias=bias),))

    def _replace_rows(self, i: int, node: Node) -> None:
        given, scale = node.operands, node.operands["scale"]
        if given["scale_dtype"] == "bfloat16":
            scale = _rounded_to_bfloat16(scale)
        ids = given["ids"]
        at = self.places.at(given["x_TD"])
        to = self.places.over(i, given["x_TD"], node.result)
        plain, scalars = (Ids(ids), ScaledRows(given["rows_ND"], scale)), (given["strength"],)
        self._step("replace_rows", at, to=to, nodes=[node], plain=plain, numbers=(len(ids),), scalars=scalars)

    def _replace_columns(self, i: int, node: Node) -> None:
        given, ids = node.operands, node.operands["ids"]
        at, new = self.places.at(given["y_TV"]), self.places.at(given["new_TN"])
        to = self.places.over(i, given["y_TV"], node.result)
        numbers, scalars = (len(ids),), (given["strength"],)
        self._step("replace_columns", at, new, to=to, nodes=[node], plain=(Ids(ids),), numbers=numbers, scalars=scalars)

    def _scale(self, i: int, node: Node) -> None:
        """To a buffer of its own: what is scaled is multiplied next, and a linear reads whole rows."""
        to = self.places.place(node.result)
        self._step("scale", self.places.at(node.operands["x"]), to=to, nodes=[node], scalars=(node.operands["factor"],))

    def _rope(self, i: int, node: Node) -> None:
        x, (cos, sin) = node.operands["x_TNH"], node.operands["table"]
        at = self.places.at(x)
        to = self.places.over(i, x, node.result)
        heads = int(x.shape[1])
        self._step("rope", at, self.places.at(cos), self.places.at(sin), to=to, nodes=[node], numbers=(heads,))

    def _attention(self, i: int, node: Node) -> None:
        q, k, v = (self.places.at(node.operands[name]) for name in ("q_TNH", "k_TKH", "v_TKH"))
        if (length := node.operands["batch"].length) is not None:
            self._attend_within(node, q, k, v, length)
            return
        layer = _layer(node)
        self._step("remember", k, v, to=None, nodes=[], numbers=(layer,))
        scalars = (node.operands["scale"], node.operands["softcap"] or 0.0)
        heads = int(node.operands["q_TNH"].shape[1])
        self._step(
            "attend", q, k, v, to=self.places.place(node.result), nodes=[node], numbers=(layer, heads), scalars=scalars
        )

    def _attend_within(self, node: Node, q: Slice, k: Slice, v: Slice, length: int) -> None:
        """Attention of the patches of an image to one another, of which nothing is remembered."""
        to_all = node.operands["window"] == (None, None) and not node.operands["softcap"]
        if not (to_all and q.width == k.width == v.width):
            raise ModelError(
                f"{node.scope}: attention within an image has as many key/value heads as query heads and neither a "
                "window nor a cap in the native executor; --executor torch runs this"
            )
        numbers, scalars = (length, int(node.operands["q_TNH"].shape[1])), (node.operands["scale"],)
        to = self.places.place(node.result)
        self._step("attend_within", q, k, v, to=to, nodes=[node], numbers=numbers, scalars=scalars)

    def _patch_embed(self, i: int, node: Node) -> None:
        """A product with the pixels of each patch, which the caller hands over laid out row by row."""
        kernel: Weight = node.operands["weight_WCpp"]
        weight = replace(kernel, shape=(kernel.shape[0], math.prod(kernel.shape[1:])))
        width = weight.shape[1]
        patches = Slice(self.places.new(width, "T"), 0, width)
        self._step("put_rows", patches, to=patches, nodes=[])
        to = self.places.place(node.result)
        self._step("linear", patches, to=to, nodes=[node], weights=(weight,), numbers=(0,))
        self._step("bias", to, to=to, nodes=[], plain=(node.operands["bias_W"],))

    def _add_positions(self, i: int, node: Node) -> None:
        table: Weight = node.operands["table_PW"]
        at = self.places.at(node.operands["x_TW"])
        to = self.places.over(i, node.operands["x_TW"], node.result)
        self._step("add_positions", at, to=to, nodes=[node], plain=(table,), numbers=(table.shape[0],))

    def _layer_norm(self, i: int, node: Node) -> None:
        x, plain = node.operands["x"], (node.operands["weight_D"], node.operands["bias_D"])
        at = self.places.at(x)
        to = self.places.over(i, x, node.result)
        self._step("layer_norm", at, to=to, nodes=[node], plain=plain, scalars=(node.operands["eps"],))

    def _geglu(self, i: int, node: Node) -> None:
        gate, up = self.places.at(node.operands["gate_TF"]), self.places.at(node.operands["up_TF"])
        self._step("geglu", gate, up, to=self.places.place(node.result), nodes=[node])

    def _gelu(self, i: int, node: Node) -> None:
        at = self.places.at(node.operands["x"])
        self._step("gelu", at, to=self.places.over(i, node.operands["x"], node.result), nodes=[node])

    def _add(self, i: int, node: Node) -> None:
        a, b = node.operands["a"], node.operands["b"]
        first, second = self.places.at(a), self.places.at(b)
        self._step(node.op, first, second, to=self.places.over(i, a, node.result), nodes=[node])

    _mul = _add

    def _softcap(self, i: int, node: Node) -> None:
        x = node.operands["x"]
        at = self.places.at(x)
        self._step("softcap", at, to=self.places.over(i, x, node.result), nodes=[node], scalars=(node.operands["cap"],))

    def _take_rows(self, i: int, node: Node) -> None:
        self._step("take_rows", self.places.at(node.operands["x_TD"]), to=self.places.place(node.result), nodes=[node])

    def _put_rows(self, i: int, node: Node) -> None:
        x = node.operands["x_TD"]
        at = self.places.at(x)
        to = self.places.over(i, x, node.result)
        assert at == to, "image features take the place of embeddings that nobody else reads"
        self._step("put_rows", at, to=to, nodes=[node])

    def _causal_conv1d(self, i: int, node: Node) -> None:
        plain = (node.operands["weight_RC"], node.operands["bias_R"])
        at = self.places.at(node.operands["x_TR"])
        to = self.places.place(node.result)
        self._step("causal_conv1d", at, to=to, nodes=[node], plain=plain, numbers=(_layer(node),))

    def _block_linear(self, i: int, node: Node) -> None:
        weight = node.operands["weight_NIO"]
        plain, at = (weight, node.operands["bias_NO"]), self.places.at(node.operands["x_TR"])
        to = self.places.place(node.result)
        self._step("block_linear", at, to=to, nodes=[node], plain=plain, numbers=(weight.shape[0],))

    def _rg_lru(self, i: int, node: Node) -> None:
        reads = [self.places.at(node.operands[name]) for name in ("x_TR", "input_gate_TR", "recurrent_gate_TR")]
        plain = (node.operands["param_R"],)
        self._step(
            "rg_lru", *reads, to=self.places.place(node.result), nodes=[node], plain=plain, numbers=(_layer(node),)
        )


def _layer(node: Node) -> int:
    memory = node.memory
    assert isinstance(memory, Memory), f"{node.op} was traced without a memory"
    return memory.layer


def _rounded_to_bfloat16(x: float) -> float:
    bits = int(np.float32(x).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def _line(step: Step) -> str:
    names = [weight.name for weight in step.weights]
    names += [plain_name(plain) for plain in step.plain]
    to = "" if step.writes is None else f" -> {_shown(step.writes)}"
    return f"{step.op}({', '.join(map(_shown, step.reads))}){to} {' + '.join(names)}".rstrip()


def plain_name(plain: Plain) -> str:
    match plain:
        case Weight(name=name):
            return name
        case Frequencies(rotated, base, factor, ramp):
            mixed = "" if ramp is None else f", of pairs {ramp[0]:g} to {ramp[1]:g} on"
            return f"rope {base:g} / {factor:g} of {rotated}{mixed}"
        case Sketch(table=table):
            return f"sketch of {table.name}"
        case Signs():
            return "signs"
        case Ids(ids):
            return f"ids {', '.join(map(str, ids))}"
        case ScaledRows(rows, scale):
            return f"{scale:g} {rows.name}"
        case Dora(part, magnitude, _, factor, strength):
            return f"{part} of {magnitude.name}, {factor:g}, strength {strength:g}"


def _shown(at: Slice) -> str:
    return f"b{at.buffer}[{at.offset}:{at.offset + at.width}]"


def packed_weights(*lowered: Lowered) -> Iterator[Weight]:
    """Every weight that the executor multiplies or looks up, once."""
    return iter({w.name: w for program in lowered for step in program.steps for w in step.weights}.values())


def plain_weights(*lowered: Lowered) -> Iterator[Plain]:
    """Every array of floats of the packed file, once."""
    read = (p for program in lowered for step in program.steps for p in step.plain)
    return iter(dict.fromkeys([*read, *(p for program in lowered for p in program.beside)]))
