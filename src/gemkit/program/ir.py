"""A Program: one forward pass of a model as a flat list of op calls, with what each reads and computes. No torch.

It serves any batch: the only sizes left open are the number of tokens, T (the patches of all images, of an image
tower), the number of rows that need logits, R, and of image features, E. A layer's state and the boundaries of
sequences are opaque operands.

    program = trace(module)
    print(program)
    program.save("program.json")
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gemkit.errors import ModelError
from gemkit.files import atomic_file

Size = int | str
Shape = tuple[Size, ...]
VERSION = 1  # of the JSON form


@dataclass(frozen=True)
class Value:
    """The result of a node, or an input."""

    number: int
    shape: Shape
    dtype: str  # "float32", "bfloat16", "int64"

    def __str__(self) -> str:
        return f"%{self.number}"


@dataclass(frozen=True)
class Weight:
    """A weight by its name: (out, in) of a linear, (rows, width) of a table."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "float32", "bfloat16", or a block type: "Q4_K"
    nbytes: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Memory:
    """The state of one layer: its KV cache, or its recurrent state."""

    layer: int

    def __str__(self) -> str:
        return f"memory[{self.layer}]"


@dataclass(frozen=True)
class Boundaries:
    """Stands for the boundaries of sequences, which are data of a call and not of a program, or are all alike.

    Args:
        length: rows of every sequence, where all have as many: the patches of an image. None: a call says it.
    """

    length: int | None = None

    def __str__(self) -> str:
        return "batch" if self.length is None else f"sequences of {self.length}"


BATCH = Boundaries()


@dataclass(frozen=True)
class Work:
    """Memory and arithmetic of a call beyond reading its weights once, by what they grow with.

    Args:
        lookup: of its weight only one row for each row of its result is read.
        row_flops: operations for each row of its result.
        key_bytes: bytes of the state for each key that is seen.
        pair_flops: operations for each pair of a query and a key that it sees.
        window: keys visible to a query; None: all before it.
        length: keys visible to every query, whatever the context; None: those of the context.
    """

    lookup: bool = False
    row_flops: int = 0
    key_bytes: int = 0
    pair_flops: int = 0
    window: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Cost:
    """Bytes of weights and of what is remembered, and floating-point operations (2 for a multiply and an add)."""

    weight_bytes: int = 0
    state_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes, self.state_bytes + other.state_bytes, self.flops + other.flops
        )


