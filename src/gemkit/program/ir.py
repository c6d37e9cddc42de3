"""A Program: one forward pass of a model as a flat list of op calls, with what each reads and computes. No torch.

It serves any batch: the only sizes left open are the number of tokens, T, and the number of rows that need logits, R.
What a layer remembers and where sequences begin are opaque operands.

    program = trace(module)
    print(program)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Size = int | str
Shape = tuple[Size, ...]


@dataclass(frozen=True)
class Value:
    """The result of a node, or an input."""

    number: int
    shape: Shape

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
    """What a layer remembers of the sequences before."""

    layer: int

    def __str__(self) -> str:
        return f"memory[{self.layer}]"


@dataclass(frozen=True)
class Node:
    """A call of an op. Operands by the names of the op's parameters: values, weights, memories, numbers."""

    op: str
    operands: Mapping[str, Any]
    results: tuple[Value, ...]

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
        return (operand for operand in self.operands.values() if isinstance(operand, Weight))

    @property
    def memory(self) -> Memory | None:
        return next((operand for operand in self.operands.values() if isinstance(operand, Memory)), None)

    def cost(self, tokens: int = 1, rows: int = 1, context: int = 0) -> Cost:
        """What the call moves and computes, for `tokens` new tokens of one sequence that has `context` in all."""
        return _cost(self, {"T": tokens, "R": rows}, context)


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
class Program:
    """One forward pass."""

    nodes: tuple[Node, ...]
    inputs: Mapping[str, Value] = field(default_factory=dict)  # "tokens", "positions", "rows"
    output: Value = Value(-1, ())

    def weights(self) -> dict[str, Weight]:
        """Every weight by its name, in the order in which they are first read."""
        return {weight.name: weight for node in self.nodes for weight in node.weights()}

    def __str__(self) -> str:
        return "\n".join(line(node) for node in self.nodes)


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
        if operand is None or operand is BATCH:
            continue
        plain = isinstance(operand, Value | Weight | Memory | tuple)
        given.append(shown(operand) if plain else f"{name}={operand}")
    results = ", ".join(map(str, node.results))
    shape = ", ".join(map(str, node.result.shape))
    return f"{results} = {node.op}({', '.join(given)}) -> ({shape})"


class _Batch:
    """Stands for the boundaries of the batch, which are data of a call and not of a program."""

    def __repr__(self) -> str:
        return "batch"


BATCH = _Batch()


def count(shape: Shape, sizes: Mapping[str, int]) -> int:
    """Elements of a shape, with sizes for its open axes."""
    return math.prod(sizes[axis] if isinstance(axis, str) else axis for axis in shape)


def _cost(node: Node, sizes: Mapping[str, int], context: int) -> Cost:
    weight_bytes = sum(weight.nbytes for weight in node.weights())
    x = next(node.values(), None)
    tokens = sizes[str(x.shape[0])] if x is not None and isinstance(x.shape[0], str) else 1
    operands = node.operands
    match node.op:
        case "embed":  # only the rows that are looked up
            table = operands["table_VD"]
            return Cost(weight_bytes=table.nbytes // table.shape[0] * tokens)
        case "linear":
            out, width = operands["weight_OI"].shape
            return Cost(weight_bytes, flops=2 * out * width * tokens)
        case "block_linear":
            return Cost(weight_bytes, flops=2 * math.prod(operands["weight_NIO"].shape) * tokens)
        case "attention":
            heads, width = operands["q_TNH"].shape[1:]
            kv_heads = operands["k_TKH"].shape[1]
            window = operands["window"]
            seen = context if window is None else min(context, window + tokens - 1)
            pairs = sum(min(context - tokens + t + 1, window or context) for t in range(tokens))
            return Cost(state_bytes=2 * 2 * kv_heads * width * seen, flops=4 * heads * width * pairs)
        case _:
            return Cost(weight_bytes)
