"""Attention over a ragged batch, in tiles: no (T, S) mask is ever built.

Each sequence is attended on its own, `_TILE` queries at a time, against only the keys that this tile may see: from the
first one that its first query sees to the last one that its last query sees. The borders of a span are borders between
tiles, so that the queries of one without a window need no mask at all. Grouped heads are folded into the rows of the
queries, so that a key/value head is read once for all the query heads it serves and never repeated in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemkit.errors import StateError
from gemkit.ops.basic import wide
from gemkit.ops.symbolic import op

# Queries a tile. 64, 128, 256, 512 and 1,024 took 399, 345, 370, 453 and 502 ms without a soft cap and 442, 431, 511,
# 581 and 847 ms with one: medians of five, 2,048 tokens, 8 heads of 256 on one key/value head, two busy CPU cores.
_TILE = 128
# Sequences of at most this many tokens are attended together with neighbours that are like them.
_SHORT = 256


class Sequences(Protocol):
    """The interface of a ragged batch's boundaries, as attention reads them; `nn.batch.Batch` implements it."""

    def sequences(self) -> Iterator[tuple[int, int, int, int]]:
        """(first row, end row, state slot, position of the first row) of each sequence."""
        ...

    def span_rows(self) -> Sequence[tuple[int, int]]:
        """(first row, end row) of each span of tokens that see one another, ascending; each is in one sequence."""
        ...


