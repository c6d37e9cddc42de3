"""Loss functions: of the logits of rows, which a model's head computes in chunks, or of log-probabilities.

Those of logits are `ops.ChunkedLoss`: `model(batch, rows=rows, output="loss", loss=...)` computes one, and the logits
of all rows are never there. Each gives a sum, which the trainer divides.

    M  rows that predict something     z  their logits, after the final soft cap     p = softmax(z)
    V  vocabulary rows                 y  the token that came                        w  the weight of a row
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemkit.errors import ConfigError
from gemkit.ops import ChunkedLoss, Vocabulary

# ── of logits ──────────────────────────────────────────────────────────────────────────────────────────────────


def cross_entropy(targets_M: Tensor, weights_M: Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0) -> ChunkedLoss:
    """Next-token cross-entropy, sum of w (-(1 - e) log p_y - e mean log p + c log(Z)^2) over the rows.

    The loss of pretraining and of fine-tuning. Label smoothing e (arXiv:1512.00567, section 7) spreads that share of
    the target evenly over the vocabulary; the z-loss c (PaLM, arXiv:2204.02311, section 5), Z the sum of exp(z), keeps
    logits from drifting. d/dz = w ((1 + 2 c log Z) p - (1 - e) onehot(y) - e / V).

    Its result is the sum, differentiable, and (M, 2): the loss of each row, and -w log p_y of it for metrics.
    """
    if not 0 <= smoothing < 1 or z_loss < 0:
        raise ConfigError(f"smoothing={smoothing} must be in [0, 1) and z_loss={z_loss} not negative")
    ones = torch.ones_like(weights_M)[:, None]
    return ChunkedLoss(_Targets(targets_M[:, None], ones, weights_M, smoothing, z_loss))


def sampled_cross_entropy(ids_MK: Tensor, probs_MK: Tensor, weights_M: Tensor) -> ChunkedLoss:
    """Cross-entropy against a distribution over K tokens of each row, sum of -w sum_k q_k log p_k over the rows.

    Gemma 3 was distilled so (arXiv:2503.19786, section 2.2): 256 tokens of each position drawn by the teacher's
    probabilities, the others' taken as zero, q renormalised (`sample_teacher`). d/dz = w (p sum(q) - q).

    Its result is that of `cross_entropy`.
    """
    return ChunkedLoss(_Targets(ids_MK, probs_MK, weights_M, 0.0, 0.0))


def distillation(
    teacher: Any, y_ME: Tensor, weights_M: Tensor, *, beta: float = 0.0, temperature: float = 1.0
) -> ChunkedLoss:
    """Divergence of a student P from a teacher Q over the whole vocabulary, both of logits divided by a temperature.

    beta = 0: sum of w KL(Q || P), whose gradient is that of -sum Q log P, the loss of Gemma 2 (arXiv:2408.00118,
    section 3.2): they differ by the entropy of the teacher, which is no function of the student. d/dz = w (P - Q) / t.

    beta = 1: the reverse, w KL(P || Q). d/dz_j = w P_j (log P_j - log Q_j - KL(P || Q)) / t.

    Between: the generalised Jensen-Shannon divergence of GKD (arXiv:2306.13649, section 3.1), with the mixture
    A = beta Q + (1 - beta) P: w (beta KL(Q || A) + (1 - beta) KL(P || A)).
    d/dz_j = w (1 - beta) P_j (log P_j - log A_j - KL(P || A)) / t.

    Args:
        teacher: a model with the same vocabulary, whose head reads `y_ME`, its own hidden rows.

    Its result is the sum, differentiable in the student alone, and that of each row, (M,).
    """
    if not 0 <= beta <= 1 or temperature <= 0:
        raise ConfigError(f"beta={beta} must be from 0 to 1 and temperature={temperature} above 0")
    return ChunkedLoss(_Divergence(weights_M, beta, temperature), teacher=(teacher.decoder.lm_head, y_ME.detach()))


def token_logprobs(targets_M: Tensor, *, temperature: float = 1.0, entropy: bool = False) -> ChunkedLoss:
    """log p_y of each row, (M,), of logits divided by a temperature: the log-probabilities of DPO and GRPO.

    Its result is differentiable. With `entropy` (M, 2): beside it the entropy H = -sum p log p of each row,
    differentiable as well.
    d log p_y / dz = (onehot(y) - p) / t, dH/dz_j = -p_j (log p_j + H) / t.
    """
    row = _Logprobs(targets_M, temperature, entropy)
    return ChunkedLoss(row, backward=row.derivative)


@torch.no_grad()
def sample_teacher(
    read: Callable[[ChunkedLoss], Tensor], count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`count` tokens of each row, drawn by the teacher's probabilities without replacement; ids and probabilities
    renormalised over them, (M, count) each.

    Args:
        read: computes a loss of the teacher's logits, such as `partial(rows.loss, teacher)`.

    The draw is of Gumbel's kind: the largest of p / e, where each e is exponentially distributed.
    """
    kept: list[Tensor] = []

    def row(z_CV: Tensor, rows: slice, gradient: bool, vocabulary: Vocabulary, *teacher_CV: Tensor) -> Tensor:
        vocabulary.softmax_(z_CV)
        ids_CK = vocabulary.topk(z_CV / vocabulary.exponential(z_CV, generator), count)
        kept.append(ids_CK)
        return F.normalize(vocabulary.gather(z_CV, ids_CK), p=1, dim=1)

    probs_MK = read(ChunkedLoss(row, backward=lambda _: row))
    return torch.cat(kept), probs_MK


