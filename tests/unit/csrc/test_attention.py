"""Attention over pages against its definition in float64, and that a row's bits depend on nothing but the row."""

import numpy as np
import pytest
import torch

from gemkit import ops
from gemkit.nn import Batch
from support import kernels as built
from support.kernels import PAGE, Memory, Partial, attend, finish, merge


def case(seed: int, *, length: int, tokens: int, group: int, head_dim: int):
    """Queries of the last `tokens` positions of a sequence, and its keys and values: numbers that float16 holds."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((tokens, group, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, length, head_dim)).astype(np.float16).astype(np.float32)
    return q, k, v


def plain(q_TGH, k_SH, v_SH, position, *, before=None, after=0, spans=(), scale=1.0, softcap=0.0):
    """The definition, one (T, S) mask and all, in float64."""
    scores = np.einsum("tgh,sh->tgs", q_TGH.astype(np.float64) * scale, k_SH.astype(np.float64))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    at_T, at_S = position + np.arange(len(q_TGH))[:, None], np.arange(len(k_SH))
    visible = (at_S <= at_T + (len(k_SH) if after is None else after)) & (
        at_S >= at_T - (len(k_SH) if before is None else before)
    )
    for start, end in spans:
        visible |= (start <= at_S) & (at_S < end) & (start <= at_T) & (at_T < end)
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("tgs,sh->tgh", weights / weights.sum(-1, keepdims=True), v_SH.astype(np.float64))


def whole(kernel, q, k, v, position, hole=0, **settings):
    pages = (0, -(-len(k) // PAGE))
    return finish(kernel, attend(Memory(kernel, k, v, hole), q, position, pages=pages, **settings), q.shape[1])


# A sum of a few hundred products of numbers around 1 is rounded to about 1e-6 of its largest term.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


@pytest.mark.parametrize("head_dim", [16, 64, 72, 128, 256, 5, 100])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_a_tile_equals_the_definition(kernel, head_dim, group):
    for tokens, length in ((1, 1), (1, 64), (1, 65), (1, 200), (3, 130), (7, 7), (40, 150)):
        q, k, v = case(length, length=length, tokens=tokens, group=group, head_dim=head_dim)
        settings = {"scale": head_dim**-0.5}
        ours = whole(kernel, q, k, v, length - tokens, **settings)
        np.testing.assert_allclose(ours, plain(q, k, v, length - tokens, **settings), **CLOSE)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("settings", [{"softcap": 50.0}, {"before": 0}, {"before": 19}, {"before": 63, "softcap": 5.0}])
def test_caps_and_windows(kernel, tokens, settings):
    q, k, v = case(1, length=300, tokens=tokens, group=2, head_dim=64)
    settings = {"scale": 0.5, **settings}
    ours = whole(kernel, q, k, v, 300 - tokens, **settings)
    np.testing.assert_allclose(ours, plain(q, k, v, 300 - tokens, **settings), **CLOSE)


@pytest.mark.parametrize(
    "spans", [[(0, 1)], [(0, 70)], [(0, 130)], [(40, 64)], [(3, 70)], [(60, 140)], [(5, 9), (30, 80), (80, 130)]]
)
@pytest.mark.parametrize("before", [None, 15])
@pytest.mark.parametrize("after", [0, 7])
def test_spans_see_themselves_both_ways(kernel, spans, before, after):
    q, k, v = case(2, length=140, tokens=140, group=2, head_dim=32)
    settings = {"scale": 0.2, "spans": spans, "before": before, "after": after}
    ours = whole(kernel, q, k, v, 0, **settings)
    np.testing.assert_allclose(ours, plain(q, k, v, 0, **settings), **CLOSE)


@pytest.mark.parametrize("tokens", [1, 50, 200])
@pytest.mark.parametrize(("before", "after"), [(None, None), (20, 20), (100, 3), (0, None)])
def test_a_window_on_both_sides(kernel, tokens, before, after):
    """Of a tile in the middle of the sequence."""
    q, k, v = case(2, length=200, tokens=200, group=2, head_dim=32)
    start = 100 if tokens < 200 else 0
    part = np.ascontiguousarray(q[start : start + tokens])
    settings = {"scale": 0.2, "before": before, "after": after}
    ours = whole(kernel, part, k, v, start, end=200, **settings)
    np.testing.assert_allclose(ours, plain(part, k, v, start, **settings), **CLOSE)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_it_is_the_op(kernel, softcap):
    """Both of the op's ways to compute it, through its own arguments."""
    q, k, v = case(3, length=90, tokens=90, group=4, head_dim=64)
    theirs = ops.attention(
        *(torch.from_numpy(x) for x in (q, k[:, None], v[:, None])),
        Batch.of([[0] * 90]), scale=0.1, window=(32, 0), softcap=softcap,
    )  # fmt: skip
    ours = whole(kernel, q, k, v, 0, scale=0.1, before=32, softcap=softcap or 0.0)
    np.testing.assert_allclose(ours, theirs.numpy(), **CLOSE)


