"""Griffin's recurrent block (arXiv:2402.19427) between its linears: a short convolution and a gated recurrence.

Both look along the sequence, and work on a whole ragged batch at once. What a layer remembers of a sequence enters at
its first rows, and nothing crosses from one sequence to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemkit.ops.attention import Sequences, opaque
from gemkit.ops.basic import wide
from gemkit.ops.symbolic import op

# Rows a block of the scan. At 4,096 rows 131 steps depend on each other: 32 through all blocks at once, 67 to scan what
# the blocks leave, 32 through all blocks again. On two CPU cores, 2,560 channels wide, 16 and 64 took 10 % longer.
_BLOCK = 32

# Elements computed at a time where no gradients are recorded: 2 MiB of float32. A large temporary is fresh memory from
# the system each time, and its page faults cost four times the addition that fills it.
_PIECE = 1 << 19

# The derivative of sqrt(1 - a^2) grows without bound as a nears 1; the models were trained with it clipped here.
_MAX_SQRT_GRADIENT = 1000.0


class RecurrentState(Protocol):
    """The interface of a recurrent layer's state between calls; `nn.state.RecurrentState` implements it."""

    def tail(self, slot: int) -> Tensor | None:
        """The last inputs of the convolution (C - 1, R), oldest first; None before the first token."""
        ...

    def hidden(self, slot: int) -> Tensor | None:
        """The hidden state (R,) float32; None before the first token."""
        ...

    def keep_tail(self, slot: int, tail_CR: Tensor) -> None: ...

    def keep_hidden(self, slot: int, hidden_R: Tensor) -> None: ...


@op(
    lambda x_TR, weight_NIO, **_: (x_TR.shape[0], weight_NIO.shape[0] * weight_NIO.shape[2]),
    cost=lambda weight_NIO, **_: {"row_flops": 2 * math.prod(weight_NIO.shape)},
)
def block_linear(x_TR: Tensor, weight_NIO: Tensor, bias_NO: Tensor) -> Tensor:
    """N projections side by side, each of its own R / N channels: (T, R) to (T, N * O). Blocks are (in, out)."""
    x_NTI = x_TR.unflatten(1, weight_NIO.shape[:2]).transpose(0, 1)
    return torch.baddbmm(bias_NO[:, None], x_NTI, weight_NIO).transpose(0, 1).flatten(1)


@op(lambda x_TR, **_: x_TR.shape)
@opaque
def causal_conv1d(
    x_TR: Tensor, weight_RC: Tensor, bias_R: Tensor, batch: Sequences, memory: RecurrentState | None = None
) -> Tensor:
    """Convolution of each channel with its last C inputs, the current one included, summed in float32, as (T, R).

    `weight_RC[:, -1]` multiplies the current row. Rows before a sequence's first are what the layer remembers of it,
    or zeros.
    """
    back = weight_RC.shape[1] - 1
    spans = list(batch.sequences())
    parts: list[Tensor] = []  # of each sequence, the rows before it and its own
    for first, end, slot, _ in spans:
        before_CR = None if memory is None else memory.tail(slot)
        parts += [x_TR.new_zeros(back, x_TR.shape[1]) if before_CR is None else before_CR, x_TR[first:end]]
    seen = torch.cat(parts)

    taps = wide(weight_RC).unbind(1)

    def convolve(first: int, end: int) -> tuple[Tensor]:
        y = wide(bias_R) + wide(seen[first:end]) * taps[0]
        for tap in range(1, back + 1):
            y.addcmul_(wide(seen[first + tap : end + tap]), taps[tap])
        return (y.to(x_TR.dtype),)

    (y,) = _in_pieces(convolve, seen.shape[0] - back, seen.shape[1])
    # the k-th sequence is k * back rows further down in `seen`; the rows between two mix them, and are dropped
    kept = [y[first + k * back : end + k * back] for k, (first, end, _, _) in enumerate(spans)]
    if memory is not None:
        for k, (_, end, slot, _) in enumerate(spans):
            memory.keep_tail(slot, seen[end + k * back : end + (k + 1) * back].clone())
    return kept[0] if len(kept) == 1 else torch.cat(kept)


