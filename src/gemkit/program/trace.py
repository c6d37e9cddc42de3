"""From a module to a Program: the module is run once, on symbols instead of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gemkit.errors import ModelError
from gemkit.family import DecoderConfig as Config
from gemkit.nn import Batch, Decoder
from gemkit.ops import Quantized
from gemkit.ops.symbolic import Shape, Symbol
from gemkit.program.ir import BATCH, Memory, Node, Program, Value, Weight


def trace(module: Decoder, *, sees: bool = False) -> Program:
    """The forward pass of a decoder for any batch.

    Args:
        sees: image features may take the place of embeddings: E of them, an input beside the rows they go to.

    Raises:
        ModelError: if the module does something with an array that is no op; names it.
    """
    recorder = _Recorder(module)
    batch = _SymbolicBatch(recorder)
    try:
        state, features = _SymbolicState(module.config), batch.features(module.config.width) if sees else None
        output = module(batch, state, batch.rows, features)
    except (AttributeError, TypeError, IndexError) as error:  # a symbol was asked for what only an array has
        done = recorder.nodes[-1].op if recorder.nodes else "its beginning"
        raise ModelError(f"{type(module).__name__} cannot be traced after {done}: {error}") from error
    if not isinstance(output, Symbol):
        raise ModelError(f"{type(module).__name__} cannot be traced: its result is {type(output).__name__}, no array")
    inputs = {name: recorder.value(symbol) for name, symbol in batch.symbols.items()}
    return Program(tuple(recorder.nodes), inputs, recorder.value(output))


class _Recorder:
    """Writes calls down as they come."""

    def __init__(self, module: Decoder):
        self.nodes: list[Node] = []
        self._count = 0
        self._names = _weight_names(module)

    def new(self, shape: Shape) -> Symbol:
        self._count += 1
        return Symbol(self, self._count - 1, shape)

    def record(self, op: str, arguments: Mapping[str, Any], shapes: tuple[Shape, ...]) -> tuple[Symbol, ...]:
        results = tuple(self.new(shape) for shape in shapes)
        operands = {name: self._operand(op, name, argument) for name, argument in arguments.items()}
        self.nodes.append(Node(op, operands, tuple(map(self.value, results))))
        return results

    @staticmethod
    def value(symbol: Symbol) -> Value:
        return Value(symbol.number, symbol.shape)

    def _operand(self, op: str, name: str, argument: Any) -> Any:
        if isinstance(argument, Symbol):
            return self.value(argument)
        if isinstance(argument, tuple):
            return tuple(self._operand(op, name, part) for part in argument)
        if isinstance(argument, Tensor | Quantized):
            found = self._names.get(id(argument))
            if found is None:
                raise ModelError(f"{op} reads a {name} of shape {tuple(argument.shape)} that is no weight of the model")
            return found
        if isinstance(argument, _SymbolicBatch):
            return BATCH
        return argument


def _weight_names(module: Decoder) -> dict[int, Weight]:
    """Every weight by the identity of what holds it; the tied head is the embedding's."""
    names: dict[int, Weight] = {}
    for path, owner in module.named_modules():
        held = dict(owner.named_parameters(recurse=False))
        held |= {leaf: value for leaf, value in vars(owner).items() if isinstance(value, Quantized)}
        for leaf, value in held.items():
            kind = value.kind.name if isinstance(value, Quantized) else str(value.dtype).removeprefix("torch.")
            weight = Weight(f"{path}.{leaf}", tuple(value.shape), kind, value.nbytes)
            names.setdefault(id(value), weight)
    return names


class _SymbolicBatch(Batch):
    """A batch whose tokens are symbols and whose boundaries nobody has drawn."""

    def __init__(self, recorder: _Recorder):
        self.recorder = recorder
        self.symbols = {name: recorder.new(("T",)) for name in ("tokens", "positions")}
        self.symbols["rows"] = self.rows = recorder.new(("R",))  # type: ignore[misc]  # hides the class method
        self.tokens, self.positions = self.symbols["tokens"], self.symbols["positions"]  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:  # a batch is frozen
        object.__setattr__(self, name, value)

    def features(self, width: int) -> Symbol:
        """Image features, whose number is the rows' that they go to."""
        self.symbols["image_rows"] = self.image_rows = self.recorder.new(("E",))  # type: ignore[misc]
        self.symbols["features"] = self.recorder.new(("E", width))
        return self.symbols["features"]

    def spans(self):
        return iter(())

    def expect_features(self, features_ED: Any) -> None: ...

    def expect_causal(self) -> None: ...


class _SymbolicState:
    """Hands every layer its memory, and has none."""

    def __init__(self, config: Config):
        self.layers = [Memory(i) for i in range(len(config.layers))]

    def expect(self, *_: Any) -> None: ...

    def advance(self, *_: Any) -> None: ...
