"""Attention against the dense definition of its mask, written out by hand where a hand can."""

import sys

import pytest
import torch

from gemkit import ops
from gemkit.errors import ConfigError
from gemkit.nn import Batch
from gemkit.nn.batch import Patches

# Two images, a prompt of three with its separator, an answer of two: rows are queries, columns are keys.
PREFIX_OF_FIVE = """
    11111..
    11111..
    11111..
    11111..
    11111..
    111111.
    1111111"""
# The same with a window of 3: it cuts what the answer sees, and nothing within the prefix.
WITH_A_WINDOW = """
    11111..
    11111..
    11111..
    11111..
    11111..
    ...111.
    ....111"""
CAUSAL = """
    1......
    11.....
    111....
    1111...
    11111..
    111111.
    1111111"""


def seen(batch, rows: int, **options) -> list[str]:
    """Which keys each query gives weight to: values are one-hot, so an output is the row of weights."""
    torch.manual_seed(0)
    q, k = torch.randn(rows, 1, 8), torch.randn(rows, 1, 8)
    v = torch.eye(rows)[:, None]
    out = ops.attention(q, k, v, batch, scale=0.3, **options)
    return ["".join("1" if weight > 0 else "." for weight in row) for row in out[:, 0]]


@pytest.mark.parametrize("softcap", [None, 5.0])  # each of the kernels
@pytest.mark.parametrize(
    ("prefix", "window", "mask"), [(5, None, PREFIX_OF_FIVE), (5, 3, WITH_A_WINDOW), (0, None, CAUSAL)]
)
def test_the_mask_of_a_prefix(prefix, window, mask, softcap):
    batch = Batch.of([range(7)], prefixes=[prefix])
    assert seen(batch, 7, window=window, softcap=softcap) == mask.split()


EACH_ITS_OWN = """
    11.......
    11.......
    111......
    ...1.....
    ...11....
    .....1111
    .....1111
    .....1111
    .....1111"""


def test_each_sequence_has_its_own_prefix():
    batch = Batch.of([range(3), range(2), range(4)], prefixes=[2, 0, 4])
    assert seen(batch, 9) == EACH_ITS_OWN.split()


def test_every_patch_of_an_image_sees_every_other_and_none_of_another_image():
    assert seen(Patches(2, 3), 6) == ["111..."] * 3 + ["...111"] * 3


def dense(q_TNH, k_TKH, v_TKH, prefix, *, scale, window, softcap):
    """The definition, with a mask of (T, T), in float64."""
    rows, heads = q_TNH.shape[:2]
    q, k, v = (x.double().transpose(0, 1) for x in (q_TNH, k_TKH, v_TKH))
    k, v = (x.repeat_interleave(heads // k_TKH.shape[1], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(rows)
    age = at[:, None] - at
    mask = (age >= 0) & (age < (window or rows)) | (at[:, None] < prefix) & (at < prefix)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 7, 150])
@pytest.mark.parametrize("prefix", [0, 1, 127, 128, 129, 300])  # at and about the borders of tiles; all of it
def test_tiles_agree_with_the_whole_mask(prefix, window, softcap):
    generator = torch.Generator().manual_seed(prefix)
    q, k, v = (torch.randn(300, heads, 16, generator=generator) for heads in (4, 2, 2))
    options = {"scale": 0.5, "window": window, "softcap": softcap}
    ours = ops.attention(q, k, v, Batch.of([range(300)], prefixes=[prefix]), **options)
    # float32 sums against float64
    torch.testing.assert_close(ours.double(), dense(q, k, v, prefix, **options), rtol=0, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_agree_with_the_whole_mask(softcap):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(140, heads, 8, generator=generator, requires_grad=True) for heads in (2, 1, 1)]
    weights = torch.randn(140, 2, 8, generator=generator)
    options = {"scale": 0.5, "window": 20, "softcap": softcap}
    ours = torch.autograd.grad(
        (ops.attention(*leaves, Batch.of([range(140)], prefixes=[130]), **options) * weights).sum(), leaves
    )
    theirs = torch.autograd.grad((dense(*leaves, 130, **options) * weights).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_neighbours_that_are_alike_are_attended_at_once_and_as_each_alone(monkeypatch, softcap):
    """Two without a prefix, two with one, two long ones: the same output and gradient."""
    attention = sys.modules["gemkit.ops.attention"]
    lengths, prefixes = [9, 9, 9, 9, 300, 300], [0, 0, 4, 4, 0, 0]
    batch = Batch.of([range(n) for n in lengths], prefixes=prefixes)
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2))
    calls = []
    for name in ("_tile_sdpa", "_tile_explicit"):
        tile = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda q, *rest, tile=tile: calls.append(len(q)) or tile(q, *rest))
    out = ops.attention(q, k, v, batch, scale=0.3, softcap=softcap)
    # sequences of each tile: one of all tokens, one of the prefix and one after it, three of each long sequence
    assert calls == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    first = 0
    for n, prefix in zip(lengths, prefixes, strict=True):
        end = first + n
        alone = [x.detach()[first:end].requires_grad_() for x in (q, k, v)]
        expected = ops.attention(*alone, Batch.of([range(n)], prefixes=[prefix]), scale=0.3, softcap=softcap)
        torch.testing.assert_close(out[first:end], expected)
        for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), alone), strict=True):
            torch.testing.assert_close(grad[first:end], wanted)
        first = end


def test_no_mask_is_built_of_a_prefix(monkeypatch):
    """The patches of an image of 896 pixels and a question: the only mask is that of the answer's one tile."""
    attention = sys.modules["gemkit.ops.attention"]
    built, real = [], attention._visible

    def visible(*args):
        mask = real(*args)
        built.append(None if mask is None else tuple(mask.shape))
        return mask

    monkeypatch.setattr(attention, "_visible", visible)
    rows = 4096 + 20
    q, kv = torch.zeros(rows, 2, 4), torch.zeros(rows, 1, 4)
    ops.attention(q, kv, kv, Batch.of([range(rows)], prefixes=[rows - 5]), scale=1.0)
    assert built == [(5, rows)]


def test_image_rows_must_be_rows():
    with pytest.raises(ConfigError, match=r"image_rows=\[3\] must be rows of the 3 tokens"):
        Batch.of([[1, 2, 3]], image_rows=[3])
    batch = Batch.of([[1, 2, 3]], image_rows=[0, 1])
    batch.expect_features(torch.zeros(2, 4))
    for features, count in ((None, 0), (torch.zeros(3, 4), 3)):
        with pytest.raises(ConfigError, match=f"{count} image features for 2 image_rows"):
            batch.expect_features(features)
