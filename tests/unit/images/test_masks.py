"""Masks in their place in a picture, against Pillow and torch."""

import numpy as np
import pytest
import torch
from PIL import Image

from gemkit.errors import ImageError
from gemkit.images.masks import _stretch, mask_in_image


def waves():
    y, x = np.mgrid[0:64, 0:64] / 64
    return (np.sin(9 * y) * np.cos(7 * x + 0.3) + 0.2).astype(np.float32)


@pytest.mark.parametrize(("before", "after"), [(64, 64), (64, 200), (64, 7), (64, 1), (1, 64), (1000, 64), (63, 64)])
def test_an_axis_is_stretched_as_pillow_and_torch_do(before, after):
    """Pillow keeps float32 between the axes, hence 1e-6 of numbers up to 1."""
    numbers = np.random.default_rng(0).uniform(-1, 1, (before, before)).astype(np.float32)
    got = _stretch(before, after) @ numbers @ _stretch(before, 64).T
    pillow = np.asarray(Image.fromarray(numbers).resize((64, after), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(got, pillow, rtol=0, atol=1e-6)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(numbers.astype(np.float64))[None, None], (after, 64), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(got, theirs[0, 0].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", [(10.9, 20.2, 110.7, 61.5), (0, 0, 640, 480), (600.5, 3.99, 640, 480), (5, 5, 6, 6)])
def test_a_map_is_pasted_as_the_evaluator_does(box):
    got = mask_in_image(waves(), box, 640, 480)
    left, top, right, bottom = map(int, box)
    expected = np.zeros((480, 640), bool)
    resized = Image.fromarray(waves()).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    expected[top:bottom, left:right] = np.asarray(resized) > 0
    assert got.dtype == np.bool_
    assert np.count_nonzero(got != expected) <= 2  # where the value is 0 to float32's last bit
    assert expected.any()


def test_boxes_without_a_whole_pixel_and_out_of_the_picture():
    ones = np.ones((64, 64), np.float32)
    assert not mask_in_image(ones, (3.2, 3.0, 3.9, 9.0), 10, 10).any()
    assert not mask_in_image(ones, (9.0, 3.0, 3.9, 9.0), 10, 10).any()
    assert not mask_in_image(ones, (20, 20, 30, 30), 10, 10).any()
    assert not mask_in_image(ones, (-30, -30, -20, -20), 10, 10).any()
    half = np.where(np.arange(64) < 32, -1.0, 1.0) * np.ones((64, 1))
    got = mask_in_image(half, (-6, -2, 6, 2), 8, 4)
    assert got.astype(int).tolist() == [[1] * 6 + [0] * 2] * 2 + [[0] * 8] * 2
    assert mask_in_image(ones, (-1e9, -1e9, 1e9, 1e9), 10, 10).all()
    assert mask_in_image(half, (4, 2, 12, 6), 8, 4).sum() == 0  # the part in the picture is the map's left half


def test_a_mask_comes_back_from_its_square():
    """A mask that Pillow stretched to the square, put back by the edges it came from."""
    mask = np.zeros((300, 400), bool)
    y, x = np.mgrid[0:300, 0:400]
    mask[((y - 150) / 100) ** 2 + ((x - 200) / 120) ** 2 < 1] = True
    box = (80.0, 50.0, 320.0, 250.0)
    inside = Image.fromarray(mask.astype(np.float32)).resize((64, 64), Image.Resampling.BILINEAR, box)
    square = 2 * np.asarray(inside) - 1
    back = mask_in_image(square, box, 400, 300)
    assert (back & mask).sum() / (back | mask).sum() > 0.97  # a pixel of the square is four wide


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_in_image(np.zeros((4, 4)), (0, 0, 1, 1), 2, 2), r"not \(4, 4\) of float64"),
        (lambda: mask_in_image(np.zeros((64, 64), int), (0, 0, 1, 1), 2, 2), "of int64"),
        (lambda: mask_in_image(waves(), (0, 0, 1), 2, 2), "is not four numbers"),
        (lambda: mask_in_image(waves(), (0, 0, np.nan, 1), 2, 2), "is not four numbers"),
    ],
)
def test_what_makes_no_mask_is_an_error(call, message):
    with pytest.raises(ImageError, match=message):
        call()