# ── of log-probabilities ────────────────────────────────────────────────────────────────────────────────────────────


def dpo(chosen_B: Tensor, rejected_B: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation (arXiv:2305.18290, equation 7), (B,).

    -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) with d = chosen - rejected. Label smoothing e takes
    preferences to be wrong that often ("conservative" DPO, E. Mitchell's note of 2023).

    Args:
        chosen_B, rejected_B: log pi(answer) - log pi_ref(answer) of both answers, summed over their tokens.
    """
    d_B = beta * (chosen_B - rejected_B)
    return -(1 - smoothing) * F.logsigmoid(d_B) - smoothing * F.logsigmoid(-d_B)


def robust_dpo(chosen_B: Tensor, rejected_B: Tensor, beta: float, smoothing: float) -> Tensor:
    """DPO whose expectation is that of clean preferences, where a share e of them is wrong (arXiv:2403.00409, equation
    10), (B,): (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e). It has no lower bound.

    Args: as for `dpo`.
    """
    d_B = beta * (chosen_B - rejected_B)
    return (smoothing * F.logsigmoid(-d_B) - (1 - smoothing) * F.logsigmoid(d_B)) / (1 - 2 * smoothing)


def ipo(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation (arXiv:2310.12036, equation 17), (B,): (d - 1 / (2 beta))^2.

    Args:
        chosen_B, rejected_B: as for `dpo`, but the mean over the tokens of each answer: a sum would make the target of
            a long answer as near as that of a short one.
    """
    return (chosen_B - rejected_B - 1 / (2 * beta)).square()


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | float = 0.0) -> Tensor:
    """-log P(chosen is preferred) where P = sigmoid(r_chosen - r_rejected - margin), (B,) (Bradley and Terry, 1952;
    as a reward model, arXiv:2203.02155, equation 1)."""
    return -F.logsigmoid(chosen_B - rejected_B - margin_B)


