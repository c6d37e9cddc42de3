"""What makes a function an op: called with arrays it computes, called with symbols it is written down.

A `Symbol` stands for an array that is not there. Calling an op with one asks the symbol's trace to record the call, and
gives the symbols of its results, whose shapes come from the rule that stands beside the op's definition. So a module
that computes only through ops is traced by running it once (`gemkit.program.trace`), and nothing else knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, Protocol, TypeVar

Size = int | str  # an axis: a number, or the name of one that differs from call to call ("T" tokens, "R" rows)
Shape = tuple[Size, ...]
P = ParamSpec("P")
Result = TypeVar("Result")


class Recorder(Protocol):
    def record(self, op: str, arguments: Mapping[str, Any], shapes: tuple[Shape, ...]) -> tuple[Symbol, ...]:
        """Write down a call; the symbols of its results."""
        ...


class Symbol:
    """An array of a shape, while a module is traced. It can be handed to ops, and to nothing else."""

    def __init__(self, trace: Recorder, number: int, shape: Shape):
        self.trace, self.number, self.shape = trace, number, shape

    def __repr__(self) -> str:
        return f"Symbol({self.number}, shape={self.shape})"


def op(shape: Callable[..., Any]) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Make a function an op.

    Args:
        shape: from the arguments of a call, the shape of its result, or a list of shapes if the op returns a tuple.
    """

    def decorate(define: Callable[P, Result]) -> Callable[P, Result]:
        parameters = signature(define)

        @wraps(define)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            for argument in args:
                if type(argument) is Symbol:
                    return record(argument.trace, *args, **kwargs)
            return define(*args, **kwargs)

        def record(trace: Recorder, *args: Any, **kwargs: Any) -> Any:
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            result = shape(**bound.arguments)
            if isinstance(result, list):
                return trace.record(define.__name__, bound.arguments, tuple(result))
            return trace.record(define.__name__, bound.arguments, (result,))[0]

        return call

    return decorate


def same(x: Any, **_: Any) -> Shape:
    """The shape rule of an op that keeps the shape of its first argument, called x."""
    return x.shape
