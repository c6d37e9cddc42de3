import numpy as np
import pytest

from gemkit.errors import ConfigError
from gemkit.family import Pixels
from gemkit.images import Picture, preprocess


def grey(*rows):
    """A picture of these grey levels."""
    return Picture(np.repeat(np.array(rows, np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "tensorflow"])
def test_what_comes_out(resample):
    pixels = np.zeros((5, 9, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :, 2] = 255, 51
    x_3SS = preprocess(Picture(pixels), 14, Pixels(resample=resample))
    assert (x_3SS.shape, x_3SS.dtype, x_3SS.flags.c_contiguous) == ((3, 14, 14), np.float32, True)
    for channel, value in enumerate([1.0, -1.0, -0.6]):  # 51 is a fifth of 255
        np.testing.assert_allclose(x_3SS[channel], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "tensorflow"])
def test_the_same_size_changes_no_level(resample):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    x_3SS = preprocess(grey(*ramp), 16, Pixels(resample=resample))
    np.testing.assert_allclose(x_3SS[1], ramp / 127.5 - 1, rtol=0, atol=1e-7)  # float32 has 24 bits


def test_tensorflows_bilinear_by_hand():
    """Centres of two pixels over four are at 1/2 and 5/2, halfway between neighbours; fractions are dropped."""
    x_3SS = preprocess(grey([0, 1, 10, 20], [0, 1, 10, 20]), 2, Pixels(resample="tensorflow"))
    np.testing.assert_array_equal(np.round((x_3SS[0] + 1) * 127.5), [[0, 15], [0, 15]])
    # four over two: -1/4 (the edge), 1/4, 3/4, 5/4 (the edge)
    x_3SS = preprocess(grey([0, 100], [0, 100]), 4, Pixels(resample="tensorflow"))
    np.testing.assert_array_equal(np.round((x_3SS[0] + 1) * 127.5)[0], [0, 25, 75, 100])


def test_only_bicubic_looks_at_every_pixel():
    """One bright column in eight: bilinear without antialias steps over it."""
    row = [0, 0, 0, 0, 0, 0, 0, 255] * 8
    assert preprocess(grey(*[row] * 64), 8, Pixels(resample="tensorflow")).max() == -1
    assert preprocess(grey(*[row] * 64), 8, Pixels(resample="bicubic")).min() > -1


@pytest.mark.parametrize(
    ("size", "resample", "message"),
    [
        (0, "bicubic", "size=0: a picture is resized to a whole number of pixels from 1 on"),
        (22.4, "bicubic", "size=22.4: a picture is resized to a whole number of pixels from 1 on"),
        (224, "bicubik", "resample='bicubik'; did you mean bicubic"),
    ],
)
def test_settings_that_are_refused(size, resample, message):
    with pytest.raises(ConfigError, match=message):
        preprocess(grey([0]), size, Pixels(resample=resample))
