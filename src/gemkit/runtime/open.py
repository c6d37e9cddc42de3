"""A checkpoint made to run: `open_runtime` chooses the executor, and a `Runtime` holds it beside the torch modules."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemkit.errors import ConfigError, ModelError
from gemkit.executors.native import library
from gemkit.executors.native.executor import NativeExecutor
from gemkit.runtime.native import load_native
from gemkit.runtime.options import LoadOptions
from gemkit.weights.checkpoint import Checkpoint, open_checkpoint
from gemkit.weights.report import Report

if TYPE_CHECKING:
    from gemkit.executors.torch import TorchExecutor
    from gemkit.nn import LanguageModel
    from gemkit.runtime.repack import Repacker
    from gemkit.weights.load import Progress


def open_runtime(checkpoint: Checkpoint, options: LoadOptions, *, progress: Progress | None = None) -> Runtime:
    """The executor of a checkpoint, with its weights.

    Args:
        progress: is called with (bytes read, bytes in all).

    Raises:
        ConfigError: for a device or dtype that cannot be used here, or weights that do not fit into memory.
        ModelError: if native is required and there is none, or it cannot run this model.
        WeightsError: if the tensors do not fit the architecture, or a file is damaged.
    """
    native, reason = options.executor == "native", ""
    if options.executor == "auto" and not options.only_torch:
        native, reason = library.available()
    if native:
        runner, report = load_native(checkpoint, options, progress=progress)
        place = checkpoint.place

        def modules() -> LanguageModel:
            from gemkit.weights.load import load_module

            with open_checkpoint(place) as again:
                return load_module(again, **options.storage)[0]

        return Runtime(runner, report, modules)
    _check_device(options.device)
    from gemkit.executors.torch import TorchExecutor
    from gemkit.weights.load import load_module  # imports torch: a wrong name is reported without waiting for it

    module, report = load_module(
        checkpoint, dtype=options.dtype, device=options.device, **options.storage, progress=progress
    )
    if reason:
        report.notes.append(f"torch computes it: {reason}")
    return Runtime(TorchExecutor(module), report, lambda: module)


class Runtime:
    """The executor of a model, and the torch modules with the same weights.

    On torch the modules are what runs. The native executor runs a packed copy: its modules are opened from the same
    files when they are first needed, and `sync` packs anew what was changed in them. Every method may be called from
    any thread; `lock` is held while modules are opened and packed, and by those who change them while others ask.

    Args:
        executor: computes the model as it is now.
        report: what loading did.
        modules: opens the torch modules; it is called once, for a native executor.
    """

    def __init__(self, executor: NativeExecutor | TorchExecutor, report: Report, modules: Callable[[], LanguageModel]):
        self.report = report
        self._executor: Any = executor
        self._modules = modules
        self._module = None if isinstance(executor, NativeExecutor) else executor.module
        self._repacker: Repacker | None = None  # follows `module` for the native executor, once it is open
        self.lock = threading.RLock()

    @property
    def executor(self) -> Any:
        """The executor as of the last `sync`."""
        return self._executor

    @property
    def is_open(self) -> bool:
        """True if the torch modules are in memory; before that nothing can have changed."""
        return self._module is not None

    @property
    def module(self) -> LanguageModel:
        """The model as torch modules, with its weights. Reads them from the checkpoint the first time, if the executor
        is native."""
        with self.lock:
            if self._module is None:
                from gemkit.runtime.repack import Repacker

                self._module = self._modules()
                self._repacker = Repacker(self._module, self._executor)
            return self._module

    def sync(self) -> Any:
        """The executor of the model as it is now: the native one packs anew what was changed in `module`
        (`runtime.repack.Repacker` says what counts as a change), and a model that it cannot run goes to torch, with a
        warning. It costs a walk over the modules if nothing was changed."""
        if self._repacker is None:  # its modules were never opened, or they are what runs: nobody waits for the lock
            return self._executor
        with self.lock:
            if self._repacker is not None:
                try:
                    self._executor = self._repacker.executor()
                except ModelError as error:
                    self.use_torch()
                    warnings.warn(f"{error}; torch computes the model from now on", stacklevel=3)
            return self._executor

    def use_torch(self) -> None:
        """Compute with `module` in torch from now on."""
        from gemkit.executors.torch import TorchExecutor

        with self.lock:
            if not isinstance(self._executor, TorchExecutor):
                self._executor, self._repacker = TorchExecutor(self.module), None


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        other = torch.accelerator.current_accelerator(check_available=True)
        usable = "cpu" if other is None else f"cpu, {other.type}"
        raise ConfigError(f"device={device!r} cannot be used on this machine, only: {usable}") from error