def test_pages_outside_of_the_window_may_be_null(kernel):
    for tokens in (1, 20):
        q, k, v = case(4, length=400, tokens=tokens, group=2, head_dim=64)
        settings = {"before": 99, "scale": 0.1}
        hole = (400 - tokens - 99) // PAGE
        assert hole >= 4
        ours = whole(kernel, q, k, v, 400 - tokens, hole=hole, **settings)
        np.testing.assert_allclose(ours, plain(q, k, v, 400 - tokens, **settings), **CLOSE)


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


SETTINGS = [
    {},
    {"softcap": 20.0},
    {"before": 49},
    {"before": 99, "spans": [(0, 90)]},
    {"before": 30, "spans": [(50, 80), (90, 150)]},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 16), (2, 128), (3, 40), (8, 64)])
def test_the_bits_do_not_depend_on_the_tile(kernel, settings, group, head_dim):
    """Prompts cut anywhere, down to single tokens, which take another path through the kernel."""
    q, k, v = case(5, length=170, tokens=170, group=group, head_dim=head_dim)
    memory = Memory(kernel, k, v)

    def tiles(*sizes):
        parts, start = [], 0
        for size in sizes:
            part = np.ascontiguousarray(q[start : start + size])
            parts.append(finish(kernel, attend(memory, part, start, pages=(0, 3), scale=0.3, **settings), group))
            start += size
        return np.concatenate(parts)

    one = tiles(170)
    same_bits(tiles(64, 64, 42), one)
    same_bits(tiles(1, 2, 3, 5, 7, 11, 13, 17, 111), one)
    same_bits(tiles(*[1] * 170), one)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tokens", [1, 60])
def test_the_bits_do_not_depend_on_who_computes_the_segments(kernel, settings, tokens):
    q, k, v = case(6, length=500, tokens=tokens, group=2, head_dim=64)
    memory, position = Memory(kernel, k, v), 500 - tokens
    settings = {"scale": 0.3, **settings}

    def segments(order):
        parts = {i: attend(memory, q, position, pages=(2 * i, min(2 * i + 2, 8)), **settings) for i in order}
        for i in range(1, 4):
            merge(kernel, parts[0], parts[i])
        return parts[0]

    forwards, backwards = segments(range(4)), segments(reversed(range(4)))
    same_bits(forwards.sum, backwards.sum)
    ours = finish(kernel, forwards, 2)
    np.testing.assert_allclose(ours, plain(q, k, v, position, **settings), **CLOSE)
    # and a row alone, in the same segments
    p = None
    for i in range(4):
        part = attend(memory, np.ascontiguousarray(q[-1:]), 499, pages=(2 * i, 2 * i + 2), **settings)
        p = part if p is None else (merge(kernel, p, part), p)[1]
    same_bits(finish(kernel, p, 2)[0], ours[-1])


@pytest.mark.parametrize("tokens", [1, 50])
def test_pages_one_at_a_time_equal_all_at_once(kernel, tokens):
    q, k, v = case(7, length=250, tokens=tokens, group=2, head_dim=72)
    memory, position = Memory(kernel, k, v), 250 - tokens
    at_once = attend(memory, q, position, pages=(0, 4), scale=0.3)
    p = attend(memory, q, position, pages=(0, 1), scale=0.3)
    for page in range(1, 4):
        attend(memory, q, position, pages=(page, page + 1), partial=p, scale=0.3)
    same_bits(p.sum, at_once.sum)
    same_bits(p.most, at_once.most)
    same_bits(p.total, at_once.total)


@pytest.mark.parametrize("tokens", [1, 30])
def test_what_is_hidden_changes_nothing(kernel, tokens):
    q, k, v = case(8, length=320, tokens=tokens, group=2, head_dim=32)
    memory, position = Memory(kernel, k, v), 320 - tokens
    empty = attend(memory, q, position, pages=(0, 2), before=19, scale=0.3)
    assert (empty.most == -np.inf).all()
    assert not empty.total.any()
    assert not empty.sum.any()
    assert not finish(kernel, empty, 2).any()  # zeros, never 0 / 0
    p = attend(memory, q, position, pages=(3, 5), before=19, scale=0.3)
    before = p.most.copy(), p.total.copy(), p.sum.copy()
    attend(memory, q, position, pages=(0, 2), partial=p, before=19, scale=0.3)
    merge(kernel, p, empty)
    for ours, was in zip((p.most, p.total, p.sum), before, strict=True):
        same_bits(ours, was)
    merge(kernel, empty, p)  # nothing, then something
    same_bits(finish(kernel, empty, 2), finish(kernel, p, 2))


