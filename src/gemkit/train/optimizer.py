"""AdamW over the weights that are trained, with float32 copies of those that are kept in bfloat16.

A bfloat16 weight has 8 bits: a change of less than 1/256 of it is lost. So AdamW sees a float32 *master* of each, which
keeps every change, and the weight is the master rounded. Gradients are added up in float32 too, part by part of a step:
the sum of the parts does not depend on how small they are.

What is not decayed: norms and biases, which are no matrices; embeddings, most rows of which have no gradient in a step;
and the parameters of the RG-LRU, whose zero means a decay of the state and nothing neutral (RecurrentGemma,
arXiv:2404.07839). The clipped derivative of the square root, published with it, is in `ops.recurrence`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from gemkit.errors import ConfigError, TrainingError
from gemkit.train import experiment
from gemkit.train.checkpoint import wide_parts

KIND = "adamw/1"  # what wrote a state; another cannot go on with it
_MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(name: str) -> bool:
    """Whether weight decay pulls a parameter to zero, by its name."""
    return not (name.endswith("bias") or any(part in name for part in ("norm", "embed", "rg_lru")))


def learning_rate(settings: experiment.Optimizer, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0.

    It rises over the steps of warm-up, to the full rate at the last of them. Then: `constant`; `cosine` and `linear`
    fall to the final share at the last step; `rsqrt` falls with the root of the step (arXiv:2106.04560 calls it
    infinite, for it needs no end).
    """
    assert settings.learning_rate is not None
    assert settings.warmup is not None
    warmup = math.ceil(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    through = (step - warmup + 1) / max(steps - warmup, 1)  # 1 at the last step
    match settings.decay:
        case "cosine":
            share = (
                settings.final_lr_share
                + (1 - settings.final_lr_share) * (1 + math.cos(math.pi * min(through, 1.0))) / 2
            )
        case "linear":
            share = settings.final_lr_share + (1 - settings.final_lr_share) * (1 - min(through, 1.0))
        case "rsqrt":
            share = math.sqrt(max(warmup, 1) / (step + 1)) if step else 1.0
        case _:
            share = 1.0
    return settings.learning_rate * share


class Optimizer:
    """AdamW (arXiv:1711.05101) by `torch.optim`, over named parameters.

    Args:
        parameters: what is trained; each takes gradients from now on.
        settings: with nothing left out (`experiment.published`).
        steps: of the whole run, for the schedule.
    """

    def __init__(self, parameters: Mapping[str, Parameter], settings: experiment.Optimizer, steps: int):
        if not parameters:
            raise ConfigError("nothing is trained: every weight is frozen")
        assert settings.betas is not None
        assert settings.eps is not None
        assert settings.weight_decay is not None
        self.settings, self.steps = settings, steps
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        self._hooks = []
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            self.masters[name] = parameter
            if parameter.dtype in (torch.bfloat16, torch.float16):
                self.masters[name] = parameter.detach().float()
                add = _adder(self.masters[name])
                self._hooks.append(parameter.register_post_accumulate_grad_hook(add))
        groups = [
            {"params": [self.masters[n] for n in parameters if decays(n) is decayed], "weight_decay": decay}
            for decayed, decay in ((True, settings.weight_decay), (False, 0.0))
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,  # set at each step
            betas=settings.betas,
            eps=settings.eps,
            fused=True,  # each element by itself: the same bits every time, and no temporaries as large as the model
        )

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter that has one, in float32 or wider."""
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def grad_norm(self) -> float:
        """The length of all gradients as one vector, summed in float64. It is not finite if any of them is not."""
        norms = [part.dot(part).sqrt() for grad in self.gradients().values() for part in wide_parts(grad)]
        return get_total_norm(norms).item()

    @torch.no_grad()
    def step(self, step: int, norm: float) -> float:
        """Change the weights by their gradients, clipped, and forget these; the learning rate."""
        if self.settings.grad_clip and norm > self.settings.grad_clip:
            for grad in self.gradients().values():
                grad.mul_(self.settings.grad_clip / norm)
        now = learning_rate(self.settings, step, self.steps)
        for group in self._adamw.param_groups:
            group["lr"] = now
        self._adamw.step()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        self.zero_grad()
        return now

    def zero_grad(self) -> None:
        """Leave no gradient."""
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is needed to go on: moments, counts of steps, masters. The tensors are those in use."""
        tensors = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                tensors[f"master.{name}"] = master
            for part, value in self._adamw.state.get(master, {}).items():
                tensors[f"{part}.{name}"] = value
        return tensors

    @torch.no_grad()
    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            TrainingError: if it is that of other parameters.
        """
        expected = {f"{part}.{name}" for part in (*_MOMENTS, "step") for name in self.masters}
        expected |= {f"master.{name}" for name, master in self.masters.items() if master is not self.parameters[name]}
        names = {name.partition(".")[2] for name in tensors}  # a parameter that never had a gradient has no moments
        if strange := sorted(set(tensors) - expected):
            raise TrainingError(f"the optimizer's state has {strange[0]}, which is nothing that is trained here")
        for name, master in self.masters.items():
            if name not in names:
                continue
            if (kept := tensors.get(f"master.{name}")) is not None:
                master.copy_(_of_shape(kept, master, name))
            state = {part: tensors[f"{part}.{name}"] for part in (*_MOMENTS, "step") if f"{part}.{name}" in tensors}
            for part in _MOMENTS:
                if part in state:
                    state[part] = _of_shape(state[part], master, name).to(master.device, master.dtype).clone()
            if state:
                self._adamw.state[master] = {**state, "step": state["step"].to(master.device).clone()}


def _adder(master: Tensor):
    """A hook that moves a parameter's gradient to its master's, in float32."""

    def add(parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        parameter.grad = None
        if master.grad is None:
            master.grad = grad.float()
        else:
            master.grad.add_(grad)

    return add


def _of_shape(kept: Tensor, like: Tensor, name: str) -> Tensor:
    if kept.shape != like.shape:
        raise TrainingError(f"{name} is {tuple(like.shape)} here, and {tuple(kept.shape)} in the optimizer's state")
    return kept
