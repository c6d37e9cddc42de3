"""Attention against the dense definition of its mask, written out by hand where a hand can."""

import itertools
import sys

import pytest
import torch

from gemkit import ops
from gemkit.errors import ConfigError, StateError
from gemkit.nn import Batch
from gemkit.nn.batch import Patches

# A prompt of five with an image and an answer of two, as PaliGemma has them: rows are queries, columns are keys.
SPAN_IN_FRONT = """
    11111..
    11111..
    11111..
    11111..
    11111..
    111111.
    1111111"""
# The same with a window of 3: it cuts what the answer sees, and nothing within the span.
IN_FRONT_WITH_A_WINDOW = """
    11111..
    11111..
    11111..
    11111..
    11111..
    ...111.
    ....111"""
# An image in the middle of a prompt, as Gemma 3 has it: before and after it text that looks back alone.
SPAN_IN_THE_MIDDLE = """
    1......
    11.....
    11111..
    11111..
    11111..
    111111.
    1111111"""
# With a window of 2 a token of the image sees it whole, and before it only what the window reaches.
IN_THE_MIDDLE_WITH_A_WINDOW = """
    1......
    11.....
    .1111..
    ..111..
    ..111..
    ....11.
    .....11"""
TWO_SPANS = """
    11.....
    11.....
    111....
    1111...
    1111111
    1111111
    1111111"""
TWO_ADJACENT_SPANS_WITH_A_WINDOW = """
    1......
    1111...
    .111...
    .111...
    ...111.
    ....11.
    .....11"""
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


# EmbeddingGemma's sliding layers: two tokens before and two after.
BOTH_SIDES = """
    111....
    1111...
    11111..
    .11111.
    ..11111
    ...1111
    ....111"""
# Two before and one after, and a span that sees itself all the same.
UNEVEN_WITH_A_SPAN = """
    11.....
    111....
    111111.
    .11111.
    ..1111.
    ..11111
    ....111"""
ALL = "1111111 " * 7


@pytest.mark.parametrize("softcap", [None, 5.0])  # each of the kernels
@pytest.mark.parametrize(
    ("spans", "window", "mask"),
    [
        ([(0, 5)], (None, 0), SPAN_IN_FRONT),
        ([(0, 5)], (2, 0), IN_FRONT_WITH_A_WINDOW),
        ([(2, 5)], (None, 0), SPAN_IN_THE_MIDDLE),
        ([(2, 5)], (1, 0), IN_THE_MIDDLE_WITH_A_WINDOW),
        ([(0, 2), (4, 7)], (None, 0), TWO_SPANS),
        ([(1, 4), (4, 6)], (1, 0), TWO_ADJACENT_SPANS_WITH_A_WINDOW),
        ([], (None, 0), CAUSAL),
        ([(3, 4)], (None, 0), CAUSAL),
        ([], (2, 2), BOTH_SIDES),
        ([(2, 6)], (2, 1), UNEVEN_WITH_A_SPAN),
        ([], (None, None), ALL),
        ([(0, 7)], (0, 0), ALL),
    ],
)
def test_masks_by_hand(spans, window, mask, softcap):
    batch = Batch.of([range(7)], spans=spans)
    assert seen(batch, 7, window=window, softcap=softcap) == mask.split()


EACH_ITS_OWN = """
    11.......
    11.......
    111......
    ...1.....
    ...11....
    .....1...
    .....1111
    .....1111
    .....1111"""
EACH_WHOLE = """
    111......
    111......
    111......
    ...11....
    ...11....
    .....1111
    .....1111
    .....1111
    .....1111"""


def test_each_sequence_has_its_own_spans():
    batch = Batch.of([range(3), range(2), range(4)], spans=[(0, 2), (6, 9)])
    assert seen(batch, 9) == EACH_ITS_OWN.split()
    assert seen(batch, 9, window=(None, None)) == EACH_WHOLE.split()


