"""Weights that change under a native executor: what differs is packed anew over the first pack."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from gemkit.executors.native.executor import NativeExecutor
from gemkit.runtime.native import executor_of

if TYPE_CHECKING:
    from gemkit.nn import LanguageModel


class Repacker:
    """The native executor of modules that change: what has changed since it was last asked for is packed anew.

    A change is what torch counts as one: an operation in place, such as an optimizer's step or `load_state_dict`,
    another tensor in a weight's place, an adapter more, less or of another strength. What is written through `.data`
    or a NumPy array of the same memory is not counted, and not seen; nor is anything in weights that were opened in
    torch's inference mode, which can only be replaced.
    """

    def __init__(self, module: LanguageModel, native: NativeExecutor):
        """
        Args:
            native: executes `module` as it is now.
        """
        self._module, self._first, self._native = module, native, native
        self._then = self._now = _stamps(module)

    def executor(self) -> NativeExecutor:
        """Raises: ModelError, if the native executor cannot run what the module has become."""
        stamps = _stamps(self._module)
        if stamps != self._now:
            from gemkit.executors.native.packer import pack

            changed = {name for name, stamp in stamps.items() if self._then.get(name) != stamp}
            made = pack(self._module, over=self._first.pack, changed=changed)
            self._native = executor_of(made, self._first.decoder, self._module.vision)
            self._now = stamps
        return self._native


class _Same(weakref.ref):  # type: ignore[type-arg]
    """Equal to another of the same living object; the objects themselves, being tensors, compare element by element."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        mine = self()
        return mine is not None and isinstance(other, _Same) and mine is other()


def _stamps(module: LanguageModel) -> dict[str, Any]:
    """What is another after each change of a weight, by name, and of what else a program is made from."""
    from gemkit.adapters.layers import Adapter
    from gemkit.ops import Quantized

    stamps: dict[str, Any] = {}
    for path, owner in module.named_modules():
        path = path.removeprefix(module.decoder_path).removeprefix(".")
        held: dict[str, Any] = dict(owner.named_parameters(recurse=False))
        held |= {leaf: value for leaf, value in vars(owner).items() if isinstance(value, Quantized)}
        for leaf, value in held.items():
            tensors = value.planes.values() if isinstance(value, Quantized) else (value,)
            stamps[f"{path}.{leaf}"] = _Same(value), sum(t._version for t in tensors if not t.is_inference())
        if isinstance(owner, Adapter):
            stamps[path] = owner.factor
    return stamps
