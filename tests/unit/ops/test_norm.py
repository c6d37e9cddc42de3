"""The gradient of the RMS norm, which is written out, against differences and torch's own of the definition."""

import torch

from gemkit import ops


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