class Remembered:
    """A memory of keys and values that holds all it was given."""

    def __init__(self):
        self.k, self.v = {}, {}

    def append(self, slot, position, k, v):
        for held, new in ((self.k, k), (self.v, v)):
            held[slot] = torch.cat([held[slot][:position], new]) if slot in held else new

    def read(self, slot):
        return self.k[slot], self.v[slot], 0


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [(None, 0), (1, 0)])
@pytest.mark.parametrize("cuts", [[2, 5], [1, 2, 6], [5], [6]])
def test_chunks_that_cut_no_span_give_the_same_as_the_whole(cuts, window, softcap):
    """Of two sequences: one with a span from 2 to 5, which is beside the first chunk, within it, or before a later."""
    torch.manual_seed(0)
    rows, spans = 9, [(2, 5)]
    q, k, v = (torch.randn(2 * rows, heads, 8) for heads in (4, 2, 2))
    options = {"scale": 0.5, "window": window, "softcap": softcap}
    whole = ops.attention(q, k, v, Batch.of([range(rows)] * 2, spans=spans), **options).unflatten(0, (2, rows))
    memory, got = Remembered(), []
    for begin, end in itertools.pairwise([0, *cuts, rows]):
        size = end - begin
        inside = [(a - begin, b - begin) for a, b in spans if begin <= a < end]
        batch = Batch.of([range(size)] * 2, offsets=[begin] * 2, slots=[3, 1], spans=inside)
        parts = [x.unflatten(0, (2, rows))[:, begin:end].flatten(0, 1) for x in (q, k, v)]
        got.append(ops.attention(*parts, batch, memory, **options).unflatten(0, (2, size)))
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=0, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("window", [(None, None), (2, 2)])
def test_tokens_that_see_what_follows_are_computed_whole(window):
    """With a state as without one; and nothing goes on after them, for they would have to have seen it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, heads, 8) for heads in (2, 1, 1))
    memory, options = Remembered(), {"scale": 0.5, "window": window}
    got = ops.attention(q, k, v, Batch.of([range(7)]), memory, **options)
    assert torch.equal(got, ops.attention(q, k, v, Batch.of([range(7)]), **options))
    with pytest.raises(StateError, match="slot 0 goes on at position 7, but its tokens see those after them"):
        ops.attention(q[:1], k[:1], v[:1], Batch.of([[1]], offsets=[7]), memory, **options)


def test_every_patch_of_an_image_sees_every_other_and_none_of_another_image():
    assert seen(Patches(2, 3), 6, window=(None, None)) == ["111..."] * 3 + ["...111"] * 3


def dense(q_TNH, k_TKH, v_TKH, spans, *, scale, window, softcap):
    """The definition, with a mask of (T, T), in float64."""
    rows, heads = q_TNH.shape[:2]
    q, k, v = (x.double().transpose(0, 1) for x in (q_TNH, k_TKH, v_TKH))
    k, v = (x.repeat_interleave(heads // k_TKH.shape[1], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(rows)
    age, (before, after) = at[:, None] - at, window
    mask = (age <= (rows if before is None else before)) & (age >= -(rows if after is None else after))
    for first, end in spans:
        mask |= (at[:, None] >= first) & (at[:, None] < end) & (at >= first) & (at < end)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)


REACHES = [(None, 0), (0, 0), (6, 0), (149, 0), (None, None), (0, None), (70, 70), (3, 140)]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", REACHES)
@pytest.mark.parametrize(
    "spans",  # at and about the borders of tiles; all of it; several
    [[], [(0, 1)], [(0, 127)], [(0, 128)], [(0, 129)], [(0, 300)], [(1, 300)], [(5, 140), (140, 141), (200, 290)]],
)
def test_tiles_agree_with_the_whole_mask(spans, window, softcap):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, heads, 16, generator=generator) for heads in (4, 2, 2))
    options = {"scale": 0.5, "window": window, "softcap": softcap}
    ours = ops.attention(q, k, v, Batch.of([range(300)], spans=spans), **options)
    # float32 sums against float64
    torch.testing.assert_close(ours.double(), dense(q, k, v, spans, **options), rtol=0, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [(19, 0), (30, 9), (None, None)])
def test_gradients_agree_with_the_whole_mask(softcap, window):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(140, heads, 8, generator=generator, requires_grad=True) for heads in (2, 1, 1)]
    weights = torch.randn(140, 2, 8, generator=generator)
    options = {"scale": 0.5, "window": window, "softcap": softcap}
    ours = torch.autograd.grad(
        (ops.attention(*leaves, Batch.of([range(140)], spans=[(10, 130)]), **options) * weights).sum(), leaves
    )
    theirs = torch.autograd.grad((dense(*leaves, [(10, 130)], **options) * weights).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_neighbours_that_are_alike_are_attended_at_once_and_as_each_alone(monkeypatch, softcap):
    """Two without a span, two with one, two long ones: the same output and gradient."""
    attention = sys.modules["gemkit.ops.attention"]
    lengths, spans = [9, 9, 9, 9, 300, 300], [[], [], [(0, 4)], [(0, 4)], [], []]
    batch = Batch.of([range(n) for n in lengths], spans=[(18, 22), (27, 31)])
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2))
    calls = []
    for name in ("_tile_sdpa", "_tile_explicit"):
        tile = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda q, *rest, tile=tile: calls.append(len(q)) or tile(q, *rest))
    out = ops.attention(q, k, v, batch, scale=0.3, softcap=softcap)
    # sequences of each tile: one of all tokens, one of the span and one after it, three of each long sequence
    assert calls == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    first = 0
    for n, own in zip(lengths, spans, strict=True):
        end = first + n
        alone = [x.detach()[first:end].requires_grad_() for x in (q, k, v)]
        expected = ops.attention(*alone, Batch.of([range(n)], spans=own), scale=0.3, softcap=softcap)
        torch.testing.assert_close(out[first:end], expected)
        for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), alone), strict=True):
            torch.testing.assert_close(grad[first:end], wanted)
        first = end


def test_no_mask_is_built_of_a_span(monkeypatch):
    """The patches of an image of 896 pixels and a question: the only mask is that of the answer's one tile."""
    attention = sys.modules["gemkit.ops.attention"]
    built, real = [], attention._visible

    def visible(*args):
        mask = real(*args)
        built.append(tuple(mask.shape))
        return mask

    monkeypatch.setattr(attention, "_visible", visible)
    rows = 4096 + 20
    q, kv = torch.zeros(rows, 2, 4), torch.zeros(rows, 1, 4)
    ops.attention(q, kv, kv, Batch.of([range(rows)], spans=[(0, rows - 5)]), scale=1.0)
    assert built == [(5, rows)]


def test_image_rows_must_be_rows():
    with pytest.raises(ConfigError, match=r"image_rows=\[3\] must be rows of the 3 tokens"):
        Batch.of([[1, 2, 3]], image_rows=[3])
    batch = Batch.of([[1, 2, 3]], image_rows=[0, 1])
    batch.expect_features(torch.zeros(2, 4))
    for features, count in ((None, 0), (torch.zeros(3, 4), 3)):
        with pytest.raises(ConfigError, match=f"{count} image features for 2 image_rows"):
            batch.expect_features(features)
