"""The six things that losses do with a row of logits, so that the vocabulary may lie on several devices.

V  vocabulary rows of this process     C  rows of logits     K  tokens of a row
"""

from __future__ import annotations

import torch
from torch import Tensor


class Vocabulary:
    """All rows of the table, in this process. Tensor parallelism has a subclass that holds some of them, in which every
    method ends with one number of each row summed over processes (arXiv:1909.08053, section 3)."""

    def softmax_(self, z_CV: Tensor) -> Tensor:
        """Probabilities in place of logits, and the log of the sum of exp of each row, (C,).

        The sum is had from the largest logit and its probability, which is at least 1 / V: two passes for a maximum,
        where `logsumexp` writes all exponentials once more.
        """
        largest_C = z_CV.amax(-1)
        torch.softmax(z_CV, -1, out=z_CV)
        return largest_C - z_CV.amax(-1).log()

    def log_softmax_(self, z_CV: Tensor) -> Tensor:
        """Log-probabilities in place of logits."""
        return torch.log_softmax(z_CV, -1, out=z_CV)

    def gather(self, z_CV: Tensor, ids_CK: Tensor) -> Tensor:
        """The values at some tokens, (C, K)."""
        return z_CV.gather(1, ids_CK)

    def scatter_add_(self, z_CV: Tensor, ids_CK: Tensor, values_CK: Tensor) -> Tensor:
        """Add to the values at some tokens."""
        return z_CV.scatter_add_(1, ids_CK, values_CK)

    def dot(self, weights_CV: Tensor, values_CV: Tensor) -> Tensor:
        """The weighted sum of each row, (C,), without a product in memory."""
        return torch.einsum("cv,cv->c", weights_CV, values_CV)

    def mean(self, z_CV: Tensor) -> Tensor:
        """The mean of each row over the whole vocabulary, (C,)."""
        return z_CV.mean(-1)

    def size(self, z_CV: Tensor) -> int:
        """Rows of the whole vocabulary."""
        return z_CV.shape[1]

    def topk(self, z_CV: Tensor, count: int) -> Tensor:
        """Ids of the largest of each row, (C, count), in any order."""
        return z_CV.topk(min(count, z_CV.shape[1]), sorted=False).indices

    def exponential(self, z_CV: Tensor, generator: torch.Generator | None) -> Tensor:
        """Exponentially distributed numbers, one for each logit; the same for a token wherever its logit lies."""
        return torch.empty_like(z_CV).exponential_(generator=generator)


WHOLE = Vocabulary()
