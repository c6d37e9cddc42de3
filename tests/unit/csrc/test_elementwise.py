"""Functions of single numbers against NumPy in float64, and the ops on rows against their definitions."""

import numpy as np
import pytest
import torch

from gemkit import ops
from support.kernels import misaligned

SIZES = (1, 2, 15, 16, 17, 31, 63, 64, 65, 255, 640, 1000, 2305)


def everything() -> np.ndarray:
    """Bit patterns from all of float32, a fine grid where the functions bend, and the edges."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 500_003, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 88.72283, 88.72284, -87.33655, -103.97, -103.98, 9.02]
    grids = [np.linspace(-110, 95, 400_001), np.linspace(-1, 1, 200_001), edges, [3.4028235e38, -3.4028235e38]]
    # each by itself: signalling NaNs among the patterns must not be cast
    return np.concatenate([patterns, *(np.array(grid, np.float32) for grid in grids)])


X = everything()

# name, in float64, where it is defined, units in the last place that it may be off
FUNCTIONS = [
    ("exp", np.exp, slice(None), 1.0),
    ("expm1", np.expm1, X <= 88, 1.5),
    ("tanh", np.tanh, slice(None), 2.5),
    # 1 + exp(-x) leaves float32 below -88, as torch's does: see the next test
    ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), X > -87, 2.5),
    ("softplus", lambda x: np.logaddexp(0, x), slice(None), 2.5),
]


def off(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance in units in the last place of the float32 nearest to the exact value; infinite if only one is a NaN."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        nearest = exact.astype(np.float32)
        units = np.abs(ours.astype(np.float64) - exact) / np.spacing(np.abs(nearest))
    units[(ours == nearest) | (np.isnan(ours) & np.isnan(exact))] = 0
    return np.where(np.isnan(units), np.inf, units)


@pytest.mark.parametrize(("name", "exact", "where", "units"), FUNCTIONS, ids=[row[0] for row in FUNCTIONS])
def test_functions_over_all_of_float32(kernels, name, exact, where, units):
    x = np.ascontiguousarray(X[where])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        theirs = exact(x.astype(np.float64))
    results = [kernel.map(name, x) for kernel in kernels.values()]
    assert off(results[0], theirs).max() <= units
    number = ~np.isnan(x)
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.uint32)[number], results[0].view(np.uint32)[number])
        assert np.isnan(other[~number]).all()


def test_far_ends(kernel):
    x = np.array([np.inf, -np.inf, 1e30, -1e30, np.nan], np.float32)
    for name, ends in {
        "exp": [np.inf, 0, np.inf, 0],
        "tanh": [1, -1, 1, -1],
        "sigmoid": [1, 0, 1, 0],
        "softplus": [np.inf, 0, np.float32(1e30), 0],
    }.items():
        np.testing.assert_array_equal(kernel.map(name, x), np.array([*ends, np.nan], np.float32))


def rows(n: int, seed: int = 0, count: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(3 * rng.standard_normal(n)).astype(np.float32) for _ in range(count)]


def result(n: int) -> np.ndarray:
    """Room for n numbers, and one behind that must stay."""
    return np.full(n + 1, 7, np.float32)


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(kernel, n):
    x, weight = rows(n, count=2)
    for factor in (1.0, 1e-20, 1e15, 0.0):  # squares below and at the end of float32
        y = result(n)
        kernel.call("rms_norm", x * np.float32(factor), weight, 1e-6, n, y)
        theirs = ops.rms_norm(torch.from_numpy(x * np.float32(factor)).double(), torch.from_numpy(weight), 1e-6)
        # a sum of n squares, a root, a division and two products
        np.testing.assert_allclose(y[:n], theirs.numpy(), rtol=2e-6, atol=1e-7)
        assert y[n] == 7


@pytest.mark.parametrize(
    ("head_dim", "half"), [(2, 1), (16, 8), (64, 32), (72, 36), (256, 128), (256, 64), (40, 5), (8, 0)]
)
def test_rope(kernel, head_dim, half):
    x, angles = rows(3 * head_dim)[0].reshape(1, 3, head_dim), rows(half + 1, seed=1)[0][:half]
    table = np.cos(angles), np.sin(angles)
    theirs = ops.rope(torch.from_numpy(x), tuple(torch.from_numpy(part[None]) for part in table)).numpy()
    kernel.call("rope", x, 3, head_dim, *table, half)
    np.testing.assert_array_equal(x[..., 2 * half :], theirs[..., 2 * half :])
    np.testing.assert_allclose(x, theirs, rtol=0, atol=2e-6)  # the same products; torch may fuse one of the two


@pytest.mark.parametrize("n", SIZES)
def test_gates(kernel, n):
    gate, up = rows(n, count=2)
    y = result(n)
    kernel.call("gelu", gate, n, y)
    theirs = ops.gelu(torch.from_numpy(gate).double()).numpy()
    np.testing.assert_allclose(y[:n], theirs, rtol=2e-6, atol=1e-6)  # far to the left it is a small exponential
    z = result(n)
    kernel.call("geglu", gate, up, n, z)
    np.testing.assert_array_equal(z[:n], y[:n] * up)
    kernel.call("geglu", gate, up, n, gate)  # in place
    np.testing.assert_array_equal(z[:n], gate)
    assert y[n] == z[n] == 7


def test_gelu_over_all_of_float32(kernel):
    ours, theirs = kernel.map("gelu", X), ops.gelu(torch.from_numpy(X)).numpy()
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    assert ours[np.inf == X] == np.inf
    finite = np.isfinite(X)
    x, ours, theirs = X[finite], ours[finite], theirs[finite]
    assert (abs(ours - theirs) <= 1e-6 * abs(x) + 1e-44).all()


@pytest.mark.parametrize("n", SIZES)
def test_softcap_add_mul_and_magnitude(kernel, n):
    a, b = rows(n, count=2)
    for name, theirs in (("add", a + b), ("mul", a * b)):
        y = result(n)
        kernel.call(name, a, b, n, y)
        np.testing.assert_array_equal(y[:n], theirs)
        assert y[n] == 7
    in_place = a.copy()
    kernel.call("add", in_place, b, n, in_place)
    np.testing.assert_array_equal(in_place, a + b)
    assert kernel.call("magnitude", a, n) == abs(a).max()
    capped = np.concatenate([100 * a, [np.float32(7)]])
    kernel.call("softcap", capped, 30.0, n)
    theirs = ops.softcap(torch.from_numpy(100 * a).double(), 30.0).numpy()
    np.testing.assert_allclose(capped[:n], theirs, rtol=5e-7)
    assert capped[n] == 7


def test_numbers_below_a_bound_are_counted_by_64(kernel):
    for n in (0, 1, 63, 64, 65, 200, 256):
        x = np.full(n, -1, np.float32)
        assert kernel.call("below", x, 0.0, n) == n // 64 * 64
        for place in {0, n // 2, n - 1} if n else ():
            for met in (0.0, 1.0, np.inf, np.nan):
                x[place] = met
                assert kernel.call("below", x, 0.0, n) == min(place, n) // 64 * 64
            x[place] = -1
    assert kernel.call("below", np.full(64, -np.inf, np.float32), -np.inf, 64) == 0


def test_magnitude_of_what_is_not_finite(kernel):
    for n in SIZES:
        for bad in (np.nan, np.inf, -np.inf):
            for place in {0, n // 2, n - 1}:
                x = np.ones(n, np.float32)
                x[place] = bad
                assert kernel.call("magnitude", x, n) == np.inf
    assert kernel.call("magnitude", np.zeros(5, np.float32), 5) == 0
    assert kernel.call("magnitude", np.full(5, -3e38, np.float32), 5) == np.float32(3e38)


def test_what_is_not_a_number_stays_so(kernel):
    x = np.ones(37, np.float32)
    x[20] = np.nan
    for name in ("gelu", "tanh", "exp", "sigmoid", "softplus"):
        assert np.flatnonzero(np.isnan(kernel.map(name, x))).tolist() == [20]
    y = result(37)
    kernel.call("rms_norm", x, x, 1e-6, 37, y)
    assert np.isnan(y[:37]).all()


@pytest.mark.parametrize("by", [4, 8, 36, 60])
def test_any_alignment(kernels, by):
    """And the same bits from every instruction set."""
    (gate, up), y = rows(333, count=2), []
    for kernel in kernels.values():
        for shift in (0, by):
            a, b, out = misaligned(gate, shift), misaligned(up, shift), misaligned(np.zeros(333, np.float32), shift)
            kernel.call("geglu", a, b, 333, out)
            normed = misaligned(np.zeros(333, np.float32), shift)
            kernel.call("rms_norm", a, b, 1e-6, 333, normed)
            y.append(np.concatenate([out, normed]).view(np.uint32))
    for other in y[1:]:
        np.testing.assert_array_equal(other, y[0])
