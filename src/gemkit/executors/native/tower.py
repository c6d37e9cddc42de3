"""The image tower of a packed model, run in C++: from pixels to the features that a decoder sees. No torch.

The tower is a second program of the packed file (`program.trace.trace_tower`). It keeps no state: every patch of an
image sees every other one and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemkit.errors import ConfigError, ModelError
from gemkit.executors.native.library import library, threads
from gemkit.executors.native.packfile import Pack
from gemkit.family import Modality

_MISFIT, _DONE, _NO_MEMORY = -1, 0, 2


class NativeTower:
    """Runs the image tower and the projection of a packed model."""

    def __init__(self, vision: Modality, width: int, pack: Pack):
        """
        Args:
            width: of the decoder, and so of a feature.

        Raises:
            ModelError: if there is no native library, or the packed model has no tower that can run.
        """
        if pack.tower is None:
            raise ModelError(f"{pack.path} holds no image tower")
        self.vision, self.width = vision, width
        self._pack = pack  # whose memory the library reads
        self._library = library()
        arrays = [*pack.tower, pack.pointers(), np.empty((0, 6), np.int32)]
        given = [part for array in arrays for part in (array.ctypes.data, len(array))]
        self._handle = self._library.gk_executor_new(*given)
        if not self._handle:
            raise ModelError(f"{pack.path} cannot run: {self._library.gk_error().decode()}")

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(I * P, D) float32, from images of (3, S, S) in -1 to 1.

        Raises:
            ConfigError: if they are of another resolution than the tower.
            ModelError: if memory runs out.
        """
        size = self.vision.tower.image_size
        for image in images:
            if image.shape != (3, size, size):
                raise ConfigError(
                    f"pixels of shape {image.shape}: this tower sees (images, 3, {size}, {size}); resize to "
                    f"{size} x {size}, or load the member of the other resolution"
                )
        patches = patches_of(np.stack(images), self.vision.tower.patch_size)
        features = np.empty((len(patches), self.width), np.float32)
        given, made = (patches.ctypes.data, *patches.shape), (features.ctypes.data, self.width)
        result = self._library.gk_encode(self._handle, threads(), *given, *made)
        if result == _MISFIT:
            raise ModelError(f"the image tower of {self._pack.path} is another than the model's")
        if result == _NO_MEMORY:
            raise ModelError(f"memory ran out for {len(images)} images: show fewer at once")
        assert result == _DONE, f"an exception of a signal handler is raised by the call itself, not told by {result}"
        return features

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.gk_executor_free(self._handle)


def patches_of(pixels_ICSS: np.ndarray, size: int) -> np.ndarray:
    """The pixels of each patch as a row, float32 (I * P, C * size * size): patches by rows from the top left, and in
    each the order of a convolution's kernel, by channel, row and column."""
    images, channels, height, width = pixels_ICSS.shape
    grid = pixels_ICSS.reshape(images, channels, height // size, size, width // size, size)
    rows = grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)
    return np.ascontiguousarray(rows, np.float32)
