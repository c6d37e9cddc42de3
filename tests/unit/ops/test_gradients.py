"""Gradients that are written out, of norm, gate and attention, against differences and torch's own."""

import pytest
import torch

from gemkit import ops
from gemkit.nn import Batch


def test_the_gradient_of_rms_norm():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 2, 16, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: ops.rms_norm(*given, 1e-6), (x, weight))
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)
    expected = torch.autograd.grad(plain, (x, weight), grad)
    found = torch.autograd.grad(ops.rms_norm(x, weight, 1e-6), (x, weight), grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64 sums in another order


def test_the_gradient_of_geglu():
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(ops.geglu, (gate, up))
    plain = torch.nn.functional.gelu(gate, approximate="tanh") * up
    expected = torch.autograd.grad(plain, (gate, up), grad)
    found = torch.autograd.grad(ops.geglu(gate, up), (gate, up), grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # the same products


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_of_attention(softcap):
    """Two sequences, one with a span, in several tiles of a window, two query heads on each key/value head."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(150, heads, 3, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    for x in given:
        x.requires_grad_()
    batch = Batch.of([range(140), range(10)], spans=[(140, 144)])
    assert torch.autograd.gradcheck(
        lambda *qkv: ops.attention(*qkv, batch, scale=0.7, window=(4, 0), softcap=softcap), given, fast_mode=True
    )
