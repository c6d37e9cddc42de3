"""Symbolic tracing of ops: called with arrays an op computes, called with symbols it is recorded.

A `Symbol` stands for an array that is not there. Calling an op with one asks the symbol's trace to record the call, and
gives the symbols of its results, whose shapes and dtypes come from the rules that stand beside the op's definition. So
a module that computes only through ops is traced by running it once (`gemkit.program.trace`), and nothing else knows
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, Protocol, TypeVar

Size = int | str  # an axis: a number, or the name of one that differs from call to call ("T" tokens, "R" rows)
Shape = tuple[Size, ...]
P = ParamSpec("P")
Result = TypeVar("Result")


class Recorder(Protocol):
    def record(self, spec: OpSpec, arguments: Mapping[str, Any]) -> tuple[Symbol, ...]:
        """Record a call; the symbols of its results."""
        ...


class Symbol:
    """An array of a shape and dtype, while a module is traced. It can be handed to ops, and to nothing else."""

    def __init__(self, trace: Recorder, number: int, shape: Shape, dtype: str):
        self.trace, self.number, self.shape, self.dtype = trace, number, shape, dtype

    def __repr__(self) -> str:
        return f"Symbol({self.number}, shape={self.shape}, dtype={self.dtype})"


@dataclass(frozen=True)
class OpSpec:
    """An op as data: everything that a trace knows of it. Rules are functions of a call's arguments, by name.

    Args:
        operands: names of its parameters, in order.
        shape: the shape of its result, or a list of shapes if it returns a tuple.
        dtype: the dtype of all results, as a string.
        cost: what a call reads and computes beyond its weights, as fields of `program.ir.Work`.
    """

    name: str
    operands: tuple[str, ...]
    shape: Callable[..., Any]
    dtype: Callable[..., str]
    cost: Callable[..., Mapping[str, Any]]


OPS: dict[str, OpSpec] = {}  # every op by its name


def dtype_name(array: Any) -> str:
    """Of a tensor or a symbol: "float32"."""
    return str(array.dtype).removeprefix("torch.")


def of_first(**arguments: Any) -> str:
    """The dtype rule of an op that keeps the dtype of its first operand."""
    return dtype_name(next(iter(arguments.values())))


def op(
    shape: Callable[..., Any],
    *,
    dtype: Callable[..., str] = of_first,
    cost: Callable[..., Mapping[str, Any]] = lambda **_: {},
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Make a function an op, with the rules of its `OpSpec`."""

    def decorate(define: Callable[P, Result]) -> Callable[P, Result]:
        parameters = signature(define)
        spec = OpSpec(define.__name__, tuple(parameters.parameters), shape, dtype, cost)
        OPS[spec.name] = spec

        @wraps(define)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            for argument in args:
                if type(argument) is Symbol:
                    return record(argument.trace, *args, **kwargs)
            return define(*args, **kwargs)

        def record(trace: Recorder, *args: Any, **kwargs: Any) -> Any:
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            results = trace.record(spec, bound.arguments)
            return results if isinstance(shape(**bound.arguments), list) else results[0]

        return call

    return decorate


def same(x: Any, **_: Any) -> Shape:
    """The shape rule of an op that keeps the shape of its first argument, called x."""
    return x.shape
