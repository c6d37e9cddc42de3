"""Rotary position embedding (arXiv:2104.09864), half-split pairing: dimension i turns with dimension i + R/2."""

from __future__ import annotations

import torch
from torch import Tensor

from gemkit.ops.basic import wide
from gemkit.ops.symbolic import op

Ramp = tuple[float, float]  # (low, high) of the numbers of dimension pairs


@op(lambda positions_T, rotated, **_: [(*positions_T.shape, rotated // 2)] * 2, dtype=lambda **_: "float32")
def rope_table(
    positions_T: Tensor, rotated: int, base: float, factor: float = 1.0, ramp: Ramp | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, float32 (T, R/2) each, of R = `rotated` dimensions.

    Positions are integers and angles are float32: in bf16 the positions 8190 and 8191 are the same number.
    """
    angles_TR = positions_T[:, None].float() * rope_frequencies(rotated, base, factor, ramp, positions_T.device)
    return angles_TR.cos(), angles_TR.sin()


def rope_frequencies(
    rotated: int,
    base: float,
    factor: float = 1.0,
    ramp: Ramp | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Radians that each pair turns by a position, `base ** (-2i / R) / factor`: float32 (R/2,).

    Args:
        ramp: pairs up to the first number are not divided by `factor`, those from the second on are, and between them
            the two frequencies are mixed linearly (YaRN, arXiv:2309.00071). None: all are divided.
    """
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
    rates = base**-exponents
    if ramp is None:
        return rates / factor
    low, high = ramp
    pairs = torch.arange(rotated // 2, dtype=torch.float32, device=device)
    share = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return rates * (1 - share) + rates / factor * share


@op(lambda x_TNH, table: x_TNH.shape)
def rope(x_TNH: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first R dimensions of every head by its token's angles, in float32; the rest passes unchanged."""
    cos_TR, sin_TR = (part[:, None, :] for part in table)
    half = cos_TR.shape[-1]
    first, second, rest = wide(x_TNH).split((half, half, x_TNH.shape[-1] - 2 * half), dim=-1)
    rotated = (first * cos_TR - second * sin_TR, second * cos_TR + first * sin_TR, rest)
    return torch.cat(rotated, dim=-1).to(x_TNH.dtype)
