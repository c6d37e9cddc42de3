"""Differentiable collectives of tensor parallelism (arXiv:1909.08053, section 3), and a vocabulary in pieces.

Activations outside of a divided region are the same on every rank of the model axis, and so are their gradients. Each
function below says how a tensor crosses the border: its backward is the crossing the other way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemkit.ops import Vocabulary


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum over a group, without a gradient."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def gathered(x: Tensor, group: Any) -> Tensor:
    """Pieces of the last dimension side by side, in the order of ranks, without a gradient."""
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return torch.cat(pieces, -1)


def own_piece(x: Tensor, group: Any) -> Tensor:
    """This rank's piece of the last dimension."""
    return x.chunk(dist.get_world_size(group), -1)[dist.get_rank(group)]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return own_piece(grad, ctx.group).contiguous(), None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return own_piece(x, group).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gathered(grad, ctx.group), None


def enter(x: Tensor, group: Any) -> Any:
    """x into a region where each rank computes a part: unchanged; its gradient is the sum of the ranks' parts."""
    return _Enter.apply(x, group)


def sum_parts(x: Tensor, group: Any) -> Any:
    """The sum of what the ranks have; each has the whole gradient already."""
    return _Sum.apply(x, group)


def gather(x: Tensor, group: Any) -> Any:
    """The ranks' pieces of the last dimension, side by side; of the gradient each takes its own."""
    return _Gather.apply(x, group)


def cut(x: Tensor, group: Any) -> Any:
    """This rank's piece of the last dimension; the gradient is put together from all of them."""
    return _Cut.apply(x, group)


class VocabularyShard(Vocabulary):
    """A part of the rows of the table: as many on every rank of the group, in the order of ranks."""

    def __init__(self, first: int, rows: int, group: Any):
        self.first, self.rows, self.group = first, rows, group
        self.ranks = dist.get_world_size(group)

    def _sum(self, x_C: Tensor) -> Tensor:
        dist.all_reduce(x_C, group=self.group)
        return x_C

    def _largest(self, z_CV: Tensor) -> Tensor:
        largest_C = z_CV.amax(-1)
        dist.all_reduce(largest_C, dist.ReduceOp.MAX, group=self.group)
        return largest_C

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows here of some ids, and which of the ids are here; the others' row is any."""
        rows = ids - self.first
        here = (rows >= 0) & (rows < self.rows)
        return rows.clamp(0, self.rows - 1), here

    def softmax_(self, z_CV: Tensor) -> Tensor:
        largest_C = self._largest(z_CV)
        total_C = self._sum(z_CV.sub_(largest_C[:, None]).exp_().sum(-1))
        z_CV.div_(total_C[:, None])
        return largest_C + total_C.log()

    def log_softmax_(self, z_CV: Tensor) -> Tensor:
        z_CV.sub_(self._largest(z_CV)[:, None])
        return z_CV.sub_(self._sum(z_CV.exp().sum(-1)).log()[:, None])

    def gather(self, z_CV: Tensor, ids_CK: Tensor) -> Tensor:
        rows_CK, here_CK = self.local(ids_CK)
        return self._sum(z_CV.gather(1, rows_CK).masked_fill(~here_CK, 0.0))

    def scatter_add_(self, z_CV: Tensor, ids_CK: Tensor, values_CK: Tensor) -> Tensor:
        rows_CK, here_CK = self.local(ids_CK)
        return z_CV.scatter_add_(1, rows_CK, values_CK.masked_fill(~here_CK, 0.0))

    def dot(self, weights_CV: Tensor, values_CV: Tensor) -> Tensor:
        return self._sum(super().dot(weights_CV, values_CV))

    def mean(self, z_CV: Tensor) -> Tensor:
        return self._sum(z_CV.sum(-1)) / self.size(z_CV)

    def size(self, z_CV: Tensor) -> int:
        return self.rows * self.ranks

    def topk(self, z_CV: Tensor, count: int) -> Tensor:
        found = z_CV.topk(min(count, self.rows), sorted=False)
        values, ids = gathered(found.values, self.group), gathered(found.indices + self.first, self.group)
        return ids.gather(1, values.topk(min(count, values.shape[1]), sorted=False).indices)

    def exponential(self, z_CV: Tensor, generator: torch.Generator | None) -> Tensor:
        noise_CW = z_CV.new_empty(len(z_CV), self.size(z_CV)).exponential_(generator=generator)
        return noise_CW[:, self.first : self.first + self.rows]