class Memory(Protocol):
    """The interface of an attention layer's KV cache; `nn.state.KVCache` implements it."""

    def append(self, slot: int, position: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Remember the keys and values of the tokens from `position` on."""
        ...

    def read(self, slot: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values (S, K, H), and the position of the first of them."""
        ...


def attention_kernel(softcap: float | None) -> tuple[str, str]:
    """Which of torch's kernels computes a tile, and why; a gradient on a CPU is `_Attention`'s whatever the cap."""
    if softcap is None:
        return "sdpa", "torch's fused kernel: no soft cap on the scores"
    return "explicit", "the scores are soft-capped, which torch's fused kernel cannot express"


Window = tuple[int | None, int | None]  # tokens that a query sees before and after itself; None: all

P = ParamSpec("P")
R = TypeVar("R")


def opaque(op: Callable[P, R]) -> Callable[P, R]:
    """An op that compilation does not look into: its loop over boundaries would be a new program for every batch.

    torch's own way to say so imports its compiler, which takes 1.5 s: it is asked only once something has compiled.
    """
    disabled: Any = None

    @wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return op(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(op)
        return disabled(*args, **kwargs)

    return call


def _cost(q_TNH: Any, k_TKH: Any, batch: Any, window: Window, **_: Any) -> dict[str, int | None]:
    """Keys and values are remembered in 2 bytes a number; a score and a weighted value are 2 operations each."""
    _, heads, width = q_TNH.shape
    return {
        "key_bytes": 2 * 2 * k_TKH.shape[1] * width,
        "pair_flops": 4 * heads * width,
        "window": None if window[0] is None else window[0] + 1,
        "length": getattr(batch, "per_image", None),
    }


@op(lambda q_TNH, **_: q_TNH.shape, cost=_cost)
@opaque
def attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    batch: Sequences,
    memory: Memory | None = None,
    *,
    scale: float,
    window: Window = (None, 0),
    softcap: float | None = None,
) -> Tensor:
    """Attention of every sequence of a ragged batch over itself and what it remembers, as (T, N, H).

    A query sees the keys of its window, and all keys of the span that it is in, if it is in one: the two masks are
    joined by OR.

    Args:
        q_TNH, k_TKH, v_TKH: queries, keys and values of the new tokens, already rotated. K divides N; query head n
            uses key/value head n // (N / K).
        batch: the boundaries of sequences and spans.
        memory: what the layer remembers; the new keys and values are appended to it. None: nothing came before.
        scale: multiplies the scores.
        window: (before, after): tokens that a query sees before and after itself; None: all of them. (None, 0) is
            causal attention, (w - 1, 0) a causal window of w tokens, (None, None) attention of all to all.
        softcap: bounds the scores, before the mask.

    Raises:
        StateError: if a sequence goes on from what `memory` holds while its window reaches after the query: the tokens
            that are remembered have not seen these.

    Source: the masks are those of Transformers' PaliGemma, and of its EmbeddingGemma for a window on both sides. Its
        Gemma 3 lets a window cut the past of a span too; an image there has 256 tokens and no window is shorter than
        512, so that both readings are the same.
    """
    fused = attention_kernel(softcap)[0] == "sdpa"
    trained = memory is None and torch.is_grad_enabled() and any(x.requires_grad for x in (q_TNH, k_TKH, v_TKH))
    parts: list[Tensor] = []
    runs = list(_runs(batch, alone=memory is not None))
    rows = [run.sequences * run.length for run in runs]
    # not slices of all rows: the gradient of each would be as long as the batch
    for run, q, k, v in zip(runs, q_TNH.split(rows), k_TKH.split(rows), v_TKH.split(rows), strict=True):
        before = 0  # keys in front of the first query's own
        if memory is not None:
            if run.position and window[1] != 0:
                raise StateError(
                    f"slot {run.slot} goes on at position {run.position}, but its tokens see those after them: compute "
                    "the sequence whole, in an empty slot"
                )
            memory.append(run.slot, run.position, k, v)
            k, v, start = memory.read(run.slot)
            before = run.position - start
        q_BTNH, k_BSKH, v_BSKH = (x.unflatten(0, (run.sequences, -1)) for x in (q, k, v))
        tiles = partial(_tiles, run.length, before, window, run.spans, q.device)
        # torch's fused gradient is slow on a CPU: 46 ms where this takes 31 (512 tokens, 4 heads of 256, two cores)
        if trained and (q.device.type == "cpu" or not fused):
            out_BTNH: Any = _Attention.apply(q_BTNH, k_BSKH, v_BSKH, tiles, scale, softcap)
        else:
            tile = _tile_sdpa if fused else _tile_explicit
            out_BTNH = _by_tiles(tile, q_BTNH, k_BSKH, v_BSKH, tiles(), scale, softcap)
        parts.append(out_BTNH.flatten(0, 1))
    return torch.cat(parts)


@dataclass
class _Run:
    """Neighbouring sequences that are alike, and are attended at once."""

    sequences: int
    length: int
    slot: int
    position: int
    spans: list[tuple[int, int]]  # rows, counted from the sequence's first


def _runs(batch: Sequences, alone: bool) -> Iterator[_Run]:
    """Short sequences together where neighbours are alike, as the images of a tower are; a long one fills a tile by
    itself. With `alone` each is a run of one."""
    run: _Run | None = None
    left = list(reversed(batch.span_rows()))
    for first, end, slot, position in batch.sequences():
        length, spans = end - first, []
        while left and left[-1][1] <= end:
            start, until = left.pop()
            spans.append((start - first, until - first))
        if run is not None:
            alike = (length, position, spans) == (run.length, run.position, run.spans)
            if alike and not alone and length <= _SHORT:
                run.sequences += 1
                continue
            yield run
        run = _Run(1, length, slot, position, spans)
    if run is not None:
        yield run


Tile = tuple[slice, slice, Tensor | None]  # queries, the keys that they may see, which of these each does see


def _tiles(
    queries: int, offset: int, window: Window, spans: Sequence[tuple[int, int]], device: torch.device
) -> Iterator[Tile]:
    """`_TILE` queries at a time, none of them over a border of a span.

    Args:
        offset: keys in front of the first query's own.
        spans: (first, end) queries that see one another.
    """
    before, after = window
    borders = sorted({0, queries, *(border for span in spans for border in span)})
    for begin, end in pairwise(borders):
        span = (offset + begin, offset + end) if (begin, end) in spans else None

        def seen(key: int, span: tuple[int, int] | None = span) -> tuple[int, int]:
            """(first, end) of the keys that the query of this key sees: they follow one another, as a span holds it."""
            first = 0 if before is None else max(0, key - before)
            until = offset + queries if after is None else min(offset + queries, key + after + 1)
            return (first, until) if span is None else (min(first, span[0]), max(until, span[1]))

        for t in range(begin, end, _TILE):
            last = min(t + _TILE, end) - 1
            (lo, first_hi), (last_lo, hi) = seen(offset + t), seen(offset + last)
            visible = None
            if (lo, first_hi) != (last_lo, hi):
                visible = _visible(range(offset + t, offset + last + 1), range(lo, hi), window, span, device)
            yield slice(t, last + 1), slice(lo, hi), visible


def _by_tiles(
    tile: Callable[..., Tensor],
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    tiles: Iterator[Tile],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The results of `tile` for each tile, one after the other, as (B, T, N, H)."""
    k_BKSH, v_BKSH = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    outs = [
        tile(q_BTNH[:, rows], k_BKSH[:, :, keys], v_BKSH[:, :, keys], visible, scale, softcap)
        for rows, keys, visible in tiles
    ]
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def _visible(queries: range, keys: range, window: Window, span: tuple[int, int] | None, device: torch.device) -> Tensor:
    """True where a query may attend to a key, (T, S). All are numbered as keys; the queries are all in `span`, or in
    none."""
    before, after = window
    at_S = torch.arange(keys.start, keys.stop, device=device)
    age_TS = torch.arange(queries.start, queries.stop, device=device)[:, None] - at_S
    visible_TS = torch.ones_like(age_TS, dtype=torch.bool)
    if after is not None:
        visible_TS &= age_TS >= -after
    if before is not None:
        visible_TS &= age_TS <= before
    if span is not None:
        visible_TS |= (at_S >= span[0]) & (at_S < span[1])
    return visible_TS


def _fold(q_BTNH: Tensor, kv_heads: int) -> Tensor:
    """(B, T, K * G, H) to (B, K, G * T, H): query heads that share a key/value head become rows of one product."""
    return q_BTNH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(o_BKEH: Tensor, queries: int) -> Tensor:
    """(B, K, G * T, H) back to (B, T, K * G, H)."""
    return o_BKEH.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _weights(q_BTNH: Tensor, k_BKSH: Tensor, visible_TS: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Attention probabilities (B, K, G * T, S): scores, cap, mask and softmax in float32."""
    scores_BKES = (wide(_fold(q_BTNH, k_BKSH.shape[1])) * scale) @ wide(k_BKSH).transpose(2, 3)
    if softcap is not None:
        scores_BKES = softcap * torch.tanh(scores_BKES / softcap)
    if visible_TS is not None:
        scores_BKGTS = scores_BKES.unflatten(2, (-1, len(visible_TS)))
        scores_BKES = scores_BKGTS.masked_fill(~visible_TS, float("-inf")).flatten(2, 3)
    return scores_BKES.softmax(-1)


def _tile_explicit(
    q_BTNH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visible_TS: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """The definition."""
    out_BKEH = _weights(q_BTNH, k_BKSH, visible_TS, scale, softcap) @ wide(v_BKSH)
    return _unfold(out_BKEH, q_BTNH.shape[1]).to(q_BTNH.dtype)


class _Attention(torch.autograd.Function):
    """Sequences by the definition, with a gradient that computes the weights of each tile anew: all that is kept is
    queries, keys and values, as in FlashAttention (arXiv:2205.14135)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        tiles: Callable[[], Iterator[Tile]],
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q_BTNH, k_BSKH, v_BSKH)
        ctx.how = tiles, scale, softcap
        return _by_tiles(_tile_explicit, q_BTNH, k_BSKH, v_BSKH, tiles(), scale, softcap)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTNH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (q_BTNH, k_BSKH, v_BSKH), (tiles, scale, softcap) = ctx.saved_tensors, ctx.how
        grad_q_BTNH = torch.empty_like(q_BTNH)
        grad_k_BSKH, grad_v_BSKH = (torch.zeros_like(wide(x)) for x in (k_BSKH, v_BSKH))
        for rows, keys, visible in tiles():
            with torch.enable_grad():
                q, k = (x.detach().requires_grad_() for x in (q_BTNH[:, rows], k_BSKH[:, keys]))
                weights_BKES = _weights(q, k.transpose(1, 2), visible, scale, softcap)
            grad_BKEH = wide(_fold(grad_BTNH[:, rows], k_BSKH.shape[2]))
            grad_weights_BKES = grad_BKEH @ wide(v_BSKH[:, keys]).permute(0, 2, 3, 1)
            grad_q_BTNH[:, rows], grad_k = torch.autograd.grad(weights_BKES, (q, k), grad_weights_BKES)
            grad_k_BSKH[:, keys] += grad_k
            grad_v_BSKH[:, keys] += (weights_BKES.detach().transpose(2, 3) @ grad_BKEH).transpose(1, 2)
        return grad_q_BTNH, grad_k_BSKH.to(k_BSKH.dtype), grad_v_BSKH.to(v_BSKH.dtype), None, None, None


def _tile_sdpa(
    q_BTNH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visible_TS: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """The same without a cap, by torch's fused kernel, which accumulates in float32."""
    assert softcap is None
    kv_heads, queries = k_BKSH.shape[1], q_BTNH.shape[1]
    q_BKEH = _fold(q_BTNH, kv_heads)
    mask_ES = None if visible_TS is None else visible_TS.repeat(q_BKEH.shape[2] // queries, 1)
    out_BKEH = F.scaled_dot_product_attention(q_BKEH, k_BKSH, v_BKSH, attn_mask=mask_ES, scale=scale)
    return _unfold(out_BKEH, queries)
