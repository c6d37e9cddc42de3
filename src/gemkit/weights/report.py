"""What loading did. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What loading did."""

    dtype: str = "float32"  # of activations, and of dense weights in torch
    seconds: float = 0.0
    nbytes: int = 0  # of weights, held in memory
    notes: list[str] = field(default_factory=list)  # everything that was changed on the way
