"""What loading did. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemkit.weights.quantize import Rounding


@dataclass
class Report:
    """What loading did."""

    dtype: str = "float32"  # of activations, and of dense weights in torch
    seconds: float = 0.0
    nbytes: int = 0  # of weights, held in memory
    nbytes_read: int = 0  # of the tensors, as stored
    notes: list[str] = field(default_factory=list)  # everything that was changed on the way
    roundings: list[Rounding] = field(default_factory=list)  # what quantizing did, weight by weight