@dataclass(frozen=True)
class Node:
    """A call of an op.

    Args:
        operands: by the names of the op's parameters: values, weights, memories, boundaries, numbers, strings, None,
            and tuples of these.
        scope: path of the module that called it: "layers.0.mlp.gate_proj".
    """

    op: str
    operands: Mapping[str, Any]
    results: tuple[Value, ...]
    scope: str = ""
    work: Work = Work()

    @property
    def result(self) -> Value:
        return self.results[0]

    def values(self) -> Iterator[Value]:
        """The values that it reads."""
        for operand in self.operands.values():
            if isinstance(operand, Value):
                yield operand
            elif isinstance(operand, tuple):
                yield from (part for part in operand if isinstance(part, Value))

    def weights(self) -> Iterator[Weight]:
        """The weights that a call reads."""
        return (operand for operand in self.operands.values() if isinstance(operand, Weight))

    def constants(self) -> Iterator[Weight]:
        """The weights that something is made from once, which a call reads in their place: those in tuples."""
        for operand in self.operands.values():
            if isinstance(operand, tuple):
                yield from (part for part in operand if isinstance(part, Weight))

    @property
    def memory(self) -> Memory | None:
        return next((operand for operand in self.operands.values() if isinstance(operand, Memory)), None)

    def cost(self, tokens: int = 1, rows: int = 1, context: int = 0) -> Cost:
        """Bytes moved and FLOPs of the call, for `tokens` new tokens of one sequence that has `context` in all."""
        work = self.work
        given = {"T": tokens, "R": rows}.get(str(self.result.shape[0]), 1)
        weight_bytes = sum(weight.nbytes // (weight.shape[0] if work.lookup else 1) for weight in self.weights())
        if work.length is not None:
            seen, pairs = 0, tokens * work.length
        else:
            seen = context if work.window is None else min(context, work.window + tokens - 1)
            pairs = sum(min(context - tokens + t + 1, work.window or context) for t in range(tokens))
        flops = work.row_flops * given + work.pair_flops * pairs
        return Cost(weight_bytes * (given if work.lookup else 1), work.key_bytes * seen, flops)


@dataclass(frozen=True)
class Program:
    """One forward pass."""

    nodes: tuple[Node, ...]
    inputs: Mapping[str, Value] = field(default_factory=dict)  # "tokens", "positions", "rows"; "pixels" of a tower
    output: Value = Value(-1, (), "float32")

    def weights(self) -> dict[str, Weight]:
        """Every weight by its name, in the order in which they are first read."""
        return {w.name: w for node in self.nodes for w in (*node.weights(), *node.constants())}

    def of_kinds(self, kinds: Mapping[str, tuple[str, int]]) -> Program:
        """The same computation on weights of other kinds.

        Args:
            kinds: kind and bytes by name, of all weights that change.
        """
        weights = self.weights()
        changed = {name: replace(weights[name], kind=kind, nbytes=n) for name, (kind, n) in kinds.items()}

        def changed_operand(operand: Any) -> Any:
            return changed.get(operand.name, operand) if isinstance(operand, Weight) else operand

        return replace(
            self,
            nodes=tuple(
                replace(node, operands={name: changed_operand(operand) for name, operand in node.operands.items()})
                for node in self.nodes
            ),
        )

    def __str__(self) -> str:
        return "\n".join(line(node) for node in self.nodes)

    def to_json(self) -> str:
        """The program as text that `from_json` reads; a weight is named, its numbers are not in it."""
        values = {value.number: value for value in self.inputs.values()}
        values |= {value.number: value for node in self.nodes for value in node.results}
        described = {
            "version": VERSION,
            "values": [[number, list(value.shape), value.dtype] for number, value in sorted(values.items())],
            "weights": [[w.name, list(w.shape), w.kind, w.nbytes] for w in self.weights().values()],
            "inputs": {name: value.number for name, value in self.inputs.items()},
            "output": self.output.number,
            "nodes": [
                {
                    "op": node.op,
                    "scope": node.scope,
                    "operands": {name: _encoded(operand) for name, operand in node.operands.items()},
                    "results": [value.number for value in node.results],
                    "work": {name: number for name, number in asdict(node.work).items() if number},
                }
                for node in self.nodes
            ],
        }
        return json.dumps(described)

    @classmethod
    def from_json(cls, text: str) -> Program:
        """The inverse of `to_json`.

        Raises:
            ModelError: if the text is no program of this version.
        """
        try:
            given = json.loads(text)
            if given["version"] != VERSION:
                raise ModelError(f"a program of version {given['version']}; this gemkit reads version {VERSION}")
            values = {number: Value(number, tuple(shape), dtype) for number, shape, dtype in given["values"]}
            weights = {name: Weight(name, tuple(shape), kind, n) for name, shape, kind, n in given["weights"]}
            nodes = tuple(
                Node(
                    node["op"],
                    {name: _decoded(operand, values, weights) for name, operand in node["operands"].items()},
                    tuple(values[number] for number in node["results"]),
                    node["scope"],
                    Work(**node["work"]),
                )
                for node in given["nodes"]
            )
            inputs = {name: values[number] for name, number in given["inputs"].items()}
            return cls(nodes, inputs, values[given["output"]])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"the text is no program: {error!r}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to a file."""
        with atomic_file(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read what `save` wrote.

        Raises:
            ModelError: if the file is no program of this version.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ModelError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: {error}") from None


def _encoded(operand: Any) -> Any:
    match operand:
        case Value(number=number):
            return {"value": number}
        case Weight(name=name):
            return {"weight": name}
        case Memory(layer=layer):
            return {"memory": layer}
        case Boundaries(length=length):
            return {"batch": length}
        case tuple():
            return [_encoded(part) for part in operand]
        case None | bool() | int() | float() | str():
            return operand
    raise ModelError(f"{operand!r} is no operand of a program")


def _decoded(operand: Any, values: Mapping[int, Value], weights: Mapping[str, Weight]) -> Any:
    match operand:
        case {"value": number}:
            return values[number]
        case {"weight": name}:
            return weights[name]
        case {"memory": int(layer)}:
            return Memory(layer)
        case {"batch": None | int() as length}:
            return Boundaries(length)
        case list():
            return tuple(_decoded(part, values, weights) for part in operand)
        case None | bool() | int() | float() | str():
            return operand
    raise ModelError(f"{operand!r} is no operand of a program")


def line(node: Node) -> str:
    """`%7 = linear(%6, layers.0.self_attn.q_proj.weight Q5_0) -> (T, 1024)`."""

    def shown(operand: Any) -> str:
        if isinstance(operand, tuple):
            return "(" + ", ".join(map(shown, operand)) + ")"
        if isinstance(operand, Weight):
            return f"{operand.name} {operand.kind} {operand.shape}"
        return str(operand)

    given = []
    for name, operand in node.operands.items():
        if operand is None or operand == BATCH:
            continue
        arrays = operand if isinstance(operand, tuple) else (operand,)
        plain = all(isinstance(array, Value | Weight | Memory) for array in arrays)
        given.append(shown(operand) if plain else f"{name}={operand}")
    results = ", ".join(map(str, node.results))
    shape = ", ".join(map(str, node.result.shape))
    return f"{results} = {node.op}({', '.join(given)}) -> ({shape})"


def count(shape: Shape, sizes: Mapping[str, int]) -> int:
    """Elements of a shape, with sizes for its open axes."""
    return math.prod(sizes[axis] if isinstance(axis, str) else axis for axis in shape)