def policy_gradient(
    logprobs_M: Tensor,
    old_M: Tensor,
    reference_M: Tensor | None,
    advantages_M: Tensor,
    *,
    clip: float = 0.2,
    kl: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped loss of each token, with a penalty for leaving a reference (GRPO, arXiv:2402.03300, equation 3).

    -min(r A, clamp(r, 1 - clip, 1 + clip) A) + kl k3, with r = pi / pi_old (PPO, arXiv:1707.06347, equation 7) and
    k3 = pi_ref / pi - log(pi_ref / pi) - 1, an unbiased estimate of KL(pi || pi_ref) that is never negative
    (J. Schulman, "Approximating KL divergence", 2020).

    Args:
        logprobs_M, old_M, reference_M: log-probability of each token drawn: now, when it was drawn, and under the
            reference (None: no penalty).
        advantages_M: how much better its answer was than others to the same prompt.

    Returns:
        loss, k3, and 1 where the clip took the gradient away, (M,) each; the last two carry no gradient.
    """
    ratio_M = torch.exp(logprobs_M - old_M)
    clipped_M = ratio_M.clamp(1 - clip, 1 + clip)
    loss_M = -torch.min(ratio_M * advantages_M, clipped_M * advantages_M)
    k3_M = torch.zeros_like(logprobs_M)
    if reference_M is not None:
        away_M = reference_M - logprobs_M
        k3_M = torch.exp(away_M) - away_M - 1
        loss_M = loss_M + kl * k3_M
    stopped_M = (clipped_M * advantages_M < ratio_M * advantages_M).to(loss_M.dtype)
    return loss_M, k3_M.detach(), stopped_M


def group_advantages(rewards_G: Tensor, *, by_std: bool = True) -> Tensor:
    """Rewards of the answers to one prompt as advantages, (G,): less their mean, and over their standard deviation.

    GRPO (arXiv:2402.03300, section 4.1.2). Without the division: Dr. GRPO (arXiv:2503.20783), which does not weigh up
    prompts whose answers are nearly all right or wrong. Equal rewards give 0, and never 0 / 0.
    """
    centred_G = rewards_G - rewards_G.mean()
    if not by_std or len(rewards_G) < 2:
        return centred_G
    return centred_G / (rewards_G.std() + 1e-4)


# ── rows of logits ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Targets:
    """Cross-entropy against K weighted tokens of a row: (C, 2), the weighted loss and -w sum q log p."""

    def __init__(self, ids_MK: Tensor, probs_MK: Tensor, weights_M: Tensor, smoothing: float, z_loss: float):
        self.ids_MK, self.probs_MK, self.weights_M = ids_MK, probs_MK, weights_M
        self.smoothing, self.z_loss = smoothing, z_loss

    def __call__(
        self, z_CV: Tensor, rows: slice, gradient: bool, vocabulary: Vocabulary, *teacher_CV: Tensor
    ) -> Tensor:
        ids_CK, q_CK, w_C = self.ids_MK[rows], self.probs_MK[rows].to(z_CV.dtype), self.weights_M[rows].to(z_CV.dtype)
        mass_C, e, c = q_CK.sum(-1), self.smoothing, self.z_loss
        mean_C = vocabulary.mean(z_CV) if e else 0.0
        picked_CK = vocabulary.gather(z_CV, ids_CK)
        lse_C = vocabulary.softmax_(z_CV)
        plain_C = (q_CK * (lse_C[:, None] - picked_CK)).sum(-1)
        loss_C = (1 - e) * plain_C + c * lse_C.square()
        if e:
            loss_C = loss_C + e * mass_C * (lse_C - mean_C)
        if gradient:
            slope_C = w_C * (mass_C + 2 * c * lse_C)
            if not bool((slope_C == 1).all()):  # what weighs 1 is most of what is learned, and spared a pass
                z_CV *= slope_C[:, None]
            if e:
                z_CV -= (e * w_C * mass_C / vocabulary.size(z_CV))[:, None]
            vocabulary.scatter_add_(z_CV, ids_CK, -(1 - e) * w_C[:, None] * q_CK)
        return torch.stack([w_C * loss_C, w_C * plain_C], -1)


class _Divergence:
    """A student's row against a teacher's: (C,), weighted."""

    def __init__(self, weights_M: Tensor, beta: float, temperature: float):
        self.weights_M, self.beta, self.temperature = weights_M, beta, temperature

    def __call__(
        self, z_CV: Tensor, rows: slice, gradient: bool, vocabulary: Vocabulary, *teacher_CV: Tensor
    ) -> Tensor:
        log_q_CV = vocabulary.log_softmax_(teacher_CV[0].to(z_CV.dtype).div_(self.temperature))
        beta, w_C = self.beta, self.weights_M[rows].to(z_CV.dtype)
        log_p_CV = vocabulary.log_softmax_(z_CV.div_(self.temperature))
        if beta == 0:
            q_CV = log_q_CV.exp()
            value_C = vocabulary.dot(q_CV, log_q_CV.sub_(log_p_CV))
            if gradient:
                torch.exp(z_CV, out=z_CV).sub_(q_CV).mul_(w_C[:, None] / self.temperature)
            return w_C * value_C
        mixed_CV = log_q_CV if beta == 1 else _log_mixture(log_q_CV, log_p_CV, beta)
        p_CV = log_p_CV.exp()
        value_C = from_p_C = vocabulary.dot(p_CV, log_p_CV - mixed_CV)
        share = 1.0
        if beta < 1:
            share = 1 - beta
            value_C = beta * vocabulary.dot(log_q_CV.exp(), log_q_CV - mixed_CV) + share * from_p_C
        if gradient:
            z_CV.sub_(mixed_CV).sub_(from_p_C[:, None]).mul_(p_CV).mul_(w_C[:, None] * share / self.temperature)
        return w_C * value_C


class _Logprobs:
    """log p of the token that came, and the entropy if asked: (C,) or (C, 2)."""

    def __init__(
        self, targets_M: Tensor, temperature: float, entropy: bool, grads: tuple[Tensor, Tensor | None] | None = None
    ):
        self.targets_M, self.temperature, self.entropy, self.grads = targets_M, temperature, entropy, grads

    def derivative(self, grad_M: Tensor) -> _Logprobs:
        """The function of a row whose gradient is that of all values times `grad_M`."""
        grads = (grad_M[:, 0], grad_M[:, 1]) if self.entropy else (grad_M, None)
        return _Logprobs(self.targets_M, self.temperature, self.entropy, grads)

    def __call__(
        self, z_CV: Tensor, rows: slice, gradient: bool, vocabulary: Vocabulary, *teacher_CV: Tensor
    ) -> Tensor:
        if self.temperature != 1:
            z_CV /= self.temperature
        targets_C1 = self.targets_M[rows, None]
        picked_C = vocabulary.gather(z_CV, targets_C1)[:, 0]
        logits_CV = z_CV.clone() if self.entropy else z_CV
        lse_C = vocabulary.softmax_(z_CV)
        values = [picked_C - lse_C]
        if self.entropy:
            values.append(lse_C - vocabulary.dot(z_CV, logits_CV))
        if gradient:
            assert self.grads is not None
            of_logprob_C = self.grads[0][rows].to(z_CV.dtype)
            slope: Any = -of_logprob_C[:, None]
            if self.grads[1] is not None:
                log_p_CV = logits_CV.sub_(lse_C[:, None])
                slope = slope - log_p_CV.add_(values[1][:, None]).mul_(self.grads[1][rows, None])
            vocabulary.scatter_add_(z_CV.mul_(slope), targets_C1, of_logprob_C[:, None])
            if self.temperature != 1:
                z_CV /= self.temperature
        return torch.stack(values, -1) if self.entropy else values[0]


def _log_mixture(log_q_CV: Tensor, log_p_CV: Tensor, beta: float) -> Tensor:
    """log(beta Q + (1 - beta) P)."""
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=log_q_CV.dtype).log().tolist()
    return torch.logaddexp(log_q_CV + log_beta, log_p_CV + log_rest)
