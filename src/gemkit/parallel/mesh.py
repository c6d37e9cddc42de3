"""The device mesh: devices in a grid with a name for each axis, as in JAX, in Keras and in `torch.distributed`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gemkit.errors import ConfigError, nearest

# What an axis means: replicas over a slow network, data parallelism (and fully sharded), tensor parallelism.
AXES = ("pod", "batch", "model")


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid: `Mesh((1, 8), ("batch", "model"))`.

    Devices are numbered with the last axis fastest, as `jax.sharding.Mesh`, Keras' `DeviceMesh` and torch's
    `init_device_mesh` number them.

    Raises:
        ConfigError: for a size below 1, an axis that is repeated or not one of `AXES`, sizes and names that differ in
            number.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ("batch", "model")

    def __post_init__(self):
        if len(self.shape) != len(self.axes) or not self.axes:
            raise ConfigError(f"mesh of {len(self.shape)} sizes and {len(self.axes)} axes: give each axis one size")
        for axis, size in zip(self.axes, self.shape, strict=True):
            if axis not in AXES:
                raise ConfigError(f"axis {axis!r} of the mesh is not one of {', '.join(AXES)}")
            if self.axes.count(axis) > 1:
                raise ConfigError(f"axis {axis!r} is in the mesh twice")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{axis}={size!r} of the mesh must be a whole number from 1")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """`1x8` is batch x model, `16x16x16` is pod x batch x model, `model=8` or `pod=2,batch=256` is by name.

        Raises:
            ConfigError: if it is none of these.
        """
        if re.fullmatch(r"\d+x\d+(x\d+)?", text):
            sizes = tuple(int(part) for part in text.split("x"))
            return cls(sizes, AXES[-len(sizes) :])
        sizes, axes = [], []
        for part in text.split(","):
            named = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if named is None:
                raise ConfigError(
                    f"mesh {text!r}: write batch x model as in 1x8, pod x batch x model as in 16x16x16, or "
                    f"names as in batch=2,model=4"
                )
            axes.append(named[1])
            sizes.append(int(named[2]))
        return cls(tuple(sizes), tuple(axes))

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 for one that the mesh does not have: along it nothing is divided."""
        self._expect_known(axis)
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def coordinates(self, device: int) -> dict[str, int]:
        """The place of a device along each axis.

        Raises:
            ConfigError: if there is no device of that number.
        """
        if not 0 <= device < self.devices:
            raise ConfigError(f"device {device} is not one of the {self.devices} of mesh {self}")
        places = {}
        for axis, size in zip(reversed(self.axes), reversed(self.shape), strict=True):
            device, places[axis] = divmod(device, size)
        return {axis: places[axis] for axis in self.axes}

    def along(self, axis: str, device: int) -> list[int]:
        """The devices that differ from this one along `axis` alone, itself among them: those of one collective."""
        self._expect_known(axis)
        if axis not in self.axes:
            return [device]
        stride = math.prod(self.shape[self.axes.index(axis) + 1 :])
        first = device - self.coordinates(device)[axis] * stride
        return [first + i * stride for i in range(self.size(axis))]

    @staticmethod
    def _expect_known(axis: str) -> None:
        if axis not in AXES:
            raise ConfigError(f"axis {axis!r} is none of a mesh; " + nearest(axis, AXES))

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in zip(self.axes, self.shape, strict=True))
