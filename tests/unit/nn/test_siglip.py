"""The modules of the image tower against torch's own, and plain attention."""

import pytest
import torch
from torch.nn import functional as F

from gemkit.errors import ConfigError
from gemkit.family import Vision
from gemkit.nn.batch import Patches
from gemkit.nn.siglip import (
    Embeddings,
    EncoderAttention,
    EncoderLayer,
    EncoderMLP,
    PatchEmbedding,
    PositionEmbedding,
    Siglip,
)

VISION = Vision(12, patch_size=4, width=10, depth=2, num_heads=2, mlp_width=7, norm_eps=1e-3)
PATCHES = Patches(2, VISION.num_patches)  # of two images, 9 each


def drawn(module):
    """The module in float64, in which another order of sums agrees to rounding, with random weights."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().requires_grad_(False).parameters():
        parameter.normal_(0, 0.5, generator=generator)
    return module


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def affine(module, x):
    return F.linear(x, module.weight, module.bias)


def attend(module, x_TW):
    """Torch's attention, an image a row of its batch and no mask."""
    heads = (affine(p, x_TW).view(2, 9, 2, 5).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    out_INPH = F.scaled_dot_product_attention(*heads)
    return affine(module.out_proj, out_INPH.transpose(1, 2).reshape(18, 10))


def feed_forward(module, x_TW):
    return affine(module.fc2, F.gelu(affine(module.fc1, x_TW), approximate="tanh"))


def norm(module, x):
    return F.layer_norm(x, (10,), module.weight, module.bias, 1e-3)


def layer(module, x_TW):
    x_TW = x_TW + attend(module.self_attn, norm(module.layer_norm1, x_TW))
    return x_TW + feed_forward(module.mlp, norm(module.layer_norm2, x_TW))


def embed(module, pixels_ICSS):
    """The convolution that others write it as; patches by rows from the top left."""
    patches_IWYX = F.conv2d(pixels_ICSS, module.patch_embedding.weight, module.patch_embedding.bias, stride=4)
    return (patches_IWYX.flatten(2).mT + module.position_embedding.weight).flatten(0, 1)


def test_a_patch_is_embedded_by_its_own_pixels():
    module, pixels = drawn(PatchEmbedding(10, 4)), normal(2, 3, 8, 12)
    table = module.weight.flatten(1)
    expected = torch.stack(
        [
            table @ image[:, top : top + 4, left : left + 4].flatten() + module.bias
            for image in pixels
            for top in (0, 4)
            for left in (0, 4, 8)
        ]
    )
    torch.testing.assert_close(module(pixels), expected)


def test_each_image_has_the_same_positions():
    module, x = drawn(PositionEmbedding(9, 10)), normal(18, 10)
    torch.testing.assert_close(module(x), x + module.weight.repeat(2, 1))


def test_embeddings_are_a_strided_convolution_and_positions():
    module, pixels = drawn(Embeddings(VISION)), normal(2, 3, 12, 12)
    torch.testing.assert_close(module(pixels), embed(module, pixels))


def test_attention_is_torchs_within_each_image():
    module, x = drawn(EncoderAttention(VISION)), normal(18, 10)
    torch.testing.assert_close(module(x, PATCHES), attend(module, x))


def test_the_feed_forward_is_two_projections():
    module, x = drawn(EncoderMLP(VISION)), normal(18, 10)
    torch.testing.assert_close(module(x), feed_forward(module, x))


def test_a_layer_adds_both_branches():
    module, x = drawn(EncoderLayer(VISION)), normal(18, 10)
    torch.testing.assert_close(module(x, PATCHES), layer(module, x))


def test_the_tower_is_its_layers_between_embeddings_and_a_norm():
    module, pixels = drawn(Siglip(VISION)), normal(2, 3, 12, 12)
    x = embed(module.embeddings, pixels)
    for part in module.encoder.layers:
        x = layer(part, x)
    torch.testing.assert_close(module(pixels), norm(module.post_layernorm, x))


def test_an_image_is_the_same_beside_others():
    module, pixels = drawn(Siglip(VISION)), normal(3, 3, 12, 12)
    torch.testing.assert_close(module(pixels), torch.cat([module(image[None]) for image in pixels]))


def test_pixels_take_the_dtype_of_the_tower():
    """Of bfloat16's 8 bits four layers' sums lose three at most: features are about 1."""
    module, pixels = drawn(Siglip(VISION)), normal(2, 3, 12, 12).float()
    exact = module(pixels)
    rounded = module.bfloat16()(pixels)
    assert (exact.dtype, rounded.dtype) == (torch.float64, torch.bfloat16)
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=2**-4 * exact.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (1, 1, 12, 12), (3, 12, 12)])
def test_pixels_of_another_resolution_are_refused(shape):
    with pytest.raises(ConfigError, match=r"this tower sees \(images, 3, 12, 12\); resize to 12 x 12"):
        Siglip(VISION)(torch.zeros(shape))


def test_they_print_their_sizes():
    text = str(Siglip(VISION))
    assert "(patch_embedding): PatchEmbedding(3, 10, patch_size=4)" in text
    assert "(position_embedding): PositionEmbedding(9, 10)" in text
    assert "(post_layernorm): LayerNorm((10,), eps=0.001)" in text
