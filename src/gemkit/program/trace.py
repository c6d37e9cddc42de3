"""From a module to a Program: the module is run once, on symbols instead of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from gemkit.errors import ModelError
from gemkit.family import DecoderConfig
from gemkit.nn import Batch, Decoder, LanguageModel
from gemkit.nn.batch import Patches
from gemkit.ops import Quantized
from gemkit.ops.symbolic import OpSpec, Shape, Symbol, dtype_name
from gemkit.program.ir import BATCH, Boundaries, Memory, Node, Program, Value, Weight, Work


def trace(module: Decoder, *, sees: bool = False) -> Program:
    """The forward pass of a decoder for any batch.

    Args:
        sees: image features may take the place of embeddings: E of them, an input beside the rows they go to.

    Raises:
        ModelError: if the module does something with an array that is no op; names it.
    """
    recorder = _Recorder(module)
    batch = _SymbolicBatch(recorder)
    state, features = _SymbolicState(module.config), batch.features(module.config.width) if sees else None
    output = recorder.run(module, lambda: module(batch, state, batch.rows, features_ED=features))
    return recorder.program(batch.symbols, output)


def trace_tower(module: LanguageModel) -> Program:
    """The image tower and its projection for any number of images: "pixels" (I, 3, S, S) to (T, D), where T is the
    patches of all images, one image after another.

    Raises:
        ModelError: as `trace`.
    """
    recorder = _Recorder(module)
    assert module.vision is not None
    size = module.vision.tower.image_size
    pixels_ICSS = recorder.new(("I", 3, size, size), "float32")
    output = recorder.run(module, lambda: module.image_features(pixels_ICSS))
    return recorder.program({"pixels": pixels_ICSS}, output)


class _Recorder:
    """Records calls as they come."""

    def __init__(self, module: Module):
        self.nodes: list[Node] = []
        self._count = 0
        self._names = _weight_names(module)
        self._scopes: list[str] = []  # paths of the modules whose forward is running

    def run(self, module: Module, call: Callable[[], Any]) -> Symbol:
        """The result of `call`, recorded with the module in whose forward each op ran."""
        hooks = []
        for path, part in module.named_modules():
            hooks.append(part.register_forward_pre_hook(lambda *_, path=path: self._scopes.append(path)))
            hooks.append(part.register_forward_hook(lambda *_: self._leave()))
        try:
            output = call()
        except (AttributeError, TypeError, IndexError) as error:  # a symbol was asked for what only an array has
            done = self.nodes[-1].op if self.nodes else "its beginning"
            raise ModelError(f"{type(module).__name__} cannot be traced after {done}: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(output, Symbol):
            name = type(module).__name__
            raise ModelError(f"{name} cannot be traced: its result is {type(output).__name__}, no array")
        return output

    def _leave(self) -> None:
        self._scopes.pop()  # a hook that returns something replaces the result

    def program(self, inputs: Mapping[str, Symbol], output: Symbol) -> Program:
        given = {name: self.value(symbol) for name, symbol in inputs.items()}
        return Program(tuple(self.nodes), given, self.value(output))

    def new(self, shape: Shape, dtype: str) -> Symbol:
        self._count += 1
        return Symbol(self, self._count - 1, shape, dtype)

    def record(self, spec: OpSpec, arguments: Mapping[str, Any]) -> tuple[Symbol, ...]:
        shapes, dtype = spec.shape(**arguments), spec.dtype(**arguments)
        results = tuple(self.new(shape, dtype) for shape in (shapes if isinstance(shapes, list) else [shapes]))
        operands = {name: self._operand(spec.name, name, argument) for name, argument in arguments.items()}
        scope = self._scopes[-1] if self._scopes else ""
        node = Node(spec.name, operands, tuple(map(self.value, results)), scope, Work(**spec.cost(**arguments)))
        self.nodes.append(node)
        return results

    @staticmethod
    def value(symbol: Symbol) -> Value:
        return Value(symbol.number, symbol.shape, symbol.dtype)

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
        if isinstance(argument, Patches):
            return Boundaries(argument.per_image)
        if isinstance(argument, torch.dtype):
            return str(argument).removeprefix("torch.")
        return argument


def _weight_names(module: Module) -> dict[int, Weight]:
    """Every weight by the identity of what holds it; the tied head is the embedding's."""
    names: dict[int, Weight] = {}
    for path, owner in module.named_modules():
        held = dict(owner.named_parameters(recurse=False))
        held |= {leaf: value for leaf, value in vars(owner).items() if isinstance(value, Quantized)}
        for leaf, value in held.items():
            kind = value.kind.name if isinstance(value, Quantized) else dtype_name(value)
            weight = Weight(f"{path}.{leaf}", tuple(value.shape), kind, value.nbytes)
            names.setdefault(id(value), weight)
    return names


class _SymbolicBatch(Batch):
    """A batch whose tokens are symbols and whose boundaries nobody has drawn."""

    def __init__(self, recorder: _Recorder):
        self.recorder = recorder
        self.symbols = {name: recorder.new(("T",), "int64") for name in ("tokens", "positions")}
        self.symbols["rows"] = self.rows = recorder.new(("R",), "int64")  # type: ignore[misc]  # hides the class method
        self.tokens, self.positions = self.symbols["tokens"], self.symbols["positions"]  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:  # a batch is frozen
        object.__setattr__(self, name, value)

    def features(self, width: int) -> Symbol:
        """Image features, whose number is the rows' that they go to."""
        self.symbols["image_rows"] = self.image_rows = self.recorder.new(("E",), "int64")  # type: ignore[misc]
        self.symbols["features"] = self.recorder.new(("E", width), "float32")
        return self.symbols["features"]

    def sequences(self):
        return iter(())

    def expect_features(self, features_ED: Any) -> None: ...

    def expect_causal(self) -> None: ...


class _SymbolicState:
    """Hands every layer its memory, and has none."""

    def __init__(self, config: DecoderConfig):
        self.layers = [Memory(i) for i in range(len(config.layers))]

    def expect(self, *_: Any) -> None: ...

    def advance(self, *_: Any) -> None: ...
