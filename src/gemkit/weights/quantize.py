"""Dense weights to quantized ones, in 8 or 4 bits: each number to the nearest code, or all of a matrix to those codes
that change its outputs least.

    int8    Q8_0: codes from -127 to 127, the scale of 32 of them is their largest magnitude / 127
    int4    Q4_0: codes from -8 to 7, a scale for 32; the up and down projections of the MLP as Q5_0, codes from -16 to
            15; the table, keys and values as int8

All are block types of GGUF files, so what runs those runs these. What stays dense: norms, biases, convolutions, gates
of a recurrence, an image tower, and matrices whose rows do not divide into 32.

Nearest codes are good for int8. In 4 bits the error of an output is a sum over its inputs, and rounding each weight by
itself ignores that an error can be made good by the next weight, as far as their inputs go together. So a text runs
through the model once (`calibrate`), and each matrix is quantized just before it computes, from the inputs that it is
about to see, which already bear the errors of all matrices before it. With H = X^T X of those inputs X_TI, the error of
the outputs is the sum over rows e of (w - q) of e H e^T, and `fitted` makes it small in two steps:

1. Column by column, the error that earlier columns made is carried over to the column that is rounded next. For
   H = U D U^T with U unit upper triangular, q_k = round(w_k + sum over j < k of (w_j - q_j) U_jk) is the best choice
   for a given past. This is OPTQ (arXiv:2210.17323) in the form of LDLQ (QuIP, arXiv:2307.13304, section 3). The scale
   of a group is the one of several that leaves the least error after its 32 columns.
2. Sweeps over all columns: each code in turn to the best one given all others, then each scale likewise (coordinate
   descent, as in QuantEase, arXiv:2309.01885). The error falls in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from gemkit.block_types import KINDS, Kind
from gemkit.errors import ConfigError, WeightsError
from gemkit.nn import Batch, LanguageModel
from gemkit.nn.layers import Embedding, Linear
from gemkit.ops.quantized import Quantized

Weights = Literal["int8", "int4"]
INT8, INT5, INT4 = KINDS["Q8_0"], KINDS["Q5_0"], KINDS["Q4_0"]
GROUP = 32  # of all three

# What int4 gives more bits. Keys and values are few, 6 % of the weights of a layer of Gemma 3 270M, and attention has
# little to even their errors out with. Calibrated 4 bits for all other matrices give a mean KL divergence of 0.061 nats
# from the dense model there (on tests/data/text.txt): 0.022 of it from up, 0.020 from down, 0.012 from gate, 0.006 from
# o, 0.004 from q. A fifth bit for up and down makes 0.026 of it, for gate too 0.013.
_MORE_BITS = {
    "k_proj.weight": INT8,
    "v_proj.weight": INT8,
    "up_proj.weight": INT5,
    "down_proj.weight": INT5,
}
_INTO_NORMS = ("o_proj.weight", "down_proj.weight", "linear_out.weight")  # where the decoder has post norms

_PIECE = 1 << 22  # elements looked at together, where a weight need not be dense as a whole
SEQUENCE = 512  # tokens of a calibration text that see each other
# Added to the diagonal of H, as a share of its mean: a short text must not decide in directions that it hardly has.
_DAMPING = 0.1
_RUN = 4096  # columns at most that share errors: of 16,384, H would be 1 GB and take a minute to factor
_SCALES = (0.8, 0.87, 0.94, 1.0, 1.06)  # tried for each group, as shares of the one that reaches its largest weight
_SWEEPS = 2  # after the second, further ones gain less than 1 % of the error


@dataclass(frozen=True)
class Rounding:
    """What quantizing one weight did."""

    name: str
    kind: str
    error: float  # root mean square of the change over that of the weight
    nbytes_before: int
    nbytes: int


def check(weights: str | None) -> None:
    """Raises: ConfigError, for what is neither "int8", "int4" nor None."""
    if weights not in (None, "int8", "int4"):
        raise ConfigError(f"weights={weights!r} is not one of int8, int4, or None to keep them as they are")


def kind_of(decoder: LanguageModel, name: str, weights: Weights) -> Kind | None:
    """What a weight becomes by its name; None: it stays dense."""
    owner = dict(_owners(decoder)).get(name)
    if owner is None or owner.weight.shape[1] % GROUP:
        return None
    if weights == "int8" or isinstance(owner, Embedding):
        return INT8
    return _MORE_BITS.get(".".join(name.split(".")[-2:]), INT4)


def _owners(model: LanguageModel) -> Iterator[tuple[str, Linear | Embedding]]:
    """Every matrix that the decoder multiplies by, or looks up in, by its name; the tied head is not repeated."""
    for name, module in model.decoder.named_modules(prefix=model.decoder_path):
        if isinstance(module, Linear | Embedding):
            yield f"{name}.weight", module


def is_as_small(kind: Kind, target: Kind) -> bool:
    """Whether a stored block type has no more bits than what it would become, so that keeping it loses nothing."""
    return sum(kind.bits) <= sum(target.bits)


def undivided(decoder: LanguageModel) -> list[str]:
    """Names of the matrices that would be quantized, but for their width."""
    return [name for name, owner in _owners(decoder) if owner.weight.shape[1] % GROUP]


def dense(weight: Tensor | Quantized) -> Tensor:
    return weight.dequantize() if isinstance(weight, Quantized) else weight


def rounding(name: str, before: Tensor | Quantized, after: Quantized) -> Rounding:
    """What was done to a weight."""
    changed, whole = 0.0, 0.0
    rows, columns = after.shape
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        piece = before.narrow_rows(start, count) if isinstance(before, Quantized) else before[start : start + count]
        piece = dense(piece).float()
        changed += (after.narrow_rows(start, count).dequantize() - piece).square().sum().item()
        whole += piece.square().sum().item()
    error = (changed / whole) ** 0.5 if whole else 0.0
    return Rounding(name, after.kind.name, error, before.nbytes, after.nbytes)


# ── each number by itself ───────────────────────────────────────────────────────────────────────────────────────────


def nearest(weight_OI: Tensor, kind: Kind, name: str = "the weight") -> Quantized:
    """The weight with each number rounded to the nearest code: bit for bit what the gguf package's quantizers write.

    Args:
        kind: `INT8`, `INT5` or `INT4`.
        name: for messages.

    Raises:
        WeightsError: if a number is not finite, or too large for a float16 scale.
    """
    rows, columns = weight_OI.shape
    quantized = Quantized.empty(kind, (rows, columns))
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        piece = weight_OI[start : start + step].float().unflatten(-1, (-1, GROUP))
        codes, scales = _nearest_int8(piece) if kind is INT8 else _nearest_from_zero(piece, kind)
        _fill(quantized.narrow_rows(start, len(piece)), codes.flatten(-2), scales, name)
    return quantized


def _nearest_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of (..., 32) numbers. Halves are rounded away from zero, as in C."""
    scales = groups.abs().amax(-1, keepdim=True) / 127
    scaled = groups * _inverse(scales)
    return torch.trunc(scaled + 0.5 * scaled.sign()), scales.squeeze(-1)