@pytest.mark.parametrize("tokens", [1, 70])
def test_numbers_at_the_edges(kernel, tokens):
    q, k, v = case(9, length=100, tokens=tokens, group=2, head_dim=64)
    for q_by, k_by, v_by in ((0, 1, 1), (1, 1, 0), (1e-42, 1, 1), (1, 6e-8, 6e-8), (1e-3, 1e4, 1e4)):
        by = np.float32(q_by) * q, np.float32(k_by) * k, np.float32(v_by) * v
        k_held, v_held = (x.astype(np.float16).astype(np.float32) for x in by[1:])
        ours = whole(kernel, *by, 100 - tokens)
        theirs = plain(by[0], k_held, v_held, 100 - tokens)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * abs(v_held).max() + 1e-44)


@pytest.mark.parametrize("tokens", [1, 70])
def test_one_key_far_ahead_of_the_others_is_all_there_is(kernel, tokens):
    q, k, v = case(9, length=100, tokens=tokens, group=2, head_dim=64)
    q[:] = 1e30
    k[:] = -1
    k[17] = 1
    ours = whole(kernel, q, k, v, 100 - tokens)
    np.testing.assert_array_equal(ours, np.broadcast_to(v[17], ours.shape))


def test_what_is_not_a_number_is_not_hidden_and_stays_in_its_row(kernel):
    for tokens in (1, 2, 70):
        q, k, v = case(10, length=100, tokens=tokens, group=2, head_dim=64)
        clean = whole(kernel, q, k, v, 100 - tokens)
        for bad in (np.nan, np.inf):
            spoilt = q.copy()
            spoilt[tokens - 1, 1, 3] = bad
            ours = whole(kernel, spoilt, k, v, 100 - tokens)
            assert np.isnan(ours[tokens - 1, 1]).all()
            ours[tokens - 1, 1] = clean[tokens - 1, 1]
            same_bits(ours, clean)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 30])
def test_every_instruction_set_gives_the_same_bits(kernels, group, tokens):
    q, k, v = case(11, length=200, tokens=tokens, group=group, head_dim=72)
    settings = {"before": 149, "softcap": 30.0, "scale": 0.2}
    results = [whole(kernel, q, k, v, 200 - tokens, **settings) for kernel in kernels.values()]
    for other in results[1:]:
        same_bits(other, results[0])


@pytest.mark.parametrize("head_dim", [1, 16, 37])
def test_keys_and_values_are_put_where_they_belong(kernel, head_dim):
    """Rounded to the nearest float16, as NumPy rounds, and nothing beside them is touched."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(head_dim) * 10.0 ** rng.integers(-9, 6, head_dim)).astype(np.float32)
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16).view(np.uint16)
    for slot in (0, 5, PAGE - 1):
        for name, shape, where in (
            ("put_key", (head_dim, PAGE), np.s_[:, slot]),
            ("put_value", (PAGE, head_dim), slot),
        ):
            page = np.full(shape, 0xABCD, np.uint16)
            expected = page.copy()
            expected[where] = halves
            kernel.call(name, x, head_dim, slot, page)
            np.testing.assert_array_equal(page, expected)


def test_any_alignment(kernel):
    q, k, v = case(12, length=130, tokens=5, group=2, head_dim=64)
    aligned = whole(kernel, q, k, v, 125)
    for by in (4, 20, 60):
        same_bits(whole(kernel, built.misaligned(q, by), k, v, 125), aligned)


def test_finish_strides_over_the_other_heads(kernel):
    p = Partial(6, 20)
    rng = np.random.default_rng(0)
    p.sum[:], p.total[:], p.most[:] = rng.standard_normal((6, 20)), rng.random(6) + 1, 0
    out = np.full((3, 100), 7, np.float32)
    kernel.call("finish", built.ctypes.byref(p.pointers), 6, 20, out, 100, 2)
    np.testing.assert_array_equal(out[:, :40], (p.sum / p.total[:, None]).reshape(3, 40))
    assert (out[:, 40:] == 7).all()
