"""Linear cross-entropy in chunks: losses of logits, with their gradient, where the (M, V) logits are never all there.

Of a vocabulary of 262,144 the logits of 512 rows are half a gigabyte, and a plain loss holds several copies. Here the
head reads a chunk of rows, a row loss is computed of their logits, and the gradient of the logits takes their place and
goes back through the head at once:

    hidden rows ─ head ─ logits ─ value of each row                      (M, D) in, (M,) out
    gradient of hidden rows and of what the head trains ─ head ─ gradient of logits

The same idea as in Cut Cross-Entropy (arXiv:2411.09009) and in Liger's fused linear cross-entropy (arXiv:2410.10989),
for any function of a row, on any device, and for quantized tables. `nn.layers.Head` calls it in its forward: the loss
is the head's own, as everything that reads its weight.

M  rows     C  rows of a chunk     D  residual width     V  vocabulary rows
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemkit.ops.basic import wide
from gemkit.ops.quantized import Quantized
from gemkit.ops.vocabulary import WHOLE, Vocabulary

# Logits that are held at once: 256 rows of 262,144. Cross-entropy and gradient of 512 rows, with a frozen float32 table
# of 640 channels, took 2,426 ms by 128 rows, 2,208 by 256 and 2,240 by 512, and the plain way 3,355 (two CPU cores).
CHUNK = 1 << 26

# Rows of the table in one product on a CPU: MKL multiplies 256 rows by 2,048 of them at 164 GFLOP/s, by all of them at
# 133. Blocks of 512 to 4,096 are as fast, 8,192 are not.
_BLOCK = 2048

# Logits that a row loss sees at once: 8 rows of 262,144, 8 MiB, so that its passes find them in the last cache.
_SLAB = 1 << 21


class RowLoss(Protocol):
    """A function of each row of logits by itself."""

    def __call__(
        self, z_CV: Tensor, rows: slice, gradient: bool, vocabulary: Vocabulary, /, *teacher_CV: Tensor
    ) -> Tensor:
        """The values of some rows, (C,) or (C, n).

        Args:
            z_CV: their logits, after the final soft cap, in float32 or wider, which may be overwritten. With `gradient`
                they must be, by the derivative of the sum of the values (if there are n, of the first).
            rows: their place among the M rows.
            vocabulary: how one number is had of a row, of which the V logits may be a part.
            teacher_CV: the logits of a teacher for them, if there is one; they may be overwritten.
        """
        ...


@dataclass(frozen=True, eq=False)
class ChunkedLoss:
    """A row loss, and how its values become a result.

    Without `backward` the result is the sum of the values, differentiable, and the values themselves, which are not:
    (M,), or (M, n), of which the first are summed. Where gradients are recorded they are computed at once, by two
    products with the table for each row; the backward only scales them. With `backward` the result is the values,
    differentiable: other things are computed of them first, and the backward reads the rows again.

    Either way the gradients are those of the hidden rows and of all that the head trains: a tied table, whose gradient
    adds to that of the embedding, adapters, a bias.
    """

    row: RowLoss
    backward: Callable[[Tensor], RowLoss] | None = None  # of the derivatives of the values: the row loss whose sum
    # has the gradient to hand on
    teacher: tuple[Any, Tensor] | None = None  # a head that is read and not trained, and hidden rows (M, E) of its own


@dataclass(frozen=True, eq=False)
class LogitsHead:
    """The head as `linear_cross_entropy` reads it.

    Attributes:
        project: (C, D) to (C, V), differentiable: the whole head, with adapters, hooks, a final soft cap.
        vocab: V; where the vocabulary is divided, the rows of the table that are here.
        trained: the weights of the head that take a gradient.
        table_VD: the table, if the head is a product with it and nothing else but the cap: then logits are made in
            place, in one buffer, in the table's dtype (a quantized one: in float32).
        softcap: the final soft cap.
        vocabulary: the rows of the table, some of which may lie in other processes.
    """

    project: Callable[[Tensor], Tensor]
    vocab: int
    trained: Sequence[Tensor]
    table_VD: Tensor | Quantized | None = None
    softcap: float | None = None
    vocabulary: Vocabulary = WHOLE


def linear_cross_entropy(x_MD: Tensor, loss: ChunkedLoss, head: LogitsHead) -> Any:
    """`loss` of the logits of some hidden rows, by chunks: (sum, values), or with `loss.backward` the values."""
    if loss.backward is None:
        return _Summed.apply(loss, head, torch.is_grad_enabled(), x_MD, *head.trained)
    return _Values.apply(loss, head, x_MD, *head.trained)


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
    count = -(-rows * vocab // CHUNK)
    for part in range(count := min(count, rows)):
        yield range(rows * part // count, rows * (part + 1) // count)


# ── one chunk of logits ─────────────────────────────────────────────────────────────────────────────────────────────


class _ModuleChunk:
    """A chunk of logits by the head's own forward, whatever it is: adapters, hooks, a table of another dtype."""

    def __init__(self, head: LogitsHead, gradient: bool):
        self.project, self.trained = head.project, list(head.trained) if gradient else []
        self.gradients = _zeros_like(self.trained)

    def read(self, x_CD: Tensor, gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            self.x_CD = x_CD.detach().requires_grad_(gradient)
            self.logits_CV = self.project(self.x_CD)
        self.back_CV = torch.empty_like(self.logits_CV) if gradient else None

    def logits(self, rows: slice) -> Tensor:
        """Some rows of the chunk, in float32 or wider, to be overwritten."""
        part = self.logits_CV.detach()[rows]
        return part.to(wide(part[:0]).dtype, copy=True)  # the head's backward may need its own

    def hand_back(self, rows: slice, grad_CV: Tensor) -> None:
        assert self.back_CV is not None
        self.back_CV[rows] = grad_CV

    def backward(self, grad_CD: Tensor) -> None:
        """Fill the gradient of the chunk's hidden rows, and add to those of the weights."""
        inputs = [self.x_CD, *self.trained]
        found = torch.autograd.grad(self.logits_CV, inputs, self.back_CV, allow_unused=True)
        grad_CD.copy_(found[0])
        for gradient, part in zip(self.gradients, found[1:], strict=True):
            if part is not None:
                gradient += part


class _TableChunk:
    """A chunk of logits by a product with the table alone: in place, in one buffer. Of a quantized table each block is
    made dense where it is multiplied, and is still in a cache then."""

    def __init__(self, table_VD: Tensor | Quantized, head: LogitsHead, gradient: bool, rows: int):
        self.table_VD = table_VD if isinstance(table_VD, Quantized) else table_VD.detach()
        self.cap = head.softcap
        self.buffer_CV = _large(rows, head.vocab, _dtype(table_VD), table_VD.device)
        self.step = _BLOCK if table_VD.device.type == "cpu" else head.vocab
        self.gradients = _zeros_like(head.trained if gradient else ())

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the table that are multiplied at once, dense, and their place."""
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


def _zeros_like(weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(weight, dtype=wide(weight[:0]).dtype) for weight in weights]


def _large(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised array on huge pages, where the kernel has some: 65,000 small ones are as many page faults."""
    count = rows * columns
    if device.type != "cpu" or not count or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without any
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(rows, columns)


def _dtype(table_VD: Tensor | Quantized) -> torch.dtype:
    """The dtype that the table is multiplied in."""
    return torch.float32 if isinstance(table_VD, Quantized) else table_VD.dtype


def _chunk_of(head: LogitsHead, x_MD: Tensor, gradient: bool, rows: int) -> _TableChunk | _ModuleChunk:
    """The choice: in place for a head that is a product with one table, in the dtype of the rows; by the head's own
    forward for every other."""
    table = head.table_VD
    known = type(table) in (Tensor, torch.nn.Parameter, Quantized)  # a subclass may compute otherwise
    if table is not None and known and _dtype(table) == x_MD.dtype:
        return _TableChunk(table, head, gradient, rows)
    return _ModuleChunk(head, gradient)


# ── all chunks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _over_chunks(
    row: RowLoss, head: LogitsHead, x_MD: Tensor, gradient: bool, teacher: tuple[Any, Tensor] | None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Values, gradient of the rows, and gradients of the head's weights: None and nothing unless `gradient`."""
    x_MD = x_MD.detach()
    chunks = [*_chunks(len(x_MD), head.vocab)] or [range(0)]
    grad_MD = torch.empty_like(x_MD) if gradient else None
    chunk = _chunk_of(head, x_MD, gradient, max(map(len, chunks)))
    values: list[Tensor] = []
    part, to_come = range(0), iter(chunks)

    def slab(place: slice, *teacher_CV: Tensor) -> None:
        nonlocal part
        if place.start >= part.stop:
            part = next(to_come)
            chunk.read(x_MD[part.start : part.stop], gradient)
        rows = slice(place.start - part.start, place.stop - part.start)
        z_CV = chunk.logits(rows)
        values.append(row(z_CV, place, gradient, head.vocabulary, *teacher_CV))
        if grad_MD is not None:
            chunk.hand_back(rows, z_CV)
            if place.stop == part.stop:
                chunk.backward(grad_MD[part.start : part.stop])

    def taught(z_CV: Tensor, place: slice, _: bool, *__: Any) -> Tensor:
        slab(place, z_CV)
        return z_CV[:, 0]

    if teacher is None:
        for place in _slabs(chunks, head.vocab):
            slab(place)
    else:  # its own head reads its rows; a vocabulary of the same size is cut at the same places
        with torch.no_grad():
            teacher[0].loss(teacher[1], ChunkedLoss(taught, backward=lambda _: taught))
    return torch.cat(values), grad_MD, chunk.gradients


def _slabs(chunks: Sequence[range], vocab: int) -> Iterator[slice]:
    """The rows that a row loss sees at once, chunk after chunk."""
    size = max(1, _SLAB // vocab)
    for chunk in chunks:
        for first in range(chunk.start, max(chunk.stop, chunk.start + 1), size):
            yield slice(first, min(first + size, chunk.stop))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, head, recorded, x_MD, *trained):
        gradient = recorded and any(ctx.needs_input_grad)
        values, grad_MD, gradients = _over_chunks(loss.row, head, x_MD, gradient, loss.teacher)
        if gradient:
            ctx.save_for_backward(grad_MD, *gradients)
        ctx.dtypes = [part.dtype for part in (x_MD, *trained)]
        ctx.mark_non_differentiable(values)
        return (values if values.dim() == 1 else values[:, 0]).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):  # type: ignore[override]
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, *((part * scale).to(dtype) for part, dtype in found)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, head, x_MD, *trained):
        ctx.derivative, ctx.head = loss.backward, head
        ctx.save_for_backward(x_MD, *trained)
        ctx.random = _random(x_MD.device)
        return _over_chunks(loss.row, head, x_MD, False, loss.teacher)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M):  # type: ignore[override]
        x_MD, *trained = ctx.saved_tensors
        now = _random(x_MD.device)
        _set_random(ctx.random, x_MD.device)  # dropout of an adapter on the head falls on the same elements again
        _, grad_MD, gradients = _over_chunks(ctx.derivative(grad_M), ctx.head, x_MD, True, None)
        _set_random(now, x_MD.device)
        assert grad_MD is not None
        found = zip([grad_MD, *gradients], (x_MD, *trained), strict=True)
        return None, None, *(part.to(like.dtype) for part, like in found)


def _random(device: torch.device) -> list[Tensor]:
    others = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *others]


def _set_random(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
