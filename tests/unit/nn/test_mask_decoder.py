"""The mask decoder, loaded from the published layout, against the equations in NumPy."""

import numpy as np
import pytest
import torch

from gemkit.weights.mask_decoder import load_mask_decoder
from support import mask_weights


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vae-oid.npz"


def test_the_decoder_equals_its_equations(path):
    """Two masks in one call. In float64 the same sums to rounding; in float32 a dozen layers of up to 1,152 terms."""
    arrays = mask_weights.published(width=7)
    np.savez(path, **arrays)
    codes = np.random.default_rng(0).integers(0, 128, 32)
    expected = torch.from_numpy(np.stack([mask_weights.decode(arrays, part) for part in codes.reshape(2, 16)]))
    assert expected.std() > 0.1
    decoder = load_mask_decoder(path)
    got = decoder(torch.from_numpy(codes))
    assert got.shape == (2, 64, 64)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    exact = decoder.double()(torch.from_numpy(codes))
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_codes_are_in_reading_order(path):
    """Another code in the last column of the first row changes the map there most."""
    np.savez(path, **mask_weights.published())
    decoder = load_mask_decoder(path)
    before, after = decoder(torch.tensor([0] * 16 + [0, 0, 0, 1] + [0] * 12))
    where = (after - before).abs().unflatten(0, (4, 16)).unflatten(2, (4, 16)).sum((1, 3))
    assert divmod(int(where.argmax()), 4) == (0, 3)


def test_a_loaded_decoder_is_for_inference(path):
    np.savez(path, **mask_weights.published())
    decoder = load_mask_decoder(path)
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert "Conv2d((128, 6, 1, 1))" in str(decoder)
