"""The two ops of Griffin's recurrent block that look along the sequence: a short convolution and a gated recurrence.

Both work on a whole ragged batch at once. What a layer remembers of a sequence enters at its first rows, and nothing
crosses from one sequence to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemkit.ops.attention import Sequences, opaque

# Rows a block of the scan. 4,096 rows are 64 steps inside all blocks at once and 64 from block to block: 128 that
# depend on each other. At 2,560 channels on two CPU cores blocks of 16 to 64 rows took the same time within noise.
_BLOCK = 64

# The derivative of sqrt(1 - a^2) grows without bound as a nears 1; training clips it here, as the models were trained.
_MAX_SQRT_GRADIENT = 1000.0


class Recurrence(Protocol):
    """What one recurrent layer remembers between calls (`nn.state.Recurrence` is one)."""

    def tail(self, slot: int) -> Tensor | None:
        """The last inputs of the convolution (taps - 1, R); None before the first token."""
        ...

    def hidden(self, slot: int) -> Tensor | None:
        """The hidden state (R,) float32; None before the first token."""
        ...

    def keep_tail(self, slot: int, tail: Tensor) -> None: ...

    def keep_hidden(self, slot: int, hidden: Tensor) -> None: ...


@opaque
def causal_conv1d(
    x_TR: Tensor, weight_RC: Tensor, bias_R: Tensor, batch: Sequences, memory: Recurrence | None = None
) -> Tensor:
    """Depthwise convolution of each channel with its last C inputs, the current one included: (T, R) to (T, R).

    `weight_RC[:, -1]` multiplies the current row. Rows before a sequence's start count as zero, or are what the layer
    remembers of it.
    """
    taps = weight_RC.shape[1]
    spans = list(batch.spans())
    age_T = _rows_since_start(spans, x_TR.device)
    y_TR = x_TR * weight_RC[:, -1] + bias_R
    for back in range(1, taps):
        shifted_TR = F.pad(x_TR, (0, 0, back, 0))[: x_TR.shape[0]]
        reaches_T1 = (age_T >= back)[:, None]
        y_TR = y_TR + torch.where(reaches_T1, shifted_TR, 0) * weight_RC[:, -1 - back]
    if memory is None:
        return y_TR
    for first, end, slot, _ in spans:
        before = memory.tail(slot)
        if before is None:
            before = x_TR.new_zeros(taps - 1, x_TR.shape[1])
        head = min(taps - 1, end - first)  # rows that see what came before
        for row in range(head):
            seen = before[row:] * weight_RC[:, : taps - 1 - row].T
            y_TR[first + row] += seen.sum(0)
        memory.keep_tail(slot, torch.cat((before, x_TR[first:end]))[1 - taps :])
    return y_TR


@opaque
def rg_lru(
    x_TR: Tensor,
    input_gate_TR: Tensor,
    recurrent_gate_TR: Tensor,
    param_R: Tensor,
    batch: Sequences,
    memory: Recurrence | None = None,
) -> Tensor:
    """The real-gated linear recurrent unit (Griffin, arXiv:2402.19427, section 2.4), as (T, R).

        a = exp(-8 * sigmoid(recurrent_gate) * softplus(param))
        h = a * h_before + sqrt(1 - a^2) * sigmoid(input_gate) * x

    A sequence's first row has no `h_before` and no `sqrt(1 - a^2)`. All in float32, cast back at the end.

    Args:
        input_gate_TR, recurrent_gate_TR: before their sigmoids.
        memory: the hidden state of each sequence, read and then replaced.
    """
    log_a_TR = -8.0 * torch.sigmoid(recurrent_gate_TR.float()) * F.softplus(param_R.float())
    gated_TR = torch.sigmoid(input_gate_TR.float()) * x_TR.float()
    fresh_T = torch.zeros(x_TR.shape[0], dtype=torch.bool, device=x_TR.device)
    starts: list[tuple[int, Tensor]] = []  # rows that continue what is remembered
    spans = list(batch.spans())
    for first, _, slot, position in spans:
        hidden = None if memory is None else memory.hidden(slot)
        if position == 0 or hidden is None:
            fresh_T[first] = True
        else:
            starts.append((first, hidden))
    # 1 - a^2 without cancellation where a is near 1
    input_scale_TR = _bounded_sqrt(-torch.expm1(2.0 * log_a_TR))
    fresh_T1 = fresh_T[:, None]
    a_TR = torch.exp(log_a_TR)
    b_TR = torch.where(fresh_T1, gated_TR, input_scale_TR * gated_TR)
    cut_T1 = fresh_T1
    if starts:
        rows = torch.tensor([row for row, _ in starts], device=x_TR.device)
        carried = a_TR[rows] * torch.stack([hidden for _, hidden in starts])
        b_TR = b_TR.index_add(0, rows, carried)
        cut_T1 = fresh_T1.index_fill(0, rows, True)
    h_TR = linear_scan(torch.where(cut_T1, 0.0, a_TR), b_TR)
    if memory is not None:
        for _, end, slot, _ in spans:
            memory.keep_hidden(slot, h_TR[end - 1].clone())
    return h_TR.to(x_TR.dtype)


def linear_scan(a_TR: Tensor, b_TR: Tensor) -> Tensor:
    """`h[t] = a[t] * h[t - 1] + b[t]` for every channel, from h = 0: (T, R).

    Rows are cut into blocks. All blocks advance together, each from zero, and keep the running product of their `a`;
    then the state is carried from block to block, and each row receives what its block inherited. Only products of `a`
    are formed and nothing is divided, so decays near 0 and near 1 are equally safe. An `a` of zero starts anew.
    """
    return _Scan.apply(a_TR, b_TR)  # type: ignore[return-value]  # torch's stubs do not know what apply returns


class _Scan(torch.autograd.Function):
    """The gradient of a scan is a scan in the other direction: g[t] = dh[t] + a[t + 1] * g[t + 1]."""

    @staticmethod
    def forward(ctx, a_TR: Tensor, b_TR: Tensor) -> Tensor:
        h_TR = _blocked(a_TR, b_TR)
        ctx.save_for_backward(a_TR, h_TR)
        return h_TR

    @staticmethod
    def backward(ctx, dh_TR: Tensor) -> tuple[Tensor, Tensor]:
        a_TR, h_TR = ctx.saved_tensors
        following_TR = F.pad(a_TR[1:], (0, 0, 0, 1))
        g_TR = _blocked(following_TR, dh_TR, reverse=True)
        return g_TR * F.pad(h_TR[:-1], (0, 0, 1, 0)), g_TR


def _blocked(a_TR: Tensor, b_TR: Tensor, reverse: bool = False) -> Tensor:
    rows, channels = a_TR.shape
    if rows == 1:
        return b_TR.clone()
    size = min(_BLOCK, rows)
    missing = -rows % size
    if missing:  # rows that nothing reads, behind the last one in the direction of the scan
        side = (0, 0, missing, 0) if reverse else (0, 0, 0, missing)
        a_TR, b_TR = F.pad(a_TR, side), F.pad(b_TR, side)
    a_NCR, b_NCR = a_TR.view(-1, size, channels), b_TR.view(-1, size, channels)
    h_NCR, product_NCR = torch.empty_like(b_NCR), torch.empty_like(a_NCR)
    steps = list(_order(size, reverse))
    h_NCR[:, steps[0]], product_NCR[:, steps[0]] = b_NCR[:, steps[0]], a_NCR[:, steps[0]]
    for before, step in zip(steps[:-1], steps[1:], strict=True):
        torch.addcmul(b_NCR[:, step], a_NCR[:, step], h_NCR[:, before], out=h_NCR[:, step])
        torch.mul(a_NCR[:, step], product_NCR[:, before], out=product_NCR[:, step])
    blocks = list(_order(len(h_NCR), reverse))
    for before, block in zip(blocks[:-1], blocks[1:], strict=True):
        h_NCR[block].addcmul_(product_NCR[block], h_NCR[before, steps[-1]])
    h_TR = h_NCR.view(-1, channels)
    return h_TR[missing:] if reverse else h_TR[:rows]


def _order(count: int, reverse: bool) -> Iterator[int]:
    return iter(range(count - 1, -1, -1) if reverse else range(count))


class _BoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.sqrt(z)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return dy / torch.sqrt(torch.clamp(4.0 * z, min=_MAX_SQRT_GRADIENT**-2))


def _bounded_sqrt(z: Tensor) -> Tensor:
    """The square root, with a derivative of at most 1000."""
    return _BoundedSqrt.apply(z)  # type: ignore[return-value]  # torch's stubs do not know what apply returns


def _rows_since_start(spans: list[tuple[int, int, int, int]], device: torch.device) -> Tensor:
    """How many rows of the same sequence came before each row of the batch, (T,)."""
    return torch.cat([torch.arange(end - first, device=device) for first, end, _, _ in spans])