def _nearest_from_zero(groups: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes from -`zero`, which is that of the number of largest magnitude, whatever its sign."""
    scales = _extreme(groups, -1) / -kind.zero
    codes = (groups * _inverse(scales) + (kind.zero + 0.5)).floor().clamp(0, 2 * kind.zero - 1) - kind.zero
    return codes, scales.squeeze(-1)


def _extreme(x: Tensor, axis: int) -> Tensor:
    """The number of largest magnitude along an axis, which stays, of size 1."""
    return x.gather(axis, x.abs().argmax(axis, keepdim=True))


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 for scales that float16 cannot tell from 0."""
    return torch.where(scales.half() == 0, 0.0, 1 / scales)


def _fill(quantized: Quantized, codes_OI: Tensor, scales_OG: Tensor, name: str) -> None:
    """Write codes (whole float32 numbers around 0) and scales into planes."""
    if not scales_OG.half().isfinite().all():
        raise WeightsError(f"{name} cannot be quantized: it has numbers that are not finite, or beyond float16 scales")
    quantized.planes["scales"].copy_(scales_OG)
    if quantized.kind is INT8:
        quantized.planes["codes"].copy_(codes_OI)
        return
    from_0_OI = (codes_OI + quantized.kind.zero).to(torch.uint8)
    low, high = (from_0_OI & 15).unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)
    quantized.planes["codes"].copy_((low | high << 4).flatten(-2))
    if "high" in quantized.planes:
        shifts_81 = torch.arange(8, dtype=torch.uint8)[:, None]
        bits = (from_0_OI >> 4).unflatten(-1, (-1, 8, GROUP // 8)) << shifts_81
        quantized.planes["high"].copy_(bits.sum(-2, dtype=torch.uint8).flatten(-2))


# ── all of a matrix together ────────────────────────────────────────────────────────────────────────────────────────


def fitted(weight_OI: Tensor, moments: Sequence[Tensor], kind: Kind = INT4, name: str = "the weight") -> Quantized:
    """The weight with the codes and scales that change its outputs least.

    Args:
        weight_OI: a dense weight.
        kind: `INT5` or `INT4`.
        moments: H of its inputs for each run of `_RUN` columns (see `second_moments`).
        name: for messages.

    Raises:
        WeightsError: if a number of it is not finite, or too large for a float16 scale.
    """
    rows, columns = weight_OI.shape
    quantized = Quantized.empty(kind, (rows, columns))
    codes, scales = [], []
    for run_OI, h_II in zip(weight_OI.float().split(_RUN, -1), moments, strict=True):
        # columns first from here on: what is done to a column of all rows is then done to memory in one piece
        w_IO = run_OI.T.contiguous()
        codes_IO, scales_GO = _carry(w_IO, h_II, kind.zero)
        for _ in range(_SWEEPS):
            _sweep(w_IO, h_II, codes_IO, scales_GO, kind.zero)
        codes.append(codes_IO.T)
        scales.append(scales_GO.T)
    _fill(quantized, torch.cat(codes, -1), torch.cat(scales, -1), name)
    return quantized


def second_moments(x_TI: Tensor, y_TO: Tensor | None = None) -> list[Tensor]:
    """H = X^T X of inputs, damped, for each run of `_RUN` columns.

    Args:
        y_TO: the outputs, where a norm follows. It divides each token's error by the size of its output, so each
            token counts by the inverse square of that; otherwise a few tokens with outputs a hundred times as large as
            all others, such as `<bos>`, would decide alone.

    Raises:
        WeightsError: if the inputs are not finite.
    """
    moments = []
    x_TI = x_TI.float()
    if y_TO is not None:
        x_TI = x_TI * torch.rsqrt(y_TO.float().square().mean(-1, keepdim=True) + 1e-12)
    for run_TI in x_TI.split(_RUN, -1):
        h_II = run_TI.T @ run_TI
        mean = h_II.diagonal().mean().item()
        if not 0 <= mean < float("inf"):
            raise WeightsError("the activations of the calibration text are not finite: the weights are damaged")
        h_II.diagonal().add_(_DAMPING * mean if mean else 1.0)
        moments.append(h_II)
    return moments


def _factor(h_II: Tensor) -> tuple[Tensor, Tensor]:
    """Unit upper triangular U and diagonal D with H = U D U^T: Cholesky's factor, from the last column on."""
    # float64: neighbours in H differ by six orders of magnitude, and a float32 pivot may come out negative
    lower = torch.linalg.cholesky(h_II.double().flip(0, 1)).flip(0, 1)
    diagonal = lower.diagonal()
    return (lower / diagonal).float(), diagonal.square().float()


def _carry(w_IO: Tensor, h_II: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Step 1 of the module's docstring: codes (I, O) and scales (I / 32, O)."""
    u_II, d_I = _factor(h_II)
    columns, rows = w_IO.shape
    codes_IO, scales_GO = torch.empty_like(w_IO), w_IO.new_empty(columns // GROUP, rows)
    errors_IO = torch.zeros_like(w_IO)
    shares_C1 = torch.tensor(_SCALES)[:, None]
    every_row = torch.arange(rows)
    for start in range(0, columns, GROUP):
        here = slice(start, start + GROUP)
        wanted_IO = w_IO[here] + u_II[:start, here].T @ errors_IO[:start]
        within_II = u_II[here, here]
        # C candidates for the scale, as float16 stores them, are carried through the whole group
        scales_CO = (_extreme(wanted_IO, 0) / -zero * shares_C1).half().float()
        inverse_CO = _inverse(scales_CO)
        loss_CO = torch.zeros_like(scales_CO)
        codes_ICO, errors_ICO = (scales_CO.new_empty(GROUP, *scales_CO.shape) for _ in range(2))
        for k in range(GROUP):
            carried_CO = (within_II[:k, k] @ errors_ICO[:k].flatten(1)).view_as(scales_CO)
            target_CO = wanted_IO[k] + carried_CO
            codes_ICO[k] = (target_CO * inverse_CO).round().clamp(-zero, zero - 1)
            values_CO = codes_ICO[k] * scales_CO
            loss_CO += d_I[start + k] * (target_CO - values_CO).square()
            errors_ICO[k] = w_IO[start + k] - values_CO
        best_O = loss_CO.argmin(0)
        codes_IO[here] = codes_ICO[:, best_O, every_row]
        errors_IO[here] = errors_ICO[:, best_O, every_row]
        scales_GO[start // GROUP] = scales_CO[best_O, every_row]
    return codes_IO, scales_GO


def _sweep(w_IO: Tensor, h_II: Tensor, codes_IO: Tensor, scales_GO: Tensor, zero: int) -> None:
    """Step 2 of the module's docstring, once over all columns, in place."""
    values_IO = (codes_IO.unflatten(0, (-1, GROUP)) * scales_GO[:, None]).flatten(0, 1)
    slope_IO = h_II @ (w_IO - values_IO)  # minus half of the loss's gradient
    for group, start in enumerate(range(0, len(w_IO), GROUP)):
        here = slice(start, start + GROUP)
        within_II, codes, slope = h_II[here, here], codes_IO[here], slope_IO[here].clone()
        scale_O = scales_GO[group]
        inverse_O = _inverse(scale_O)
        for k in range(GROUP):
            better_O = (codes[k] + slope[k] / within_II[k, k] * inverse_O).round().clamp(-zero, zero - 1)
            slope -= within_II[k][:, None] * ((better_O - codes[k]) * scale_O)
            codes[k] = better_O
        curvature_O = (codes * (within_II @ codes)).sum(0)
        step_O = torch.where(curvature_O > 0, (codes * slope).sum(0) / curvature_O, 0.0)
        scales_GO[group] = (scale_O + step_O).half().float()
        changed_IO = codes * scales_GO[group] - values_IO[here]
        slope_IO -= h_II[:, here] @ changed_IO


# ── a text through the model ────────────────────────────────────────────────────────────────────────────────────────


def calibration_text() -> str:
    """Our own text for calibration: prose, talk, code and tables, in English, and a little of some 25 languages."""
    return (Path(__file__).parent / "calibration.txt").read_text(encoding="utf-8")


def calibrate(
    decoder: LanguageModel,
    kinds: Mapping[str, Kind],
    take: Callable[[str], Tensor | Quantized],
    bos: int,
    ids: Sequence[int],
) -> list[Rounding]:
    """Quantize linears while a text runs through the decoder once.

    Each is dense only from being taken to being quantized, so that no second model is ever in memory.

    Args:
        decoder: with all its other weights in place.
        kinds: `INT5` or `INT4`, by the weight's name.
        take: a weight by its name; called once for each.
        bos: begins each sequence.
        ids: of the text.

    Returns:
        What was done to each.

    Raises:
        ConfigError: if the text is empty.
        WeightsError: if weights, or what is computed from them, are not finite.
    """
    if not ids:
        raise ConfigError("the calibration text is empty")
    roundings: list[Rounding] = []
    inputs: Tensor | None = None
    moments: list[Tensor] = []

    def before_it_computes(name: str) -> Callable[[Module, tuple[Tensor]], None]:
        def quantize(linear: Module, inputs_of_it: tuple[Tensor]) -> None:
            nonlocal inputs, moments
            (x_TI,) = inputs_of_it
            before = take(name)
            if inputs is not x_TI:  # gate and up see the same
                normed = decoder.config.post_norms and name.endswith(_INTO_NORMS)
                y_TO = x_TI.float() @ dense(before).float().T.to(x_TI.device) if normed else None
                inputs, moments = x_TI, [h_II.cpu() for h_II in second_moments(x_TI, y_TO)]
            after = fitted(dense(before), moments, kinds[name], name)
            roundings.append(rounding(name, before, after))
            decoder.set_param(name, after.to(x_TI.device))

        return quantize

    hooks = [
        decoder.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(before_it_computes(name))
        for name in kinds
    ]
    try:
        with torch.no_grad():  # not inference_mode, whose tensors nothing could ever be trained around
            sequences = [[bos, *ids[start : start + SEQUENCE]] for start in range(0, len(ids), SEQUENCE)]
            device = decoder.device
            decoder(Batch.of(sequences, device=device), None, torch.tensor([0], device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return roundings
