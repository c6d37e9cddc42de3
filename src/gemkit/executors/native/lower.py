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
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemkit.errors import ModelError
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
)
RENAMES = ("split_heads", "merge_heads", "in_dtype_of")  # move nothing: all floats of the executor are float32
DENSE = ("float32", "bfloat16")  # kinds of weights whose products are of floats
STEP_WEIGHTS = 8


@dataclass(frozen=True)
class Slice:
    """Columns of a buffer."""

    buffer: int
    offset: int
    width: int


@dataclass(frozen=True)
class Buffer:
    width: int
    rows: str  # "T" or "R"
    kind: str = "floats"  # or "quantized", or "logits": what the caller gets


@dataclass(frozen=True)
class Frequencies:
    """Radians a position, of each pair of channels: what a rope table is made from (`ops.rope_frequencies`)."""

    rotated: int
    base: float
    factor: float


@dataclass(frozen=True)
class Sketch:
    """The coarse copy of an output table, by which its rows are screened (`executors.native.screening`)."""

    table: Weight


@dataclass(frozen=True)
class Signs:
    """The signs of the rotation of a sketch."""

    columns: int


Plain = Weight | Frequencies | Sketch | Signs  # handed to the executor as an array of floats, or of bytes it knows

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
        self.out = Lowered()
        self.places: dict[int, Slice] = {}  # of values, by number
        self.roots: dict[int, int] = {}  # a value that only renames another -> that one
        self.quantized: dict[int, Slice] = {}
        self.done: set[int] = set()  # results of linears that were computed with an earlier one
        self.free: list[int] = []
        for node in program.nodes:
            if node.op in RENAMES:
                source = next(node.values())
                self.roots[node.result.number] = self._root(source.number)
        self.last: dict[int, int] = {}  # the last node that reads a value, or a name of it
        for i, node in enumerate(program.nodes):
            for value in node.values():
                self.last[self._root(value.number)] = i
        self.last[self._root(program.output.number)] = len(program.nodes)
        self.final = {program.output.number}  # values that are in the caller's own array of logits: also what is capped
        self.final |= {
            n.operands["x"].number for n in program.nodes if n.op == "softcap" and n.result == program.output
        }
        self.sharing: dict[int, list[Node]] = {}  # the linears that read a value
        for node in program.nodes:
            if node.op == "linear":
                self.sharing.setdefault(self._root(node.operands["x_TI"].number), []).append(node)

    def lowered(self) -> Lowered:
        for i, node in enumerate(self.program.nodes):
            lower_one = getattr(self, f"_{node.op}", None)
            if lower_one is None:
                raise ModelError(f"{node.op} is no op of the native executor; --executor torch runs it")
            lower_one(i, node)
            self._release(i)
        return self.out

    # ── values and where they are ───────────────────────────────────────────────────────────────────────────────────

    def _root(self, number: int) -> int:
        return self.roots.get(number, number)

    def _at(self, value: Value) -> Slice:
        return self.places[self._root(value.number)]

    def _new(self, width: int, rows: str, kind: str = "floats") -> int:
        """A buffer, a used one of the same form if there is one."""
        wanted = Buffer(width, rows, kind)
        for buffer in self.free:
            if self.out.buffers[buffer] == wanted:
                self.free.remove(buffer)
                return buffer
        self.out.buffers.append(wanted)
        return len(self.out.buffers) - 1

    def _place(self, value: Value) -> Slice:
        """Somewhere for a new value."""
        width = math.prod(size for size in value.shape if isinstance(size, int))
        logits = value.number in self.final
        buffer = self._new(width, str(value.shape[0]), "logits" if logits else "floats")
        self.places[value.number] = Slice(buffer, 0, width)
        return self.places[value.number]

    def _over(self, i: int, source: Value, result: Value) -> Slice:
        """Where a result that could take its source's place goes: there, if nobody reads that again."""
        at = self._at(source)
        logits = self.out.buffers[at.buffer].kind == "logits"
        if self.last.get(self._root(source.number)) == i and logits == (result.number in self.final):
            del self.places[self._root(source.number)]
            self.places[result.number] = at
            return at
        return self._place(result)

    def _release(self, i: int) -> None:
        """Give back the buffers in which nothing is left that a later node reads."""
        for places in (self.places, self.quantized):
            for number in [n for n in places if self.last.get(n, -1) <= i]:
                del places[number]
        used = {at.buffer for places in (self.places, self.quantized) for at in places.values()}
        kept = [b for b, buffer in enumerate(self.out.buffers) if b not in used and buffer.kind != "logits"]
        self.free = kept

    def _step(self, op: str, *reads: Slice, to: Slice | None, nodes: Sequence[Node], **given) -> None:
        self.out.steps.append(Step(op, tuple(reads), to, nodes=tuple(nodes), **given))

    # ── the ops ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _embed(self, i: int, node: Node) -> None:
        scale = node.operands["scale"]
        if node.operands["scale_dtype"] == "bfloat16":
            scale = _rounded_to_bfloat16(scale)
        to = self._place(node.result)
        self._step("embed", to=to, nodes=[node], weights=(node.operands["table_VD"],), scalars=(scale,))

    def _rope_table(self, i: int, node: Node) -> None:
        cos, sin = node.results
        half = int(cos.shape[1])
        buffer = self._new(2 * half, "T")
        self.places[cos.number], self.places[sin.number] = Slice(buffer, 0, half), Slice(buffer, half, half)
        rates = Frequencies(*(node.operands[name] for name in ("rotated", "base", "factor")))
        self._step("rope_table", to=Slice(buffer, 0, 2 * half), nodes=[node], plain=(rates,))

    def _rms_norm(self, i: int, node: Node) -> None:
        x, weight = node.operands["x"], node.operands["weight_D"]
        at = self._at(x)
        to = self._over(i, x, node.result)
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
        together = [n for n in self.sharing[self._root(x.number)] if n.result.number not in self.done]
        dense = [n for n in together if n.operands["weight_OI"].kind in DENSE]
        if dense and len(dense) < len(together):  # products of floats and of integers do not mix
            together = dense if node in dense else [n for n in together if n not in dense]
        together = together[:STEP_WEIGHTS]
        weights = tuple(n.operands["weight_OI"] for n in together)
        source = self._at(x)
        if is_quantized := weights[0].kind not in DENSE:
            source = self._quantize(x, node)
        width = sum(weight.shape[0] for weight in weights)
        logits = any(n.result.number in self.final for n in together)
        buffer = self._new(width, str(node.result.shape[0]), "logits" if logits else "floats")
        offset = 0
        for other in together:
            rows = other.operands["weight_OI"].shape[0]
            self.places[other.result.number] = Slice(buffer, offset, rows)
            self.done.add(other.result.number)
            offset += rows
        to = Slice(buffer, 0, width)
        given: dict[str, Any] = {}
        if logits and weights[0].shape[0] >= SCREENED_ROWS:
            given["plain"] = Sketch(weights[0]), Signs(weights[0].shape[1])
            given["scalars"] = (self._cap(node),)
        reads = (source, self._at(x)) if given else (source,)
        self._step("linear", *reads, to=to, nodes=together, weights=weights, numbers=(int(is_quantized),), **given)
        for other in together:
            if (bias := other.operands["bias_O"]) is not None:
                at = self.places[other.result.number]
                self._step("bias", at, to=at, nodes=[], plain=(bias,))

    def _cap(self, head: Node) -> float:
        """What the logits are capped at after the head; 0: not at all."""
        caps = (n.operands["cap"] for n in self.program.nodes if n.op == "softcap" and n.operands["x"] == head.result)
        return next(caps, 0.0)

    def _quantize(self, x: Value, node: Node) -> Slice:
        root = self._root(x.number)
        if root not in self.quantized:
            at = self._at(x)
            self.quantized[root] = Slice(self._new(at.width, str(node.result.shape[0]), "quantized"), 0, at.width)
            self._step("quantize", at, to=self.quantized[root], nodes=[])
        return self.quantized[root]

    def _split_heads(self, i: int, node: Node) -> None:
        """Nothing moves."""

    _merge_heads = _in_dtype_of = _split_heads

    def _scale(self, i: int, node: Node) -> None:
        """To a buffer of its own: what is scaled is multiplied next, and a linear reads whole rows."""
        to = self._place(node.result)
        self._step("scale", self._at(node.operands["x"]), to=to, nodes=[node], scalars=(node.operands["factor"],))

    def _rope(self, i: int, node: Node) -> None:
        x, (cos, sin) = node.operands["x_TNH"], node.operands["table"]
        at = self._at(x)
        to = self._over(i, x, node.result)
        heads = int(x.shape[1])
        self._step("rope", at, self._at(cos), self._at(sin), to=to, nodes=[node], numbers=(heads,))

    def _attention(self, i: int, node: Node) -> None:
        q, k, v = (self._at(node.operands[name]) for name in ("q_TNH", "k_TKH", "v_TKH"))
        layer = _layer(node)
        self._step("remember", k, v, to=None, nodes=[], numbers=(layer,))
        scalars = (node.operands["scale"], node.operands["softcap"] or 0.0)
        heads = int(node.operands["q_TNH"].shape[1])
        self._step(
            "attend", q, k, v, to=self._place(node.result), nodes=[node], numbers=(layer, heads), scalars=scalars
        )

    def _geglu(self, i: int, node: Node) -> None:
        gate, up = self._at(node.operands["gate_TF"]), self._at(node.operands["up_TF"])
        self._step("geglu", gate, up, to=self._place(node.result), nodes=[node])

    def _gelu(self, i: int, node: Node) -> None:
        at = self._at(node.operands["x"])
        self._step("gelu", at, to=self._over(i, node.operands["x"], node.result), nodes=[node])

    def _add(self, i: int, node: Node) -> None:
        a, b = node.operands["a"], node.operands["b"]
        first, second = self._at(a), self._at(b)
        self._step(node.op, first, second, to=self._over(i, a, node.result), nodes=[node])

    _mul = _add

    def _softcap(self, i: int, node: Node) -> None:
        x = node.operands["x"]
        at = self._at(x)
        self._step("softcap", at, to=self._over(i, x, node.result), nodes=[node], scalars=(node.operands["cap"],))

    def _take_rows(self, i: int, node: Node) -> None:
        self._step("take_rows", self._at(node.operands["x_TD"]), to=self._place(node.result), nodes=[node])

    def _put_rows(self, i: int, node: Node) -> None:
        x = node.operands["x_TD"]
        at = self._at(x)
        to = self._over(i, x, node.result)
        assert at == to, "image features take the place of embeddings that nobody else reads"
        self._step("put_rows", at, to=to, nodes=[node])

    def _causal_conv1d(self, i: int, node: Node) -> None:
        plain = (node.operands["weight_RC"], node.operands["bias_R"])
        at = self._at(node.operands["x_TR"])
        to = self._place(node.result)
        self._step("causal_conv1d", at, to=to, nodes=[node], plain=plain, numbers=(_layer(node),))

    def _block_linear(self, i: int, node: Node) -> None:
        weight = node.operands["weight_NIO"]
        plain, at = (weight, node.operands["bias_NO"]), self._at(node.operands["x_TR"])
        to = self._place(node.result)
        self._step("block_linear", at, to=to, nodes=[node], plain=plain, numbers=(weight.shape[0],))

    def _rg_lru(self, i: int, node: Node) -> None:
        reads = [self._at(node.operands[name]) for name in ("x_TR", "input_gate_TR", "recurrent_gate_TR")]
        plain = (node.operands["param_R"],)
        self._step("rg_lru", *reads, to=self._place(node.result), nodes=[node], plain=plain, numbers=(_layer(node),))


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
        case Frequencies(rotated, base, factor):
            return f"rope {base:g} / {factor:g} of {rotated}"
        case Sketch(table=table):
            return f"sketch of {table.name}"
        case Signs():
            return "signs"


def _shown(at: Slice) -> str:
    return f"b{at.buffer}[{at.offset}:{at.offset + at.width}]"


def packed_weights(lowered: Lowered) -> Iterator[Weight]:
    """Every weight that the executor multiplies or looks up, once."""
    return iter({w.name: w for step in lowered.steps for w in step.weights}.values())


def plain_weights(lowered: Lowered) -> Iterator[Plain]:
    """Every array of floats that it reads, once."""
    return iter(dict.fromkeys(p for step in lowered.steps for p in step.plain))
