"""How a checkpoint is opened: the settings of `gemkit.load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from gemkit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from gemkit.weights.quantize import Weights

ExecutorName: TypeAlias = Literal["auto", "native", "torch"]


@dataclass(frozen=True)
class LoadOptions:
    """Which executor computes a checkpoint, and how its weights are held.

    Args:
        device: any torch device.
        dtype: run dtype, "bfloat16" or "float32". None: bfloat16 where the file has it, else float32.
        executor: "native" (C++, on a CPU), "torch" (any device, any dtype), or "auto": native where it is installed
            and nothing is set that torch alone has.
        quantized: keep quantized weights as they are in memory. False makes them dense, for torch.
        weights: "int8" or "int4" quantizes while loading (`weights.load.load_module`).
        calibrate: rounds int4 by what the model computes from a text of ours (True) or from this text, or each weight
            to the nearest code (False).

    Raises:
        ConfigError: for an executor that does not exist, or one that cannot do what the other fields say.
    """

    device: str = "cpu"
    dtype: str | torch.dtype | None = None
    executor: ExecutorName = "auto"
    quantized: bool = True
    weights: Weights | None = None
    calibrate: bool | str = True

    def __post_init__(self) -> None:
        if self.executor not in get_args(ExecutorName):
            raise ConfigError(f"executor={self.executor!r} is not one of {', '.join(get_args(ExecutorName))}")
        if self.executor == "native" and self.only_torch:
            raise ConfigError(f"executor='native' cannot do {self.only_torch}: use executor='torch'")

    @property
    def only_torch(self) -> str:
        """The settings that the torch executor alone supports, for messages; empty if there are none."""
        found = []
        if self.device != "cpu":
            found.append(f"device={self.device!r}")
        if self.dtype is not None:
            found.append(f"dtype={str(self.dtype).removeprefix('torch.')}")
        if not self.quantized and self.weights is None:
            found.append("quantized=False")
        return ", ".join(found)

    @property
    def storage(self) -> dict[str, Any]:
        """The settings that decide the stored form of the weights: arguments of `weights.load.load_module`, and part of
        the key of a packed model."""
        return {"quantized": self.quantized, "weights": self.weights, "calibrate": self.calibrate}
