"""A picture to what an image tower takes: a square of numbers, in [-1, 1] unless its folder says otherwise.

The aspect ratio is not kept: published models were trained on squeezed pictures, and places in the answer are
fractions of each side.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gemkit.errors import ConfigError, MissingExtraError, nearest
from gemkit.family import Pixels
from gemkit.family.schema import PILLOW_FILTERS
from gemkit.images.read import Picture


@lru_cache
def _levels(pixels: Pixels) -> np.ndarray:
    """float32 (3, 256): the number of each 8-bit level of a channel, rounded where the published processor rounds."""
    scaled_V = np.arange(256) * (1.0 if pixels.scale is None else pixels.scale)
    mean_31, std_31 = (np.array(each, np.float32)[:, None] for each in (pixels.mean, pixels.std))
    return (scaled_V.astype(np.float32) - mean_31) / std_31


def preprocess(picture: Picture, size: int, pixels: Pixels = Pixels()) -> np.ndarray:  # noqa: B008 (it is frozen)
    """Resize to `size` x `size` and scale.

    Args:
        pixels: how. "bicubic", as released, is Pillow's filter, which widens when it shrinks a picture, on 8 bits.
            "tensorflow" is how the models were trained and evaluated in big_vision: two neighbours a side however much
            is left out between them, cut to 8 bits.

    Returns:
        float32 (3, size, size), C-contiguous, RGB.

    Raises:
        ConfigError: if `size` is no size, or the filter none of these.
        MissingExtraError: if Pillow is needed (all but "tensorflow") and not installed.

    Source: SiglipImageProcessor of Transformers 5.23; big_vision, pp/ops_image.py (`get_resize`).
    """
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"size={size!r}: a picture is resized to a whole number of pixels from 1 on")
    if pixels.resample == "tensorflow":
        square_SS3 = _bilinear(picture.pixels, size)
    elif pixels.resample in PILLOW_FILTERS:
        square_SS3 = _with_pillow(picture.pixels, size, pixels.resample)
    else:
        raise ConfigError(
            f"resample={pixels.resample!r}; {nearest(str(pixels.resample), (*PILLOW_FILTERS, 'tensorflow'))}"
        )
    levels_3V = _levels(pixels)
    return np.stack([levels_3V[channel][square_SS3[:, :, channel]] for channel in range(3)])


def _with_pillow(pixels_HW3: np.ndarray, size: int, resample: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError(f"{resample} resizing", "vision") from None
    number = Image.Resampling(PILLOW_FILTERS.index(resample))
    return np.asarray(Image.fromarray(pixels_HW3).resize((size, size), number))


def _bilinear(pixels_HW3: np.ndarray, size: int) -> np.ndarray:
    """In float32 and in this order of sums as TensorFlow does it; cut, not rounded: a cast there drops the fraction."""
    top_S, bottom_S, down_S = _neighbours(pixels_HW3.shape[0], size)
    left_S, right_S, across_S = _neighbours(pixels_HW3.shape[1], size)
    down_S11, across_S1 = down_S[:, None, None], across_S[:, None]

    def row(at_S: np.ndarray) -> np.ndarray:
        left_SS3 = pixels_HW3[at_S[:, None], left_S].astype(np.float32)
        return left_SS3 + (pixels_HW3[at_S[:, None], right_S] - left_SS3) * across_S1

    top_SS3 = row(top_S)
    return (top_SS3 + (row(bottom_S) - top_SS3) * down_S11).astype(np.uint8)


def _neighbours(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `size` pixels along a side of `length`: the pixels before and after its centre, and how far between.

    Centres are at half pixels: (i + 1/2) * length / size - 1/2. Beyond the outermost ones there is only the edge.
    """
    centre_S = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5)
    before_S = np.floor(centre_S)
    after_S = np.minimum(np.ceil(centre_S), length - 1)
    return np.maximum(before_S, 0).astype(np.intp), after_S.astype(np.intp), centre_S - before_S