@op(lambda x_TR, **_: x_TR.shape)
@opaque
def rg_lru(
    x_TR: Tensor,
    input_gate_TR: Tensor,
    recurrent_gate_TR: Tensor,
    param_R: Tensor,
    batch: Sequences,
    memory: RecurrentState | None = None,
) -> Tensor:
    """The real-gated linear recurrent unit (Griffin, arXiv:2402.19427, section 2.4), as (T, R).

        a = exp(-8 * sigmoid(recurrent_gate) * softplus(param))
        h = a * h_before + sqrt(1 - a^2) * sigmoid(input_gate) * x

    A sequence's first row has no `h_before`, and its input no factor `sqrt(1 - a^2)`: it is as if a were 0. All in
    float32 (in float64 for float64 inputs), cast back at the end.

    Args:
        input_gate_TR, recurrent_gate_TR: before their sigmoids.
        memory: the hidden state of each sequence, read and then replaced.
    """
    spans = list(batch.sequences())
    remembered = [None if memory is None else memory.hidden(slot) for _, _, slot, _ in spans]
    fresh = _rows([first for (first, *_), h_R in zip(spans, remembered, strict=True) if h_R is None], x_TR)
    going_on = _rows([first for (first, *_), h_R in zip(spans, remembered, strict=True) if h_R is not None], x_TR)
    rate_R = -8.0 * F.softplus(wide(param_R))
    is_fresh_T1 = torch.zeros(len(x_TR), 1, dtype=torch.bool, device=x_TR.device).index_fill_(0, fresh, True)

    def gates(first: int, end: int) -> tuple[Tensor, Tensor]:
        log_a = torch.sigmoid(wide(recurrent_gate_TR[first:end])) * rate_R
        log_a.masked_fill_(is_fresh_T1[first:end], -torch.inf)  # a = 0, sqrt(1 - a^2) = 1, and no gradient
        scale = _bounded_sqrt(-torch.expm1(2.0 * log_a))  # exact where a is near 1
        return torch.exp(log_a), scale * torch.sigmoid(wide(input_gate_TR[first:end])) * wide(x_TR[first:end])

    a_TR, b_TR = _in_pieces(gates, *x_TR.shape)
    if len(going_on):  # never while gradients are recorded, so that writing in place is safe
        b_TR[going_on] += a_TR[going_on] * torch.stack([h_R for h_R in remembered if h_R is not None])
        a_TR[going_on] = 0.0
    h_TR: Tensor = _Scan.apply(a_TR, b_TR, True) if len(spans) < len(b_TR) else b_TR  # type: ignore[assignment]
    if memory is not None:
        for _, end, slot, _ in spans:
            memory.keep_hidden(slot, h_TR[end - 1].clone())
    return h_TR.to(x_TR.dtype)


def linear_scan(a_TR: Tensor, b_TR: Tensor) -> Tensor:
    """`h[t] = a[t] * h[t - 1] + b[t]` for every channel, from h = 0: (T, R).

    Rows are cut into blocks. All blocks advance together, each from zero, to its last row, and keep the product of
    their `a`; what the blocks leave to each other is a scan of these ends; from there all blocks advance once more.
    Only products of `a` are formed and nothing is divided, so decays near 0 and near 1 are equally safe. An `a` of
    zero starts anew.
    """
    return _Scan.apply(a_TR, b_TR, False)  # type: ignore[return-value]  # torch's stubs do not know what apply returns


