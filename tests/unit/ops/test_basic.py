"""The ops of the image tower against torch's own modules and plain indexing."""

import pytest
import torch

from gemkit import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_the_ordinary_one_in_float32(dtype):
    torch.manual_seed(0)
    x = (3 + 5 * torch.randn(7, 12)).to(dtype)
    theirs = torch.nn.LayerNorm(12, eps=1e-6)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    ours = ops.layer_norm(x, theirs.weight.to(dtype), theirs.bias.to(dtype), 1e-6)
    assert ours.dtype == dtype
    rounded = torch.nn.functional.layer_norm(
        x.float(), (12,), theirs.weight.to(dtype).float(), theirs.bias.to(dtype).float(), 1e-6
    )
    assert torch.equal(ours, rounded.to(dtype))


def test_patches_come_by_rows_from_the_top_left():
    """Patch (y, x) of an image is row y * columns + x, and its pixels meet the weight as they lie."""
    torch.manual_seed(0)
    pixels, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 2, 2), torch.randn(5)
    ours = ops.patch_embed(pixels, weight, bias)
    assert ours.shape == (2 * 9, 5)
    for image in range(2):
        for y in range(3):
            for x in range(3):
                patch = pixels[image, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                expected = (weight * patch).sum((1, 2, 3)) + bias
                torch.testing.assert_close(ours[9 * image + 3 * y + x], expected)


def test_rows_are_put_in_their_places_and_gradients_follow():
    x = torch.arange(8.0).view(4, 2).requires_grad_()
    new = torch.tensor([[10.0, 11], [12, 13]], dtype=torch.float64, requires_grad=True)
    y = ops.put_rows(x, torch.tensor([3, 1]), new)
    assert y.tolist() == [[0, 1], [12, 13], [4, 5], [10, 11]]
    assert y.dtype == torch.float32  # that of the rows it joins
    y.sum().backward()
    assert x.grad.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert new.grad.tolist() == [[1, 1], [1, 1]]
    assert x.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_every_image_gets_the_whole_table_of_positions():
    x = torch.tensor([[10], [20], [30], [40], [50], [60]])
    assert ops.add_positions(x, torch.tensor([[1], [2]])).flatten().tolist() == [11, 22, 31, 42, 51, 62]
