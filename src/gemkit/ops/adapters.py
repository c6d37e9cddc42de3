"""The ops of adapters that do more than add a low-rank product: DoRA's magnitudes, and rows of a table of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemkit.ops.basic import wide
from gemkit.ops.quantized import Quantized
from gemkit.ops.symbolic import op

_PIECE_ELEMENTS = 1 << 20  # of a weight, made float32 at a time


@op(lambda y_TO, **_: y_TO.shape)
def dora(
    y_TO: Tensor,
    low_TO: Tensor,
    magnitude_O: Tensor,
    changed: tuple[Tensor | Quantized, Tensor, Tensor],
    factor: float,
    bias_O: Tensor | None = None,
    strength: float = 1.0,
    base_TO: Tensor | None = None,
    of_table: bool = False,
) -> Tensor:
    """A product and its low-rank change, by channel times the gain of DoRA: `gain (y - bias + low) + bias`, cast back
    to y's dtype (arXiv:2402.09353).

    Args:
        changed: W, A and B of `dora_gain`. They are operands of a constant, and no call has to read them anew.
        strength: the share of the way from y that is gone.
        base_TO: in place of `y - bias`, the product of the inputs that dropout has left.
        of_table: of an embedding, as in `dora_gain`.
    """
    gain_O = dora_gain(magnitude_O, *changed, factor, of_table)
    base32_TO = wide(y_TO if base_TO is None else base_TO)
    if base_TO is None and bias_O is not None:
        base32_TO = base32_TO - wide(bias_O)
    step_TO = gain_O * (base32_TO + wide(low_TO)) - base32_TO
    return (wide(y_TO) + strength * step_TO).to(y_TO.dtype)


def dora_gain(
    magnitude_O: Tensor, weight: Tensor | Quantized, a: Tensor, b_OR: Tensor, factor: float, of_table: bool = False
) -> Tensor:
    """DoRA's magnitude divided by the length of the changed weight's rows, `m / |W + factor B A|`: (O,).

    The length counts as a constant: no gradient runs through it (section 4.3).

    Args:
        weight, a: (O, I) and (R, I).
        of_table: they are (V, O) and (V, R), of an embedding, and the length is that of the columns.
    """
    left, right = (a, b_OR.T) if of_table else (b_OR, a)
    with torch.no_grad():
        squares_O = torch.zeros_like(wide(magnitude_O))
        for rows, piece in _pieces(weight):
            square = torch.addmm(piece, wide(left[rows]), wide(right), alpha=factor).square_()
            if of_table:
                squares_O += square.sum(0)
            else:
                squares_O[rows] = square.sum(1)
    return wide(magnitude_O) / squares_O.sqrt()


def _pieces(weight: Tensor | Quantized) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight at a time, in float32, and which they are."""
    step = max(1, _PIECE_ELEMENTS // weight.shape[1])
    if isinstance(weight, Quantized):
        yield from weight.pieces(step)
    else:
        for start in range(0, weight.shape[0], step):
            part = slice(start, min(weight.shape[0], start + step))
            yield part, wide(weight.detach()[part])


@op(lambda x_TD, **_: x_TD.shape)
def replace_rows(
    x_TD: Tensor,
    tokens_T: Tensor,
    ids: tuple[int, ...],
    rows_ND: Tensor,
    scale: float,
    scale_dtype: str,
    strength: float,
) -> Tensor:
    """Embeddings with other rows, scaled as `embed` scales its own, in the places of some tokens.

    Args:
        ids: of those tokens, ascending.
        strength: the share of the way from x to them.
    """
    ids_N = torch.tensor(ids, device=tokens_T.device)
    at_T = torch.searchsorted(ids_N, tokens_T).clamp_(max=len(ids) - 1)
    dtype = x_TD.dtype if scale_dtype == "run" else getattr(torch, scale_dtype)
    new_TD = rows_ND[at_T].to(x_TD.dtype) * torch.tensor(scale, dtype=dtype).item()
    return torch.where((ids_N[at_T] == tokens_T)[:, None], torch.lerp(x_TD, new_TD, strength), x_TD)


@op(lambda y_TV, **_: y_TV.shape)
def replace_columns(y_TV: Tensor, new_TN: Tensor, ids: tuple[int, ...], strength: float) -> Tensor:
    """Logits with others in the columns `ids`, or a share `strength` of the way to them."""
    ids_N = torch.tensor(ids, device=y_TV.device)
    return y_TV.index_copy(1, ids_N, torch.lerp(y_TV[:, ids_N], new_TN.to(y_TV.dtype), strength))