class _Scan(torch.autograd.Function):
    """The gradient of a scan is a scan in the other direction: g[t] = dh[t] + a[t + 1] * g[t + 1]."""

    @staticmethod
    def forward(ctx, a_TR: Tensor, b_TR: Tensor, in_place: bool) -> Tensor:
        """`in_place`: the result takes the memory of `b_TR`."""
        h_TR = b_TR if in_place else torch.empty_like(b_TR)
        _scan(a_TR, b_TR, h_TR)
        if in_place:
            ctx.mark_dirty(b_TR)
        ctx.save_for_backward(a_TR, h_TR)
        return h_TR

    @staticmethod
    @once_differentiable
    def backward(ctx, dh_TR: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        a_TR, h_TR = ctx.saved_tensors
        g_TR, da_TR = torch.empty_like(dh_TR), torch.empty_like(a_TR)
        da_TR[:-1] = a_TR[1:]  # for now what carries g backwards
        da_TR[-1] = 0.0
        _scan(da_TR, dh_TR, g_TR, reverse=True)
        torch.mul(g_TR[1:], h_TR[:-1], out=da_TR[1:])
        da_TR[0] = 0.0
        return da_TR, g_TR, None


def _scan(a_TR: Tensor, b_TR: Tensor, h_TR: Tensor, reverse: bool = False) -> None:
    """Fill `h_TR`, which may be `b_TR`. In `reverse` the scan starts at the last row, and blocks are cut from there."""
    rows = len(a_TR)
    whole = (rows - 1) // _BLOCK  # blocks that another one follows

    def at(x_TR: Tensor, step: int) -> Tensor:
        """That step's row of every block."""
        return x_TR[(rows - 1 - step) % _BLOCK :: _BLOCK] if reverse else x_TR[step::_BLOCK]

    def first(x_NR: Tensor, count: int) -> Tensor:
        """Of the blocks that come first in the direction of the scan."""
        return x_NR[len(x_NR) - count :] if reverse else x_NR[:count]

    def behind(x_NR: Tensor) -> Tensor:
        """Of all blocks but the first."""
        return x_NR[:-1] if reverse else x_NR[1:]

    if whole:
        end_NR, product_NR = first(at(b_TR, 0), whole).clone(), first(at(a_TR, 0), whole).clone()
        for step in range(1, _BLOCK):
            a_NR = first(at(a_TR, step), whole)
            torch.addcmul(first(at(b_TR, step), whole), a_NR, end_NR, out=end_NR)
            product_NR.mul_(a_NR)
        _scan(product_NR, end_NR, end_NR, reverse)
        a_NR, b_NR = behind(at(a_TR, 0)), behind(at(b_TR, 0))
        torch.addcmul(b_NR, a_NR, end_NR, out=behind(at(h_TR, 0)))
    first(at(h_TR, 0), 1).copy_(first(at(b_TR, 0), 1))
    for step in range(1, min(_BLOCK, rows)):
        b_NR = at(b_TR, step)
        torch.addcmul(b_NR, at(a_TR, step), first(at(h_TR, step - 1), len(b_NR)), out=at(h_TR, step))


class _BoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.sqrt(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return dy / torch.sqrt(torch.clamp(4.0 * z, min=_MAX_SQRT_GRADIENT**-2))


def _bounded_sqrt(z: Tensor) -> Tensor:
    """The square root, with a derivative of at most 1000."""
    return _BoundedSqrt.apply(z)  # type: ignore[return-value]  # torch's stubs do not know what apply returns


def _in_pieces(compute: Callable[[int, int], tuple[Tensor, ...]], rows: int, channels: int) -> tuple[Tensor, ...]:
    """`compute(first, end)` of all rows, a piece of them at a time unless gradients are recorded."""
    step = max(1, _PIECE // channels)
    if torch.is_grad_enabled() or rows <= step:
        return compute(0, rows)
    whole: tuple[Tensor, ...] = ()
    for first in range(0, rows, step):
        end = min(first + step, rows)
        parts = compute(first, end)
        whole = whole or tuple(part.new_empty(rows, channels) for part in parts)
        for result, part in zip(whole, parts, strict=True):
            result[first:end] = part
    return whole


def _rows(indices: list[int], like: Tensor) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=like.device)
