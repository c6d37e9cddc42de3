"""Attention over a ragged batch, in tiles: no (T, S) mask is ever built.

Each sequence is attended on its own, `_TILE` queries at a time, against only the keys that this tile may see: those up
to its last query, from the first one in the window of its first query. The queries of a prefix see all of the prefix,
and its border is a border between tiles, so that these need no mask at all. Grouped heads are folded into the rows of
the queries, so that a key/value head is read once for all the query heads it serves and never repeated in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gemkit.ops.basic import wide
from gemkit.ops.symbolic import op

# Queries a tile. 64, 128, 256, 512 and 1,024 took 399, 345, 370, 453 and 502 ms without a soft cap and 442, 431, 511,
# 581 and 847 ms with one: medians of five, 2,048 tokens, 8 heads of 256 on one key/value head, two busy CPU cores.
_TILE = 128
# Sequences of at most so many tokens are attended together with neighbours that are like them.
_SHORT = 256


class Sequences(Protocol):
    """What attention needs to know of a batch (`nn.batch.Batch` is one)."""

    def spans(self) -> Iterator[tuple[int, int, int, int]]:
        """(first row, end row, state slot, position of the first row) of each sequence."""
        ...

    def prefix_lengths(self) -> Sequence[int]:
        """How many tokens of each sequence, from its position 0 on, see one another: all of them are in one span."""
        ...


class Memory(Protocol):
    """What one attention layer remembers between calls (`nn.state.KeysValues` is one)."""

    def append(self, slot: int, position: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Remember the keys and values of the tokens from `position` on."""
        ...

    def read(self, slot: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values (S, K, H), and the position of the first of them."""
        ...


def attention_kernel(softcap: float | None) -> tuple[str, str]:
    """Which of torch's kernels computes a tile, and why."""
    if softcap is None:
        return "sdpa", "torch's fused kernel: no soft cap on the scores"
    return "explicit", "the scores are soft-capped, which torch's fused kernel cannot express"


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


@op(lambda q_TNH, **_: q_TNH.shape)
@opaque
def attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    batch: Sequences,
    memory: Memory | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every sequence of a ragged batch over itself and what it remembers, as (T, N, H).

    A query sees a key at or before its own position, within the window; and if both are in the sequence's prefix it
    sees it in any case, which neither order nor window takes away.

    Args:
        q_TNH, k_TKH, v_TKH: queries, keys and values of the new tokens, already rotated. K divides N; query head n
            uses key/value head n // (N / K).
        batch: the boundaries, and how long a prefix is.
        memory: what the layer remembers; the new keys and values are appended to it. None: nothing came before.
        scale: multiplies the scores.
        window: tokens visible to a query after the prefix, itself included. None: all up to it.
        softcap: bounds the scores, before the mask.
    """
    tile = _tile_sdpa if attention_kernel(softcap)[0] == "sdpa" else _tile_explicit
    parts: list[Tensor] = []
    runs = list(_runs(batch, alone=memory is not None))
    rows = [run.sequences * run.length for run in runs]
    # not slices of all rows: the gradient of each would be as long as the batch
    for run, q, k, v in zip(runs, q_TNH.split(rows), k_TKH.split(rows), v_TKH.split(rows), strict=True):
        before = 0  # keys in front of the first query's own
        if memory is not None:
            memory.append(run.slot, run.position, k, v)
            k, v, start = memory.read(run.slot)
            before = run.position - start
        q_BTNH = q.unflatten(0, (run.sequences, -1))
        k_BKSH, v_BKSH = (x.unflatten(0, (run.sequences, -1)).transpose(1, 2) for x in (k, v))
        within = run.prefix if run.position == 0 else 0  # queries of the prefix: all of them, or none
        tiles = list(_tiles(within, run.length))
        outs: list[Tensor] = []
        for (t, until), tile_BTNH in zip(tiles, q_BTNH.split([end - t for t, end in tiles], 1), strict=True):
            if t < within:
                lo, last, visible = 0, within, None
            else:
                last = before + until  # one past the last key that this tile may see
                lo = 0 if window is None else max(0, before + t - window + 1)
                visible = _visible(until - t, before + t - lo, last - lo, window, q.device)
            outs.append(tile(tile_BTNH, k_BKSH[:, :, lo:last], v_BKSH[:, :, lo:last], visible, scale, softcap))
        parts.append((torch.cat(outs, 1) if len(outs) > 1 else outs[0]).flatten(0, 1))
    return torch.cat(parts)


@dataclass
class _Run:
    """Neighbouring sequences that are alike, and are attended at once."""

    sequences: int
    length: int
    slot: int
    position: int
    prefix: int


def _runs(batch: Sequences, alone: bool) -> Iterator[_Run]:
    """Short sequences together where neighbours are alike, as the images of a tower are; a long one fills a tile by
    itself. With `alone` each is a run of one."""
    run: _Run | None = None
    for (first, end, slot, position), prefix in zip(batch.spans(), batch.prefix_lengths(), strict=True):
        length = end - first
        if run is not None:
            alike = (length, position, prefix) == (run.length, run.position, run.prefix)
            if alike and not alone and length <= _SHORT:
                run.sequences += 1
                continue
            yield run
        run = _Run(1, length, slot, position, prefix)
    if run is not None:
        yield run


def _tiles(within: int, queries: int) -> Iterator[tuple[int, int]]:
    """First and end of each tile: none reaches over the end of the prefix."""
    for begin, end in ((0, within), (within, queries)):
        for t in range(begin, end, _TILE):
            yield t, min(t + _TILE, end)


def _visible(queries: int, offset: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where query t, at key index `offset + t`, may attend, (T, S); None where it may everywhere."""
    if queries == 1:  # its keys were cut at the window and at itself
        return None
    age_TS = torch.arange(offset, offset + queries, device=device)[:, None] - torch.arange(keys, device=device)
    return (age_TS >= 0) if window is None else (age_TS >= 0) & (age_TS < window)


def _fold(q_BTNH: Tensor, kv_heads: int) -> Tensor:
    """(B, T, K * G, H) to (B, K, G * T, H): query heads that share a key/value head become rows of one product."""
    return q_BTNH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(o_BKEH: Tensor, queries: int) -> Tensor:
    """(B, K, G * T, H) back to (B, T, K * G, H)."""
    return o_BKEH.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _tile_explicit(
    q_BTNH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, visible_TS: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """The definition: scores, cap, mask and softmax in float32."""
    kv_heads, queries = k_BKSH.shape[1], q_BTNH.shape[1]
    q_BKEH = wide(_fold(q_BTNH, kv_heads)) * scale
    scores_BKES = q_BKEH @ wide(k_BKSH).transpose(2, 3)
    if softcap is not None:
        scores_BKES = softcap * torch.tanh(scores_BKES / softcap)
    if visible_TS is not None:
        hidden_ES = ~visible_TS.repeat(q_BKEH.shape[2] // queries, 1)
        scores_BKES = scores_BKES.masked_fill(hidden_ES, float("-inf"))
    out_BKEH = scores_BKES.softmax(-1) @ wide(v_BKSH)
    return _unfold(out_BKEH, queries).to(q_BTNH.dtype)


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
