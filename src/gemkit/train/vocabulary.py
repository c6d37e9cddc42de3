"""The head a few rows at a time: what is computed of logits, with its gradient, where (M, V) of them are never there.

Of a vocabulary of 262,144 the logits of 512 rows are half a gigabyte, and a plain loss holds several copies. Here some
rows are read by the head, what is wanted of each row is computed, and the gradient of the row's logits takes their
place and goes back through the head at once:

    hidden rows ─ head ─ logits ─ value of each row                      (M, D) in, (M,) out
    gradient of hidden rows and of what the head trains ─ head ─ gradient of logits

`summed` is for losses whose weights are known before: two products with the table for each row, and nothing is
computed twice. `mapped` is for values that other things are computed of first: its backward reads the rows again.

M  rows     C  rows of a chunk     D  residual width     V  vocabulary rows
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemkit.nn import PaliGemma
from gemkit.nn.layers import Head
from gemkit.ops import Quantized
from gemkit.ops.basic import wide

# Logits that are held at once: 256 rows of 262,144. Cross-entropy and gradient of 512 rows, with a frozen float32 table
# of 640 channels, took 2,426 ms by 128 rows, 2,208 by 256 and 2,240 by 512, and the plain way 3,355 (two CPU cores).
_CHUNK = 1 << 26

# Rows of the table in one product on a CPU: MKL multiplies 256 rows by 2,048 of them at 164 GFLOP/s, by all of them at
# 133. Blocks of 512 to 4,096 are as fast, 8,192 are not.
_BLOCK = 2048

# Logits that a row function sees at once: 8 rows of 262,144, 8 MiB, so that its passes find them in the last cache.
_SLAB = 1 << 21


class Rowwise(Protocol):
    """What is computed of each row of logits by itself."""

    def __call__(self, z_CV: Tensor, rows: slice, gradient: bool, *beside_CV: Tensor) -> Tensor:
        """The values of some rows, (C,) or (C, n).

        Args:
            z_CV: their logits, after the final soft cap, in float32 or wider, which may be overwritten. With `gradient`
                they must be, by the derivative of the sum of the values (if there are n, of the first).
            rows: which of the M rows they are.
            beside_CV: the logits of the other model for them, if there is one; they may be overwritten.
        """
        ...


Beside = tuple[Any, Tensor] | None  # a model that is read and not trained, and the hidden rows of its own


def summed(model: Any, rowwise: Rowwise, x_MD: Tensor, beside: Beside = None) -> tuple[Tensor, Tensor]:
    """The sum of what `rowwise` gives of each row, differentiable, and the values themselves, which are not: (M,), or
    (M, n), of which the first are summed.

    Where gradients are recorded they are computed here already; the backward only scales them. They are those of `x_MD`
    and of all that the head trains: a tied table, whose gradient adds to that of the embedding, adapters, a bias.
    """
    weights = _trained(model)
    recorded = torch.is_grad_enabled()
    return _Summed.apply(model, rowwise, recorded, beside, x_MD, *weights)  # type: ignore[return-value]


def mapped(model: Any, rowwise: Rowwise, backward: Callable[[Tensor], Rowwise], x_MD: Tensor) -> Tensor:
    """What `rowwise` gives of each row, differentiable.

    Args:
        backward: of the derivatives of the values, the function of a row whose sum has the gradient to hand on.
    """
    weights = _trained(model)
    return _Mapped.apply(model, rowwise, backward, x_MD, *weights)  # type: ignore[return-value]


def extra_bytes(rows: int, vocab: int, width: int, *, itemsize: int = 4, table: bool = False) -> int:
    """Bytes beside hidden rows, table and adapters that a loss holds at its highest.

    Args:
        rows: M.
        itemsize: of the run dtype.
        table: is the table trained? Its gradient is held twice while the backward scales it.
    """
    chunk = max(map(len, _chunks(rows, vocab)), default=0)
    held = chunk * vocab * itemsize + rows * width * itemsize + 4 * min(chunk * vocab, _SLAB + vocab) * 4
    return held + (2 * vocab * width * max(4, itemsize) if table else 0)


def _chunks(rows: int, vocab: int) -> Iterator[range]:
    """As few ranges of rows as there may be, of nearly the same length."""
    count = -(-rows * vocab // _CHUNK)
    for part in range(count := min(count, rows)):
        yield range(rows * part // count, rows * (part + 1) // count)


def _decoder(model: Any) -> Any:
    return model.language_model if isinstance(model, PaliGemma) else model


def _trained(model: Any) -> list[Tensor]:
    return [weight for weight in _decoder(model).lm_head.parameters() if weight.requires_grad]


class _Through:
    """A chunk by the model's own `logits`, whatever its head is: adapters, hooks, a quantized table."""

    def __init__(self, model: Any, weights: list[Tensor]):
        self.model, self.weights = model, weights
        self.gradients = [torch.zeros_like(weight, dtype=wide(weight[:0]).dtype) for weight in weights]

    def read(self, x_CD: Tensor, gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            self.x_CD = x_CD.detach().requires_grad_(gradient)
            self.logits_CV = self.model.logits(self.x_CD)
        self.back_CV = torch.empty_like(self.logits_CV) if gradient else None

    def logits(self, rows: slice) -> Tensor:
        """Some rows of the chunk, in float32 or wider, to be overwritten."""
        part = self.logits_CV.detach()[rows]
        return part.to(wide(part[:0]).dtype, copy=True)  # the model's backward may need its own

    def hand_back(self, rows: slice, grad_CV: Tensor) -> None:
        assert self.back_CV is not None
        self.back_CV[rows] = grad_CV

    def backward(self, grad_CD: Tensor) -> None:
        """Fill the gradient of the chunk's hidden rows, and add to those of the weights."""
        inputs = [self.x_CD, *self.weights]
        found = torch.autograd.grad(self.logits_CV, inputs, self.back_CV, allow_unused=True)
        grad_CD.copy_(found[0])
        for gradient, part in zip(self.gradients, found[1:], strict=True):
            if part is not None:
                gradient += part


class _InPlace:
    """The same where the head is a product with a table and nothing else: in place, in one buffer. Of a quantized table
    each block is made dense where it is multiplied, and is still in a cache then."""

    def __init__(self, table_VD: Tensor | Quantized, cap: float | None, weights: list[Tensor], rows: int):
        self.table_VD = table_VD if isinstance(table_VD, Quantized) else table_VD.detach()
        self.cap = cap
        vocab = table_VD.shape[0]
        self.buffer_CV = _large(rows, vocab, _dtype(table_VD), table_VD.device)
        self.step = _BLOCK if table_VD.device.type == "cpu" else vocab
        self.gradients = [torch.zeros_like(weight, dtype=wide(weight[:0]).dtype) for weight in weights]

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the table that are multiplied at once, dense, and which they are."""
        if isinstance(self.table_VD, Quantized):
            return self.table_VD.pieces(self.step)
        starts = range(0, len(self.table_VD), self.step)
        return zip((slice(v, v + self.step) for v in starts), self.table_VD.split(self.step), strict=True)

    def read(self, x_CD: Tensor, gradient: bool) -> None:
        self.x_CD, self.z_CV = x_CD, self.buffer_CV[: len(x_CD)]
        for block, rows_BD in self._blocks():
            torch.mm(x_CD, rows_BD.T, out=self.z_CV[:, block])

    def logits(self, rows: slice) -> Tensor:
        z_CV = wide(self.z_CV[rows])
        return z_CV if self.cap is None else torch.div(z_CV, self.cap).tanh_().mul_(self.cap)

    def hand_back(self, rows: slice, grad_CV: Tensor) -> None:
        z_CV = self.z_CV[rows]
        if self.cap is not None:  # d cap tanh(z / cap) / dz = 1 - tanh^2
            tanh_CV = torch.div(wide(z_CV), self.cap).tanh_()
            grad_CV.addcmul_(tanh_CV.square_(), grad_CV, value=-1)
        if grad_CV.data_ptr() != z_CV.data_ptr():  # else it is there already
            z_CV.copy_(grad_CV)

    def backward(self, grad_CD: Tensor) -> None:
        if isinstance(self.table_VD, Quantized):
            grad_CD.zero_()
            for block, rows_BD in self._blocks():
                grad_CD.addmm_(self.z_CV[:, block], rows_BD)
        else:
            torch.mm(self.z_CV, self.table_VD, out=grad_CD)
        for gradient_VD in self.gradients:  # of the table, if it is trained
            for block, _ in self._blocks():
                gradient_VD[block] += self.z_CV[:, block].T @ self.x_CD


def _large(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An array for a moment, on huge pages where the kernel gives them to who asks: 65,000 small ones are as many page
    faults."""
    count = rows * columns
    if device.type != "cpu" or not count or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without any
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(rows, columns)


def _dtype(table_VD: Tensor | Quantized) -> torch.dtype:
    """What the table is multiplied in."""
    return torch.float32 if isinstance(table_VD, Quantized) else table_VD.dtype


def _reader(model: Any, weights: list[Tensor], x_MD: Tensor, rows: int) -> _InPlace | _Through:
    """The choice: in place for a head that is a product with one table, in the dtype of the rows, and nothing that
    looks on or adds to it; by the model's own `logits` for every other."""
    decoder = _decoder(model)
    head = decoder.lm_head
    watched = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    plain = type(head) is Head and head.bias is None and not head.adapters and not watched
    if plain and type(head.weight) in (Tensor, torch.nn.Parameter, Quantized) and _dtype(head.weight) == x_MD.dtype:
        return _InPlace(head.weight, decoder.config.final_softcap, weights, rows)
    return _Through(model, weights)


def _sweep(
    model: Any, rowwise: Rowwise, x_MD: Tensor, weights: list[Tensor], gradient: bool, beside: Beside = None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Values, gradient of the rows, and gradients of `weights`: None and nothing unless `gradient`."""
    x_MD, vocab = x_MD.detach(), _decoder(model).config.vocab_size
    chunks = [*_chunks(len(x_MD), vocab)] or [range(0)]
    grad_MD = torch.empty_like(x_MD) if gradient else None
    mine = _reader(model, weights if gradient else [], x_MD, max(map(len, chunks)))
    other = None if beside is None else _reader(beside[0], [], beside[1], max(map(len, chunks)))
    values, slab = [], max(1, _SLAB // vocab)
    for chunk in chunks:
        mine.read(x_MD[chunk.start : chunk.stop], gradient)
        if beside is not None and other is not None:
            other.read(beside[1][chunk.start : chunk.stop], False)
        for first in range(0, len(chunk) or 1, slab):
            rows = slice(first, min(first + slab, len(chunk)))
            of_all = slice(chunk.start + rows.start, chunk.start + rows.stop)
            z_CV = mine.logits(rows)
            values.append(rowwise(z_CV, of_all, gradient, *(() if other is None else (other.logits(rows),))))
            if gradient:
                mine.hand_back(rows, z_CV)
        if grad_MD is not None:
            mine.backward(grad_MD[chunk.start : chunk.stop])
    return torch.cat(values), grad_MD, mine.gradients


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, rowwise, recorded, beside, x_MD, *weights):
        gradient = recorded and any(ctx.needs_input_grad)
        values, grad_MD, gradients = _sweep(model, rowwise, x_MD, list(weights), gradient, beside)
        if gradient:
            ctx.save_for_backward(grad_MD, *gradients)
        ctx.dtypes = [part.dtype for part in (x_MD, *weights)]
        ctx.mark_non_differentiable(values)
        return (values if values.dim() == 1 else values[:, 0]).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):  # type: ignore[override]
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, None, *((part * scale).to(dtype) for part, dtype in found)


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, rowwise, backward, x_MD, *weights):
        ctx.model, ctx.derivative = model, backward
        ctx.save_for_backward(x_MD, *weights)
        ctx.random = _random(x_MD.device)
        return _sweep(model, rowwise, x_MD, list(weights), False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M):  # type: ignore[override]
        x_MD, *weights = ctx.saved_tensors
        now = _random(x_MD.device)
        _set_random(ctx.random, x_MD.device)  # dropout of an adapter on the head falls on the same elements again
        _, grad_MD, gradients = _sweep(ctx.model, ctx.derivative(grad_M), x_MD, weights, True)
        _set_random(now, x_MD.device)
        assert grad_MD is not None
        found = zip([grad_MD, *gradients], (x_MD, *weights), strict=True)
        return None, None, None, *(part.to(like.dtype) for part, like in found)


def _random(device: torch.device) -> list[Tensor]:
    others = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *others]


def _set_random(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
