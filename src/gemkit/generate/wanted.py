"""What will be looked at of a row of logits: an executor need not compute the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemkit.generate.sampler import Sampling

# Beyond this many a table is as well read in full.
MOST = 256


@dataclass(frozen=True, eq=False)
class Wanted:
    """The rows of a table that a sampler can keep. The logits of others may be anything that is not larger, such as
    -inf; those that are wanted are exact."""

    best: int  # so many of the best, not counting those of `kept`
    drop: float | None = None  # also all down to so much below the best of them, if this is a number
    # (K,) int64: computed whatever their logits are: rows that a bias or a penalty moves
    kept: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def wanted(sampling: Sampling, history: Sequence[int]) -> Wanted | None:
    """What `sample` looks at with these settings; None: all of it.

    Greedy looks at the best token, top-k at the k best, with whatever filters come after it, and min-p at those within
    a distance of the best. Top-p without top-k and plain temperature weigh every token.
    """
    drop = None
    if not sampling.temperature:
        best = 1
    elif sampling.top_k is not None and sampling.top_k <= MOST:
        best = sampling.top_k
    elif sampling.min_p > 0 and sampling.top_p == 1:
        best, drop = 1, -sampling.temperature * math.log(sampling.min_p)
    else:
        return None
    kept = sampling.biases[0]
    if sampling.repetition_penalty != 1:
        kept = np.concatenate([kept, np.asarray(history, np.int64)])
    return Wanted(best, drop, kept)
