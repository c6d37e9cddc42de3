"""The ops that act on each token by itself: lookups, projections, norms, gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gemkit.ops.quantized import Quantized
from gemkit.ops.symbolic import dtype_name, op, same

# Rows of a quantized weight are made dense this many elements at a time: 4 MiB of float32, which stays in a cache
# between being written and being multiplied. With a quarter and with four times of it a product of one token took 1.1
# to 2.7 times as long (Q8_0, Q5_0 and Q4_K, 65,536 x 768, two runs on two busy CPU cores).
_DENSE_ELEMENTS = 1 << 20


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is: what is computed in float32 by contract stays exact where gradients are
    checked in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def new_weight(*shape: int) -> Tensor:
    """A weight that waits to be loaded or initialised: zeros (torch's default dtype and device)."""
    return torch.zeros(shape)


def _looked_up(table_VD: Any, run_dtype: torch.dtype | None, **_: Any) -> str:
    if isinstance(table_VD, Quantized):
        return str(run_dtype or torch.float32).removeprefix("torch.")
    return dtype_name(table_VD)


@op(
    lambda tokens_T, table_VD, **_: (*tokens_T.shape, table_VD.shape[1]),
    dtype=_looked_up,
    cost=lambda **_: {"lookup": True},
)
def embed(
    tokens_T: Tensor,
    table_VD: Tensor | Quantized,
    scale: float,
    scale_dtype: str = "run",
    run_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of the table by token id, times `scale`, as (T, D).

    The scale is rounded before it multiplies, as the released embedders do: to the run dtype ("run"), or to bf16
    whatever the run dtype ("bfloat16"). sqrt(3072) is 55.5 in bf16, not 55.43. A dense table has the run dtype;
    `run_dtype` says it for a quantized one (None: float32).
    """
    if isinstance(table_VD, Quantized):
        rows_TD = table_VD.rows(tokens_T).to(run_dtype or torch.float32)
    else:
        rows_TD = F.embedding(tokens_T, table_VD)
    dtype = rows_TD.dtype if scale_dtype == "run" else getattr(torch, scale_dtype)
    return rows_TD * torch.tensor(scale, dtype=dtype).item()


@op(
    lambda x_TI, weight_OI, **_: (*x_TI.shape[:-1], weight_OI.shape[0]),
    cost=lambda weight_OI, **_: {"row_flops": 2 * weight_OI.shape[0] * weight_OI.shape[1]},
)
def linear(x_TI: Tensor, weight_OI: Tensor | Quantized, bias_O: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: (T, in) to (T, out), in the dtype of x.

    A dense weight of another dtype, such as an adapter's that stays float32, is multiplied in its own. A quantized one
    is multiplied in float32, a few rows at a time, and so is its gradient, which only x has.
    """
    if not isinstance(weight_OI, Quantized):
        if weight_OI.dtype == x_TI.dtype:
            return F.linear(x_TI, weight_OI, bias_O)
        y_TO = F.linear(x_TI.to(weight_OI.dtype), weight_OI).to(x_TI.dtype)
    elif torch.is_grad_enabled() and x_TI.requires_grad:
        y_TO = _QuantizedLinear.apply(x_TI, weight_OI)
    else:
        y_TO = _by_pieces(x_TI, weight_OI)
    return y_TO if bias_O is None else y_TO + bias_O


def _by_pieces(x_TI: Tensor, weight_OI: Quantized) -> Tensor:
    x32_TI = x_TI.float()
    # one result for all pieces: small ones kept between the large temporary ones stopped malloc from using the room of
    # these again, and a head of 168 million weights grew by 670 MB
    y_TO = x32_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
    for rows, piece_RI in _pieces(weight_OI):
        torch.mm(x32_TI, piece_RI.T, out=y_TO[:, rows])
    return y_TO.to(x_TI.dtype)


def _pieces(weight_OI: Quantized) -> Iterator[tuple[slice, Tensor]]:
    return weight_OI.pieces(max(1, _DENSE_ELEMENTS // weight_OI.shape[1]))


class _QuantizedLinear(torch.autograd.Function):
    """`_by_pieces` with a gradient that makes each piece dense anew, so that between the two passes nothing is kept:
    neither pieces, which together are the dense weight, nor x, which a frozen weight's gradient does not need."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Quantized) -> Tensor:
        ctx.weight_OI = weight_OI
        return _by_pieces(x_TI, weight_OI)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # of one result
        grad32_TO = grad_TO.float()
        grad_TI = grad32_TO.new_zeros(grad_TO.shape[0], ctx.weight_OI.shape[1])
        for rows, piece_RI in _pieces(ctx.weight_OI):
            grad_TI.addmm_(grad32_TO[:, rows], piece_RI)
        return grad_TI.to(grad_TO.dtype), None


@op(same)
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * (1 + weight)` over the last axis, in float32, cast back at the end (arXiv:1910.07467).

    `1 + weight`: Gemma stores norms around zero. The product with it happens before the cast: casting first, as
    Llama does, gives other bits in bf16.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return _RMSNorm.apply(x, weight_D, eps)  # type: ignore[return-value]
    return _rms_norm(x, weight_D, eps)[0]


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = wide(x)
    inverse_1 = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * inverse_1 * (1.0 + wide(weight_D))).to(x.dtype), inverse_1


class _RMSNorm(torch.autograd.Function):
    """`_rms_norm` with its gradient in a few passes, which keeps x and one number of each row.

    With r = 1 / rms(x), n = r x and g the gradient of n: dx = r (g - n mean(g n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, inverse_1 = _rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, inverse_1)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight_D, inverse_1 = ctx.saved_tensors
        normed, grad32 = wide(x) * inverse_1, wide(grad)
        grad_x = grad_weight_D = None
        if ctx.needs_input_grad[1]:
            grad_weight_D = (grad32 * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            of_normed = grad32 * (1.0 + wide(weight_D))
            along_1 = torch.linalg.vecdot(of_normed, normed)[..., None] / x.shape[-1]
            grad_x = of_normed.addcmul_(normed, along_1, value=-1).mul_(inverse_1).to(x.dtype)
        return grad_x, grad_weight_D, None


@op(same)
def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """`(x - mean) / std * weight + bias` over the last axis, in float32, cast back at the end (arXiv:1607.06450).

    The ordinary one: unlike in `rms_norm` the weight is the factor itself.
    """
    normed = F.layer_norm(wide(x), weight_D.shape, wide(weight_D), wide(bias_D), eps)
    return normed.to(x.dtype)


@op(same)
def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, the one these models were trained with."""
    return F.gelu(x, approximate="tanh")


@op(lambda gate_TF, **_: gate_TF.shape)
def geglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`gelu(gate) * up`."""
    if torch.is_grad_enabled() and (gate_TF.requires_grad or up_TF.requires_grad):
        return _GEGLU.apply(gate_TF, up_TF)  # type: ignore[return-value]
    return gelu(gate_TF) * up_TF


class _GEGLU(torch.autograd.Function):
    """`geglu` with a gradient that computes GELU anew: of the widest arrays of a layer it keeps two, not three."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return gelu(gate_TF).mul_(up_TF)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate_TF, up_TF = ctx.saved_tensors
        grad_up_TF = gelu(gate_TF).mul_(grad_TF)
        return torch.ops.aten.gelu_backward(grad_TF * up_TF, gate_TF, approximate="tanh"), grad_up_TF


@op(same, dtype=lambda **_: "float32")
def softcap(x: Tensor, cap: float) -> Tensor:
    """`cap * tanh(x / cap)` in float32: bounds logits smoothly (Gemma 2 report, arXiv:2408.00118, section 2)."""
    return cap * torch.tanh(wide(x) / cap)


@op(lambda a, **_: a.shape)
def add(a: Tensor, b: Tensor) -> Tensor:
    """The residual sum."""
    return a + b


@op(lambda a, **_: a.shape)
def mul(a: Tensor, b: Tensor) -> Tensor:
    """The elementwise product of two branches."""
    return a * b


@op(same)
def scale(x: Tensor, factor: float) -> Tensor:
    """The product with a number."""
    return x * factor


@op(same, dtype=lambda x, other: dtype_name(other))
def in_dtype_of(x: Tensor, other: Tensor) -> Tensor:
    """x in the dtype of another array: what an adapter adds to it, which stays float32."""
    return x.to(other.dtype)


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, of which only the arguments are kept: the backward computes it again (arXiv:1604.06174)."""
    return checkpoint(function, *args, use_reentrant=False)


@op(same)
def dropout(x: Tensor, rate: float) -> Tensor:
    """Zeros in place of a share of the elements, at random, and the others larger by as much; for training alone."""
    return F.dropout(x, rate)


@op(lambda x_TE, head_dim: (*x_TE.shape[:-1], x_TE.shape[-1] // head_dim, head_dim))
def split_heads(x_TE: Tensor, head_dim: int) -> Tensor:
    """(T, N * H) to (T, N, H), where H is `head_dim`: a shard of a projection has fewer heads, never narrower ones."""
    return x_TE.unflatten(-1, (-1, head_dim))


@op(lambda x_TNH: (*x_TNH.shape[:-2], x_TNH.shape[-2] * x_TNH.shape[-1]))
def merge_heads(x_TNH: Tensor) -> Tensor:
    """(T, N, H) to (T, N * H)."""
    return x_TNH.flatten(-2)


@op(lambda x_TD, rows: (*rows.shape, *x_TD.shape[1:]))
def take_rows(x_TD: Tensor, rows: Tensor) -> Tensor:
    """The rows whose logits are wanted: a prompt of 1000 tokens needs one row of a 256,000-wide head, not 1000."""
    return x_TD.index_select(0, rows)


@op(lambda x_TD, **_: x_TD.shape)
def put_rows(x_TD: Tensor, rows: Tensor, new_ED: Tensor) -> Tensor:
    """`x` with other rows in the places `rows`: image features where their placeholders were embedded."""
    return x_TD.index_copy(0, rows, new_ED.to(x_TD.dtype))


@op(lambda x_TW, **_: x_TW.shape)
def add_positions(x_TW: Tensor, table_PW: Tensor) -> Tensor:
    """The sum of each image's P patches, one image after another, and a vector for each place of a patch: (T, W)."""
    return (x_TW.unflatten(0, (-1, table_PW.shape[0])) + table_PW).flatten(0, 1)


def _patches(pixels_ICSS: Any, weight_WCpp: Any, **_: Any) -> tuple[int | str, ...]:
    images, _channels, height, width = pixels_ICSS.shape
    per_image = (height // weight_WCpp.shape[2]) * (width // weight_WCpp.shape[3])
    return ("T" if isinstance(images, str) else images * per_image), weight_WCpp.shape[0]


def _patch_cost(weight_WCpp: Any, **_: Any) -> dict[str, int]:
    return {"row_flops": 2 * math.prod(weight_WCpp.shape)}


@op(_patches, dtype=lambda weight_WCpp, **_: dtype_name(weight_WCpp), cost=_patch_cost)
def patch_embed(pixels_ICSS: Tensor, weight_WCpp: Tensor, bias_W: Tensor) -> Tensor:
    """A projection of each square patch of each image, patches by rows from the top left: (I * P, W).

    Patches are as large as the weight's last two axes and do not overlap.
    """
    patches_IWYX = F.conv2d(
        pixels_ICSS.to(weight_WCpp.dtype), weight_WCpp, bias_W, stride=(weight_WCpp.shape[2], weight_WCpp.shape[3])
    )
    return patches_IWYX.flatten(2).transpose(1, 2).flatten(0, 1)
